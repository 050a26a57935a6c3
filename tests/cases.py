"""Every estimator x every problem that it can serve: the inputs of the property tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import gradlab as gl
from gradlab.cli import serves
from gradlab.distributions import has_mean


@dataclass(frozen=True)
class Case:
    """An estimator to be tested; ``make(problem)`` builds it."""

    name: str
    make: Callable[[gl.Problem], gl.Estimator]


def _linear_control(problem: gl.Problem, **kwargs: object) -> gl.ControlVariate:
    """The control variate "sum of z over the event dims", whose mean torch knows."""
    dims = tuple(range(-len(problem.q().event_shape), 0))

    def total(z: torch.Tensor) -> torch.Tensor:
        return z.sum(dims) if dims else z

    return gl.ControlVariate(total, lambda q: total(q.mean), **kwargs)


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
