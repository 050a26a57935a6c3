"""Estimators and models by name, as the ``gradlab`` command knows them."""

from __future__ import annotations

from collections.abc import Callable

from gradlab.baselines import LeaveOneOut, MovingAverage
from gradlab.coupled import ARM, DisARM, MeasureValued
from gradlab.estimator import Estimator
from gradlab.exact import Enumerate, LocalExpectation, SumAndSample, UnorderedSet
from gradlab.generalized import GeneralizedReparameterization, RejectionReparameterization
from gradlab.pathwise import ImplicitReparameterization, Reparameterization
from gradlab.rebar import REBAR, DoubleControlVariate
from gradlab.relaxed import GumbelRao, GumbelSoftmax, ReinMax, StraightThrough
from gradlab.score import MuProp, ScoreFunction
from gradlab.stochastic_backprop import StochasticBackprop
from gradlab.subsampled import AdaptiveLocalExpectation, TaylorLocalExpectation

__all__ = ["ESTIMATORS", "MODELS", "TRAINABLE"]

ESTIMATORS: dict[str, Callable[[int], Estimator]] = {
    "score": lambda s: ScoreFunction(s),
    "score-average": lambda s: ScoreFunction(s, MovingAverage()),
    "score-loo": lambda s: ScoreFunction(max(s, 2), LeaveOneOut()),
    "muprop": lambda s: MuProp(s),
    "reparameterization": lambda s: Reparameterization(s),
    "implicit": lambda s: ImplicitReparameterization(s),
    "g-rep": lambda s: GeneralizedReparameterization(num_samples=s),
    "rsvi": lambda s: RejectionReparameterization(s),
    "gumbel-softmax": lambda s: GumbelSoftmax(s, temperature=0.5),
    "st-gumbel-softmax": lambda s: GumbelSoftmax(s, temperature=0.5, hard=True),
    "straight-through": lambda s: StraightThrough(s),
    "gumbel-rao": lambda s: GumbelRao(s, temperature=0.5),
    "reinmax": lambda s: ReinMax(s),
    "rebar": lambda s: REBAR(s),
    "double-cv": lambda s: DoubleControlVariate(max(s, 2)),
    "arm": lambda s: ARM(s),
    "disarm": lambda s: DisARM(s),
    "measure-valued": lambda s: MeasureValued(s),
    "local-expectation": lambda s: LocalExpectation(s),
    "taylor-local-expectation": lambda s: TaylorLocalExpectation(s),
    "adaptive-local-expectation": lambda s: AdaptiveLocalExpectation(s),
    "sum-and-sample": lambda s: SumAndSample(top=2, num_samples=s),
    "unordered-set": lambda s: UnorderedSet(min(max(s, 2), 10)),
    "stochastic-backprop": lambda s: StochasticBackprop(s),
    "enumerate": lambda s: Enumerate(),
}
"""Each makes the estimator of S samples."""

MODELS = ("one-layer-sbn", "two-layer-sbn", "bernoulli-vae", "one-layer-categorical", "categorical-vae")
"""What ``gradlab train`` can train; :mod:`gradlab.experiments.models` builds them."""

TRAINABLE = (
    "score-loo", "gumbel-softmax", "st-gumbel-softmax", "straight-through", "gumbel-rao", "reinmax", "rebar", "relax",
    "disarm", "local-expectation",
)  # fmt: skip
"""With what it can train them."""
