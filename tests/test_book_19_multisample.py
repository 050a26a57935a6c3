"""What chapter 19 claims and no test of the package keeps: sums over tuples and counts, closed forms, no sampling."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import gradlab as gl

F64 = torch.float64
BITS = torch.tensor([0.0, 1.0], dtype=F64)
LAM = torch.tensor(-0.4, dtype=F64)
LOG_JOINT = D.Bernoulli(torch.tensor(0.3, dtype=F64)).log_prob(BITS) + D.Normal(2 * BITS, 1.0).log_prob(
    torch.tensor(2.0, dtype=F64)
)
LOG_P = LOG_JOINT.logsumexp(0)


def counts(size: int, logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of 0 and 1, the numbers of ones among ``size`` bits, and their probabilities."""
    n = torch.arange(size + 1, dtype=F64)
    w = (LOG_JOINT - D.Bernoulli(logits=logit).log_prob(BITS)).exp()
    return w, n, D.Binomial(size, logits=logit).log_prob(n).exp()


def bound(size: int, logit: Tensor = LAM) -> Tensor:
    w, n, chance = counts(size, logit)
    return chance @ ((n * w[1] + (size - n) * w[0]) / size).log()


def gradient(size: int) -> Tensor:
    logit = LAM.clone().requires_grad_()
    return torch.autograd.grad(bound(size, logit), logit)[0]


def test_gap() -> None:
    """It falls, always, and its first term is Var(w) / (2 K p^2): what is left is of order 1 / K^2."""
    w, _, chance = counts(1, LAM)
    first = chance @ (w / LOG_P.exp() - 1) ** 2 / 2
    gaps = torch.stack([LOG_P - bound(k) for k in range(1, 60)])
    assert (gaps > 0).all()
    assert (gaps.diff() < 0).all()
    rest = [(k * k * (LOG_P - bound(k) - first / k)).item() for k in (256, 512, 1024)]
    assert rest[0] == pytest.approx(rest[2], rel=0.01)
    assert 2 * bound(128) - bound(64) > LOG_P  # the first terms cancel, and the bound is none


@pytest.mark.parametrize("scale", [0.5**0.5, 0.1**0.5, 0.8])
def test_landing(scale: float) -> None:
    """Mean and variance of what is linear in the noise, from the two points -1 and 1."""
    found = {}
    for mode in ("total", "sample", "analytic"):
        m = torch.full((2,), 0.2, dtype=F64, requires_grad=True)
        noise = torch.tensor([[-1.0, 1.0]], dtype=F64)
        loss = gl.NegativeELBO(
            lambda x, m=m: D.Normal(m, scale),
            D.Normal(torch.tensor(0.0, dtype=F64), 1.0),
            lambda z: D.Normal(z, 1.0),
            gl.Reparameterization(sampler=lambda q, size, noise=noise: q.loc + q.scale * noise),
            kl=mode,
        )(torch.ones(2, dtype=F64))
        found[mode] = torch.autograd.grad(loss.sum(), m)[0]
        assert found[mode].mean().item() == pytest.approx(2 * 0.2 - 1)
    spread = {mode: g.var(correction=0).item() for mode, g in found.items()}
    assert spread == pytest.approx(
        {"total": 4 * scale**2, "sample": (2 * scale - 1 / scale) ** 2, "analytic": scale**2}, abs=1e-12
    )


def vimco(size: int) -> tuple[Tensor, Tensor]:
    """The gradient for each number of ones, and its probability."""
    (v, w), n, chance = counts(size, LAM)
    p = LAM.sigmoid()
    total = n * w + (size - n) * v
    one = total - w + (((n - 1) * w.log() + (size - n) * v.log()) / (size - 1)).exp()
    zero = total - v + ((n * w.log() + (size - n - 1) * v.log()) / (size - 1)).exp()
    gain = torch.where(n > 0, n * (total / one.clamp_min(1e-300)).log() * (1 - p), 0.0)
    gain = gain - torch.where(n < size, (size - n) * (total / zero.clamp_min(1e-300)).log() * p, 0.0)
    return gain - (n * w * (1 - p) - (size - n) * v * p) / total, chance


def test_vimco_by_counts() -> None:
    """Unbiased for every K; the signal-to-noise ratio falls as the root of K."""
    for size in (2, 5, 64):
        values, chance = vimco(size)
        torch.testing.assert_close(chance @ values, gradient(size), rtol=1e-10, atol=1e-12)
    ratio = {}
    for size in (128, 1024):
        values, chance = vimco(size)
        mean = chance @ values
        ratio[size] = mean / (chance @ (values - mean) ** 2).sqrt()
    assert math.log(ratio[1024] / ratio[128]) / math.log(8) == pytest.approx(-0.5, abs=0.01)


def test_autograd_of_a_discrete_bound_points_away() -> None:
    """Its mean is 0 for one sample; with many it ascends the divergence from posterior to guide."""
    p, posterior = LAM.sigmoid(), (LOG_JOINT[1] - LOG_P).exp()

    def mean(size: int) -> Tensor:
        w, n, chance = counts(size, LAM)
        ones, zeros = n * w[1], (size - n) * w[0]
        return -(chance @ ((ones * (1 - p) - zeros * p) / (ones + zeros)))

    assert mean(1).abs() < 1e-12
    for size in (2, 8, 1000):
        assert mean(size) < 0 < gradient(size)
    assert mean(1000).item() == pytest.approx((p - posterior).item(), abs=1e-3)


def test_moments() -> None:
    """The second moment of normal weights, and where moments cease to exist."""
    z = torch.linspace(-14, 14, 40_001, dtype=F64)
    for m, s2, mu, v in ((1.0, 1.0, 0.5, 0.5), (0.3, 0.4, 0.5, 0.5), (0.0, 2.0, 1.0, 1.5)):
        log = 2 * D.Normal(mu, v**0.5).log_prob(z) - D.Normal(m, s2**0.5).log_prob(z)
        formula = s2 / (v * (2 * s2 - v)) ** 0.5 * math.exp((m - mu) ** 2 / (2 * s2 - v))
        assert torch.trapezoid(log.exp(), z).item() == pytest.approx(formula, rel=1e-9)
    for r, s2 in ((2, 0.25), (4, 0.375)):  # of a posterior of variance 0.5
        for factor in (0.99, 1.01):
            log = r * D.Normal(0.0, 0.5**0.5).log_prob(z) - (r - 1) * D.Normal(0.0, (factor * s2) ** 0.5).log_prob(z)
            assert (log[0] < log[len(z) // 2]) == (factor > 1)


def test_principal_components() -> None:
    """The best factorized guide's KL; the estimate is exact where the guide is the posterior."""
    torch.manual_seed(0)
    loadings, noise = torch.randn(6, 3, dtype=F64), torch.tensor(0.5, dtype=F64)
    x = torch.randn(4, 6, dtype=F64)
    exact = D.MultivariateNormal(
        torch.zeros(6, dtype=F64), loadings @ loadings.T + noise * torch.eye(6, dtype=F64)
    ).log_prob(x)
    precision = torch.eye(3, dtype=F64) + loadings.T @ loadings / noise
    mean = torch.linalg.solve(precision, loadings.T @ x.T / noise).T
    kl = (precision.diagonal().log().sum() - precision.logdet()) / 2
    factorized = D.MultivariateNormal(mean, precision_matrix=precision.diagonal().diag())
    posterior = D.MultivariateNormal(mean, precision_matrix=precision)
    torch.testing.assert_close(D.kl_divergence(factorized, posterior), kl.expand(4))
    found = gl.log_likelihood(
        lambda x: posterior,
        D.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)),
        lambda z: D.Independent(D.Normal(z @ loadings.T, noise.sqrt()), 1),
        x,
        2,
    )
    torch.testing.assert_close(found.bounds, exact)
