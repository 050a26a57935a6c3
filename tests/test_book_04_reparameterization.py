"""The formulas of chapter 04, without Monte Carlo: noise by quadrature, lattices and exact sums."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    Cauchy,
    Gumbel,
    Laplace,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    Weibull,
)

import gradlab
from gradlab import Quadrature, Reparameterization, inverse_cdf

NODE, WEIGHT = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(60))
WEIGHT = WEIGHT / WEIGHT.sum()
MU, SIGMA = 0.7, 1.3


@pytest.fixture(autouse=True)
def _on_the_cpu(_reproducible):
    """These are formulas; the nodes above live on the CPU, wherever the rest of the suite runs."""
    torch.set_default_device("cpu")


def close(value, exact, tol=1e-9):
    value, exact = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (value, exact))
    torch.testing.assert_close(value, exact, rtol=tol, atol=tol)


def slopes(value, parameters):
    return torch.stack(torch.autograd.grad(value, parameters, materialize_grads=True))


def t(*values):
    return [torch.tensor(x, requires_grad=True) for x in values]


def exact(make_q, theta, f, cuts=()):
    theta = t(*theta)
    return slopes(Quadrature(cuts)(make_q(*theta), f), theta)


def path_mean(noise, h, theta, f, cuts=()):
    theta = t(*theta)
    return slopes(Quadrature(cuts)(noise, lambda e: f(h(e, *theta))), theta)


def affine(e, m, s):
    return m + s * e


def unit():
    return Normal(torch.tensor(0.0), torch.tensor(1.0))


def replicates(f, mu=MU, sigma=SIGMA):
    """The package's one-sample pathwise gradients at the nodes of the noise."""
    p = [torch.full_like(NODE, x).requires_grad_() for x in (mu, sigma)]
    loss = Reparameterization(sampler=lambda q, _: (q.loc + q.scale * NODE)[None])(Normal(*p), f)
    return torch.autograd.grad(loss.sum(), p)


def variance(g):
    return (WEIGHT * g**2).sum() - (WEIGHT * g).sum() ** 2


@pytest.mark.parametrize(
    "law",
    [Normal, Laplace, gradlab.Logistic, Gumbel, lambda m, s: StudentT(5.0, m, s)],
    ids=lambda x: x.__name__,
)
def test_location_scale(law):
    noise = law(torch.tensor(0.0), torch.tensor(1.0))
    found = path_mean(noise, affine, (MU, SIGMA), torch.tanh, [0.0])
    close(found, exact(law, (MU, SIGMA), torch.tanh, [MU]))


def test_location_scale_uniform():
    m, s = t(MU, SIGMA)
    truth = slopes((torch.cosh(m + s) / torch.cosh(m - s)).log() / (2 * s), [m, s])
    close(path_mean(Uniform(-1.0, 1.0), affine, (MU, SIGMA), torch.tanh), truth)


def test_slope_in_the_variance():
    by_variance = path_mean(unit(), lambda e, v: MU + v.sqrt() * e, (SIGMA**2,), torch.tanh)
    by_scale = path_mean(unit(), lambda e, s: MU + s * e, (SIGMA,), torch.tanh)
    close(by_variance, by_scale / (2 * SIGMA))


def test_laplace_is_not_stable():
    q = Laplace(torch.tensor(0.0), torch.tensor(1.0))
    with torch.no_grad():
        second, fourth = (Quadrature([0.0])(q, lambda z, n=n: z**n) for n in (2, 4))
        total = Quadrature([0.0])(q, lambda z: (1 + z.abs()) / 2 * z**4)  # density of x + y: (1 + |z|) exp(-|z|) / 4
    close(fourth / second**2, 6.0)
    close((2 * fourth + 6 * second**2) / (2 * second) ** 2, 4.5)
    close(total / 16, 4.5)


def test_cholesky():
    """At the nodes of two independent noises, the package's path has the closed form as its mean."""
    a = torch.tensor([0.5, -0.4])
    loc = torch.tensor([0.2, -0.1])
    tril = torch.tensor([[0.8, 0.0], [-0.3, 0.6]])
    size = (a @ loc + (tril.T @ a).square().sum() / 2).exp()
    eps = torch.cartesian_prod(NODE, NODE)
    weight = torch.outer(WEIGHT, WEIGHT).flatten()
    p = [x.expand(len(eps), *x.shape).clone().requires_grad_() for x in (loc, tril)]
    sampler = lambda q, _: (q.loc + (q.scale_tril @ eps[..., None])[..., 0])[None]  # noqa: E731
    value = Reparameterization(sampler=sampler)(MultivariateNormal(p[0], scale_tril=p[1]), lambda z: (z @ a).exp())
    by_loc, by_tril = torch.autograd.grad((weight * value).sum(), p)
    close(by_loc.sum(0), size * a)
    close(by_tril.sum(0), size * torch.outer(a, tril.T @ a))  # the entry above the diagonal too: no zero there
    assert abs(by_tril.sum(0)[0, 1]) > 0.1


def test_rosenblatt_is_cholesky():
    a, b, c = 0.8, -0.3, 0.6
    u = torch.tensor([[0.2, 0.9], [0.7, 0.4]])
    first = Normal(0.0, a).icdf(u[:, 0])
    covariance, spread = a * b, b * b + c * c
    given = Normal(covariance / a**2 * first, (spread - covariance**2 / a**2) ** 0.5)
    eps = Normal(0.0, 1.0).icdf(u)
    close(torch.stack([first, given.icdf(u[:, 1])], -1), eps @ torch.tensor([[a, 0.0], [b, c]]).T)


def test_weibull():
    scale, k = t(1.5, 1.7)
    truth = slopes(scale**2 * torch.lgamma(1 + 2 / k).exp(), [scale, k])
    by_hand = -2 * 1.5**2 / 1.7**2 * torch.lgamma(1 + 2 / k).exp() * torch.digamma(1 + 2 / k)
    close(by_hand, truth[1])
    found = path_mean(Uniform(0.0, 1.0), lambda u, *p: Weibull(*p).icdf(u), (1.5, 1.7), torch.square)
    close(found, truth)


def test_inverse_cdf_moves_as_the_cdf_says():
    """The sampler's slope is the implicit one, -dF/dk / q: the law and the path are both right."""
    k = torch.full((9,), 1.7, requires_grad=True)
    q = Weibull(torch.full((9,), 1.5), k)
    z = inverse_cdf(q)
    slope = torch.autograd.grad(z.sum(), k)[0]
    fixed = z.detach()
    by_cdf = torch.autograd.grad((1 - (-((fixed / 1.5) ** k)).exp()).sum(), k)[0]
    close(slope, -by_cdf / q.log_prob(fixed).exp())


def test_variances_of_the_square():
    by_mu, by_sigma = replicates(lambda z: z**2 + 5)
    close((WEIGHT * by_mu).sum(), 2 * MU)
    close((WEIGHT * by_sigma).sum(), 2 * SIGMA)
    close(variance(by_mu), 4 * SIGMA**2)
    close(variance(by_sigma), 4 * MU**2 + 8 * SIGMA**2)


def test_same_noise():
    """The package's gradient is the hand-written one at the same noise, and rsample draws what sample draws."""
    mu, sigma = t(MU, SIGMA)
    eps = torch.randn(100)
    z = MU + SIGMA * eps
    value = Reparameterization(100, lambda q, _: q.loc + q.scale * eps)(Normal(mu, sigma), torch.square)
    close(value, z.square().mean())
    close(slopes(value, [mu, sigma]), torch.stack([2 * z.mean(), 2 * (eps * z).mean()]))
    torch.manual_seed(1)
    without = Normal(mu, sigma).sample((100,))
    torch.manual_seed(1)
    assert torch.equal(without, Normal(mu, sigma).rsample((100,)))


@pytest.mark.parametrize("c", [0.0, 1.0, -5.56, 20.0])
def test_the_score_varies_more_on_the_square(c):
    z = MU + SIGMA * NODE
    cost = z**2 + c
    path = 4 * SIGMA**2, 4 * MU**2 + 8 * SIGMA**2
    score = variance(cost * NODE / SIGMA), variance(cost * (NODE**2 - 1) / SIGMA)
    level = (MU**2 + c) / SIGMA
    close(score[0] - path[0], (level + 3 * SIGMA) ** 2 + 8 * MU**2 + 2 * SIGMA**2)
    close(score[1] - path[1], 2 * (level + 5 * SIGMA) ** 2 + 36 * MU**2 + 16 * SIGMA**2)


def cosine_variances(k, mu, sigma):
    a, b = math.exp(-((k * sigma) ** 2) / 2), math.exp(-2 * (k * sigma) ** 2)
    squared_mean, wave = (k * a * math.sin(k * mu)) ** 2, b * math.cos(2 * k * mu)
    score = 1 + (1 - 4 * (k * sigma) ** 2) * wave
    return k**2 / 2 * (1 - wave) - squared_mean, score / (2 * sigma**2) - squared_mean


@pytest.mark.parametrize(("k", "mu", "sigma"), [(0.4, 0.3, 1.0), (0.9, 0.3, 1.0), (2.0, -0.6, 1.4), (10.0, 0.3, 1.0)])
def test_variances_of_the_cosine(k, mu, sigma):
    rule, q = Quadrature(panels=400), unit()
    mean = -k * math.sin(k * mu) * math.exp(-((k * sigma) ** 2) / 2)
    path, score = cosine_variances(k, mu, sigma)
    with torch.no_grad():
        close(rule(q, lambda e: (-k * torch.sin(k * (mu + sigma * e)) - mean) ** 2), path)
        close(rule(q, lambda e: (e / sigma * torch.cos(k * (mu + sigma * e)) - mean) ** 2), score)
    if k == 10.0:
        close((path, score), (50.0, 0.5))


@pytest.mark.parametrize("f", [lambda z: (z + z.sin()).exp(), torch.relu], ids=["smooth", "relu"])
def test_price(f):
    rule = Quadrature([0.0])
    v, m = t(1.0, 0.0)
    truth = slopes(rule(Normal(0.0, v.sqrt()), f), [v])
    close(slopes(rule(unit(), lambda e: f(v.sqrt() * e)), [v]), truth, 1e-8)
    slope = torch.autograd.grad(rule(unit(), lambda e: f(m + e)), m, create_graph=True)[0]
    second = slopes(slope, [m]) / 2 if slope.requires_grad else torch.zeros(1)
    if f is torch.relu:
        close(second, [0.0])
        close(truth, [1 / math.sqrt(8 * math.pi)], 1e-8)
    else:
        close(second, truth, 1e-8)


def test_two_layers():
    """Both noises by quadrature, through the nested estimators of the package."""
    mu, sigma, w, s = p = t(0.3, 0.8, 1.1, 0.5)
    wave = (-2 * (w * sigma) ** 2).exp() * torch.cos(2 * w * mu)
    truth = slopes((1 - wave) / 2 + s**2, p)
    first, second = (x.flatten() for x in torch.meshgrid(NODE, NODE, indexing="ij"))
    weight = torch.outer(WEIGHT, WEIGHT).flatten()
    outer = Reparameterization(sampler=lambda q, _: (q.loc + q.scale * first)[None])
    inner = Reparameterization(sampler=lambda q, _: (q.loc + q.scale * second)[None])
    expanded = Normal(mu.expand(len(first)), sigma.expand(len(first)))
    value = outer(expanded, lambda z: inner(Normal(torch.sin(w * z), s), torch.square))
    close(slopes((weight * value).sum(), p), truth)


def test_a_score_function_inside_a_path():
    """Every inner value by enumeration, the outer noise by quadrature: the nested gradient is exact."""
    mu, sigma, w = p = t(0.3, 0.8, 1.1)
    z = mu + sigma * NODE
    q = torch.distributions.Bernoulli(logits=w * z)
    total = 0.0
    for value in (0.0, 1.0):
        draw = torch.full_like(NODE, value)
        surrogate = gradlab.ScoreFunction().estimate(q, lambda x: (x - 0.45) ** 2, draw[None])
        total = total + (WEIGHT * q.log_prob(draw).exp().detach() * surrogate).sum()
    truth = slopes((WEIGHT * (0.45**2 + 0.1 * torch.sigmoid(w * (mu + sigma * NODE)))).sum(), p)
    close(slopes(total, p), truth)


def gap(u, w):
    return torch.where(u < w, u / w, 2 + (u - w) / (1 - w))


def test_jumps():
    def step(z):
        return (1 + z.sign()) / 2

    truth = exact(Normal, (0.3, 1.0), step, [0.0])[0]
    close(truth, unit().log_prob(torch.tensor(0.3)).exp())
    close(truth, 0.381388, 1e-6)
    assert path_mean(unit(), affine, (0.3, 1.0), step, [-0.3])[0] == 0
    uniform = Uniform(torch.tensor(0.0), 1.0)
    for f, total in ((torch.square, 1 / 3 - 19 / 3), (torch.exp, math.e - 1 - (math.exp(3) - math.exp(2)))):
        found = path_mean(uniform, gap, (0.4,), f, [0.4])[0]
        ends = f(torch.tensor([1.0, 2.0]))
        close(found, total + ends[1] - ends[0])
    bernoulli = path_mean(uniform, lambda u, p: torch.ceil(u + p - 1), (0.4,), lambda z: (z - 0.45) ** 2, [0.6])
    assert bernoulli[0] == 0


def cantor(x, digits=30):
    x, value, open_ = x.clamp(0, 1), 0.0, torch.ones_like(x)
    for j in range(1, digits + 1):
        digit = (3 * x).floor().clamp(max=2)
        x = 3 * x - digit
        value = value + open_ * (digit > 0) / 2**j
        open_ = open_ * (digit != 1)
    return value + open_ * x.round() / 2**digits


def test_cantor():
    close(cantor(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])), [0.0, 1 / 3, 0.5, 2 / 3, 1.0], 1e-8)
    x = torch.linspace(0.003, 0.997, 50)
    close(cantor(1 - x), 1 - cantor(x), 1e-8)
    close(cantor(x / 3), cantor(x) / 2, 1e-8)
    cells = 3**10
    u = (torch.arange(cells) + 0.5) / cells
    for n in (1, 3, 6, 10):
        step = 3.0**-n
        central = (cantor(u + step).mean() - cantor(u - step).mean()) / (2 * step)
        close(central, 1 - 0.5 ** (n + 1), 1e-7)
    (shift,) = t(0.0)
    assert slopes(cantor(u + shift).mean(), [shift])[0] == 0


def test_almost_cantor():
    """Slope (3/2)^n on a share (2/3)^n of the interval: mean 1, variance (3/2)^n - 1."""
    for n in (1, 5, 8):
        u = (torch.arange(3**n) + 0.5) / 3**n
        alive, x = torch.ones_like(u), u
        for _ in range(n):
            digit = (3 * x).floor()
            x, alive = 3 * x - digit, alive * (digit != 1)
        slope = alive * 1.5**n
        close(slope.mean(), 1.0)
        close(slope.var(correction=0), 1.5**n - 1)


def test_stable_index():
    """The path of Chambers, Mallows and Stuck on a lattice of its two noises, against Fourier."""
    (alpha,) = t(1.5)
    v, wv = np.polynomial.legendre.leggauss(300)
    x, wx = np.polynomial.legendre.leggauss(300)
    v, x = torch.tensor(v) * math.pi / 2, torch.tensor(x)
    weight = torch.outer(torch.tensor(wv), torch.tensor(wx)) / 4
    log_u = torch.log((1 + x) / 2)[None, :]
    v = v[:, None]
    bend = (torch.cos((1 - alpha) * v) / -log_u).pow((1 - alpha) / alpha)
    z = torch.sin(alpha * v) / torch.cos(v).pow(1 / alpha) * bend
    value = (weight * (-(z**2) / 2).exp()).sum()
    truth = Quadrature([0.0])(unit(), lambda w: (-(w.abs() ** alpha)).exp())
    close(value, truth, 2e-4)
    close(slopes(value, [alpha]), slopes(truth, [alpha]), 2e-3)


def test_no_domination():
    """E|eps sin eps| grows like (4 / pi^2) log t for a Cauchy eps, and the score stays bounded."""

    def absolute_mean(low, high, cells=1_000_000):
        e = low + (high - low) * (torch.arange(cells) + 0.5) / cells
        return 2 * (e * e.sin().abs() / (math.pi * (1 + e**2))).mean() * (high - low)

    close(absolute_mean(1e3, 1e4), 4 / math.pi**2 * math.log(10), 1e-3)
    q = Cauchy(torch.tensor(0.0), torch.tensor(1.0, requires_grad=True))
    z = torch.logspace(-3, 6, 50)
    score = torch.stack([torch.autograd.grad(q.log_prob(x), q.scale)[0] for x in z])
    close(score, (z**2 - 1) / (z**2 + 1))
