"""The autoencoders of binary images that are timed, and their steps.

``L``  784-(20 x 10)-784, one linear layer each way, 20 categorical latents of 10 values
``L1`` 784-200-784, one linear layer each way, 200 bits
``J``  784-512-256-(20 x 10)-256-512-784 with ReLU
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical

import gradlab as gl
from benchmarks import harness

BATCH, PIXELS = 100, 784
SHAPES: dict[str, tuple[list[int], int]] = {"L": ([], 10), "L1": ([], 0), "J": ([512, 256], 10)}
"""hidden widths; values of a latent, 0 for bits"""
SIZE = 200
"""of the latents, bits or 20 one-hots of 10"""


class Guide(nn.Module):
    """The encoder: images to a distribution of the latents."""

    def __init__(self, hidden: list[int], values: int) -> None:
        super().__init__()
        self.net, self.values = layers([PIXELS, *hidden, SIZE]), values

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, those of one latent in the last dim."""
        return self.net(x).unflatten(-1, (-1, self.values)) if self.values else self.net(x)

    def forward(self, x: Tensor) -> Distribution:
        return law(self.logits(x), self.values)


class Autoencoder(nn.Module):
    """Encoder and decoder; the same parameters whatever the gradient."""

    def __init__(self, name: str) -> None:
        super().__init__()
        hidden, self.values = SHAPES[name]
        self.guide, self.decoder = Guide(hidden, self.values), layers([SIZE, *hidden[::-1], PIXELS])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def elbo(self, estimator: gl.Estimator) -> gl.NegativeELBO:
        """Return the negative ELBO, trained by an estimator."""
        zeros = torch.zeros(SIZE, device=self.device)
        prior = law(zeros.unflatten(0, (-1, self.values)) if self.values else zeros, self.values)
        return gl.NegativeELBO(self.guide, prior, self.likelihood(), estimator)

    def likelihood(self) -> gl.LikelihoodAfterLinear:
        """Return p(x | z), which begins with a linear layer."""
        first, *others = self.decoder
        assert isinstance(first, nn.Linear)
        tail = nn.Sequential(*others)
        return gl.LikelihoodAfterLinear(first, lambda h: law(tail(h), 0)) if others else gl.BernoulliLikelihood(first)

    def law(self, logits: Tensor) -> Distribution:
        """Return the distribution of the latents."""
        return law(logits, self.values)

    def kl(self, logits: Tensor) -> Tensor:
        """Return the KL to the uniform law, ``[B]``."""
        if not self.values:
            p = logits.sigmoid()
            return (p * logits - F.softplus(logits)).sum(-1) + SIZE * math.log(2)
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p + math.log(self.values))).sum((-2, -1))

    def nll(self, x: Tensor, z: Tensor) -> Tensor:
        """Return -log p(x | z), ``[*L, B]``, as one writes it by hand."""
        y = self.decoder(z.flatten(-2) if self.values else z)
        return F.binary_cross_entropy_with_logits(y, x.expand_as(y), reduction="none").sum(-1)

    def floor(self, x: Tensor) -> Tensor:
        """Return the loss of the deterministic autoencoder: z is the mean of the latents."""
        logits = self.guide.logits(x)
        z = logits.softmax(-1) if self.values else logits.sigmoid()
        return self.nll(x, z) + self.kl(logits)


def law(logits: Tensor, values: int) -> Distribution:
    """Return the distribution of the latents; for no values, of bits."""
    return Independent((OneHotCategorical if values else Bernoulli)(logits=logits), 1)


def layers(widths: list[int]) -> nn.Sequential:
    """Return linear layers with ReLU between any two."""
    net: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        net += [nn.ReLU(), nn.Linear(a, b)]
    return nn.Sequential(*net[1:])


def steps(
    m: Autoencoder, gradients: Mapping[str, Callable[[Tensor], object]], x: Tensor, adam: bool = True
) -> dict[str, Callable[[], None]]:
    """Return training steps on a batch."""
    return harness.steps(m.parameters(), {name: partial(gradient, x) for name, gradient in gradients.items()}, adam)


def train(m: Autoencoder, data: Tensor, estimator: gl.Estimator, steps: int) -> None:
    """Train the model for so many steps."""
    loss, adam = m.elbo(estimator), torch.optim.Adam(m.parameters(), 1e-3)
    for _ in range(steps):
        adam.zero_grad()
        loss(data[torch.randint(len(data), (BATCH,), device=data.device)]).mean().backward()
        adam.step()


def images(device: torch.device | str = "cpu") -> Tensor:
    """Return binary images ``[N, 784]``: scikit-learn's digits, scaled up, with more contrast, then drawn."""
    from sklearn.datasets import load_digits

    small = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1).flatten(1)
    return (torch.rand(large.shape) < torch.sigmoid(10 * (large - 0.5))).float().to(device)
