"""The formulas of chapter 02, without Monte Carlo: noise by quadrature, discrete values by enumeration."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import grad
from torch.autograd.functional import hessian
from torch.distributions import Beta, Categorical, Gamma, Laplace, Normal, Poisson, StudentT, Uniform

from gradlab import Enumerate, Quadrature, ScoreFunction, magic_box, problem

MU, SIGMA, MEAN_COST = 0.7, 1.3, 2.18
NODE, WEIGHT = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(12))
WEIGHT = WEIGHT / WEIGHT.sum()  # exact for polynomials of the noise up to degree 23
SETTINGS = [(0.7, 1.3, 0.0), (0.7, 0.05, 1.0), (0.0, 0.1, -3.0), (-2.0, 0.8, 5.0)]


def close(value, exact, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(exact, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def every_z(q, surrogate):
    """The mean of a surrogate over z ~ q, the weights held fixed."""
    z, weight = Quadrature().draw(q)
    weight = (weight * q.log_prob(z).exp()).detach()
    inside = weight > 0
    return (weight[inside] * surrogate(q, z[inside].detach())).sum(0)


def gradients(mu, sigma, f):
    """The package's one-sample gradients at the nodes of the noise."""
    loc, scale = (torch.full_like(NODE, x).requires_grad_() for x in (mu, sigma))
    loss = ScoreFunction().estimate(Normal(loc, scale), f, (mu + sigma * NODE)[None])
    return grad(loss.sum(), (loc, scale))


def mean(g):
    return (WEIGHT * g).sum()


def variance(g):
    return mean((g - mean(g)) ** 2)


def test_identity():
    by_mu, by_sigma = gradients(MU, SIGMA, lambda z: z**2)
    close(mean(by_mu), 1.4)
    close(mean(by_sigma), 2.6)


def test_areas():
    q = Normal(torch.tensor(MU, dtype=torch.float64), SIGMA)
    with torch.no_grad():
        for c in (0.0, 10.0, 100.0):
            close(Quadrature()(q, lambda z, c=c: (z**2 + c) * (z - MU) / SIGMA**2), 1.4)


def test_surrogate():
    p = t(MU, SIGMA, 0.0)
    z = torch.linspace(-2, 3, 5, dtype=torch.float64)

    def box(p):
        return every_z(Normal(p[0], p[1]), lambda q, z: magic_box(q.log_prob(z)) * (z - p[2]) ** 2)

    def post(p):
        return every_z(Normal(p[0], p[1]), lambda q, z: ((z - p[2]) ** 2).detach() * q.log_prob(z))

    def package(p):
        return ScoreFunction(5).estimate(Normal(p[0], p[1]), lambda z: (z - p[2]) ** 2, z)

    def plain(p):
        q = Normal(p[0], p[1])
        return ((q.log_prob(z) - q.log_prob(z).detach()).exp() * (z - p[2]) ** 2).mean(0)

    close(box(p), MEAN_COST)
    close(grad(box(p), p)[0], [1.4, 2.6, -1.4])
    close(hessian(box, p), [[2.0, 0.0, -2.0], [0.0, 2.0, 0.0], [-2.0, 0.0, 2.0]])
    close(post(p), -MEAN_COST * math.log(2 * math.pi * SIGMA**2) / 2 - (MU**2 + 3 * SIGMA**2) / 2)
    close(grad(post(p), p)[0], [1.4, 2.6, 0.0])  # nothing for w
    curvature = hessian(post, p)
    close(curvature[0, 0], -MEAN_COST / SIGMA**2)
    close(curvature[1, 1], (MEAN_COST - 3 * (MU**2 + 3 * SIGMA**2)) / SIGMA**2)
    for derivative in (lambda f: f(p), lambda f: grad(f(p), p)[0], lambda f: hessian(f, p)):
        close(derivative(package), derivative(plain), 1e-12)


def test_undetached():
    for q, noise, weight, mean_cost in (
        (Normal(*t(MU, SIGMA)), NODE, WEIGHT, MEAN_COST),
        (Laplace(*t(0.4, SIGMA)), *laplace_nodes(), 0.4**2 + 2 * SIGMA**2),
    ):
        z = q.loc + q.scale * noise
        loss = (weight * (z**2).detach() * q.log_prob(z)).sum()
        close(grad(loss, (q.loc, q.scale)), [0.0, -mean_cost / SIGMA])


def laplace_nodes():
    q = Laplace(torch.zeros((), dtype=torch.float64), 1.0)
    z, weight = Quadrature(breakpoints=[0.0]).draw(q)
    return z, weight * q.log_prob(z).exp()


@pytest.mark.parametrize(
    "law, params", [(Normal, (0.7, 1.3)), (Gamma, (0.4, 1.1)), (Beta, (0.7, 1.6)), (StudentT, (4.5,))]
)
def test_mean_zero(law, params):
    p = t(*params)
    close(grad(every_z(law(*p), lambda q, z: q.log_prob(z)), p)[0], torch.zeros(len(params)))


@pytest.mark.parametrize("name", ["bernoulli_3", "categorical_3", "binomial_square"])
def test_discrete(name):
    it = problem(name)
    params = {k: p.clone().requires_grad_() for k, p in it.params.items()}
    q = it.q(params)
    z = Enumerate().draw(q)
    loss = (q.log_prob(z).exp().detach() * magic_box(q.log_prob(z)) * it.f(z)).sum()
    for g, exact in zip(grad(loss, list(params.values())), it.exact()[0].values(), strict=True):
        close(g, exact)


def test_discrete_poisson():
    rate = t(2.3)
    z = torch.arange(80, dtype=torch.float64)
    for f, exact in (
        (z**2, 2 * 2.3 + 1),
        ((-z / 2).exp(), math.expm1(-0.5) * math.exp(2.3 * math.expm1(-0.5))),
    ):
        log_prob = Poisson(rate).log_prob(z)
        (g,) = grad((log_prob.exp().detach() * magic_box(log_prob) * f).sum(), rate)
        close(g, [exact])


def test_bandit():
    reward = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (exact,) = grad(Enumerate()(Categorical(logits=logits), lambda z: -reward[z]), logits)
    z = torch.arange(3)  # all arms once: the probabilities are equal
    for shift in (0.0, 10.0):
        loss = ScoreFunction(3).estimate(Categorical(logits=logits), lambda z, s=shift: -(reward[z] + s), z)
        (g,) = grad(loss, logits)
        close(g, exact)
    close(exact, [1 / 6, 0.0, -1 / 6])


@pytest.mark.parametrize("mu, sigma, c", SETTINGS)
def test_variances(mu, sigma, c):
    """Statements 4.18 and 4.20, their completed squares, and 4.22."""
    by_mu, by_sigma = gradients(mu, sigma, lambda z: z**2 + c)
    a = mu**2 + c
    close(variance(by_mu), a**2 / sigma**2 + 15 * sigma**2 + 14 * mu**2 + 6 * c)
    close(variance(by_mu), (a + 3 * sigma**2) ** 2 / sigma**2 + 2 * (4 * mu**2 + 3 * sigma**2))
    close(variance(by_sigma), 2 * a**2 / sigma**2 + 60 * mu**2 + 74 * sigma**2 + 20 * c)
    close(variance(by_sigma), 2 * (a + 5 * sigma**2) ** 2 / sigma**2 + 8 * (5 * mu**2 + 3 * sigma**2))
    path_mu, path_sigma = 2 * (mu + sigma * NODE), 2 * NODE * (mu + sigma * NODE)
    close(variance(path_mu), 4 * sigma**2)
    close(variance(path_sigma), 4 * mu**2 + 8 * sigma**2)
    assert variance(by_mu) - variance(path_mu) > 2 * (4 * mu**2 + sigma**2) - 1e-9
    assert variance(by_sigma) - variance(path_sigma) > 4 * (9 * mu**2 + 4 * sigma**2) - 1e-9


@pytest.mark.parametrize("mu, sigma, c", SETTINGS)
def test_baseline(mu, sigma, c):
    def var(b, k):
        return variance(gradients(mu, sigma, lambda z: z**2 + c - b)[k])

    best = [c + mu**2 + 3 * sigma**2, c + mu**2 + 5 * sigma**2]
    least = [2 * (4 * mu**2 + 3 * sigma**2), 8 * (5 * mu**2 + 3 * sigma**2)]
    mean_cost = c + mu**2 + sigma**2
    for k in (0, 1):
        close(var(best[k], k), least[k])
        assert var(best[k] + 0.1, k) > least[k]
        assert var(best[k] - 0.1, k) > least[k]
    close(var(mean_cost, 0), 8 * mu**2 + 10 * sigma**2)
    close(var(mean_cost, 1), 40 * mu**2 + 56 * sigma**2)


def test_dimension():
    """The formula in d dimensions, on the product of the nodes for d = 1, 2 and 3."""
    m, v = MU**2 + SIGMA**2, 2 * SIGMA**4 + 4 * MU**2 * SIGMA**2
    for d in (1, 2, 3):
        e = torch.cartesian_prod(*[NODE] * d).reshape(-1, d)
        w = torch.cartesian_prod(*[WEIGHT] * d).reshape(-1, d).prod(-1)
        best = MU**2 + 3 * SIGMA**2 + (d - 1) * m
        for b, square in ((0.0, best**2), (best, 0.0)):
            g = e[:, 0] / SIGMA * (((MU + SIGMA * e) ** 2).sum(-1) - b)
            value = (w * (g - 2 * MU) ** 2).sum()
            close(value, (square + (d - 1) * v) / SIGMA**2 + 2 * (4 * MU**2 + 3 * SIGMA**2))


def test_samples():
    """Two samples, all pairs of nodes: half the variance of one."""
    i, j = torch.cartesian_prod(torch.arange(12), torch.arange(12)).T
    loc = torch.full((144,), MU, dtype=torch.float64, requires_grad=True)
    z = MU + SIGMA * torch.stack([NODE[i], NODE[j]])
    (g,) = grad(ScoreFunction(2).estimate(Normal(loc, SIGMA), lambda z: z**2, z).sum(), loc)
    one = variance(gradients(MU, SIGMA, lambda z: z**2)[0])
    close((WEIGHT[i] * WEIGHT[j] * (g - 1.4) ** 2).sum(), one / 2)


def test_moving_support():
    edge = t(2.0)[0]
    q = Uniform(0.0, edge)
    with pytest.raises(TypeError, match="support does not depend on its parameters"):
        ScoreFunction()(q, lambda z: z**2)
    close(grad(Quadrature()(q, lambda z: z**2), edge)[0], 4 / 3)
    close(grad(every_z(q, lambda q, z: magic_box(q.log_prob(z)) * z**2), edge)[0], -2 / 3)
    close(grad(every_z(q, lambda q, z: q.log_prob(z)), edge)[0], -1 / 2)


def test_fisher():
    information = -hessian(lambda p: every_z(Normal(*p), lambda q, z: q.log_prob(z)), t(MU, SIGMA))
    close(information, [[1 / SIGMA**2, 0.0], [0.0, 2 / SIGMA**2]])
