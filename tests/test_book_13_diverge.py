"""What chapter 13 claims: where the series breaks, and the exact rules, by quadrature and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.nn.functional import logsigmoid

import gradlab as gl

PHI = 1 / math.sqrt(math.tau)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def nodes(q, panels=16):
    z, weight = gl.Quadrature(panels=panels).draw(q)
    w = (weight * q.log_prob(z).exp()).nan_to_num()
    return z[w > 1e-22], w[w > 1e-22]


def law(cls, *parameters: float):
    return nodes(cls(*(torch.tensor(p) for p in parameters)))


def moments(estimator, make_q, theta, f, *rules):
    """Mean and variance of one gradient: the first rule integrates z, the others the jumps."""
    z, *jumps = (x.flatten() for x in torch.meshgrid(*(r[0] for r in rules), indexing="ij"))
    w = math.prod(x.flatten() for x in torch.meshgrid(*(r[1] for r in rules), indexing="ij"))
    t = torch.full_like(z, theta).requires_grad_()
    q = make_q(t)
    noise = estimator.draw(q)._replace(z=z[None])
    if jumps:
        noise = noise._replace(jumps={key: tuple(j[None] for j in jumps) for key in noise.jumps})
    (g,) = torch.autograd.grad(estimator.estimate(q, f, noise).sum(), t)
    return summary(g, w)


def summary(g, w):
    mean = (w * g).sum()
    return float(mean), float((w * (g - mean) ** 2).sum())


def laplace(b):
    return D.Laplace(torch.zeros_like(b), b)


def gamma(k):
    return D.Gamma(k, torch.ones_like(k))


def slope(make_q, theta, f, breakpoints=()):
    t = torch.tensor(theta, requires_grad=True)
    return float(torch.autograd.grad(gl.Quadrature(breakpoints=breakpoints)(make_q(t), f), t)[0])


OMEGA = (torch.arange(40_000, dtype=torch.float64) + 0.5) * 1e-3
SHAPE = math.pi * OMEGA / torch.sinh(math.pi * OMEGA)


def error(b, n):
    y = (b * OMEGA) ** 2
    return float((SHAPE * (-y) ** n / (1 + y) ** 2).sum() * 1e-3 / math.pi)


def test_series():
    """Partial sums of the series against the frequency integral, and the terms at a mean that is not 0."""
    for b, n in ((0.1, 8), (0.5, 3), (1.0, 2), (1.0, 8)):
        exact = slope(laplace, b, logsigmoid) / (2 * b)
        assert exact == pytest.approx(-error(b, 0), abs=1e-9)
        total = moments(
            gl.StochasticBackprop(form="series", order=2 * n), laplace, b, logsigmoid, law(D.Laplace, 0.0, b)
        )
        assert total[0] / (2 * b) == pytest.approx(exact + error(b, n), abs=1e-7)
    shifted = nodes(D.Laplace(torch.tensor(0.7), torch.tensor(0.5)))
    sums = [
        moments(
            gl.StochasticBackprop(form="series", order=2 * n),
            lambda b: D.Laplace(0.7 + 0 * b, b),
            0.5,
            logsigmoid,
            shifted,
        )[0]
        for n in (9, 10)
    ]
    assert abs(sums[1] - sums[0]) > 1  # unbounded terms for any mean


def test_best():
    for b in (0.1, 0.3, 0.5, 1.0, 2.0):
        best = 1 + int(np.argmin([abs(error(b, n)) for n in range(1, 30)]))
        assert abs(best - math.pi / (2 * b)) <= 1


def test_filter():
    for n, value in ((1, -4.0), (4, 204.0), (8, 52428.0)):
        assert -4 * sum((-4.0) ** m for m in range(n)) == value


def test_kinks():
    """The rule without the mass of the kink, with it, and the default of the package."""
    z, w = nodes(D.Normal(torch.tensor(0.0), torch.tensor(1.0)), panels=16)
    up = math.exp(0.5) * float(D.Normal(0.0, 1.0).cdf(torch.tensor(-1.0)))
    cases = [
        (torch.relu, 0.0, 1.0),
        (lambda z: (2 - z.relu()) ** 2, 0.5, -4.0),
        (lambda z: (-z.relu()).exp(), up / 2, -1.0),
    ]
    for f, smooth, jump in cases:
        exact = smooth + jump * PHI / 2
        found = moments(gl.StochasticBackprop(), lambda s: D.Normal(torch.zeros_like(s), s), 1.0, f, (z, w))
        assert found[0] / 2 == pytest.approx(exact, abs=1e-9)
        assert slope(lambda s: D.Normal(0.0, s), 1.0, f, (0.0,)) / 2 == pytest.approx(exact, abs=1e-9)


def test_beta():
    """The terms of the beta series, by quadrature over two gammas."""
    series = [0.1, 0.1 - 1 / 30, 0.1, 0.0]
    (x, y), w = (
        torch.stack(torch.meshgrid(*(law(D.Gamma, a, 1.0)[0] for a in (3.0, 2.0)), indexing="ij")).flatten(1),
        math.prod(torch.meshgrid(*(law(D.Gamma, a, 1.0)[1] for a in (3.0, 2.0)), indexing="ij")).flatten(),
    )
    for n, exact in enumerate(series, 1):
        alpha = torch.full_like(w, 3.0).requires_grad_()
        estimator = gl.StochasticBackprop(form="series", order=n)
        q = D.Beta(alpha, torch.tensor(2.0))
        loss = estimator.estimate(q, lambda z: z, estimator.draw(q)._replace(z=torch.stack([x, y], -1)[None]))
        assert float((w * torch.autograd.grad(loss.sum(), alpha)[0]).sum()) == pytest.approx(exact, abs=1e-6)
    assert slope(lambda a: D.Beta(a, torch.tensor(2.0)), 3.0, lambda z: z) == pytest.approx(0.08, abs=1e-9)


@pytest.mark.parametrize("f", [torch.square, torch.tanh, torch.cos])
def test_exact(f):
    """Differences and derivatives for gamma and Laplace, without Monte Carlo."""
    jump, third = law(D.Exponential, 1.0), law(D.Gamma, 3.0, 1.0)
    exact = slope(gamma, 3.0, f)
    assert moments(gl.StochasticBackprop(order=0), gamma, 3.0, f, third, jump)[0] == pytest.approx(exact, abs=1e-7)
    wide = nodes(D.Laplace(torch.tensor(0.0), torch.tensor(1.0)))
    exact = slope(laplace, 1.0, f)
    for order, jumps in ((2, wide), (1, jump), (0, jump)):
        found = moments(gl.StochasticBackprop(order=order), laplace, 1.0, f, wide, jumps)[0]
        assert found == pytest.approx(exact, abs=1e-7)


def test_remainder():
    points = law(D.Laplace, 0.0, 0.5)
    exact = slope(laplace, 0.5, logsigmoid)
    for n in (1, 2, 3, 4):
        rest = gl.StochasticBackprop(form="remainder", order=2 * n)
        assert moments(rest, laplace, 0.5, logsigmoid, points, points)[0] == pytest.approx(exact, abs=1e-9)


def test_sweet_spot():
    for b, best in ((0.5, 3), (1.0, 2)):
        points = law(D.Laplace, 0.0, b)
        found = [
            moments(gl.StochasticBackprop(form="remainder", order=2 * n), laplace, b, logsigmoid, points, points)[1]
            for n in range(1, 6)
        ]
        assert 1 + int(np.argmin(found)) == best


def divided(z, g, f):
    return (f(z + g) + f(z - g) - 2 * f(z)) / g**2


def product(a, b) -> tuple[Tensor, Tensor, Tensor]:
    return a[0][:, None], b[0][None], a[1][:, None] * b[1][None]


def test_divided():
    """The divided differences: unbiased, and never worse than the forms that they average."""
    wide, far, jump = law(D.Laplace, 0.0, 1.0), law(D.Gamma, 3.0, 1.0), law(D.Exponential, 1.0)
    for f in (logsigmoid, torch.cos, torch.square):
        z, g, w = product(wide, far)
        mean, variance = summary(2 * divided(z, g, f), w)
        assert mean == pytest.approx(slope(laplace, 1.0, f), abs=1e-8)
        assert variance <= moments(gl.StochasticBackprop(order=2), laplace, 1.0, f, wide, wide)[1] + 1e-12
    assert summary(2 * divided(*product(wide, far)[:2], logsigmoid), product(wide, far)[2])[1] < 0.0125
    first, second = law(D.Gamma, 1.0, 1.0), law(D.Gamma, 2.0, 1.0)  # the rate of a gamma
    for f in (lambda z: (z - 0.49) ** 2, torch.tanh, lambda z: (-z).exp()):
        z, g, w = product(first, second)
        mean, variance = summary(-(f(z + g) - f(z)) / g, w)
        other = moments(gl.StochasticBackprop(order=1), lambda b: D.Gamma(torch.ones_like(b), b), 1.0, f, first, jump)
        assert mean == pytest.approx(other[0], abs=1e-8)
        assert variance <= other[1]


def test_dirichlet():
    """Beta by quadrature; Dirichlet by the closed form of a polynomial cost."""
    points = nodes(D.Beta(torch.tensor(3.0), torch.tensor(2.0)))
    jump = nodes(D.Beta(torch.tensor(1.0), torch.tensor(5.0)))

    def beta(a):
        return D.Beta(a, torch.tensor(2.0))

    for f in (torch.square, lambda z: (3 * z).cos(), lambda z: z.log()):
        found = moments(gl.StochasticBackprop(order=0), beta, 3.0, f, points, jump)[0]
        assert found == pytest.approx(slope(beta, 3.0, f), abs=1e-7)
    alpha = torch.tensor([0.8, 1.5, 2.0], requires_grad=True)
    s = alpha.sum()
    (exact,) = torch.autograd.grad(alpha[0] * alpha[1] / (s * (s + 1)), alpha)
    s = 4.3
    # E[(f(z + V (e_1 - z)) - f(z)) / V] / s for f = z_1 z_2, by the moments of z and V, is
    # E[-2 z_1 z_2 + z_2 - V z_2 (1 - z_1)] / s
    m2, m12 = 1.5 / s, 0.8 * 1.5 / (s * (s + 1))
    mean = (m2 - 2 * m12 - (m2 - m12) / (1 + s)) / s
    assert float(exact[0]) == pytest.approx(mean, abs=1e-12)


def paths(k, f, rule):
    z, w = rule
    t = torch.full_like(z, k).requires_grad_()
    loss = gl.ImplicitReparameterization().estimate(gamma(t), f, z.log()[None]).sum()
    return torch.autograd.grad(loss, t)[0], w


def first_form(k, f, df, rule):
    """Variance of f'(z + UV): U is integrated by Gauss-Legendre, V and z by double exponentials."""
    u, a = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(20))
    v, b = law(D.Exponential, 1.0)
    t = ((u[:, None] + 1) / 2 * v).flatten()
    return summary(df(rule[0][:, None] + t), rule[1][:, None] * (a[:, None] / 2 * b).flatten())


COSTS = {
    "square": (torch.square, lambda z: 2 * z, True),
    "tanh": (lambda z: (z - 3).tanh(), lambda z: (z - 3).cosh() ** -2, True),
    "exp": (lambda z: (-z).exp(), lambda z: -(-z).exp(), False),
    "log": (torch.log, lambda z: 1 / z, False),
}


@pytest.mark.parametrize("name", COSTS)
def test_implicit(name):
    f, df, wins = COSTS[name]
    rule = law(D.Gamma, 3.0, 1.0)
    mean, variance = first_form(3.0, f, df, rule)
    path = summary(*paths(3.0, f, rule))
    assert mean == pytest.approx(path[0], abs=1e-6)
    assert (variance < path[1]) == wins
    difference = moments(gl.StochasticBackprop(order=0), gamma, 3.0, f, rule, law(D.Exponential, 1.0))
    assert difference[1] < variance


@pytest.mark.parametrize("name", COSTS)
def test_covariance(name):
    """Var(implicit) - Var(F) = Cov(g, g f'^2)."""
    f, df, _ = COSTS[name]
    rule = law(D.Gamma, 3.0, 1.0)
    g, w = paths(3.0, lambda z: z, rule)
    x = g * df(rule[0]) ** 2
    covariance = float((w * g * x).sum() - (w * g).sum() * (w * x).sum())
    gap = summary(*paths(3.0, f, rule))[1] - first_form(3.0, f, df, rule)[1]
    assert gap == pytest.approx(covariance, abs=1e-5)


def test_costs():
    """A curvature rule against the path, per unit of noise: its variance falls as b^2, the path's stays."""
    ratios = []
    for b in (0.1, 0.02):
        points = law(D.Laplace, 0.0, b)
        second = moments(gl.StochasticBackprop(order=2), laplace, b, logsigmoid, points, points)[1]
        z, w = points
        ratios.append(summary(torch.sigmoid(-z) * z / b, w)[1] / second)
    assert ratios[0] > 1e4
    assert ratios[1] > 1e6
    q = D.Independent(gamma(torch.full((50,), 3.0, requires_grad=True)), 1)
    assert gl.StochasticBackprop(order=0).evaluations(q) == 51


def test_infinite():
    """The second moment of form D for log z at small z is pi^2 / (3 z)."""
    v, w = law(D.Exponential, 1.0)
    for z in (1e-6, 1e-8):
        moment = float((w * (torch.log1p(v / z) / v) ** 2).sum())
        assert moment * z == pytest.approx(math.pi**2 / 3, rel=1e-2)


def test_absolute():
    k = torch.tensor(2.0, requires_grad=True)
    gl.Quadrature(breakpoints=[1.0])(gamma(k), lambda z: (z - 1).abs()).backward()
    assert float(k.grad) == pytest.approx(0.7128425262, abs=1e-8)
