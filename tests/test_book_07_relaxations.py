"""What chapter 07 claims and no test of the package keeps: slide numbers, bounds and limits, with no sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as D

import gradlab as gl
from gradlab import relaxations as rx

X = [1.1, 4.0, -0.1, 2.3]
SOFTMAX = {
    1.0: "0.044 0.797 0.013 0.146",
    0.8: "0.023 0.868 0.005 0.104",
    0.6: "0.007 0.936 0.001 0.055",  # the slides: 0.008 0.937
    0.4: "6.997e-04 9.852e-01 3.483e-05 1.405e-02",  # the slides: 3.484e-05
    0.2: "5.042e-07 9.998e-01 1.250e-09 2.034e-04",
}
INDEX = {1.0: "1.2606", 0.8: "1.1894", 0.6: "1.1037", 0.4: "1.0274", 0.2: "1.0004"}
VALUE = {1.0: "3.571", 0.8: "3.736", 0.6: "3.881", 0.4: "3.974", 0.2: "4.000"}  # the slides: 3.999


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@torch.enable_grad()
def slope(f, x) -> Tensor:
    x = torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def moments(f, theta: float, tau: float, hard: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of the relaxed gradient, by a rule of its own: a grid on each side of the step."""
    u = torch.linspace(1e-12, 60.0, 60_001)
    mean = second = torch.zeros(())
    for side in (-u.flip(0), u):
        y = torch.sigmoid(side)
        at = torch.full_like(y, float(side[0] > 0)) if hard else y
        gradient = slope(f, at) * y * (1 - y) / tau
        weight = tau * torch.sigmoid(tau * side - theta) * torch.sigmoid(theta - tau * side)
        mean = mean + torch.trapezoid(gradient * weight, side)
        second = second + torch.trapezoid(gradient**2 * weight, side)
    return mean, second - mean**2


def truth(f, theta: float) -> Tensor:
    return slope(lambda x: gl.Enumerate()(D.Bernoulli(logits=x), f), theta)


def quadratic(y: Tensor) -> Tensor:
    return (y - 0.45) ** 2


def test_kinks():
    """What autograd picks where there is no derivative."""
    f = torch.nn.functional
    picks = [torch.relu, torch.abs, lambda x: x.clamp(0.0, 1.0), lambda x: f.hardtanh(x, 0.0, 1.0)]
    assert [slope(pick, 0.0).item() for pick in picks] == [0, 0, 1, 0]
    identity = slope(lambda x: torch.relu(x) - torch.relu(-x), [-0.1, 0.0, 0.1])
    assert identity.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("f", "breaks", "jumps"),
    [
        (torch.relu, [0.0], {}),
        (torch.abs, [0.0], {}),
        (lambda z: z.clamp(-1.0, 1.0), [-1.0, 1.0], {}),
        (lambda z: 0.5 + z.sign() / 2, [0.0], {0.0: 1.0}),
        (torch.round, [k + 0.5 for k in range(-9, 9)], {k + 0.5: 1.0 for k in range(-9, 9)}),
    ],
)
def test_kinks_average_out(f, breaks, jumps):
    """The derivative of the expectation is the mean slope plus the jumps times the density."""
    quadrature, q = gl.Quadrature(breakpoints=breaks), D.Normal(0.3, 1.0)
    exact = slope(lambda x: quadrature(D.Normal(x, 1.0), f), 0.3)
    with torch.no_grad():
        mean = quadrature(D.Normal(torch.tensor(0.3), 1.0), lambda z: slope(f, z))
    missed = sum(height * q.log_prob(torch.tensor(c)).exp() for c, height in jumps.items())
    torch.testing.assert_close(mean + missed, exact, rtol=0, atol=1e-9)
    assert (abs(mean - exact) > 0.1) == bool(jumps)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
def test_softplus(tau):
    x = torch.linspace(-4, 4, 801)
    gap = rx.softplus(x, tau) - torch.relu(x)
    assert x[gap.argmax()].abs() < 1e-12
    assert gap.max().item() == pytest.approx(tau * math.log(2), abs=1e-12)
    assert gap.min() > -1e-14
    torch.testing.assert_close(slope(lambda x: rx.softplus(x, tau), x), torch.sigmoid(x / tau), rtol=0, atol=1e-12)
    q = gl.Logistic(torch.tensor(0.3), torch.tensor(tau))
    with torch.no_grad():
        mean = gl.Quadrature(breakpoints=[0.0])(q, torch.relu)  # softplus is ReLU under logistic noise
    torch.testing.assert_close(mean, rx.softplus(torch.tensor(0.3), tau), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tau", SOFTMAX)
def test_slide_numbers(tau):
    x = torch.tensor(X)
    for value, text in zip(rx.softmax(x, tau).tolist(), SOFTMAX[tau].split(), strict=True):
        assert (f"{value:.3e}" if "e" in text else f"{value:.3f}") == text
    assert f"{rx.softargmax(x, tau).item():.4f}" == INDEX[tau]
    assert f"{rx.soft_max_value(x, tau).item():.3f}" == VALUE[tau]


@pytest.mark.parametrize("tau", [2.0, 0.6, 0.05])
def test_maxima(tau):
    x = torch.tensor(X)
    p, soft, smooth, top = rx.softmax(x, tau), rx.soft_max_value(x, tau), rx.smooth_max(x, tau), x.max()
    torch.testing.assert_close(smooth, soft + tau * D.Categorical(p).entropy(), rtol=0, atol=1e-10)
    assert top - tau * math.log(4) <= soft <= top <= smooth <= top + tau * math.log(4)
    torch.testing.assert_close(slope(lambda x: rx.smooth_max(x, tau), x), p, rtol=0, atol=1e-12)
    down = slope(lambda x: rx.soft_max_value(x, tau), x)
    torch.testing.assert_close(down, p * (1 + (x - soft) / tau), rtol=0, atol=1e-12)
    assert (down < 0).any() == (x < soft - tau).any()
    assert 1 - p[1] <= 3 * math.exp(-1.7 / tau)
    assert rx.softargmax(torch.tensor([1.0, 4.0, 4.0, 2.0]), 0.01).item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("loss", "converges"),
    [
        (torch.abs, False),
        (lambda x: rx.smooth_l1(x, 1.0), True),
        (lambda x: rx.smooth_l1(x, 0.15), True),
        (lambda x: rx.smooth_l1(x, 0.05), False),
        (lambda x: rx.huber(x, 0.05), True),
    ],
)
def test_descent(loss, converges):
    x = torch.tensor(0.95)
    for _ in range(200):
        x = x - 0.2 * slope(loss, x)
    assert (abs(x) < 1e-4) == converges


@pytest.mark.parametrize("delta", [0.1, 1.0, 2.5])
def test_huber_is_smooth_l1_scaled(delta):
    x = torch.linspace(-5, 5, 1001)
    torch.testing.assert_close(rx.huber(x, delta), delta * rx.smooth_l1(x, delta), rtol=0, atol=1e-12)
    gap = x.abs() - rx.smooth_l1(x, delta)
    assert gap.min() >= 0
    assert gap.max().item() == pytest.approx(delta / 2)
    assert torch.allclose(rx.huber(x, delta), rx.smooth_l1(x, delta)) == (delta == 1)


def test_st_argmax():
    x = torch.tensor(X)
    assert rx.st_argmax(x, 0.6) == 1
    hard, soft = (slope(lambda x, f=f: f(x, 0.6), x) for f in (rx.st_argmax, rx.softargmax))
    assert torch.equal(hard, soft)
    assert hard.abs().max() > 0.01


@pytest.mark.parametrize(
    ("f", "hard_limit"),
    [(lambda y: y, 1.0), (quadratic, 0.1), (lambda y: y**3, 1.5), (lambda y: y + 3 * y**2 * (1 - y), -0.5)],
)
def test_relaxed_step(f, hard_limit):
    """Soft tends to the truth, hard to the trapezium rule, and the variance grows like 1 / tau."""
    density = (torch.tensor(0.5).sigmoid() * torch.tensor(-0.5).sigmoid()).item()
    torch.testing.assert_close(moments(f, 0.5, 1e-3)[0], truth(f, 0.5), rtol=0, atol=3e-4)
    assert moments(f, 0.5, 1e-3, hard=True)[0].item() == pytest.approx(density * hard_limit, abs=3e-4)
    s = torch.linspace(0, 1, 100_001)
    scale = torch.trapezoid(slope(f, s) ** 2 * s * (1 - s), s)
    assert 1e-3 * moments(f, 0.5, 1e-3)[1].item() == pytest.approx(density * scale.item(), abs=3e-4)


def test_the_bias_is_linear_in_the_temperature():
    p, u = D.Normal(0.0, 1.0), torch.linspace(-60, 60, 60_001)
    s, theta, tau = torch.sigmoid(u), 0.5, 1e-3
    path = 3 * s**2 * s * (1 - s)
    mean = torch.trapezoid(path * p.log_prob(tau * u - theta).exp(), u)
    density = p.log_prob(torch.tensor(-theta)).exp()
    first = theta * density * torch.trapezoid(u * path, u)  # p'(-theta) = theta p(-theta)
    assert ((mean - density) / tau).item() == pytest.approx(first.item(), rel=1e-2)


def test_where_it_fails():
    def agrees(f, theta, tau, hard=False):
        return bool(moments(f, theta, tau, hard)[0] * truth(f, theta) > 0)

    def bumped(y):
        return y + 3 * y**2 * (1 - y)

    assert agrees(lambda y: y, 0.5, 0.01, hard=True)
    assert not agrees(bumped, 0.5, 0.01, hard=True)
    assert agrees(bumped, 0.5, 0.01)
    assert [agrees(quadratic, -2.0, tau) for tau in (1.0, 0.5, 0.05)] == [False, False, True]
    for tau in (0.05, 0.3):  # far to the left the sign is that of 1 - 2 t - tau
        tail = moments(quadratic, -12.0, tau)[0].item() * math.exp(12)
        assert tail == pytest.approx((0.1 - tau) * math.pi * tau / math.sin(math.pi * tau), abs=1e-3)


def test_schedules():
    assert rx.constant_temperature(0.7)(999) == 0.7
    exponential, inverse = rx.exponential_annealing(1.0, 0.03, 0.1), rx.inverse_time_annealing(1.0, 0.1, 0.1)
    assert exponential(23) == pytest.approx(math.exp(-0.69))
    assert inverse(10) == pytest.approx(0.5)
    assert exponential(10**4) == inverse(10**4) == 0.1
    assert exponential(0) == inverse(0) == 1.0
