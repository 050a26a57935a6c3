"""Two random layers: an estimator inside the cost of another, every pair, against the exact gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributions as td
from cases import Critic
from torch import Tensor

import gradlab as gl

pytestmark = pytest.mark.usefixtures("device")

WEIGHT = torch.tensor([[0.8, -0.4], [0.3, 0.9]])

DISCRETE = {
    "score": lambda: gl.ScoreFunction(1),
    "leave-one-out": lambda: gl.ScoreFunction(3, gl.LeaveOneOut()),
    "control": lambda: gl.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean.sum(-1), 0.5),
    "muprop": lambda: gl.MuProp(2),
    "rebar": lambda: gl.REBAR(1),
    "relax": lambda: gl.RELAX(Critic(1)),
    "double": lambda: gl.DoubleControlVariate(2),
    "arm": lambda: gl.ARM(),
    "disarm": lambda: gl.DisARM(),
    "measure-valued": lambda: gl.MeasureValued(),
    "local": lambda: gl.LocalExpectation(chunk_size=1),
    "taylor": lambda: gl.TaylorLocalExpectation(),
    "adaptive": lambda: gl.AdaptiveLocalExpectation(flips=1),
    "sum and sample": lambda: gl.SumAndSample(1),
    "unordered set": lambda: gl.UnorderedSet(2),
    "enumerate": lambda: gl.Enumerate(),
}
CONTINUOUS = {
    "score": lambda: gl.ScoreFunction(2, gl.LeaveOneOut()),
    "muprop": lambda: gl.MuProp(1),
    "reparameterization": lambda: gl.Reparameterization(1),
    "implicit": lambda: gl.ImplicitReparameterization(2),
    "g-rep": lambda: gl.GeneralizedReparameterization(),
    "lax": lambda: gl.LAX(Critic(1)),
    "measure-valued": lambda: gl.MeasureValued(),
}


def bernoulli(logits: Tensor) -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=logits), 1)


def normal(loc: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(loc, 0.6), 1)


def two_layers(outer: gl.Estimator, inner: gl.Estimator, make_q, first: Tensor, second: Tensor) -> Tensor:
    """E over z1 of E over z2 given z1 of a cost of both, with parameters in both layers."""
    weight = WEIGHT.to(first)

    def cost(z1: Tensor) -> Tensor:
        return inner(make_q(second + z1 @ weight), lambda z2: (z1.sum(-1) - z2[..., 0] * z2[..., 1] + z2.sum(-1)) ** 2)

    return outer(make_q(first), cost)


def check(outer: gl.Estimator, inner: gl.Estimator, make_q, exact: Tensor, count: int) -> None:
    outer, inner = outer.to(exact.device), inner.to(exact.device)
    point = torch.tensor([0.4, -0.3, 0.2, 0.6])
    grads = gl.replicate(lambda p: two_layers(outer, inner, make_q, p[..., :2], p[..., 2:]), point, count)
    error = grads.std(0) / count**0.5
    gap = (grads.mean(0) - exact).abs()
    assert ((gap < 6 * error) | (gap < 1e-12)).all(), (gap / error).tolist()


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(DISCRETE, DISCRETE)))
def test_discrete_pairs(outer: str, inner: str) -> None:
    point = torch.tensor([0.4, -0.3, 0.2, 0.6], requires_grad=True)
    value = two_layers(gl.Enumerate(), gl.Enumerate(), bernoulli, point[:2], point[2:])
    (exact,) = torch.autograd.grad(value, point)
    check(DISCRETE[outer](), DISCRETE[inner](), bernoulli, exact, 40_000)


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(CONTINUOUS, CONTINUOUS)))
def test_continuous_pairs(outer: str, inner: str) -> None:
    point = torch.tensor([0.4, -0.3, 0.2, 0.6], requires_grad=True)
    (exact,) = torch.autograd.grad(_gauss_hermite(point), point)
    check(CONTINUOUS[outer](), CONTINUOUS[inner](), normal, exact, 40_000)


def _gauss_hermite(point: Tensor) -> Tensor:
    """The two-layer value for normals: a polynomial of degree 4, integrated exactly by 5 nodes a dim."""
    import numpy as np

    x, w = (torch.as_tensor(a, device=point.device) for a in np.polynomial.hermite_e.hermegauss(5))
    w = w / w.sum()
    grid = torch.cartesian_prod(x, x, x, x)
    weights = torch.cartesian_prod(w, w, w, w).prod(-1)
    z1 = point[:2] + 0.6 * grid[:, :2]
    z2 = point[2:] + z1 @ WEIGHT.to(point) + 0.6 * grid[:, 2:]
    return weights @ (z1.sum(-1) - z2[:, 0] * z2[:, 1] + z2.sum(-1)) ** 2
