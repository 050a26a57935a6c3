"""What chapter 05 claims and no test of the package keeps: formulas against quadrature, with no sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as D

import gradlab as gl
from gradlab.paths import at, path

LOCATION_SCALE = [D.Normal, D.Laplace, gl.Logistic, D.Cauchy]


def copies(theta: float | Tensor, z: Tensor) -> Tensor:
    return torch.as_tensor(theta).expand(z.shape).clone().requires_grad_()


def packaged(make_q, theta: float | Tensor, z: Tensor, through=at) -> Tensor:
    theta = copies(theta, z)
    return torch.autograd.grad(through(make_q(theta), z).sum(), theta)[0]


def from_cdf(make_q, theta: float, z: Tensor) -> Tensor:
    theta = copies(theta, z)
    q = make_q(theta)
    return -torch.autograd.grad(q.cdf(z).sum(), theta)[0] / q.log_prob(z).exp().detach()


@pytest.mark.parametrize("cls", LOCATION_SCALE)
def test_location_scale(cls):
    """The implicit velocity is (1, eps), the explicit one."""
    eps = torch.linspace(-3, 3, 61)
    z = 0.7 + 1.3 * eps
    torch.testing.assert_close(from_cdf(lambda m: cls(m, 1.3), 0.7, z), torch.ones(61), rtol=0, atol=1e-10)
    torch.testing.assert_close(from_cdf(lambda s: cls(0.7, s), 1.3, z), eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(packaged(lambda s: cls(0.7, s), 1.3, z), eps, rtol=0, atol=1e-10)


def test_transport():
    """Following the velocity from shape 1 to shape 5 keeps u = F(z); a proportional move does not."""
    u, shapes = torch.linspace(0.05, 0.95, 10), torch.linspace(1, 5, 81)

    def error(v):
        z = -torch.log1p(-u)
        for t, h in zip(shapes[:-1], shapes.diff(), strict=True):
            a = v(t, z)
            b = v(t + h / 2, z + h / 2 * a)
            c = v(t + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + v(t + h, z + h * c))
        return (torch.special.gammainc(shapes[-1], z) - u).abs().max()

    assert error(lambda k, z: packaged(lambda k: D.Gamma(k, 1.0), k, z)) < 1e-6
    assert error(lambda k, z: z / k) > 0.05


@pytest.mark.parametrize(
    "name, key",
    [
        ("gamma_exp", "concentration"),
        ("gamma_small", "concentration"),
        ("student_cos", "df"),
        ("von_mises_cos", "concentration"),
        ("truncated_square", "scale"),
    ],
)
@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_by_parts(name, key, leak):
    """E[f' v] is the gradient; another solution of the continuity equation leaks through the ends."""
    p = gl.problem(name)

    @torch.enable_grad()
    def integrand(z):
        theta, x = copies(p.params[key], z), copies(z, z)
        (fv,) = torch.autograd.grad(p.f(at(p.make_q(p.params | {key: theta}), z)).sum(), theta)
        (slope,) = torch.autograd.grad(p.f(x).sum(), x)
        return fv + leak * slope / p.q().log_prob(z).exp()

    with torch.no_grad():
        value = gl.Quadrature()(p.q(), integrand)
    exact = p.exact()[0][key]
    if not leak:
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-6)
    elif name == "gamma_exp":
        torch.testing.assert_close(value, exact - leak, rtol=0, atol=1e-6)


def test_sum_of_exponentials():
    """The velocity is the conditional mean of the explicit path, and the variances are 92.09 and 99."""
    z = torch.linspace(1e-4, 60, 200_001)
    a = copies(1.0, z)
    cdf = 1 - (2 * (-a * z).exp() - a * (-2 * z).exp()) / (2 - a)
    q = 2 * ((-z).exp() - (-2 * z).exp())
    v = -torch.autograd.grad(cdf.sum(), a)[0] / q
    centre = z < 15  # beyond, the cdf is 1 to machine precision
    mean = 1 + z / torch.expm1(-z)  # -E[x1 | z]
    torch.testing.assert_close(v[centre], mean[centre], rtol=0, atol=1e-6)
    assert torch.trapezoid(q * 2 * z * mean, z).item() == pytest.approx(-5, abs=1e-6)
    assert torch.trapezoid(q * (2 * z * mean) ** 2, z).item() - 25 == pytest.approx(92.0901, abs=1e-3)
    moments = 24 + 2 * 6 * 0.5 + 2 * 0.5  # E[(x1 + x2)^2 x1^2]
    assert 4 * moments - 25 == 99


def test_beta_through_two_gammas_varies_more():
    """The path through two gammas cannot beat the velocity of the beta's own cdf, which torch has."""
    p, variance = gl.problem("beta_square"), {}
    own = gl.Reparameterization(sampler=lambda q, size: q.rsample(size))  # torch's
    for name, e in (("gammas", gl.ImplicitReparameterization()), ("own", own)):
        grads = gl.replicate(lambda x, e=e: e(p.make_q(x), p.f), p.params, 50_000)
        variance[name] = grads["concentration1"].var().item()
    assert 1.1 < variance["gammas"] / variance["own"] < 1.4


def test_limits():
    """For Poisson the formula gives 1; the difference is right, the derivative is not."""
    n, rate = torch.arange(60.0), copies(2.3, torch.zeros(60))
    q = D.Poisson(rate)
    mass = q.log_prob(n).exp()
    slope = torch.autograd.grad(torch.special.gammaincc(n + 1, rate).sum(), rate)[0]  # the Poisson cdf
    torch.testing.assert_close(-slope[:20] / mass.detach()[:20], torch.ones(20))
    assert (mass * (2 * n + 1)).sum().item() == pytest.approx(5.6)
    assert (mass * 2 * n).sum().item() == pytest.approx(4.6)
    x = torch.linspace(-math.pi, math.pi, 20_001)  # von Mises with location 2: E[z] and its derivative
    z = lambda mu: torch.trapezoid(x * D.VonMises(mu, 2.2).log_prob(x).exp(), x)  # noqa: E731
    exact = (z(2 + 1e-4) - z(2 - 1e-4)) / 2e-4
    cut = D.VonMises(2.0, 2.2).log_prob(torch.tensor(math.pi)).exp()
    torch.testing.assert_close(exact, 1 - 2 * math.pi * cut, rtol=0, atol=1e-5)


def two_modes(logit: Tensor, m: float) -> D.Distribution:
    logits = torch.stack([logit, torch.zeros_like(logit)], -1)
    loc = torch.tensor([-m, m]).expand(logits.shape)
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(loc, torch.ones_like(loc)))


@pytest.mark.parametrize("m", [1.0, 1.5, 2.0, 5.0, 10.0])
def test_separated_modes(m):
    """Both gradients are -m/2; the velocity at the centre, and which variance is smaller."""
    z = torch.linspace(-m - 10, m + 10, 40_001)
    logits = copies(0.0, z)
    log_prob = two_modes(logits, m).log_prob(z)
    (score,) = torch.autograd.grad(log_prob.sum(), logits)
    q, v = log_prob.exp().detach(), packaged(lambda x: two_modes(x, m), 0.0, z, path)
    variances = []
    for g in (v, z * score):
        assert torch.trapezoid(q * g, z).item() == pytest.approx(-m / 2, rel=1e-6)
        variances.append(torch.trapezoid(q * g**2, z).item() - m**2 / 4)
    assert (variances[0] < variances[1]) == (m < 1.6)
    assert m < 10 or variances[0] > 1e20
    normal, at_m = D.Normal(0.0, 1.0), torch.tensor(m)
    speed = (normal.cdf(at_m) - 0.5) / (2 * normal.log_prob(at_m).exp())
    torch.testing.assert_close(-v[20_000], speed, rtol=1e-6, atol=0)
