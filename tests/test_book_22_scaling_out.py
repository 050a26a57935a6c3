"""What chapter 22 claims and no test of the package keeps: averages, copies, the two noises, the noise scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

import gradlab as gl

BITS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2)
LOO = gl.LeaveOneOut


class Linear(nn.Module):
    """One small linear layer for each copy."""

    def __init__(self, seeds: list[int], inputs: int = 3, outputs: int = 2) -> None:
        super().__init__()
        weights = [torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.weight = nn.Parameter(torch.stack(weights).double())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Loss(nn.Module):
    """A guide of two bits, and a decoder."""

    def __init__(self, seeds: list[int], estimator: gl.Estimator) -> None:
        super().__init__()
        self.guide, self.decoder, self.estimator = Linear(seeds), Linear(seeds, 2, 3), estimator

    def forward(self, x: Tensor) -> Tensor:
        q = Independent(Bernoulli(logits=self.guide(x)), 1)
        return self.estimator(q, lambda z: (self.decoder(z) - x).square().sum(-1))


def data(n: int = 6) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def train(seeds: list[int], estimator: gl.Estimator, replay: list[Tensor] | None = None, clip: float | None = None):
    loss, noise, draw = Loss(seeds, estimator), [], estimator.draw

    def recorded(q):
        noise.append(draw(q) if replay is None else replay[len(noise)])
        return noise[-1]

    estimator.draw = recorded
    adam = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(8):
        adam.zero_grad()
        loss(data()).mean(-1).sum().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(loss.parameters(), clip)
        adam.step()
    return [p.detach() for p in loss.parameters()], noise


@pytest.mark.parametrize(
    "make, clip, same",
    [
        (lambda: gl.ScoreFunction(2, LOO()), None, True),
        (gl.LocalExpectation, None, True),
        (lambda: gl.ScoreFunction(2, gl.MovingAverage()), None, False),
        (lambda: gl.ScoreFunction(2, LOO()), 0.1, False),
    ],
)
def test_copies(make, clip, same):
    torch.manual_seed(0)
    together, noise = train([0, 1, 2], make(), clip=clip)
    alone, _ = train([1], make(), [draw[:, 1:2] for draw in noise], clip)
    gap = max((a[1] - b[0]).abs().max() for a, b in zip(together, alone, strict=True))
    assert (gap <= 1e-11) == same, gap


def all_gradients(estimator: gl.Estimator) -> tuple[Tensor, Tensor]:
    """Weights [N, O] and gradients [N, O, P] of all outcomes of the samples for each point."""
    x, size = data(), estimator.num_samples
    z = BITS[torch.cartesian_prod(*[torch.arange(4)] * size).reshape(-1, size).T]  # [S, O, 2]
    q = Independent(Bernoulli(logits=Loss([0], estimator).guide(x[:, None]).detach()), 1)
    weight = q.log_prob(z[:, None]).sum(0).exp()
    many = Loss([0] * weight.numel(), estimator)
    estimator.draw = lambda q: z.repeat(1, len(x), 1)[:, :, None]
    many(x.repeat_interleave(z.shape[1], 0)[:, None]).sum().backward()
    return weight, torch.cat([p.grad.flatten(1) for p in many.parameters()], 1).reshape(*weight.shape, -1)


def noises(estimator: gl.Estimator) -> tuple[Tensor, Tensor, Tensor]:
    weight, g = all_gradients(estimator)
    each = torch.einsum("no,nop->np", weight, g)
    latent = (weight * (g - each[:, None]).square().sum(-1)).sum(1).mean()
    return (each - each.mean(0)).square().sum(-1).mean(), latent, each


def test_total_variance():
    """D does not depend on the estimator, L falls as 1/S, and both add up in the mean of two points."""
    (D, L, each), (D2, L2, _) = noises(gl.ScoreFunction()), noises(gl.ScoreFunction(2))
    torch.testing.assert_close(D2, D)
    torch.testing.assert_close(L2, L / 2)
    torch.testing.assert_close(noises(gl.LocalExpectation())[2], each)
    weight, g = (t.flatten(0, 1) for t in all_gradients(gl.ScoreFunction()))
    weight = weight / len(data())
    pairs = (g[:, None] + g) / 2 - each.mean(0)
    total = torch.einsum("i,j,ij->", weight, weight, pairs.square().sum(-1))
    torch.testing.assert_close(total, (D + L) / 2)


def test_best_samples():
    D, L, fixed, each = 2.0, 3.0, 5.0, 0.7
    S = torch.linspace(0.2, 20, 100_001, dtype=torch.float64)
    price = (D + L / S) * (fixed + S * each)
    assert abs(S[price.argmin()] - (L * fixed / D / each) ** 0.5) < 1e-3
    assert abs(price.min() - ((D * fixed) ** 0.5 + (L * each) ** 0.5) ** 2) < 1e-6


def test_noise_scale():
    """The mean gain of the best step, over all outcomes, with any positive definite H."""
    weight, g = (t.flatten(0, 1) for t in all_gradients(gl.ScoreFunction(2, LOO())))
    weight, G = weight / len(data()), noises(gl.LocalExpectation())[2].mean(0)
    root = torch.randn(len(G), len(G), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = root @ root.T
    curve = G @ H @ G
    scale = weight @ torch.einsum("op,pq,oq->o", g - G, H, g - G) / curve

    def gain(step: Tensor) -> Tensor:
        return weight @ (step * (g @ G) - step**2 / 2 * torch.einsum("op,pq,oq->o", g, H, g))

    best = G @ G / curve / (1 + scale)
    torch.testing.assert_close(gain(best), (G @ G) ** 2 / (2 * curve) / (1 + scale))
    assert gain(0.9 * best) < gain(best) > gain(1.1 * best)


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_mean_of_ranks(rho):
    """V/R (1 + (R - 1) rho) is the variance of the mean of R equally correlated gradients."""
    R, V = 5, 3.0
    covariance = V * (rho + (1 - rho) * torch.eye(R))
    assert abs(covariance.mean() - V / R * (1 + (R - 1) * rho)) < 1e-12


def test_pooled():
    """Leave-one-out over two ranks of two samples gains K / 6."""
    logits, costs = torch.tensor([0.4, -0.2]).double(), torch.tensor([0.3, 2.0, -1.0, 5.0]).double()
    p = Bernoulli(logits=logits).log_prob(BITS).sum(-1).exp()

    def variance(size: int) -> Tensor:
        index = torch.cartesian_prod(*[torch.arange(4)] * size).T
        weight = p[index].prod(0)
        many = logits.expand(len(weight), 2).clone().requires_grad_()
        q = Independent(Bernoulli(logits=many), 1)
        estimator = gl.ScoreFunction(size, LOO())
        estimator.estimate(
            q, lambda z: costs[(z @ torch.tensor([2.0, 1.0]).to(z)).long()], BITS[index]
        ).sum().backward()
        return weight @ (many.grad - weight @ many.grad).square().sum(-1)

    score = BITS - p @ BITS
    slope = (p * costs) @ score
    K = (p @ (costs - p @ costs) ** 2) * (p @ score.square().sum(-1)) + slope @ slope
    torch.testing.assert_close(variance(2) / 2 - variance(4), K / 6)
