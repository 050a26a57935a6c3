"""What chapter 18 claims and no test of the package keeps: bounds, relaxed values and collapse, with no sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D

import gradlab as gl

K, FACTORS = 3, 2
CODES = nn.functional.one_hot(torch.cartesian_prod(*[torch.arange(K)] * FACTORS), K).double()  # [9, 2, 3]
X = torch.tensor([[0.0, 16.0, 5.0], [7.0, 1.0, 12.0], [3.0, 3.0, 16.0], [9.0, 0.0, 8.0]], dtype=torch.float64)


def one_hots(logits: Tensor) -> D.Distribution:
    return D.Independent(D.OneHotCategorical(logits=logits), 1)


PRIOR = one_hots(torch.zeros(FACTORS, K, dtype=torch.float64))


def parameters(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return guide logits [N, d, K], first weights [d K, 5] and last weights [5, 3]."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((len(X), FACTORS, K), (FACTORS * K, 5), (5, 3))
    guide, first, last = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    return guide.requires_grad_(), first.requires_grad_(), last.requires_grad_()


def decoder(first: Tensor, last: Tensor):
    def likelihood(z: Tensor) -> D.Distribution:
        return D.Independent(D.Binomial(16, logits=(z.flatten(-2) @ first).tanh() @ last), 1)

    return likelihood


def loss(guide: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return gl.NegativeELBO(lambda x: one_hots(guide), PRIOR, decoder(first, last), gl.Enumerate())(X)


def test_bound() -> None:
    """The ELBO is reconstruction minus log K minus entropies, and log p minus the divergence to the posterior."""
    guide, first, last = parameters()
    elbo = -loss(guide, first, last)
    log_q = one_hots(guide).log_prob(CODES[:, None])  # [9, N]
    log_x = decoder(first, last)(CODES[:, None]).log_prob(X)
    joint = log_x - FACTORS * math.log(K)
    kl = math.log(K) - one_hots(guide).base_dist.entropy()  # [N, d]
    assert (kl >= 0).all()
    assert (kl <= math.log(K)).all()
    torch.testing.assert_close(elbo, (log_q.exp() * log_x).sum(0) - kl.sum(-1))
    gap = (log_q.exp() * (log_q - joint.log_softmax(0))).sum(0)
    torch.testing.assert_close(elbo, joint.logsumexp(0) - gap)
    assert (gap > 0).all()


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_relaxed(temperature: float) -> None:
    """The contrived model of the proof: the relaxed value exceeds log p at every temperature."""
    x = torch.tensor(1.0, dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # the difference of two Gumbels is logistic
    first = (u.logit() / temperature).sigmoid()
    relaxed = D.Normal(4 * first * (1 - first), 1.0).log_prob(x).mean()
    log_p = D.Normal(0.0, 1.0).log_prob(x)  # both vertices have mean zero
    assert relaxed > log_p + 0.01


def stuck(equal: bool, uniform: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient in the first factor's logits, and in its first weights less their mean over values."""
    guide, first, last = parameters()
    with torch.no_grad():
        if uniform:
            guide[:, 0] = 0.7
        if equal:
            first[:K] = first[0].clone()
    loss(guide, first, last).sum().backward()
    assert guide.grad is not None
    assert first.grad is not None
    weights = first.grad[:K]
    return guide.grad[:, 0], weights - weights.mean(0)


def test_collapse() -> None:
    """A factor that is ignored and uniform stays so; either alone does not."""
    for gradient in stuck(True, True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    assert stuck(True, False)[0].abs().max() > 1e-3
    assert stuck(True, False)[1].abs().max() > 1e-3
    assert stuck(False, True)[0].abs().max() > 1e-3


def test_information() -> None:
    """The mean KL of a factor is its mutual information with the index plus a mismatch with the prior."""
    pi = parameters()[0].softmax(-1)
    mean = pi.mean(0)
    kl = (pi * (K * pi).log()).sum(-1).mean(0)
    information = (pi * (pi / mean).log()).sum(-1).mean(0)
    torch.testing.assert_close(kl, information + (mean * (K * mean).log()).sum(-1))
    assert (information > 0).all()


@pytest.mark.parametrize("estimator", [gl.StraightThrough(), gl.ReinMax()])
def test_enumerated_mean_of_straight_through(estimator: gl.Estimator) -> None:
    """Giving all codes as noise, with weighted costs, is the mean over samples."""
    guide, first, last = parameters()
    q, likelihood = one_hots(guide), decoder(first.detach(), last.detach())
    z = CODES[:, None].expand(-1, len(X), -1, -1)
    weight = len(CODES) * q.log_prob(z).exp().detach()
    value = estimator.estimate(q, lambda z: -weight * likelihood(z).log_prob(X), z)
    torch.testing.assert_close(value, gl.Enumerate()(q, lambda z: -likelihood(z).log_prob(X)))
    (found,) = torch.autograd.grad(value.sum(), guide)
    torch.manual_seed(0)
    many = one_hots(guide.expand(4000, *guide.shape))
    (draws,) = torch.autograd.grad(estimator(many, lambda z: -likelihood(z).log_prob(X)).sum(), guide)
    assert (draws / 4000 - found).norm() < 0.1 * found.norm()
