"""Figures 1 and 2 of Echraibi et al. (2020): two costs of independent gamma variables, whose exact loss is known.

All runs of a method are one batch, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, Independent

from gradlab.diagnostics import replicate
from gradlab.estimator import Estimator
from gradlab.experiments.plan import Job, Plan
from gradlab.experiments.results import rounded
from gradlab.generalized import GeneralizedReparameterization
from gradlab.pathwise import ImplicitReparameterization
from gradlab.rules import log_mgf
from gradlab.score import ScoreFunction
from gradlab.stochastic_backprop import StochasticBackprop
from gradlab.surrogate import magic_box

__all__ = ["decay", "decay_loss", "jobs", "methods", "settings", "square", "square_loss", "train"]

EPSILON = 0.49
RATE = 1e-3
DIMS = (1, 10, 100)
Cost = Callable[[Tensor], Tensor]
Loss = Callable[[Gamma], Tensor]


def square(z: Tensor) -> Tensor:
    """The cost of toy problem 1, by coordinate."""
    return (z - EPSILON).square()


def decay(z: Tensor) -> Tensor:
    """The cost of toy problem 2, by coordinate."""
    return torch.exp(-EPSILON * z)


def square_loss(k: Tensor, scale: Tensor) -> Tensor:
    """The exact loss of toy problem 1, by coordinate."""
    return k * scale**2 + (k * scale - EPSILON) ** 2


def decay_loss(k: Tensor, scale: Tensor) -> Tensor:
    """The exact loss of toy problem 2, by coordinate."""
    return (1 + EPSILON * scale) ** -k


def jointly(estimator: Estimator, f: Cost) -> Loss:
    """The estimator sees one sample of d coordinates and the sum of their costs."""
    return lambda q: estimator(Independent(q, 1), lambda z: f(z).sum(-1))


def apart(estimator: Estimator, f: Cost) -> Loss:
    """The cost is a sum over coordinates: each is a problem of its own."""
    return lambda q: estimator(q, f).sum(-1)


def exponential(sign: int) -> Loss:
    """Equation 25, a closed form for the exponential cost; the paper prints it with sign = +1."""

    def loss(q: Distribution) -> Tensor:
        weight = magic_box(log_mgf(q, q.rate.new_tensor(sign * EPSILON)))
        return (weight * decay(q.sample())).sum(-1)

    return loss


def methods(figure: str) -> dict[str, Loss]:
    """Return the estimators of figure 1 or 2, one sample each."""
    f = square if figure == "figure1" else decay
    paper = {"series": apart(StochasticBackprop(form="series", order=2), f)}
    if figure == "figure2":
        paper = {"series": exponential(-1), "series, as printed": exponential(+1)}
    return {
        "score": jointly(ScoreFunction(), f),
        "g-rep": jointly(GeneralizedReparameterization(), f),
        "implicit": apart(ImplicitReparameterization(), f),
        **paper,
        "stochastic backprop": apart(StochasticBackprop(), f),
    }


def train(figure: str, loss: Loss, dim: int, plan: Plan) -> dict[str, list]:
    """Train one method on one dimension, and return its loss and log-variance at the checkpoints, by run."""
    exact = square_loss if figure == "figure1" else decay_loss
    raw = torch.zeros(2, plan.runs, dim, dtype=torch.float64, device=plan.device).requires_grad_()
    adam = torch.optim.Adam([raw], lr=RATE)
    found: dict[str, list[Tensor]] = {"loss": [], "log_variance": []}
    checkpoints = set(plan.checkpoints)

    def law(x: Tensor) -> Gamma:
        k, scale = x.exp().unbind(-3)
        return Gamma(k, 1 / scale, validate_args=False)

    for step in range(plan.steps + 1):
        if step in checkpoints:
            found["loss"].append(exact(*raw.detach().exp()).mean(-1))
            gradient = replicate(lambda x: loss(law(x)), raw.detach(), plan.replicates)
            found["log_variance"].append(gradient.var(0).mean((0, 2)).log())
        if step < plan.steps:
            adam.zero_grad()
            loss(law(raw)).sum().backward()
            adam.step()
    return {name: rounded(torch.stack(values, -1)) for name, values in found.items()}  # [R, checkpoints]


def settings() -> dict[str, Any]:
    """Return what is fixed."""
    return {"epsilon": EPSILON, "dims": list(DIMS), "samples": 1, "rate": RATE, "start": "k = scale = 1"}


def jobs(figure: str, plan: Plan) -> list[Job]:
    """Return what there is to do for a figure: each method on each dimension."""
    return [
        Job(f"{name}, d={dim}", 1000 * number + dim, partial(train, figure, loss, dim, plan))
        for number, (name, loss) in enumerate(methods(figure).items())
        for dim in DIMS
    ]
