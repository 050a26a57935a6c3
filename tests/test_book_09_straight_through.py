"""What chapter 09 claims: the biased family against its rules of integration, over all of the noise and no sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D

import gradlab as gl
from gradlab.samplers import conditional_noise, gumbel_rao_path, reinmax_path

BITS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
LOGITS = torch.tensor([0.4, -1.0, 0.8])
ROWS = torch.tensor([0.3, -0.8, 1.1, 0.0])
WEIGHT = torch.tensor([[0.7, -1.2, 0.4, 2.0], [0.1, 0.9, -0.6, 1.0], [1.3, 0.2, 0.5, -0.8], [-0.4, 1.1, 0.3, 0.6]])
THETAS = (-1.3, 0.5, 1.5)
ENDS = torch.tensor([0.0, 1.0])


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def nodes(theta: float, tau: float) -> tuple[Tensor, Tensor]:
    """Logistic noise and weights, exact for what decays away from the threshold."""
    x, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))
    noise = tau * (torch.arange(-40.0, 40.0, dtype=torch.float64)[:, None] + (x + 1) / 2).flatten() - theta
    return noise, tau * w.repeat(80) / 2 * noise.sigmoid() * (-noise).sigmoid()


def chances(theta: float) -> Tensor:
    p = torch.tensor(theta, dtype=torch.float64).sigmoid()
    return torch.stack([1 - p, p])


def gradients(estimator: gl.Estimator, f: Callable, theta: float, noise: Tensor) -> Tensor:
    theta = torch.full_like(noise, theta).requires_grad_()
    loss = estimator.estimate(D.Bernoulli(logits=theta), f, noise[None])
    return torch.autograd.grad(loss.sum(), theta)[0]


def moments(estimator: gl.Estimator, f: Callable, theta: float) -> tuple[Tensor, Tensor]:
    relaxed = isinstance(estimator, gl.GumbelSoftmax)
    noise, weight = nodes(theta, estimator.temperature) if relaxed else (ENDS.double(), chances(theta))
    g = gradients(estimator, f, theta, noise)
    mean = (weight * g).sum()
    return mean, (weight * g**2).sum() - mean**2


def slope(f: Callable, x: Tensor) -> Tensor:
    x = x.double().clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def worst(method: gl.Estimator, make_q: Callable, theta: Tensor, f: Callable, points: Tensor) -> Tensor:
    theta, points = theta.double().clone().requires_grad_(), points.double()
    q = make_q(theta)
    rows = torch.stack([method.estimate(q, f, z[None]) for z in points])
    gap = (q.log_prob(points).exp().detach() * rows).sum() - gl.Enumerate()(q, f)
    return torch.autograd.grad(gap, theta)[0].abs().max()


def bits(theta: Tensor) -> D.Distribution:
    return D.Independent(D.Bernoulli(logits=theta), 1)


def one_hot(theta: Tensor) -> D.Distribution:
    return D.OneHotCategorical(logits=theta)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("theta", THETAS)
def test_rules(theta: float, tau: float) -> None:
    """Each expected gradient is its rule of integration for s * int f'; GS and ST-GS are not exact."""

    def f(z: Tensor) -> Tensor:
        return torch.cos(2 * z)

    noise, weight = nodes(theta, tau)
    x = ((theta + noise) / tau).sigmoid()
    weight = weight * x * (1 - x) / tau
    ends, (off, on) = slope(f, ENDS), chances(theta)
    s = off * on
    expected = {
        gl.GumbelSoftmax(1, tau): (weight * slope(f, x)).sum(),
        gl.GumbelSoftmax(1, tau, hard=True): (weight * ends[(x > 0.5).long()]).sum(),
        gl.StraightThrough(): s * (off * ends[0] + on * ends[1]),
        gl.ReinMax(): s * ends.mean(),
    }
    for estimator, rule in expected.items():
        mean = moments(estimator, f, theta)[0]
        torch.testing.assert_close(mean, rule, rtol=0, atol=1e-10)
        assert abs(mean - s * (np.cos(2) - 1)) > 1e-4


def test_st_argmax() -> None:
    """Value 1, gradient of the softargmax."""
    x = torch.tensor([1.1, 4.0, -0.1, 2.3], requires_grad=True)
    soft = gl.softargmax(x)
    assert gl.st_argmax(x).item() == 1.0
    (ours,) = torch.autograd.grad(soft, x)
    (theirs,) = torch.autograd.grad(gl.st_argmax(x), x)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)


def test_euler() -> None:
    """Straight-through is exact where the cost is linear in each variable, and only as it is written."""
    st, a = gl.StraightThrough(), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert worst(st, bits, LOGITS, lambda z: z @ a, BITS) < 1e-12
    assert worst(st, bits, LOGITS, lambda z: z.prod(-1) - z[..., 0] * z[..., 1], BITS) < 1e-12
    assert worst(st, bits, LOGITS, lambda z: (z**3).sum(-1), BITS) > 0.01
    assert worst(st, one_hot, ROWS, lambda z: z @ WEIGHT.double()[0], torch.eye(4)) < 1e-12
    hard = gl.GumbelSoftmax(hard=True)
    assert abs(moments(hard, lambda z: z, float(np.log(1 / 3)))[0] - 0.1479) < 1e-4


@pytest.mark.parametrize("p", [0.1, 0.45, 0.9])
def test_toy(p: float) -> None:
    """ST descends the cost of the mean: 2 (p - t) p (1 - p); the exact gradient is (1 - 2 t) p (1 - p)."""
    t, theta, s = 0.45, float(np.log(p / (1 - p))), p * (1 - p)

    def toy(z: Tensor) -> Tensor:
        return (z - t) ** 2

    assert abs(moments(gl.StraightThrough(), toy, theta)[0] - 2 * (p - t) * s) < 1e-12
    assert abs(moments(gl.ReinMax(), toy, theta)[0] - (1 - 2 * t) * s) < 1e-12


def test_toy_of_source_001() -> None:
    """theta = 1.5, tau = 0.5: the mean of ST-GS is 0.0668; the exact gradient is 0.0149."""
    mean = moments(gl.GumbelSoftmax(1, 0.5, hard=True), lambda z: (z - 0.45) ** 2, 1.5)[0]
    assert abs(mean - 0.06677) < 1e-5


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_rao(hard: float) -> None:
    """The conditioned noise has the law of the noise given the sample, and carries no derivative."""
    theta, tau, p = 0.5, 0.5, chances(0.5)[int(hard)]
    noise, weight = nodes(theta, tau)
    g = gradients(gl.GumbelSoftmax(1, tau, hard=True), lambda z: z, theta, noise)
    given = (weight * g)[(theta + noise > 0) == bool(hard)].sum() / p
    logit = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    q, z = D.Bernoulli(logits=logit), torch.tensor([hard], dtype=torch.float64)
    torch.manual_seed(0)
    free = conditional_noise(q, z, 100_000)
    assert not free.requires_grad
    assert bool(((theta + free > 0) == bool(hard)).all())
    (ours,) = torch.autograd.grad(gumbel_rao_path(q, z, free, tau).sum(), logit)
    assert abs(ours - given) < 0.002


def test_rao_variance() -> None:
    """Law of total variance: at most that of ST-GS, at every temperature."""
    for tau in (0.05, 0.3, 1.0, 3.0):
        hard = gl.GumbelSoftmax(1, tau, hard=True)
        noise, weight = nodes(0.5, tau)
        part = weight * gradients(hard, torch.sin, 0.5, noise)
        on = 0.5 + noise > 0
        mean, first = moments(hard, torch.sin, 0.5)
        given = torch.stack([part[~on].sum(), part[on].sum()])
        torch.testing.assert_close(given.sum(), mean)
        assert (given**2 / chances(0.5)).sum() - mean**2 < first


def test_heun() -> None:
    """ReinMax is exact on quadratics to 1e-12, not on cubics; its matrix is the derived one."""
    for make_q, theta, points, size in ((bits, LOGITS, BITS, 3), (one_hot, ROWS, torch.eye(4), 4)):
        a = WEIGHT.double()[:size, :size]
        for power in (1, 2, 3):
            error = worst(gl.ReinMax(), make_q, theta, lambda z, a=a, k=power: ((z @ a) ** k).sum(-1), points)
            assert (error < 1e-12) == (power < 3)
        assert worst(gl.StraightThrough(), make_q, theta, lambda z, a=a: ((z @ a) ** 2).sum(-1), points) > 0.01
    for z in torch.eye(4, dtype=torch.float64):
        jacobian = torch.func.jacrev(lambda x, z=z: reinmax_path(one_hot(x), z, 1.0))(ROWS.double())
        pi = ROWS.double().softmax(-1)
        cross = torch.outer(z, pi)
        torch.testing.assert_close(jacobian, (torch.diag(z) + torch.diag(pi) - cross - cross.T) / 2)


def test_cold() -> None:
    """Gumbel-Rao at a low temperature is ReinMax, given the sample; the second moment of ST-GS is s / (6 tau)."""
    tau, (off, on) = 1e-4, chances(0.5)
    noise, weight = nodes(0.5, tau)
    g = gradients(gl.GumbelSoftmax(1, tau, hard=True), lambda z: z, 0.5, noise)
    assert abs((weight * g)[0.5 + noise > 0].sum() / on - off / 2) < 1e-3
    assert abs((weight * g)[0.5 + noise < 0].sum() / off - on / 2) < 1e-3
    assert abs(6 * tau * (weight * g**2).sum() / (on * off) - 1) < 1e-3


def test_cold_one_hot() -> None:
    """The same for one-hot variables, within the error of 200000 noises."""
    torch.manual_seed(0)
    theta = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    for z in torch.eye(3, dtype=torch.float64):
        free = conditional_noise(one_hot(theta), z, 200_000)
        ours = torch.func.jacrev(lambda x, z=z, g=free: gumbel_rao_path(one_hot(x), z, g, 0.02))(theta)
        theirs = torch.func.jacrev(lambda x, z=z: reinmax_path(one_hot(x), z, 1.0))(theta)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def test_temperature() -> None:
    """Cooled, only plain Gumbel-softmax loses its bias; ST-GS goes to ReinMax."""

    def f(z: Tensor) -> Tensor:
        return torch.cos(2 * z)

    exact = chances(0.5).prod() * (np.cos(2) - 1)
    assert abs(moments(gl.GumbelSoftmax(1, 1e-3), f, 0.5)[0] - exact) < 1e-4
    hard, rm = moments(gl.GumbelSoftmax(1, 1e-3, hard=True), f, 0.5)[0], moments(gl.ReinMax(), f, 0.5)[0]
    assert abs(hard - rm) < 1e-3
    assert abs(rm - exact) > 0.1
    for gentle, nearer in ((torch.cos, True), (f, False)):
        exact = chances(0.5).prod() * (gentle(ENDS.double()).diff())
        rm, st = (abs(moments(m, gentle, 0.5)[0] - exact) for m in (gl.ReinMax(), gl.StraightThrough()))
        assert bool(rm < st) == nearer


def test_question() -> None:
    """GS takes the slope at the soft point, ST-GS at the hard one, with the same Jacobian."""
    g = torch.tensor([0.2, 1.3, -0.4], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return (z**3) @ torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

    x = ((theta.detach() + g) / 0.5).softmax(-1)
    z = torch.eye(3, dtype=torch.float64)[x.argmax()]
    jacobian = (torch.diag(x) - torch.outer(x, x)) / 0.5
    noise = (g + torch.logsumexp(theta, 0).detach())[None]
    for point, hard in ((x, False), (z, True)):
        loss = gl.GumbelSoftmax(1, 0.5, hard).estimate(one_hot(theta), f, noise)
        (ours,) = torch.autograd.grad(loss, theta)
        torch.testing.assert_close(ours, slope(f, point) @ jacobian)


def test_bent() -> None:
    """A cost that equals z on {0, 1}, with slope -1 at both: the sign is wrong for all that see slopes at ends."""

    def f(z: Tensor) -> Tensor:
        return z - torch.sin(2 * torch.pi * z) / torch.pi

    s = chances(0.5).prod()
    for estimator in (gl.StraightThrough(), gl.ReinMax()):
        torch.testing.assert_close(moments(estimator, f, 0.5)[0], -s)
    assert abs(moments(gl.GumbelSoftmax(1, 0.01), f, 0.5)[0] - s) < 1e-3
