"""Stochastic gradient estimators for PyTorch: swap one line, measure what it costs."""

from gradlab import rules as rules
from gradlab.baselines import Baseline, Constant, Learned, LeaveOneOut, MovingAverage
from gradlab.bernoulli import BernoulliAfterLinear
from gradlab.count_laws import (
    BetaBinomial,
    Cliques,
    CompoundPoisson,
    Delta,
    DirichletMultinomial,
    MeanNegativeBinomial,
    Skellam,
    ZeroInflatedPoisson,
)
from gradlab.coupled import ARM, DisARM, MeasureValued
from gradlab.diagnostics import Comparison, Row, compare, replicate
from gradlab.distributions import Logistic, TruncatedNormal
from gradlab.estimator import AfterLinear, Cost, Estimator, Sampler, Traits
from gradlab.exact import Enumerate, LocalExpectation, SumAndSample, UnorderedSet
from gradlab.families import (
    AsymmetricLaplace,
    InverseGaussian,
    NormalInverseGaussian,
    SymmetricStable,
    VarianceGamma,
)
from gradlab.generalized import GeneralizedReparameterization, RejectionReparameterization, standardize
from gradlab.gumbel import concrete_log_prob, conditional_gumbels, gumbel
from gradlab.multisample import IWAE, VIMCO, DReG, LogLikelihood, log_likelihood
from gradlab.paths import Path, has_path, register_path
from gradlab.pathwise import ImplicitReparameterization, Reparameterization
from gradlab.problems import PROBLEMS, Problem, problem
from gradlab.quadrature import Quadrature
from gradlab.rebar import LAX, REBAR, RELAX, DoubleControlVariate
from gradlab.relaxations import (
    Schedule,
    constant_temperature,
    exponential_annealing,
    huber,
    inverse_time_annealing,
    smooth_l1,
    smooth_max,
    soft_max_value,
    softargmax,
    softmax,
    softplus,
    st_argmax,
    stop_gradient,
)
from gradlab.relaxed import GumbelRao, GumbelSoftmax, ReinMax, StraightThrough
from gradlab.samplers import (
    gumbel_max,
    gumbel_rao,
    gumbel_softmax,
    gumbel_top_k,
    implicit,
    inverse_cdf,
    reinmax,
    rsample,
    straight_through,
)
from gradlab.score import ControlVariate, MuProp, ScoreFunction
from gradlab.stochastic_backprop import StochasticBackprop
from gradlab.subsampled import AdaptiveLocalExpectation, TaylorLocalExpectation
from gradlab.surrogate import attach, descend, magic_box, zero
from gradlab.svi import (
    BernoulliLikelihood,
    ExpectationMaximization,
    LikelihoodAfterLinear,
    NegativeELBO,
    expectation_maximization,
)
from gradlab.training import Fitted, fit

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "IWAE",
    "LAX",
    "PROBLEMS",
    "REBAR",
    "RELAX",
    "VIMCO",
    "AdaptiveLocalExpectation",
    "AfterLinear",
    "AsymmetricLaplace",
    "Baseline",
    "BernoulliAfterLinear",
    "BernoulliLikelihood",
    "BetaBinomial",
    "Cliques",
    "Comparison",
    "CompoundPoisson",
    "Constant",
    "ControlVariate",
    "Cost",
    "DReG",
    "Delta",
    "DirichletMultinomial",
    "DisARM",
    "DoubleControlVariate",
    "Enumerate",
    "Estimator",
    "ExpectationMaximization",
    "Fitted",
    "GeneralizedReparameterization",
    "GumbelRao",
    "GumbelSoftmax",
    "ImplicitReparameterization",
    "InverseGaussian",
    "Learned",
    "LeaveOneOut",
    "LikelihoodAfterLinear",
    "LocalExpectation",
    "LogLikelihood",
    "Logistic",
    "MeanNegativeBinomial",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "NegativeELBO",
    "NormalInverseGaussian",
    "Path",
    "Problem",
    "Quadrature",
    "ReinMax",
    "RejectionReparameterization",
    "Reparameterization",
    "Row",
    "Sampler",
    "Schedule",
    "ScoreFunction",
    "Skellam",
    "StochasticBackprop",
    "StraightThrough",
    "SumAndSample",
    "SymmetricStable",
    "TaylorLocalExpectation",
    "Traits",
    "TruncatedNormal",
    "UnorderedSet",
    "VarianceGamma",
    "ZeroInflatedPoisson",
    "attach",
    "compare",
    "concrete_log_prob",
    "conditional_gumbels",
    "constant_temperature",
    "descend",
    "expectation_maximization",
    "exponential_annealing",
    "fit",
    "gumbel",
    "gumbel_max",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_top_k",
    "has_path",
    "huber",
    "implicit",
    "inverse_cdf",
    "inverse_time_annealing",
    "log_likelihood",
    "magic_box",
    "problem",
    "register_path",
    "reinmax",
    "replicate",
    "rsample",
    "smooth_l1",
    "smooth_max",
    "soft_max_value",
    "softargmax",
    "softmax",
    "softplus",
    "st_argmax",
    "standardize",
    "stop_gradient",
    "straight_through",
    "zero",
]
