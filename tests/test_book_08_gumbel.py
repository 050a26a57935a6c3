"""What chapter 08 claims and no test of the package keeps: formulas against quadrature, and fixed seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.nn.functional import normalize

import gradlab as gl

ALPHA = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
LOGITS, PI = ALPHA.log(), ALPHA / ALPHA.sum()
EULER = 0.57721566490153286


def t(x: float | list[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def simplex_grid(size: int, step: float = 0.25, width: float = 80.0) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-width, width + step, step, dtype=torch.float64)
    s = torch.stack(torch.meshgrid(*[axis] * (size - 1), indexing="ij"), -1).reshape(-1, size - 1)
    log_x = torch.log_softmax(torch.cat([s, s.new_zeros(len(s), 1)], -1), -1)
    return log_x, step ** (size - 1) * log_x.sum(-1).exp()


def logistic_grid(tau: float) -> tuple[Tensor, Tensor]:
    step = min(tau, 1.0) / 8
    noise = torch.arange(-40, 40, step, dtype=torch.float64)
    return noise, step * torch.sigmoid(noise) * torch.sigmoid(-noise)


def moments(tau: float, f, theta: float = 0.0) -> tuple[float, float]:
    """Mean and variance of the package's gradient, its noise replaced by a grid."""
    noise, mass = logistic_grid(tau)
    copies = torch.full_like(noise, theta).requires_grad_()
    q = D.Bernoulli(logits=copies)
    value = gl.GumbelSoftmax(temperature=tau).estimate(q, f, noise[None])
    (grad,) = torch.autograd.grad(value.sum(), copies)
    mean = (mass * grad).sum()
    return mean.item(), ((mass * grad**2).sum() - mean**2).item()


def toy(z: Tensor) -> Tensor:
    return (z - 0.45) ** 2


def test_weights_and_logits():
    torch.testing.assert_close(torch.softmax(LOGITS, 0), PI)
    torch.testing.assert_close(torch.softmax(ALPHA, 0)[2].item(), 0.66524, atol=1e-5, rtol=0)
    signed = t([-1.0, 2.0])
    assert (signed / signed.sum()).tolist() == [-1.0, 2.0]


def test_gumbel_noise():
    torch.manual_seed(0)
    g = gl.gumbel(torch.Size([200_000]), LOGITS)
    error = (g.std() / math.sqrt(len(g))).item()
    assert abs(g.mean().item() - EULER) < 4 * error
    u = torch.exp(-torch.exp(-g)).sort().values  # uniform
    grid = (torch.arange(len(u), dtype=torch.float64) + 0.5) / len(u)
    assert (u - grid).abs().max().item() * math.sqrt(len(u)) < 1.95  # Kolmogorov, 1 in 1000


def win(k: int, shift: float = 0.0, invert: bool = False) -> float:
    g = torch.linspace(-8, 60, 20_001, dtype=torch.float64)
    ratio = ALPHA / ALPHA[k]
    total = (1 / ratio if invert else ratio).sum() - 1
    y = g - shift
    return torch.trapezoid(torch.exp(-total * torch.exp(-g) - y - torch.exp(-y)), g).item()


def test_gumbel_max():
    for k in range(3):
        assert win(k) == pytest.approx(PI[k].item(), abs=1e-10)
    square = [(a**2 / (a**2 + ALPHA.sum() - a)).item() for a in ALPHA]
    assert [win(k, shift=LOGITS[k].item()) for k in range(3)] == pytest.approx(square, abs=1e-10)
    assert square == pytest.approx([1 / 6, 1 / 2, 3 / 4])
    inverted = [win(k, invert=True) for k in range(3)]
    assert inverted == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=1e-10)
    torch.manual_seed(0)
    z = gl.gumbel_max(D.OneHotCategorical(logits=LOGITS), torch.Size([100_000]))
    z_score = (z.mean(0) - PI) / (PI * (1 - PI) / len(z)).sqrt()
    assert z_score.abs().max() < 4


@pytest.mark.parametrize(("size", "tau"), [(2, 0.5), (2, 1.0), (2, 2.5), (3, 0.7)])
def test_density(size, tau):
    log_x, weight = simplex_grid(size)
    p = gl.concrete_log_prob(log_x, LOGITS[:size], tau).exp()
    assert (p * weight).sum().item() == pytest.approx(1.0, abs=1e-9)
    torch.manual_seed(0)
    x = D.Dirichlet(torch.ones(size, dtype=torch.float64)).sample((200,))
    theirs = D.RelaxedOneHotCategorical(t(tau), logits=LOGITS[:size])
    torch.testing.assert_close(gl.concrete_log_prob(x.log(), LOGITS[:size], tau), theirs.log_prob(x))


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.27924), (1.0, 0.32396), (2.5, 0.40240)])
def test_mean_of_the_relaxed_sample(tau, expected):
    noise, mass = logistic_grid(tau)
    by_noise = (mass * torch.sigmoid((math.log(1 / 3) + noise) / tau)).sum().item()
    log_x, weight = simplex_grid(2, step=0.05)
    p = gl.concrete_log_prob(log_x, t([0.25, 0.75]).log(), tau).exp()
    by_density = (p * weight * log_x[:, 0].exp()).sum().item()
    assert by_noise == pytest.approx(by_density, abs=1e-10)
    assert by_noise == pytest.approx(expected, abs=1e-5)
    if tau == 1.0:
        r = 1 / 3
        assert by_noise == pytest.approx(r * (r - 1 - math.log(r)) / (r - 1) ** 2, abs=1e-10)


def test_rounding():
    q = D.OneHotCategorical(logits=LOGITS)
    hard = []
    for tau in (0.1, 0.5, 2.0, 50.0):
        torch.manual_seed(0)
        hard.append(gl.gumbel_softmax(q, torch.Size([1000]), temperature=tau).argmax(-1))
    torch.manual_seed(0)
    exact = gl.gumbel_max(q, torch.Size([1000])).argmax(-1)
    assert all(torch.equal(h, exact) for h in hard)


def scaled_hessian(log_x: Tensor, logits: Tensor, tau: float) -> Tensor:
    size, w = len(logits), torch.softmax(logits - tau * log_x, -1)
    return (1 + tau) * torch.diag(1 - size * tau * w) + size * tau**2 * w[:, None] * w


def least_curvature(log_x: Tensor, logits: Tensor, tau: float) -> float:
    normal = normalize(log_x.exp(), dim=-1)
    outer = normal[:, None] * normal
    project = torch.eye(len(logits), dtype=torch.float64) - outer
    return torch.linalg.eigvalsh(project @ scaled_hessian(log_x, logits, tau) @ project + 10 * outer)[0].item()


@pytest.mark.parametrize("size", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("a", [0.99, 1.01])
def test_log_convexity(size, a):
    torch.manual_seed(size)
    logits, tau = torch.randn(size, dtype=torch.float64), a / (size - 1)
    x = D.Dirichlet(torch.ones(size, dtype=torch.float64)).sample()
    hessian = torch.autograd.functional.hessian(lambda x: gl.concrete_log_prob(x.log(), logits, tau), x)
    torch.testing.assert_close(x[:, None] * hessian * x, scaled_hessian(x.log(), logits, tau))
    face = torch.zeros(size, dtype=torch.float64)
    face[0] = -60 / tau
    assert least_curvature(face.log_softmax(0), logits, tau) == pytest.approx(1 - a, abs=1e-9)
    if a < 1:
        points = D.Dirichlet(torch.full((size,), 0.3, dtype=torch.float64)).sample((100,)).log()
        assert min(least_curvature(point, logits, tau) for point in points) > 0
    log_x = torch.stack([-torch.logspace(0, 3, 4, dtype=torch.float64)] + [t([0.0] * 4)] * (size - 1), -1)
    on_the_way = gl.concrete_log_prob(log_x.log_softmax(-1), logits, tau)
    assert (on_the_way[-1] > on_the_way[-2]) == (a < 1)


def test_conditional_gumbels():
    torch.manual_seed(0)
    free = gl.gumbel(torch.Size([100_000, 3]), LOGITS)
    hard = t([0.0, 1.0, 0.0])
    given = gl.conditional_gumbels(LOGITS, hard, free)
    assert bool(((LOGITS + given).argmax(-1) == 1).all())
    log_pi = PI.log()
    exponential = torch.exp(-free)
    race = exponential[:, 1:2] + exponential / PI
    race[:, 1] = exponential[:, 1]
    torch.testing.assert_close(log_pi + given, -race.log())
    expected = EULER + PI * log_pi / (1 - PI)
    expected[1] = EULER - log_pi[1]
    z_score = (given.mean(0) - expected) / (given.std(0) / math.sqrt(len(given)))
    assert z_score.abs().max() < 4


@pytest.mark.parametrize(
    ("tau", "mean", "variance"),
    [
        (5.0, 0.00485, 0.0001),
        (1.0, 0.01667, 0.0048),
        (0.5, 0.02146, 0.0142),
        (0.1, 0.02480, 0.0862),
        (0.02, 0.02499, 0.4367),
    ],
)
def test_bias_and_variance(tau, mean, variance):
    found = moments(tau, toy)
    assert found[0] == pytest.approx(mean, abs=1e-5)
    assert found[1] == pytest.approx(variance, abs=1e-4)


def test_bias_and_variance_of_a_linear_cost_and_the_limit():
    assert moments(1.0, lambda z: z, math.log(1 / 3))[0] == pytest.approx(0.1479, abs=5e-5)
    tau = 1e-3
    limit = 0.25 * (4 * (1 / 120 + 0.0025 / 6))
    assert tau * moments(tau, toy)[1] == pytest.approx(limit, abs=1e-5)


@pytest.mark.parametrize("tau", [0.05, 0.09, 0.11, 0.5])
def test_the_relaxed_optimum(tau):
    theta = -20.0 if tau < 0.5 else -30.0
    beta = math.exp(math.lgamma(1 - tau) + math.lgamma(1 + tau) - math.lgamma(2))
    limit = 2 * beta * ((1 - tau) / 2 - 0.45)
    assert moments(tau, toy, theta)[0] * math.exp(-theta) == pytest.approx(limit, rel=1e-3)
    assert (limit > 0) == (tau < 0.1)


def test_continuation():
    exact = torch.sigmoid(t(0.5)) * torch.sigmoid(t(-0.5))
    for power in (1, 2, 3):
        assert abs(moments(1.0, lambda z, n=power: z**n, 0.5)[0] - exact) > 1e-3
        assert moments(0.01, lambda z, n=power: z**n, 0.5)[0] == pytest.approx(exact.item(), abs=1e-3)


def test_float32():
    torch.manual_seed(0)
    low = LOGITS.float()
    log_x = torch.log_softmax((low + gl.gumbel(torch.Size([10_000, 3]), low)) / 0.05, -1)
    assert bool((log_x.exp() == 0).any())
    assert bool(gl.concrete_log_prob(log_x, low, 0.05).isfinite().all())


def test_top_k():
    torch.manual_seed(0)
    pairs = gl.gumbel_top_k(D.OneHotCategorical(logits=LOGITS), 2, torch.Size([50_000]))
    hits = (pairs == torch.tensor([2, 0])).all(-1).double()
    assert abs(hits.mean().item() - 1 / 6) < 4 * hits.std().item() / math.sqrt(len(hits))


def test_best_temperature():
    c = 0.1 * math.pi**2 / 48
    for tau in (0.02, 0.05):
        assert moments(tau, toy)[0] == pytest.approx(0.025 - c * tau**2, abs=tau**4)
    predicted = (0.00875 / (4 * c**2 * 1e6)) ** 0.2
    taus = torch.linspace(0.05, 0.5, 46).tolist()
    errors = [(m - 0.025) ** 2 + v / 1e6 for m, v in (moments(tau, toy) for tau in taus)]
    assert abs(taus[errors.index(min(errors))] - predicted) < 0.02
