"""What chapter 13 claims: where the series breaks, and the exact rules, by quadrature and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
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


def nodes(q, panels=16, breakpoints=()):
    z, weight = gl.Quadrature(panels=panels, breakpoints=breakpoints).draw(q)
    w = (weight * q.log_prob(z).exp()).nan_to_num()
    return z[w > 1e-22], w[w > 1e-22]


def law(cls, *parameters: float, **options):
    return nodes(cls(*(torch.tensor(p) for p in parameters)), **options)


def grid(*rules):
    """The product of rules (points, weights); the points of one may be rows."""
    at = [i.flatten() for i in torch.meshgrid(*(torch.arange(len(w)) for _, w in rules), indexing="ij")]
    return [r[0][i] for r, i in zip(rules, at, strict=True)], math.prod(r[1][i] for r, i in zip(rules, at, strict=True))


def coin(jump, share=0.0):
    """Jumps (pick, u, v) of the order-0 rules of gamma shapes, beta and Dirichlet: u matters if pick, else v."""
    v, w = jump
    u, w_u = law(D.Uniform, 0.0, 1.0, panels=4)
    rows = torch.cat([torch.stack([0 * v, v**0, v], -1), torch.stack([u**0, u, u], -1)])
    weights = torch.cat([(1 - share) * w, share * w_u])
    return rows[weights > 0], weights[weights > 0]


def moments(estimator, make_q, theta, f, *rules):
    """Mean and variance of one gradient: the first rule integrates z, the others the jumps."""
    (z, *jumps), w = grid(*rules)
    t = torch.full_like(z, theta).requires_grad_()
    q = make_q(t)
    noise = estimator.draw(q)._replace(z=z[None])
    if jumps:
        columns = tuple(torch.column_stack(jumps).T[:, None])
        noise = noise._replace(jumps={key: columns for key in noise.jumps})
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
    assert moments(gl.StochasticBackprop(), gamma, 3.0, f, third, coin(jump))[0] == pytest.approx(exact, abs=1e-7)
    wide = nodes(D.Laplace(torch.tensor(0.0), torch.tensor(1.0)))
    exact = slope(laplace, 1.0, f)
    for order, jumps in ((2, wide), (1, jump), (0, third), (None, third)):
        found = moments(gl.StochasticBackprop(order=order), laplace, 1.0, f, wide, jumps)[0]
        assert found == pytest.approx(exact, abs=1e-7)


def test_remainder():
    points, jump = law(D.Laplace, 0.0, 0.5), law(D.Laplace, 0.0, 1.0)
    exact = slope(laplace, 0.5, logsigmoid)
    for n in (1, 2, 3, 4):
        rest = gl.StochasticBackprop(form="remainder", order=2 * n)
        assert moments(rest, laplace, 0.5, logsigmoid, points, jump)[0] == pytest.approx(exact, abs=1e-9)


def test_sweet_spot():
    jump = law(D.Laplace, 0.0, 1.0)
    for b, best in ((0.5, 3), (1.0, 2)):
        points = law(D.Laplace, 0.0, b)
        found = [
            moments(gl.StochasticBackprop(form="remainder", order=2 * n), laplace, b, logsigmoid, points, jump)[1]
            for n in range(1, 6)
        ]
        assert 1 + int(np.argmin(found)) == best


def rate(b):
    return D.Gamma(torch.ones_like(b), b)


def scale_difference(z, v, f):
    return f(z + v) + f(z - v) - 2 * f(z)


def rate_difference(z, v, f):
    return f(z) - f(z + v)


def test_divided():
    """The defaults for scale and rate: unbiased, the formulas, and never worse than the forms that they average."""
    wide, jump = law(D.Laplace, 0.0, 1.0), law(D.Exponential, 1.0)
    second, third = law(D.Gamma, 2.0, 1.0), law(D.Gamma, 3.0, 1.0)

    def toy(z):
        return (z - 0.49) ** 2

    cases = [
        (laplace, logsigmoid, wide, third, scale_difference, 2, {2: 0.0248, 1: 0.0735}, (0.01025, 0.369)),
        (laplace, torch.cos, wide, third, scale_difference, 2, {2: None, 1: None}, None),
        (laplace, torch.square, wide, third, scale_difference, 2, {2: None, 1: None}, None),
        (rate, toy, jump, second, rate_difference, 1, {1: 8.0}, (6.0, 37.2)),
        (rate, torch.tanh, jump, second, rate_difference, 1, {1: None}, None),
        (rate, lambda z: (-z).exp(), jump, second, rate_difference, 1, {1: None}, None),
    ]
    for make_q, f, points, far, difference, power, orders, stated in cases:
        mean, variance = moments(gl.StochasticBackprop(), make_q, 1.0, f, points, far)
        assert mean == pytest.approx(slope(make_q, 1.0, f), abs=1e-8)
        (z, g), w = grid(points, far)
        ours = summary(math.factorial(power) * difference(z, g, f) / g**power, w)
        assert (mean, variance) == pytest.approx(ours, abs=1e-8)
        for order, value in orders.items():
            estimator = gl.StochasticBackprop(order=order)
            form = moments(estimator, make_q, 1.0, f, points, wide if order == 2 else jump)[1]
            assert variance <= form + 1e-9
            assert value is None or form == pytest.approx(value, rel=3e-3)
        (z, v), w = grid(points, jump)
        plain = summary(difference(z, v, f), w)
        assert plain[0] == pytest.approx(mean, abs=1e-8)
        if stated is not None:
            assert (variance, plain[1]) == pytest.approx(stated, rel=2e-3)


def test_scaled():
    """The defaults at other parameters: unit jumps, and the powers of the scale in the weights."""
    third, second = law(D.Gamma, 3.0, 1.0), law(D.Gamma, 2.0, 1.0)
    for b in (0.3, 2.0):
        found = moments(gl.StochasticBackprop(), laplace, b, logsigmoid, law(D.Laplace, 0.0, b), third)[0]
        assert found == pytest.approx(slope(laplace, b, logsigmoid), abs=1e-8)

        def three(beta):
            return D.Gamma(torch.full_like(beta, 3.0), beta)

        found = moments(gl.StochasticBackprop(), three, b, torch.tanh, law(D.Gamma, 3.0, b), second)[0]
        assert found == pytest.approx(slope(three, b, torch.tanh), abs=1e-8)


def test_dirichlet():
    """Beta by quadrature; Dirichlet by the closed form of a polynomial cost."""
    points = nodes(D.Beta(torch.tensor(3.0), torch.tensor(2.0)))
    jump = nodes(D.Beta(torch.tensor(1.0), torch.tensor(5.0)))

    def beta(a):
        return D.Beta(a, torch.tensor(2.0))

    for f in (torch.square, lambda z: (3 * z).cos(), lambda z: z.log()):
        found = moments(gl.StochasticBackprop(), beta, 3.0, f, points, coin(jump))[0]
        assert found == pytest.approx(slope(beta, 3.0, f), abs=1e-7)
    low = nodes(D.Beta(torch.tensor(0.8), torch.tensor(2.0)))  # log-uniform jumps too
    mixed = coin(nodes(D.Beta(torch.tensor(1.0), torch.tensor(2.8))), share=0.1)
    for f in (torch.square, lambda z: (3 * z).cos()):
        found = moments(gl.StochasticBackprop(), beta, 0.8, f, low, mixed)[0]
        assert found == pytest.approx(slope(beta, 0.8, f), abs=1e-7)
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
    difference = moments(gl.StochasticBackprop(), gamma, 3.0, f, rule, coin(law(D.Exponential, 1.0)))
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
    """The default against the path: its variance in b falls as b^2, the path's stays."""
    ratios, far = [], law(D.Gamma, 3.0, 1.0)
    for b in (0.1, 0.02):
        points = law(D.Laplace, 0.0, b)
        divided = moments(gl.StochasticBackprop(), laplace, b, logsigmoid, points, far)[1]
        z, w = points
        ratios.append(summary(torch.sigmoid(-z) * z / b, w)[1] / divided)
    assert ratios[0] > 1e4
    assert ratios[1] > 1e6
    q = D.Independent(gamma(torch.full((50,), 3.0, requires_grad=True)), 1)
    assert gl.StochasticBackprop().evaluations(q) == 51
    q = D.Independent(laplace(torch.full((30,), 3.0, requires_grad=True)), 1)
    assert gl.StochasticBackprop().evaluations(q) == 61


def test_infinite():
    """The second moment of form D for log z at small z is pi^2 / (3 z)."""
    v, w = law(D.Exponential, 1.0)
    for z in (1e-6, 1e-8):
        moment = float((w * (torch.log1p(v / z) / v) ** 2).sum())
        assert moment * z == pytest.approx(math.pi**2 / 3, rel=1e-2)


def above(delta, k):
    """Trapezoids in log z."""
    s = torch.linspace(math.log(delta), math.log(40), 401)
    w = s.exp() * gamma(torch.tensor(k)).log_prob(s.exp()).exp() * (s[1] - s[0])
    w[[0, -1]] /= 2
    return s.exp(), w


def test_mixture():
    """The package's jumps for a shape below 2: log z has a finite variance, and f = z no longer none."""
    jump = coin(law(D.Exponential, 1.0, breakpoints=(1.0,)), share=0.1)
    default = gl.StochasticBackprop()
    for k, variance, implicit in ((1.0, 9.759, 0.9004), (0.6, 123.0, 6.953)):
        points = above(1e-40, k)
        found = moments(default, gamma, k, torch.log, points, jump)
        assert found[0] == pytest.approx(float(torch.polygamma(1, torch.tensor(k))), abs=1e-6)
        assert found[1] == pytest.approx(variance, rel=1e-3)
        assert summary(*paths(k, torch.log, points))[1] == pytest.approx(implicit, rel=1e-3)
        second = [moments(default, gamma, k, torch.log, above(d, k), jump)[1] for d in (1e-8, 1e-10)]
        assert second[1] < 1.1 * second[0]
    mean, variance = moments(default, gamma, 1.0, lambda z: z, above(1e-40, 1.0), jump)
    assert mean == pytest.approx(1.0, abs=1e-6)
    assert variance == pytest.approx(0.00717, rel=1e-2)


def test_absolute():
    k = torch.tensor(2.0, requires_grad=True)
    gl.Quadrature(breakpoints=[1.0])(gamma(k), lambda z: (z - 1).abs()).backward()
    assert float(k.grad) == pytest.approx(0.7128425262, abs=1e-8)
