"""Extreme parameters in float32: finite, or a clear error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributions as td

import gradlab as gl

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def _single() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("logit", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize(
    "estimator",
    [
        gl.ScoreFunction(2, gl.LeaveOneOut()),
        gl.MuProp(2),
        gl.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean.sum(-1), "optimal", 4),
        gl.GumbelSoftmax(2, 1e-6),
        gl.GumbelSoftmax(2, 0.5, hard=True),
        gl.StraightThrough(2),
        gl.GumbelRao(2, 1e-6),
        gl.ReinMax(2, 1e-6),
        gl.REBAR(2, 0.01),
        gl.RELAX(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)), 2),
        gl.DoubleControlVariate(2),
        gl.ARM(2),
        gl.DisARM(2),
        gl.LocalExpectation(2),
        gl.TaylorLocalExpectation(2),
        gl.AdaptiveLocalExpectation(2),
        gl.MeasureValued(2),
        gl.SumAndSample(2),
        gl.UnorderedSet(3),
        gl.Enumerate(),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("law", ["bernoulli", "one-hot"])
def test_logits(estimator: gl.Estimator, logit: float, law: str) -> None:
    """The first logit is extreme, the others follow it half way, or all are."""
    estimator = copy.deepcopy(estimator)  # one that learns a table serves one q
    for scale in (1.0, 0.5):
        logits = torch.full((50, 3), logit)
        logits[:, 1:] *= scale if law == "bernoulli" else -scale
        logits.requires_grad_()
        q = td.OneHotCategorical(logits=logits) if law == "one-hot" else td.Independent(td.Bernoulli(logits=logits), 1)
        if not estimator.supports(q):
            continue
        loss = estimator(q, lambda z: (z.sum(-1) - z[..., 0] - 0.5) ** 2)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in estimator.parameters())


@pytest.mark.parametrize("shape", [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize(
    "estimator",
    [gl.ImplicitReparameterization(2), gl.RejectionReparameterization(2), gl.RejectionReparameterization(2, boost=5)],
    ids=repr,
)
def test_shapes_of_gamma_and_dirichlet(estimator: gl.Estimator, shape: float) -> None:
    for make_q, f in (
        (lambda a: td.Gamma(a[..., 0], a[..., 1]), lambda z: z),
        (lambda a: td.Beta(a[..., 0], a[..., 1]), lambda z: z**2),
        (td.Dirichlet, lambda z: z[..., 0] ** 2),
    ):
        a = torch.full((200, 3), shape, requires_grad=True)
        loss = estimator(make_q(a), f)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert a.grad.isfinite().all()


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 1e2, 1e4])
def test_von_mises(kappa: float) -> None:
    k = torch.full((200,), kappa, requires_grad=True)
    loss = gl.ImplicitReparameterization(2)(td.VonMises(torch.zeros(200), k), torch.cos)
    loss.sum().backward()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e6])
def test_scales(scale: float) -> None:
    for cls in (td.Normal, td.Laplace, gl.Logistic, td.Cauchy):
        s = torch.full((100,), scale, requires_grad=True)
        gl.ImplicitReparameterization(2)(cls(torch.zeros(100), s), torch.sin).sum().backward()
        assert s.grad.isfinite().all()


def test_mixture_with_far_modes_and_vanishing_weights() -> None:
    logits = torch.tensor([0.0, -60.0, 3.0]).expand(300, 3).clone().requires_grad_()
    loc = torch.tensor([-50.0, 0.0, 50.0]).expand(300, 3).clone().requires_grad_()
    q = td.MixtureSameFamily(td.Categorical(logits=logits), td.Normal(loc, 0.5))
    gl.ImplicitReparameterization(2)(q, torch.sin).sum().backward()
    assert logits.grad.isfinite().all()
    assert loc.grad.isfinite().all()
