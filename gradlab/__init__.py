"""Stochastic gradient estimators for PyTorch: swap one line, measure what it costs."""

from gradlab.baselines import Baseline, Constant, Learned, LeaveOneOut, MovingAverage
from gradlab.diagnostics import Comparison, Row, compare, replicate
from gradlab.distributions import Logistic, TruncatedNormal
from gradlab.estimator import Cost, Estimator, Sampler, Traits
from gradlab.exact import Enumerate, Quadrature
from gradlab.generalized import GeneralizedReparameterization, RejectionReparameterization, standardize
from gradlab.paths import Path, has_path, register_path
from gradlab.pathwise import ImplicitReparameterization, Reparameterization
from gradlab.problems import PROBLEMS, Problem, problem
from gradlab.samplers import implicit, inverse_cdf, rsample
from gradlab.score import ControlVariate, MuProp, ScoreFunction
from gradlab.surrogate import attach, descend, magic_box, zero

__version__ = "0.1.0"

__all__ = [
    "PROBLEMS",
    "Baseline",
    "Comparison",
    "Constant",
    "ControlVariate",
    "Cost",
    "Enumerate",
    "Estimator",
    "GeneralizedReparameterization",
    "ImplicitReparameterization",
    "Learned",
    "LeaveOneOut",
    "Logistic",
    "MovingAverage",
    "MuProp",
    "Path",
    "Problem",
    "Quadrature",
    "RejectionReparameterization",
    "Reparameterization",
    "Row",
    "Sampler",
    "ScoreFunction",
    "Traits",
    "TruncatedNormal",
    "attach",
    "compare",
    "descend",
    "has_path",
    "implicit",
    "inverse_cdf",
    "magic_box",
    "problem",
    "register_path",
    "replicate",
    "rsample",
    "standardize",
    "zero",
]
