"""What chapter 10 claims and no test of the package keeps: by quadrature and enumeration, with little sampling."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import gradlab as gl
from gradlab.coupled import binary_logits
from gradlab.quadrature import gauss_legendre
from gradlab.rebar import Coupled


def toy(z: Tensor) -> Tensor:
    return (z - 0.45) ** 2


def wiggle(z: Tensor) -> Tensor:
    return toy(z) + (2 * torch.pi * z).sin()


def parity(z: Tensor) -> Tensor:
    return (2 * z - 1).prod(-1)


def nodes(theta: float) -> tuple[Coupled, Tensor]:
    """Both logistic noises of one bit, and their weights."""
    lines = []
    for cut in (-theta, 0.0):
        x, w = map(torch.as_tensor, gauss_legendre(38.0, 38, [cut]))
        lines.append((x, w * x.sigmoid() * (-x).sigmoid()))
    (g, m), (y, w) = lines
    both = torch.cartesian_prod(g, y).T[:, None]
    return Coupled((theta + both[0] > 0).to(g), both[0], both[1]), torch.cartesian_prod(m, w).prod(1)


def moments(weight: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    mean = weight @ grads
    return mean, weight @ (grads - mean) ** 2


def integrated(estimator: gl.Estimator, theta: float, f: gl.Cost) -> tuple[Tensor, Tensor]:
    noise, weight = nodes(theta)
    p = torch.full_like(weight, theta).requires_grad_()
    loss = copy.deepcopy(estimator).eval().estimate(td.Bernoulli(logits=p), f, noise)
    return moments(weight, torch.autograd.grad(loss.sum(), p)[0])


def uniforms(binary: Tensor) -> tuple[Tensor, Tensor]:
    """Uniforms cut at p and 1 - p, ``[N, d]``, and their weights."""
    m = binary.abs().sigmoid()[:, None]
    edges = torch.cat([0 * m, 1 - m, m, 1 + 0 * m], 1)
    middle, half = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff() / 2
    u = torch.cat([middle - half / 3**0.5, middle + half / 3**0.5], 1)
    grids = [torch.cartesian_prod(*a).reshape(-1, len(m)) for a in (u, torch.cat([half, half], 1))]
    return grids[0], grids[1].prod(1)


def pairs(estimator: gl.Estimator, logits: Tensor, f: gl.Cost) -> tuple[Tensor, Tensor]:
    u, weight = uniforms(logits)
    p = logits.expand(u.shape).clone().requires_grad_()
    loss = estimator.estimate(td.Independent(td.Bernoulli(logits=p), 1), f, u[None])
    return moments(weight, torch.autograd.grad(loss.sum(), p)[0])


def test_descend() -> None:
    """The mean gradient that backward leaves is the derivative of the variance."""
    rebar = gl.REBAR(1, 0.8, 0.6)
    noise, weight = nodes(0.3)
    q = td.Bernoulli(logits=torch.full_like(weight, 0.3).requires_grad_())
    (weight @ rebar.estimate(q, toy, noise)).backward()
    for name, p in rebar.named_parameters():
        ends = []
        for step in (1e-4, -1e-4):
            moved = copy.deepcopy(rebar)
            moved.get_parameter(name).data += step
            ends.append(integrated(moved, 0.3, toy)[1])
        assert p.grad is not None
        torch.testing.assert_close(p.grad, (ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-7)


class Scaled(nn.Module):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor) -> Tensor:
        return self.a * z**2


def test_lax() -> None:
    def gradient(a: float) -> Tensor:
        torch.manual_seed(2)
        loc = torch.full((1000,), 0.7, requires_grad=True)
        loss = gl.LAX(Scaled(a)).eval()(td.Normal(loc, 1.3), torch.square)
        return torch.autograd.grad(loss.sum(), loc)[0]

    path = gradient(1.0)
    score = (path / 2) ** 2 * (path / 2 - 0.7) / 1.69
    torch.testing.assert_close(gradient(0.0), score)
    torch.testing.assert_close(gradient(0.5), (path + score) / 2)


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
def test_double(a: float) -> None:
    problem = gl.problem("bernoulli_3")
    values = gl.Enumerate().draw(problem.q())
    p = problem.q().log_prob(values).exp()
    i, j = torch.cartesian_prod(torch.arange(8), torch.arange(8)).T

    def exactly(estimator: gl.Estimator) -> tuple[Tensor, Tensor]:
        logits = problem.params["logits"].expand(64, 3).clone().requires_grad_()
        loss = estimator.eval().estimate(
            problem.make_q({"logits": logits}), problem.f, torch.stack([values[i], values[j]])
        )
        return moments(p[i] * p[j], torch.autograd.grad(loss.sum(), logits)[0])

    mean, variance = exactly(gl.DoubleControlVariate(2, a))
    torch.testing.assert_close(mean, problem.exact()[0]["logits"])
    loo = exactly(gl.ScoreFunction(2, gl.LeaveOneOut()))[1]
    assert torch.allclose(variance, loo) == (a == 0)


@pytest.mark.parametrize("theta", [0.0, 1.5, -0.7])
def test_one_bit(theta: float) -> None:
    logit = torch.tensor([theta])
    m = logit.abs().sigmoid()
    s2 = (m * (1 - m)) ** 2
    f = lambda z: z[..., 0]  # noqa: E731
    torch.testing.assert_close(pairs(gl.ARM(), logit, f)[1], (1 - (2 * m - 1) ** 3) / 12 - s2)
    torch.testing.assert_close(pairs(gl.DisARM(), logit, f)[1], (1 - m) * m**2 / 2 - s2)


def test_categorical() -> None:
    """DisARM on one variable of three values: the uniforms of its two questions, integrated."""
    problem = gl.problem("onehot_3")
    u, weight = uniforms(binary_logits(problem.q()).reshape(-1))
    logits = problem.params["logits"].expand(len(u), *problem.params["logits"].shape).clone().requires_grad_()
    q = problem.make_q({"logits": logits})
    loss = gl.DisARM().estimate(q, problem.f, u.reshape(1, *binary_logits(q).shape))
    grads = torch.autograd.grad(loss.sum(), logits)[0].flatten(1)
    torch.testing.assert_close(weight @ grads, problem.exact()[0]["logits"].flatten())
    assert not gl.ARM.supports(problem.q())


def test_failures() -> None:
    mean, wild = integrated(gl.REBAR(1, 0.4, 1.0), 0.0, wiggle)
    torch.testing.assert_close(mean, torch.tensor(0.025), rtol=0, atol=1e-7)
    assert wild > integrated(gl.REBAR(1, 0.4, 0.0), 0.0, wiggle)[1]
    spread = pairs(gl.DisARM(), torch.full((3,), 1e-9), parity)[1]
    torch.testing.assert_close(spread, torch.full((3,), 0.25), rtol=0, atol=1e-7)


def test_best() -> None:
    """REBAR is linear in its coefficient, so its variance is a parabola with a minimum."""
    low, middle, high = (integrated(gl.REBAR(1, 0.8, e), 0.3, toy)[1] for e in (0.0, 1.0, 2.0))
    best = 1 + (low - high) / (2 * (low - 2 * middle + high))
    near = [integrated(gl.REBAR(1, 0.8, best.item() + e), 0.3, toy)[1] for e in (-0.1, 0.0, 0.1)]
    assert near[1] < min(near[0], near[2])


def test_ratio() -> None:
    """DisARM over leave-one-out of two samples: 0 for a fair bit, to 1 for a confident one."""
    logit = torch.tensor([6.0])
    s = logit.sigmoid() * (-logit).sigmoid()
    variance = pairs(gl.DisARM(), logit, lambda z: z[..., 0])[1]
    assert abs(variance / (s / 2 - s**2) - 1).item() < 0.01
    assert pairs(gl.DisARM(), torch.zeros(1), lambda z: z[..., 0])[1].item() < 1e-14


def test_constant() -> None:
    """One bit: the constant (1 - p) f(1) + p f(0) leaves the score function without variance; E[f] does not."""
    f1, f0, p = 0.55**2, 0.45**2, torch.tensor(1.5).sigmoid()
    for baseline, none in (((1 - p) * f1 + p * f0, True), (p * f1 + (1 - p) * f0, False)):
        rebar = gl.REBAR(1, 1.0, 0.0)
        rebar.offset.data += baseline
        assert (integrated(rebar, 1.5, toy)[1].item() < 1e-12) == none
