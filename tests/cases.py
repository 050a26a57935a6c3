"""Every estimator x every problem that it can serve: the inputs of the property tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import gradlab as gl
from gradlab.cli import serves
from gradlab.distributions import has_mean, number_of_factors
from gradlab.flips import values_of


@dataclass(frozen=True)
class Case:
    """An estimator to be tested; ``make(problem)`` builds it."""

    name: str
    make: Callable[[gl.Problem], gl.Estimator]


class Critic(torch.nn.Module):
    """A smooth function of a sample of any shape, periodic so that it is smooth on a circle too."""

    def __init__(self, dims: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.7, 0.3]))
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.weight[0] * torch.sin(x) + self.weight[1] * torch.cos(x)
        return value.flatten(value.ndim - self.dims).sum(-1) if self.dims else value


def _critic(problem: gl.Problem) -> Critic:
    return Critic(len(problem.q().event_shape)).to(problem.t.device)


def _linear_control(problem: gl.Problem, **kwargs: object) -> gl.ControlVariate:
    """The control variate "sum of z over the event dims", whose mean torch knows."""
    dims = tuple(range(-len(problem.q().event_shape), 0))

    def total(z: torch.Tensor) -> torch.Tensor:
        return z.sum(dims) if dims else z

    return gl.ControlVariate(total, lambda q: total(q.mean), **kwargs)


def taught(problem: gl.Problem) -> gl.AdaptiveLocalExpectation:
    """In the middle of learning."""
    estimator, q = gl.AdaptiveLocalExpectation(1, flips=2), problem.q()
    if not estimator.supports(q):
        return estimator
    d, size = number_of_factors(q), len(values_of(q))
    cells = torch.arange(d * size * (size - 1), dtype=problem.t.dtype, device=problem.t.device)
    cells = cells.reshape(d, size, size - 1)
    estimator.count, estimator.total, estimator.square = cells % 5, cells % 5 * torch.cos(cells), 2 * (cells % 5)
    return estimator


CASES = [
    Case("score", lambda p: gl.ScoreFunction(1)),
    Case("score, constant", lambda p: gl.ScoreFunction(2, baseline=0.3)),
    Case("score, leave-one-out", lambda p: gl.ScoreFunction(3, gl.LeaveOneOut())),
    Case("score, moving average", lambda p: gl.ScoreFunction(2, gl.MovingAverage())),
    Case("control variate", lambda p: _linear_control(p)),
    Case("control variate, 0.4", lambda p: _linear_control(p, coefficient=0.4, num_samples=2)),
    Case("control variate, optimal", lambda p: _linear_control(p, coefficient="optimal", num_samples=8)),
    Case("muprop", lambda p: gl.MuProp(1)),
    Case("muprop, leave-one-out", lambda p: gl.MuProp(2, gl.LeaveOneOut())),
    Case("reparameterization", lambda p: gl.Reparameterization(2)),
    Case("inverse cdf", lambda p: gl.Reparameterization(2, gl.inverse_cdf)),
    Case("implicit", lambda p: gl.ImplicitReparameterization(2)),
    Case("g-rep", lambda p: gl.GeneralizedReparameterization(num_samples=2)),
    Case("g-rep, leave-one-out", lambda p: gl.GeneralizedReparameterization(num_samples=2, baseline=gl.LeaveOneOut())),
    Case("rsvi", lambda p: gl.RejectionReparameterization(2)),
    Case("rsvi, boost 3", lambda p: gl.RejectionReparameterization(1, boost=3)),
    Case("gumbel-softmax", lambda p: gl.GumbelSoftmax(2, temperature=0.7)),
    Case("gumbel-softmax, hard", lambda p: gl.GumbelSoftmax(2, temperature=0.7, hard=True)),
    Case("straight-through", lambda p: gl.StraightThrough(2)),
    Case("gumbel-rao", lambda p: gl.GumbelRao(2, temperature=0.7, num_noises=3)),
    Case("reinmax", lambda p: gl.ReinMax(2)),
    Case("rebar", lambda p: gl.REBAR(2, temperature=0.4, coefficient=0.8)),
    Case("relax", lambda p: gl.RELAX(_critic(p), 2)),
    Case("relax, with the relaxed cost", lambda p: gl.RELAX(_critic(p), 1, temperature=0.6)),
    Case("lax", lambda p: gl.LAX(_critic(p), 2)),
    Case("double control variate", lambda p: gl.DoubleControlVariate(3)),
    Case("arm", lambda p: gl.ARM(1)),
    Case("disarm", lambda p: gl.DisARM(2)),
    Case("measure-valued", lambda p: gl.MeasureValued(2, chunk_size=3)),
    Case("local expectation", lambda p: gl.LocalExpectation(1, chunk_size=4)),
    Case("taylor local expectation", lambda p: gl.TaylorLocalExpectation(2)),
    Case("adaptive local expectation", lambda p: taught(p)),
    Case("sum and sample", lambda p: gl.SumAndSample(2, 2, gl.LeaveOneOut())),
    Case("unordered set", lambda p: gl.UnorderedSet(2)),
    Case(
        "stochastic backprop", lambda p: gl.StochasticBackprop(2, order=1 if "relu" in p.name else None, chunk_size=3)
    ),
    Case("stochastic backprop, values", lambda p: gl.StochasticBackprop(1, order=0)),
    Case("enumerate", lambda p: gl.Enumerate()),
]


def on(device: torch.device, problem: gl.Problem) -> gl.Problem:
    """Return the problem with its tensors on the device."""
    return replace(problem, params={k: p.to(device) for k, p in problem.params.items()}, t=problem.t.to(device))


def pairs() -> list[tuple[Case, gl.Problem]]:
    """Every case with every problem it can serve; nothing is left out by hand."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = [(c, p) for c in CASES for p in gl.PROBLEMS.values() if _can(c, p)]
    torch.set_default_dtype(before)
    return found


def _can(case: Case, problem: gl.Problem) -> bool:
    if case.name.startswith("control variate") and not has_mean(problem.q()):
        return False
    return serves(case.make(problem), problem)


PAIRS = pairs()
IDS = [f"{c.name}-{p.name}" for c, p in PAIRS]
UNBIASED = [(c, p) for c, p in PAIRS if c.make(p).traits.unbiased]
UNBIASED_IDS = [f"{c.name}-{p.name}" for c, p in UNBIASED]
