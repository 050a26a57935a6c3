"""What chapter 16 claims and no test of the package keeps: EM, the bound and its updates, with no sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D

import gradlab as gl

X = torch.tensor([-3, -2.5, -2, 2, 2.5, 3, 9, 9.5, 10], dtype=torch.float64)
BEST, LOWER, SADDLE = -18.9079, -35.5785, -118.0204


def joint(m: Tensor) -> Tensor:
    return D.Normal(m[..., None, :], 1.0).log_prob(X[:, None]) - math.log(3)


def likelihood(m: Tensor) -> Tensor:
    return joint(m).logsumexp(-1).sum(-1)


def em(m: Tensor, steps: int = 200) -> Tensor:
    for _ in range(steps):
        r = joint(m).softmax(-1)
        m = (r * X[:, None]).sum(-2) / r.sum(-2)
    return m


def points(count: int) -> Tensor:
    return 4 * torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(value: Tensor, m: Tensor) -> Tensor:
    return torch.autograd.grad(value, m)[0]


def test_fisher():
    """The gradient of log p is the posterior mean of that of log p(x, z); a prior mean is not."""
    theta = (points(3) / 4).requires_grad_()

    def log_joint() -> Tensor:
        return theta[0].log_softmax(-1) + D.Normal(theta[1], theta[2].exp()).log_prob(X[:, None])

    exact = gradient(log_joint().logsumexp(-1).sum(), theta)
    found = gradient((log_joint().softmax(-1).detach() * log_joint()).sum(), theta)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    prior = gradient((theta[0].softmax(-1).detach() * log_joint()).sum(), theta)
    assert (prior - exact).abs().max() > 0.1


def test_bound():
    """L = Q + H + KL for any two points; the gradients of Q and L agree where they meet, and only there."""
    worst = 0.0
    for old, new in zip(points(20), points(40)[20:], strict=True):
        r, log_r = joint(old).softmax(-1), joint(old).log_softmax(-1)
        kl = (r * (log_r - joint(new).log_softmax(-1))).sum()
        bound = (r * joint(new)).sum() - (r * log_r).nan_to_num().sum()
        torch.testing.assert_close(bound + kl, likelihood(new))
        m = old.clone().requires_grad_()
        exact = gradient(likelihood(m), m)
        torch.testing.assert_close(gradient((r * joint(m)).sum(), m), exact, rtol=0, atol=1e-9)
        stale = joint(old + 0.1).softmax(-1)
        worst = max(worst, (gradient((stale * joint(m)).sum(), m) - exact).abs().max().item())
    assert worst > 0.1


@pytest.mark.parametrize(
    ("start", "end", "positive"),
    [((-2.5, 2.5, 9.5), BEST, 0), ((9.0, 9.5, 10.0), LOWER, 0), ((1.0, 1.0, 1.0), SADDLE, 2)],
)
def test_ends(start, end, positive):
    """The value at which EM ends, and how many directions lead up from there."""
    m = em(torch.tensor(start, dtype=torch.float64))
    assert likelihood(m).item() == pytest.approx(end, abs=1e-4)
    slopes = torch.linalg.eigvalsh(torch.autograd.functional.hessian(likelihood, m))
    assert (slopes > 0).sum() == positive


def test_pushes():
    """The lower maximum attracts; the saddle is left for the best end, unless a tie remains."""
    lower, saddle = torch.tensor([[0.0, 9.5, 9.5], [28.5 / 9] * 3], dtype=torch.float64)
    push = torch.eye(3, dtype=torch.float64)
    assert (likelihood(em(lower + torch.cat([push, -push]))) - LOWER).abs().max() < 1e-4
    apart = torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64)
    assert likelihood(em(saddle + apart)).item() == pytest.approx(BEST, abs=1e-4)
    assert likelihood(em(saddle + 0.01 * push[2])).item() == pytest.approx(-33.4991, abs=1e-4)


@pytest.mark.parametrize("p", [0.2, 0.7, 0.875])
def test_elbo(p):
    guide, posterior = D.Bernoulli(torch.tensor([p], dtype=torch.float64)), D.Bernoulli(torch.tensor(7 / 8).double())
    loss = gl.NegativeELBO(lambda x: guide, D.Bernoulli(0.5), lambda z: D.Bernoulli(0.1 + 0.6 * z), gl.Enumerate())
    with torch.no_grad():
        value = -loss(torch.ones(1, dtype=torch.float64)) + D.kl_divergence(guide, posterior)
    assert value.item() == pytest.approx(math.log(0.4), abs=1e-7)


@pytest.mark.parametrize("d", [2, 5])
def test_shrink(d):
    """The best mean-field bound, from the KL of two normals, and where it is largest."""
    size = 9.0

    def bound(v: float) -> float:
        precision = torch.eye(d, dtype=torch.float64) + v
        posterior = D.MultivariateNormal(torch.zeros(d).double(), precision_matrix=precision)
        guide = D.MultivariateNormal(torch.zeros(d).double(), (1 / precision.diagonal()).diag())
        log_p = -0.5 * (math.log(2 * math.pi * (1 + d * v)) + size / (1 + d * v))
        return log_p - D.kl_divergence(guide, posterior).item()

    for v in (0.3, 2.0):
        formula = -0.5 * (math.log(2 * math.pi) + size / (1 + d * v) + d * math.log1p(v))
        assert bound(v) == pytest.approx(formula, abs=1e-10)
    b = size - 2 * d  # (1 + d v)^2 = size (1 + v)
    best = (b + math.sqrt(b * b + 4 * d * d * (size - 1))) / (2 * d * d)
    assert bound(best) > max(bound(best - 0.01), bound(best + 0.01))
    assert best < (size - 1) / d


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(1, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> D.Distribution:
        return D.Categorical(logits=self.map(x[:, None]))


BATCHES = [list(b) for b in itertools.combinations(range(9), 3)]


def test_updates():
    """Over all batches, N / b makes the mean update right; a shared variable shows that it is no mere step size."""
    means = torch.tensor([-1.0, 2.0, 7.0], dtype=torch.float64, requires_grad=True)
    prior = D.Categorical(torch.ones(3, dtype=torch.float64))
    elbo = gl.NegativeELBO(Linear(), prior, lambda z: D.Normal(means[z], 1.0), gl.Enumerate())
    parameters = [means, *elbo.parameters()]
    total = torch.autograd.grad(elbo(X).sum(), parameters)
    batches = torch.autograd.grad(sum(9 * elbo(X[b]).mean() for b in BATCHES), parameters)
    for exact, found in zip(total, batches, strict=True):
        torch.testing.assert_close(found / len(BATCHES), exact)

    def shared(mean: float, variance: float, factor: float) -> float:
        p = torch.tensor([mean, math.log(variance) / 2], dtype=torch.float64, requires_grad=True)
        elbo = gl.NegativeELBO(
            lambda x: D.Normal(p[0], p[1].exp()).expand(x.shape),
            D.Normal(torch.zeros((), dtype=torch.float64), 1.0),
            lambda z: D.Normal(z, 1.0),
            gl.Quadrature(),
            kl_weight=1 / factor,
        )
        return gradient(factor * elbo(X[BATCHES]).mean(), p).abs().max().item()

    assert shared(2.85, 0.1, 9) < 1e-9
    assert shared(2.85, 0.1, 3) > 0.1
    assert shared(9.5 / 4, 0.25, 3) < 1e-9


def test_amortisation():
    """With unequal scales the posterior logits are quadratic in x: a quadratic network has no gap, a linear one has."""
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    means, scales = torch.tensor([[-1.0, 0.0, 1.5], [0.7, 1.0, 1.5]], dtype=torch.float64)
    logits = D.Normal(means, scales).log_prob(x[:, None]).log_softmax(-1)
    odds = logits[:, 1:] - logits[:, :1]
    for degree, exact in ((1, False), (2, True)):
        powers = x[:, None] ** torch.arange(degree + 1)
        fitted = powers @ torch.linalg.lstsq(powers, odds).solution
        assert torch.allclose(fitted, odds, rtol=0, atol=1e-8) == exact


@pytest.mark.parametrize("s", [0.5, 0.8, 1.0, 1.6])
def test_landing(s):
    """The three one-sample gradients in the mean are m + slope * noise, so that two noises give their variances."""
    root, rules = math.sqrt(2.0), {"total": s, "sample": s - 1 / s, "analytic": s / 2}
    noise = torch.tensor([1.0, -2.0], dtype=torch.float64)
    path = gl.Reparameterization(sampler=lambda q, size: (q.loc + q.scale * noise)[None])
    for kl, slope in rules.items():
        m = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
        prior, guide = D.Normal(torch.zeros((), dtype=torch.float64), root), D.Normal(m, s)
        elbo = gl.NegativeELBO(lambda x, q=guide: q, prior, lambda z: D.Normal(z, root), path, kl=kl)
        found = gradient(elbo(torch.zeros(2, dtype=torch.float64)).sum(), m)
        torch.testing.assert_close(found, 0.5 + slope * noise)


def test_one_bump():
    """A guide on one of two bumps of the posterior loses log 2, and its gradient is zero."""
    p = torch.tensor([3.2, math.log(0.2) / 2], dtype=torch.float64, requires_grad=True)
    centres = torch.tensor([-4.0, 4.0], dtype=torch.float64)
    prior = D.MixtureSameFamily(D.Categorical(torch.ones(2, dtype=torch.float64)), D.Normal(centres, 0.5))
    elbo = gl.NegativeELBO(lambda x: D.Normal(p[0], p[1].exp()), prior, lambda z: D.Normal(z, 1.0), gl.Quadrature())
    loss = elbo(torch.zeros((), dtype=torch.float64))
    log_p = -0.5 * (math.log(2 * math.pi * 1.25) + 16 / 1.25)
    assert loss.item() + log_p == pytest.approx(math.log(2), abs=1e-8)
    assert gradient(loss, p).abs().max() < 1e-8
