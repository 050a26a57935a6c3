"""What chapter 12 claims: rules of stochastic backpropagation against quadrature and closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from torch import distributions as D

import gradlab as gl
from gradlab.rules import from_log_cf, log_mgf
from gradlab.taylor import derivatives


def leaf(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def slope(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value + 0 * theta.sum(), theta, retain_graph=True)[0]


def mean(q, f, breakpoints=()) -> torch.Tensor:
    with torch.no_grad():
        return gl.Quadrature(breakpoints)(q, f)


def coefficients(kappa, theta) -> torch.Tensor:
    return torch.stack([slope(x, theta) / math.factorial(n) for n, x in enumerate(kappa, 1)])


def log_laplace(p, w):
    return 1j * p.loc * w - torch.log(1 + (p.scale * w) ** 2)


def log_gamma(p, w):
    return -p.concentration * torch.log(1 - 1j * w / p.rate)


def beta_moments(alpha, beta, order):
    return list(torch.cumprod(torch.stack([(alpha + j) / (alpha + beta + j) for j in range(order)]), 0))


def from_moments(moments):
    kappa, m = [], [1.0, *moments]
    for n in range(1, len(m)):
        kappa.append(m[n] - sum(math.comb(n - 1, j - 1) * x * m[n - j] for j, x in enumerate(kappa, 1)))
    return kappa


W = torch.linspace(-12, 12, 9601, dtype=torch.float64)
F_HAT = math.sqrt(math.tau) * (-(W**2) / 2).exp()


@pytest.mark.parametrize(
    ("make_q", "phi"),
    [
        (lambda t: D.Normal(0.7, t), lambda t: (0.7j * W - (t * W) ** 2 / 2).exp()),
        (lambda t: D.Laplace(t, 1.3), lambda t: (1j * t * W).exp() / (1 + (1.3 * W) ** 2)),
        (lambda t: D.Laplace(0.7, t), lambda t: (0.7j * W).exp() / (1 + (t * W) ** 2)),
        (lambda t: D.Gamma(t, 0.8), lambda t: (1 - 1j * W / 0.8) ** -t),
        (lambda t: D.Gamma(2.3, 1 / t), lambda t: (1 - 1j * t * W) ** -2.3),
        (lambda t: D.Uniform(-t, t), lambda t: torch.sinc(t * W / math.pi)),
    ],
)
def test_parseval(make_q, phi):
    t = leaf(1.2)
    exact = slope(gl.Quadrature()(make_q(t), lambda z: (-(z**2) / 2).exp()), t)
    found = slope((F_HAT * phi(t)).real.sum() * (W[1] - W[0]) / math.tau, t)
    torch.testing.assert_close(found, exact, atol=1e-8, rtol=0)


def test_the_characteristic_function_of_laplace():
    q = D.Laplace(tensor(0.7), tensor(1.3))
    f = [mean(q, g, [0.7]) for g in (lambda z: (0.9 * z).cos(), lambda z: (0.9 * z).sin())]
    with_mu = np.exp(0.63j) / (1 + (1.3 * 0.9) ** 2)
    printed = np.exp(0.9j) / (1 + (1.3 * 0.9) ** 2)
    assert abs(complex(f[0], f[1]) - with_mu) < 1e-9
    assert abs(complex(f[0], f[1]) - printed) > 0.1


def test_lattice():
    assert math.isclose(np.sin(math.pi / 2) / (math.pi / 2), 2 / math.pi)
    assert math.isclose(2.5 + 2 / math.pi * (2 + 3) / 2, 4.092, abs_tol=5e-4)


def test_coefficients():
    n = torch.arange(1, 9, dtype=torch.float64)
    mu, v, k, b, lam, alpha = (leaf(x) for x in (0.7, 0.64, 2.3, 1.3, 1.7, 2.0))
    laplace, gamma = D.Laplace(mu, v.sqrt()), D.Gamma(k, 1 / b)
    one = (n == 1).double()

    def kummer(p, w):
        m = beta_moments(p.concentration1, p.concentration0, 9)
        return (1 + sum(x * (1j * w) ** j / math.factorial(j) for j, x in enumerate(m, 1))).log()

    cases = [
        (log_laplace, laplace, mu, one),
        (log_laplace, laplace, v, torch.where(n % 2 == 0, v ** (n / 2 - 1), 0.0)),
        (log_gamma, gamma, k, b**n / n),
        (log_gamma, gamma, b, k * b ** (n - 1)),
        (lambda p, w: p.rate * (torch.exp(1j * w) - 1), D.Poisson(lam), lam, 1 / (n + 1).lgamma().exp()),
        (lambda p, w: 1j * w * p.loc - (p.scale * w) ** 2 / 2, D.Normal(mu, v.sqrt()), v, (n == 2) / 2),
        (kummer, D.Beta(alpha, tensor(3.0)), alpha, coefficients(from_moments(beta_moments(alpha, 3.0, 8)), alpha)),
    ]  # fmt: skip
    for log_cf, p, theta, exact in cases:
        torch.testing.assert_close(coefficients(from_log_cf(log_cf)(p, 8), theta), exact, atol=1e-10, rtol=0)
    known = tensor([0.12, -0.00133333, -0.00053696, -6.6156e-6])
    torch.testing.assert_close(cases[-1][-1][:4], known, atol=5e-9, rtol=0)


def test_the_radius_of_beta():
    root = mpmath.findroot(lambda s: mpmath.hyp1f1(2, 5, s), mpmath.mpc(1.7, 10.2))
    assert abs(root - mpmath.mpc(1.7307, 10.1560)) < 1e-3
    assert math.isclose(abs(root), 10.302, abs_tol=1e-3)
    ring = [mpmath.hyp1f1(2, 5, 10.0 * mpmath.expjpi(2 * x / 400)) for x in range(400)]
    turns = sum(mpmath.arg(b / a) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)) / (2 * mpmath.pi)
    assert abs(turns) < 1e-6  # no zero inside


def test_gauss():
    x, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(50))
    eps, mass = torch.cartesian_prod(x, x), torch.outer(w, w).flatten() / math.tau

    def f(z):
        return (-((z[..., 0] - z[..., 1] / 2) ** 2) / 4).exp() * (z[..., 1] + z[..., 0]).sin()

    def normal(t):
        return torch.stack([t, t**2]), torch.stack([torch.ones_like(t), 0 * t, t, 0.5 + t**2]).reshape(2, 2)

    t = leaf(0.4)
    loc, low = normal(t)
    z = (loc + eps @ low.T).detach()
    exact = slope((mass * f(loc + eps @ low.T)).sum(), t)
    d_loc = torch.func.jacrev(lambda t: normal(t)[0])(t.detach())
    d_cov = torch.func.jacrev(lambda t: normal(t)[1] @ normal(t)[1].T)(t.detach())
    gradient = mass @ torch.func.vmap(torch.func.grad(f))(z)
    hessian = torch.einsum("n,nij", mass, torch.func.vmap(torch.func.jacrev(torch.func.grad(f)))(z))
    torch.testing.assert_close(d_loc @ gradient + (d_cov * hessian).sum() / 2, exact, atol=1e-8, rtol=0)


def test_the_series_of_a_normal_is_its_rule():
    p = D.Normal(leaf([0.3, -0.5]), leaf([0.8, 1.2]))
    series = gl.StochasticBackprop(4, form="series", order=2)
    q = D.Independent(p, 1)
    noise = series.draw(q)
    loss = series.estimate(q, lambda z: z.sin().prod(-1), noise)
    by_loc, by_scale = torch.autograd.grad(loss, (p.loc, p.scale))
    z = noise.z
    other = z.flip(-1).sin()
    torch.testing.assert_close(by_loc, (z.cos() * other).mean(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(by_scale, (-p.scale * z.sin() * other).mean(0).detach(), atol=1e-10, rtol=0)


def test_dirac():
    theta = leaf(0.6)
    f = (2 * (1.5 * theta).tanh()).sin() ** 3
    a = math.tanh(0.9)
    chain = 1.5 * (1 - a**2) * 2 * math.cos(2 * a) * 3 * math.sin(2 * a) ** 2
    torch.testing.assert_close(slope(f, theta), tensor(chain))
    for sigma in (1.0, 1e-6):
        kl = D.kl_divergence(D.Normal(tensor(0.7), sigma), D.Normal(tensor(0.7), 2 * sigma))
        assert math.isclose(kl, math.log(2) - 3 / 8, abs_tol=1e-10)


def power(z, n=0):
    return math.perm(4, n) * z ** max(4 - n, 0)


def exponential(z, n=0):
    return 0.3**n * (0.3 * z).exp()


def cosine(z, n=0):
    return 0.7**n * (0.7 * z + n * math.pi / 2).cos()


@pytest.mark.parametrize("f", [power, exponential, cosine])
@pytest.mark.parametrize(
    ("make_q", "a"),
    [
        (lambda t: D.Laplace(tensor(0.5), t), lambda n: 2 * 0.8 ** (n - 1) * (n % 2 == 0)),
        (lambda t: D.Gamma(t, tensor(1.3)), lambda n: 1.3**-n / n),
        (lambda t: D.Gamma(tensor(2.3), t), lambda n: -2.3 * 0.8 ** -(n + 1)),
    ],
)
def test_series(make_q, a, f):
    for order in (1, 2, 5, 8):
        series, t = gl.StochasticBackprop(5, form="series", order=order), leaf(0.8)
        noise = series.draw(make_q(t))
        found = slope(series.estimate(make_q(t), f, noise), t)
        exact = sum(a(n) * f(noise.z, n).mean() for n in range(1, order + 1))
        torch.testing.assert_close(found, tensor(float(exact)), atol=1e-10, rtol=0)


def series_mean(q, f, a, order):
    """The mean of the cut series, by quadrature."""
    return sum(
        a(n) * mean(q, lambda z, n=n: derivatives(f, z, torch.ones_like(z), n, taylor=True)[n])
        for n in range(1, order + 1)
    )


def laplace_mean(x, terms):
    return sum((-(x**2)) ** n for n in range(1, terms + 1)) / (1 + x**2)


def laplace_exact(x):
    return -(x**2) / (1 + x**2) ** 2


def gamma_mean(eps, terms):
    return sum((-eps) ** n / n for n in range(1, terms + 1)) * (1 + eps) ** -2


def gamma_exact(eps):
    return -math.log1p(eps) * (1 + eps) ** -2


def test_radius():
    q = D.Laplace(tensor(0.0), tensor(1.0))
    found = series_mean(q, lambda z: (0.9 * z).cos(), lambda n: float(n % 2 == 0), 4)
    assert math.isclose(found, laplace_mean(0.9, 2), abs_tol=1e-8)
    found = series_mean(D.Gamma(tensor(2.0), tensor(1.0)), lambda z: (-0.49 * z).exp(), lambda n: 1 / n, 4)
    assert math.isclose(found, gamma_mean(0.49, 4), abs_tol=1e-8)
    assert math.isclose(laplace_mean(0.5, 20), laplace_exact(0.5), abs_tol=1e-10)
    assert math.isclose(gamma_mean(0.49, 40), gamma_exact(0.49), abs_tol=1e-10)
    scale = leaf(1.0)
    exact = slope(gl.Quadrature(breakpoints=[0.0])(D.Laplace(0.0, scale), lambda z: (1.1 * z).cos()), scale) / 2
    assert math.isclose(exact, laplace_exact(1.1), abs_tol=1e-8)


def test_chi_squared():
    nu = tensor(5.0)
    found = series_mean(D.Gamma(nu / 2, tensor(0.5)), lambda z: z * z, lambda n: 2 ** (n - 1) / n, 2)
    assert math.isclose(found, 2 * nu + 2, abs_tol=1e-7)


def test_diverges():
    assert laplace_mean(1.1, 40) > 500
    assert abs(gamma_mean(2.0, 40)) > 1e9
    scale = leaf(1.0)
    cauchy = slope((-2 * scale).exp(), scale)  # E cos 2z
    assert math.isclose(cauchy, -2 * math.exp(-2))


def dirichlet_term(n, w, alpha):
    s = alpha.sum()
    falling = math.prod(float(s) - j for j in range(1, n + 1))
    return -((-1) ** n) * float(math.factorial(n - 1)) * (w - w @ alpha / s) / falling


def test_dirichlet():
    w, alpha = tensor([1.0, -0.5, 2.0]), leaf([2.0, 3.0, 4.0])
    shape = alpha.detach()
    series, q = gl.StochasticBackprop(5, form="series", order=6), D.Dirichlet(alpha)
    noise = series.draw(q)
    found = torch.autograd.grad(series.estimate(q, lambda z: z @ w, noise), alpha)[0]
    s = noise.z.sum(-1, keepdim=True)
    ahead = w - noise.z / s @ w[:, None]
    exact = sum(-math.factorial(n - 1) * ahead / (-s) ** n for n in range(1, 7)).mean(0)
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)
    # E S^-n for S ~ Gamma(9, 1), by quadrature: the means of the terms
    for n in (1, 2, 5):
        power = mean(D.Gamma(tensor(9.0), tensor(1.0)), lambda x, n=n: x**-n)
        term = -math.factorial(n - 1) * (-1) ** n * (w - w @ shape / 9) * power
        torch.testing.assert_close(dirichlet_term(n, w, shape), term, atol=1e-9, rtol=0)
    terms = [float(dirichlet_term(n, tensor([1.0, 0.0]), tensor([3.0, 2.0]))[0]) for n in range(1, 5)]
    np.testing.assert_allclose(terms, [0.1, -1 / 30, 1 / 30, -0.1])
    for order in (1, 2, 3, 4):
        error = -((-1) ** order) * math.factorial(order) / math.prod(range(5 - order, 6)) * 0.4
        assert math.isclose(sum(terms[:order]) - 0.08, error, abs_tol=1e-12)
    many = np.cumsum([float(dirichlet_term(n, tensor([1.0, 0.0]), tensor([20.0, 20.0]))[0]) for n in range(1, 40)])
    gap = abs(many - 0.0125)
    assert gap[14] < gap[4]
    assert gap[14] < gap[29]
    a, b = leaf(3.0), tensor(2.0)
    m = beta_moments(a, b, 3)
    c = coefficients(from_moments(m), a)
    direct = 3 * c[0] * m[1] + 6 * c[1] * m[0] + 6 * c[2]
    torch.testing.assert_close(direct, slope(m[2], a), atol=1e-12, rtol=0)


def test_closed_forms():
    k, mu = leaf(2.0), leaf(1.0)
    loss = gl.Quadrature()(D.Gamma(k, 1 / mu), lambda z: (-0.49 * z).exp())
    by_k, by_mu = torch.autograd.grad(loss, (k, mu))
    assert math.isclose(by_k, -math.log(1.49) * 1.49**-2, abs_tol=1e-9)
    assert math.isclose(by_k, -0.17962079, abs_tol=1e-8)
    assert math.isclose(by_mu, -0.29625608, abs_tol=1e-8)
    assert math.isclose(-math.log(0.51) * 1.49**-2, 0.3032947, abs_tol=1e-6)
    q = D.Gamma(k, 1 / mu)
    factors = torch.autograd.grad(log_mgf(q, tensor(-0.49)), (k, mu))
    torch.testing.assert_close(torch.stack(factors) * 1.49**-2, torch.stack([by_k, by_mu]), atol=1e-9, rtol=0)
    loss = gl.Quadrature()(D.Gamma(k, tensor(1.0)), lambda z: (z - 0.49) ** 2)
    assert math.isclose(slope(loss, k), 2 * (2 - 0.49) + 1, abs_tol=1e-8)


def test_a_linear_predictor():
    """The exponential rule for two different factors, in closed form."""
    k, b, c, w = leaf(2.0), leaf(0.5), -0.7, (0.6, 1.1)
    loss = (1 - c * w[0]) ** -k / (1 - (b * c * w[1]) ** 2)  # gamma with scale 1, Laplace(0, b)
    by_k, by_b = torch.autograd.grad(loss, (k, b))
    torch.testing.assert_close(by_k, -math.log(1 - c * w[0]) * loss)
    torch.testing.assert_close(by_b, 2 * b * (c * w[1]) ** 2 / (1 - (b * c * w[1]) ** 2) * loss)


def test_poisson():
    j, lam = torch.arange(60.0, dtype=torch.float64), leaf(2.3)
    shifted = D.Poisson(lam).log_prob(j).exp() @ ((j + 1) ** 3 - j**3)
    torch.testing.assert_close(shifted, slope(lam + 3 * lam**2 + lam**3, lam), atol=1e-10, rtol=0)


def test_wald():
    m = leaf(1.2)
    p = SimpleNamespace(mean=m)
    kappa = from_log_cf(lambda p, w: 2.0 / p.mean * (1 - torch.sqrt(1 - 1j * p.mean**2 * w)))(p, 3)
    torch.testing.assert_close(coefficients(kappa, m), tensor([1.0, 3 * 1.44 / 4, 15 * 1.44**2 / 24]))
