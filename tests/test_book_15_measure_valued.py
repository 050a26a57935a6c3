"""What chapter 15 claims: weak derivatives against autograd, sums and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

import gradlab as gl
from gradlab.coupled import RULES

SAMPLES = torch.Size([40_000])


def tensor(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def slope(make_q, theta, z):
    t = torch.full_like(z, theta).requires_grad_()
    return torch.autograd.grad(make_q(t).log_prob(z).exp().sum(), t)[0]


def density(q, z):
    return q.log_prob(z).exp()


X = torch.linspace(-4, 4, 200, dtype=torch.float64)
Y = torch.linspace(0.01, 9, 200, dtype=torch.float64)
K = torch.arange(60, dtype=torch.float64)
N = torch.arange(6, dtype=torch.float64)


def binomial(n, z):
    """The density of Binomial(n, 0.3), 0 outside of its support."""
    inside = (z >= 0) & (z <= n)
    return torch.where(inside, density(D.Binomial(n, probs=tensor(0.3)), z.clamp(0, n)), 0.0)


CASES = {
    "normal loc": (
        lambda t: D.Normal(t, 1.3), 0.0, X, 1 / (1.3 * math.sqrt(math.tau)),
        X.clamp_min(0) / 1.69 * (-(X**2) / 3.38).exp(), (-X).clamp_min(0) / 1.69 * (-(X**2) / 3.38).exp(),
    ),
    "normal scale": (
        lambda t: D.Normal(0.0, t), 1.3, X, 1 / 1.3,
        X**2 / 1.69 * density(D.Normal(tensor(0.0), 1.3), X), density(D.Normal(tensor(0.0), 1.3), X),
    ),
    "laplace loc": (
        lambda t: D.Laplace(t, 1.3), 0.0, X, 0.5 / 1.3,
        (X > 0) * (-X.abs() / 1.3).exp() / 1.3, (X < 0) * (-X.abs() / 1.3).exp() / 1.3,
    ),
    "laplace scale": (
        lambda t: D.Laplace(0.0, t), 1.3, X, 1 / 1.3,
        X.abs() / 1.3 * density(D.Laplace(tensor(0.0), 1.3), X), density(D.Laplace(tensor(0.0), 1.3), X),
    ),
    "exponential": (
        D.Exponential, 1.3, Y, 1 / 1.3, density(D.Exponential(tensor(1.3)), Y), density(D.Gamma(tensor(2.0), 1.3), Y),
    ),
    "gamma rate": (
        lambda t: D.Gamma(2.3, t), 1.3, Y, 2.3 / 1.3,
        density(D.Gamma(tensor(2.3), 1.3), Y), density(D.Gamma(tensor(3.3), 1.3), Y),
    ),
    "weibull scale": (
        lambda t: D.Weibull(t, 2.0), 1.3, Y, 2 / 1.3,
        (Y / 1.3) ** 2 * density(D.Weibull(tensor(1.3), 2.0), Y), density(D.Weibull(tensor(1.3), 2.0), Y),
    ),
    "poisson": (
        D.Poisson, 2.3, K, 1.0,
        torch.cat([torch.zeros(1), density(D.Poisson(tensor(2.3)), K)[:-1]]), density(D.Poisson(tensor(2.3)), K),
    ),
    "geometric": (
        D.Geometric, 0.3, K, 1 / 0.3, density(D.Geometric(tensor(0.3)), K), K * 0.09 * 0.7 ** (K - 1),
    ),
    "bernoulli": (D.Bernoulli, 0.3, N[:2], 1.0, N[:2], 1 - N[:2]),
    "binomial": (
        lambda t: D.Binomial(5, probs=t), 0.3, N, 5.0, binomial(4, N - 1), binomial(4, N),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_densities(name):
    """The derivative of each density is c times the difference of the halves."""
    make_q, theta, z, c, plus, minus = CASES[name]
    torch.testing.assert_close(slope(make_q, theta, z), c * (plus - minus), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("q", "name", "c", "plus", "minus"),
    [
        (D.Normal(tensor(0.0), tensor(1.3)), "loc", 1 / (1.3 * math.sqrt(math.tau)), 3.38, 3.38),
        (D.Normal(tensor(0.0), tensor(1.3)), "scale", 1 / 1.3, 5.07, 1.69),
        (D.Laplace(tensor(0.0), tensor(1.0)), "loc", 0.5, 2.0, 2.0),
        (D.Laplace(tensor(0.0), tensor(1.0)), "scale", 1.0, 6.0, 2.0),
        (D.Exponential(tensor(2.0)), "rate", 0.5, 0.5, 1.5),
        (D.Gamma(tensor(2.0), tensor(1.0)), "rate", 2.0, 6.0, 12.0),
        (D.Weibull(tensor(1.3), tensor(2.0)), "scale", 2 / 1.3, 3.38, 1.69),
        (D.Uniform(tensor(0.0), tensor(2.0)), "low", 0.5, 4 / 3, 0.0),
        (D.Uniform(tensor(0.0), tensor(2.0)), "high", 0.5, 4.0, 4 / 3),
        (D.Poisson(tensor(2.0)), "rate", 1.0, 11.0, 6.0),
        (D.Bernoulli(tensor(0.3)), "probs", 1.0, 1.0, 0.0),
        (D.Geometric(tensor(0.5)), "probs", 2.0, 3.0, 13.0),
        (D.Binomial(tensor(5.0), probs=tensor(0.5)), "probs", 5.0, 10.0, 5.0),
    ],
)
def test_samples(q, name, c, plus, minus):
    """The package's constant, and the second moment of both halves."""
    torch.manual_seed(1)
    weak = RULES[type(q)][name](q, SAMPLES)
    assert float(weak.constant) == pytest.approx(c, rel=1e-12)
    for z, exact in ((weak.plus, plus), (weak.minus, minus)):
        z = z.square()
        assert abs(float(z.mean()) - exact) <= 4 * float(z.std()) / math.sqrt(len(z)) + 1e-12


def test_rayleigh():
    """The Rayleigh pair, integrated: 2 mu for z squared, and the mean slope for any smooth cost."""
    r = torch.linspace(0, 10, 200_001, dtype=torch.float64)
    for f, exact in ((torch.square, 1.4), (torch.sin, math.cos(0.7) * math.exp(-0.5))):
        g = (f(0.7 + r) - f(0.7 - r)) / math.sqrt(math.tau) * r * (-(r**2) / 2).exp()
        assert float(torch.trapezoid(g, r)) == pytest.approx(exact, abs=1e-8)


def test_coupling():
    """Both variance formulas, by quadrature over the Rayleigh step."""
    r = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    w = r * (-(r**2) / 2).exp()

    def variance(x):
        return float(torch.trapezoid(x**2 * w, r) - torch.trapezoid(x * w, r) ** 2) / math.tau

    up, down, v = (0.7 + r) ** 2, (0.7 - r) ** 2, 2 - math.pi / 2
    assert variance(up - down) == pytest.approx(7.84 * v / math.tau, abs=1e-7)
    assert variance(up) + variance(down) == pytest.approx((3.92 * v + 8) / math.tau, abs=1e-7)
    assert variance(2 * r) == pytest.approx(4 * v / math.tau, abs=1e-7)


def test_edge():
    """U(0, 2) and z squared: 4/3; a step under a normal: its density."""
    torch.manual_seed(1)
    high = tensor(2.0).requires_grad_()
    gl.MeasureValued(100_000)(D.Uniform(tensor(0.0), high), torch.square).backward()
    assert high.grad.item() == pytest.approx(4 / 3, abs=0.01)
    loc = tensor(0.3).requires_grad_()
    gl.MeasureValued(1)(D.Normal(loc, tensor(1.0)), lambda z: (z > 0).to(z)).backward()
    assert loc.grad.item() in (0.0, pytest.approx(1 / math.sqrt(math.tau)))


def test_edge_by_score():
    """Without its guard the score function has the mean -2/3: exactly so on a grid of midpoints."""
    z = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 5_000
    high = tensor(2.0).requires_grad_()
    q = D.Uniform(tensor(0.0), high)
    assert not gl.ScoreFunction.supports(q)
    gl.ScoreFunction().estimate(q, torch.square, z).backward()
    assert high.grad.item() == pytest.approx(-2 / 3, abs=1e-8)


def test_cost():
    """1 + 2 d P evaluations a sample, as said and as counted."""
    loc, scale = (torch.ones(100, requires_grad=True) for _ in range(2))
    q, points = D.Independent(D.Normal(loc, scale), 1), []

    def f(z):
        points.append(z.shape[:-1].numel())
        return z.sum(-1)

    gl.MeasureValued(3)(q, f)
    assert sum(points) == gl.MeasureValued(3).evaluations(q) == 3 * 401


def test_families():
    """Bernoulli: f(1) - f(0); Poisson: 1 for the identity, at every sample."""
    p = tensor(0.3).requires_grad_()
    gl.MeasureValued()(D.Bernoulli(probs=p), lambda z: (z - 0.45) ** 2).backward()
    assert p.grad.item() == pytest.approx(0.1, abs=1e-12)
    rate = tensor(2.3).requires_grad_()
    gl.MeasureValued()(D.Poisson(rate), lambda z: z).backward()
    assert rate.grad.item() == pytest.approx(1.0, abs=1e-12)
    lam, k = tensor(2.3).requires_grad_(), torch.arange(80, dtype=torch.float64)
    pmf = density(D.Poisson(lam), k)
    (slope,) = torch.autograd.grad((pmf * (k + 1).log()).sum(), lam)
    torch.testing.assert_close((pmf * ((k + 2).log() - (k + 1).log())).sum(), slope)


def test_onehot():
    """The weak derivative of a one-hot variable, averaged over its own noise, is the exact gradient."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64).requires_grad_()
    cost = torch.tensor([0.25, 1.0, 2.25], dtype=torch.float64)
    (exact,) = torch.autograd.grad(logits.softmax(-1) @ cost, logits)
    pi = logits.softmax(-1)
    torch.testing.assert_close(pi @ (pi * (cost - cost[:, None])), exact)  # rows: the value of z


def test_frequency():
    """cos(w z): the bounds 1 and 2 / pi of score function and pair, and the path's variance, about w^2 / 2."""
    eps = torch.linspace(-9, 9, 8001, dtype=torch.float64)
    r = torch.linspace(0, 10, 8001, dtype=torch.float64)
    for w in (0.5, 2.0, 10.0):
        bell, ray = (-(eps**2) / 2).exp(), r * (-(r**2) / 2).exp()
        z, pair = w * (0.7 + eps), 4 / math.tau * (math.sin(0.7 * w) * (w * r).sin()) ** 2
        assert float(((z.cos() * eps) ** 2 * bell).sum() / bell.sum()) <= 1
        assert float((pair * ray).sum() / ray.sum()) <= 2 / math.pi
        path = -w * z.sin()
        variance = float((path**2 * bell).sum() / bell.sum() - ((path * bell).sum() / bell.sum()) ** 2)
        even = (1 - math.exp(-2 * w * w) * math.cos(1.4 * w)) / 2
        closed = w * w * (even - math.exp(-w * w) * math.sin(0.7 * w) ** 2)
        assert variance == pytest.approx(closed, abs=1e-8)
    assert closed == pytest.approx(50, abs=1e-8)


def test_supports():
    """The rate of a gamma has a rule, its shape has none."""
    wanted, fixed = tensor(2.3).requires_grad_(), tensor(2.3)
    assert gl.MeasureValued.supports(D.Gamma(fixed, wanted))
    assert not gl.MeasureValued.supports(D.Gamma(wanted, fixed))
    assert not gl.MeasureValued.supports(D.Weibull(fixed, wanted))
    assert not gl.MeasureValued.supports(D.OneHotCategorical(logits=torch.zeros(3)))
