"""The biased family: follow a relaxed sample, or pretend that a hard one had a path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from gradlab.estimator import Cost, Estimator, Traits
from gradlab.gumbel import is_relaxable
from gradlab.samplers import (
    concrete_path,
    conditional_noise,
    gumbel_max,
    gumbel_rao_path,
    noise_of,
    reinmax_path,
    straight_through_path,
)

__all__ = ["GumbelRao", "GumbelSoftmax", "ReinMax", "StraightThrough"]

SERVES = "Bernoulli and OneHotCategorical"


class _Relaxed(Estimator):
    """Has a temperature, a plain attribute that a schedule may change; serves Bernoulli and one-hot variables."""

    def __init__(self, num_samples: int = 1, temperature: float = 1.0) -> None:
        super().__init__(num_samples)
        if not temperature > 0:
            raise ValueError(f"{type(self).__name__}: found temperature={temperature}, expected a positive number.")
        self.temperature = temperature

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return is_relaxable(q)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


class GumbelSoftmax(_Relaxed):
    r"""The pathwise gradient of a relaxed cost, at a sample of the Concrete law.

    .. math:: \nabla E_q[f] \approx E_g\big[\nabla_\theta f(\mathrm{softmax}((\log\pi + g)/\tau))\big]

    Biased: it is the exact gradient of :math:`E[f(x_\tau)]`, and f is evaluated between the values of q. A low
    temperature has little bias and much variance.

    Args:
        num_samples: S.
        temperature: :math:`\tau`; set ``estimator.temperature = schedule(step)`` to anneal it.
        hard: evaluate f at the one-hot argmax, and keep the gradient of the soft sample (straight-through
            Gumbel-softmax). Then the value is right, and a second derivative raises.

    Reference:
        `Categorical Reparameterization with Gumbel-Softmax <https://arxiv.org/abs/1611.01144>`_, Jang, Gu and
        Poole, 2017.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.OneHotCategorical(logits=logits)
    >>> GumbelSoftmax(4, temperature=0.5)(q, lambda z: z[..., 0]).backward()
    >>> bool(logits.grad[0] > 0)
    True
    """

    traits = Traits(
        serves=SERVES,
        unbiased=False,
        needs_gradient=True,
        relaxes=True,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Jang, Gu and Poole (2017), https://arxiv.org/abs/1611.01144",
    )

    def __init__(self, num_samples: int = 1, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__(num_samples, temperature)
        self.hard = hard

    def draw(self, q: Distribution) -> Tensor:
        return noise_of(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return f(concrete_path(q, noise, self.temperature, self.hard)).mean(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hard={self.hard}"


class StraightThrough(_Relaxed):
    r"""Evaluate f at an exact sample, and let the gradient pass as if the sample were its probabilities.

    .. math:: \nabla E_q[f] \approx E_q[f'(z)^\top\,\nabla_\theta\pi_\tau], \qquad
              \pi_\tau = \mathrm{softmax}(\theta/\tau)

    Biased; exact for a linear f at :math:`\tau = 1` (Euler's rule).

    Args:
        num_samples: S.
        temperature: :math:`\tau` of the backward pass.

    Reference:
        `Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation
        <https://arxiv.org/abs/1308.3432>`_, Bengio, Léonard and Courville, 2013.

    >>> logits = torch.tensor([0.3, -0.2], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> StraightThrough()(q, lambda z: z.sum(-1)).backward()
    >>> torch.allclose(logits.grad, logits.sigmoid() * (1 - logits.sigmoid()))
    True
    """

    traits = Traits(
        serves=SERVES,
        unbiased=False,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=False,
        transforms=True,
        reference="Bengio, Léonard and Courville (2013), https://arxiv.org/abs/1308.3432",
    )

    def draw(self, q: Distribution) -> Tensor:
        return gumbel_max(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return f(straight_through_path(q, noise, self.temperature)).mean(0)


class Given(NamedTuple):
    """Exact samples, and noises that harden to them."""

    hard: Tensor  # [S, *B, *E]
    noise: Tensor  # [M, S, *B, *E]


class GumbelRao(_Relaxed):
    r"""Straight-through Gumbel-softmax, averaged over the noise that the sample leaves open.

    .. math:: \nabla E_q[f] \approx E_q\Big[f'(z)^\top\,\frac1M\sum_{m=1}^M
              \nabla_\theta\,\mathrm{softmax}\big((\log\pi + \mathrm{sg}(g^{(m)}))/\tau\big)\Big],
              \qquad g^{(m)} \sim p(g \mid z)

    Biased, with the mean of ``GumbelSoftmax(hard=True)`` and never more variance, at the same number of evaluations.

    Args:
        num_samples: S.
        temperature: :math:`\tau`.
        num_noises: M.

    Reference:
        `Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator
        <https://arxiv.org/abs/2010.04838>`_, Paulus, Maddison and Krause, 2021.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.OneHotCategorical(logits=logits)
    >>> GumbelRao(temperature=0.5, num_noises=100)(q, lambda z: z[..., 0]).backward()
    >>> bool(logits.grad[0] > 0)
    True
    """

    traits = Traits(
        serves=SERVES,
        unbiased=False,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=False,
        transforms=True,
        reference="Paulus, Maddison and Krause (2021), https://arxiv.org/abs/2010.04838",
    )

    def __init__(self, num_samples: int = 1, temperature: float = 1.0, num_noises: int = 16) -> None:
        super().__init__(num_samples, temperature)
        if num_noises < 1:
            raise ValueError(f"GumbelRao: found num_noises={num_noises}, expected a positive int.")
        self.num_noises = num_noises

    def draw(self, q: Distribution) -> Given:
        hard = gumbel_max(q, torch.Size([self.num_samples]))
        return Given(hard, conditional_noise(q, hard, self.num_noises))

    def estimate(self, q: Distribution, f: Cost, noise: Given, context: Tensor | None = None) -> Tensor:
        return f(gumbel_rao_path(q, noise.hard, noise.noise, self.temperature)).mean(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_noises={self.num_noises}"


class ReinMax(_Relaxed):
    r"""Straight-through of second order: the mean of the slopes at both ends of a flip.

    .. math:: \nabla E_q[f] \approx E_q\big[f'(z)^\top\,\nabla_\theta(2\pi_1 - \tfrac12\pi)\big], \qquad
              \pi_1 = \mathrm{softmax}\big(\theta - \mathrm{sg}(\theta) + \log\tfrac12(z + \pi_\tau)\big)

    Biased; exact for a quadratic f at :math:`\tau = 1` (Heun's rule).

    Args:
        num_samples: S.
        temperature: :math:`\tau`.

    Reference:
        `Bridging Discrete and Backpropagation: Straight-Through and Beyond <https://arxiv.org/abs/2304.08612>`_,
        Liu, Dong, Liu, Yu and Gao, 2023.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.OneHotCategorical(logits=logits)
    >>> ReinMax(1000)(q, lambda z: z[..., 0] ** 2).backward()
    >>> round(logits.grad[0].item(), 1)  # 2 / 9
    0.2
    """

    traits = Traits(
        serves=SERVES,
        unbiased=False,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=False,
        transforms=True,
        reference="Liu et al. (2023), https://arxiv.org/abs/2304.08612",
    )

    def draw(self, q: Distribution) -> Tensor:
        return gumbel_max(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return f(reinmax_path(q, noise, self.temperature)).mean(0)
