"""Two samples that share their noise: antithetic pairs, and the two halves of a weak derivative."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from gradlab.distributions import factor, number_of_factors, standard_exponential
from gradlab.estimator import Cost, Estimator, Traits
from gradlab.flips import check_chunk_size, replace_each
from gradlab.gumbel import is_relaxable, logits_of
from gradlab.samplers import sample
from gradlab.surrogate import attach, wants_gradient

__all__ = ["ARM", "DisARM", "MeasureValued"]


class _Antithetic(Estimator):
    """Evaluates f at a pair made from the uniforms u and 1 - u; S counts the pairs."""

    def evaluations(self, q: Distribution) -> int:
        return 2 * self.num_samples

    def draw(self, q: Distribution) -> Tensor:
        binary = binary_logits(q)
        return torch.rand(torch.Size([self.num_samples]) + binary.shape, dtype=binary.dtype, device=binary.device)

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        logits = binary_logits(q)
        p = torch.sigmoid(logits.detach())
        first, second = (noise > 1 - p).to(p.dtype), (noise < p).to(p.dtype)
        cost, twin = f(torch.cat([decode(q, first), decode(q, second)])).chunk(2)  # [S, *B] each
        half = (cost - twin).detach().reshape(*cost.shape, *(1 for _ in q.event_shape)) / 2
        gradient = half * self._weight(noise, first, second, logits.detach())
        return attach((cost + twin).mean(0) / 2, logits, (gradient * matters(q, first, second)).mean(0))

    @abstractmethod
    def _weight(self, u: Tensor, first: Tensor, second: Tensor, logits: Tensor) -> Tensor:
        """Return what multiplies half the difference of the costs, for each binary logit."""


class ARM(_Antithetic):
    r"""Augment, REINFORCE, merge: the difference of an antithetic pair, times its uniform.

    .. math:: \hat g = \big(f(1[u > \sigma(-\theta)]) - f(1[u < \sigma(\theta)])\big)\,(u - \tfrac12)

    Args:
        num_samples: S pairs; f is evaluated at 2 S points.

    Reference:
        `ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks <https://arxiv.org/abs/1807.11143>`_,
        Yin and Zhou, 2019.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> ARM(4)(q, lambda z: z.sum(-1)).backward()
    >>> logits.grad.shape
    torch.Size([3])
    """

    traits = Traits(
        serves="Bernoulli",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="2 S",
        second_order=False,
        transforms=True,
        reference="Yin and Zhou (2019), https://arxiv.org/abs/1807.11143",
    )

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return isinstance(factor(q), td.Bernoulli)

    def _weight(self, u: Tensor, first: Tensor, second: Tensor, logits: Tensor) -> Tensor:
        return 2 * u - 1


class DisARM(_Antithetic):
    r"""ARM, averaged over the uniform that its pair leaves open; also known as U2G.

    .. math:: \hat g = \tfrac12\big(f(b) - f(\tilde b)\big)\,(-1)^{\tilde b}\,1[b \ne \tilde b]\,\sigma(|\theta|),
              \qquad b = 1[u > \sigma(-\theta)],\quad \tilde b = 1[u < \sigma(\theta)]

    A one-hot variable of K values is reduced to K - 1 binary ones: is it the first value, if not the second, ...; a
    question that neither sample of the pair reaches gets no gradient.

    Args:
        num_samples: S pairs; f is evaluated at 2 S points.

    Reference:
        `DisARM: An Antithetic Gradient Estimator for Binary Latent Variables <https://arxiv.org/abs/2006.10680>`_,
        Dong, Mnih and Tucker, 2020; `Coupled Gradient Estimators for Discrete Latent Variables
        <https://arxiv.org/abs/2106.08056>`_, the same, 2021.

    >>> logits = torch.tensor(0.0, requires_grad=True)
    >>> DisARM()(torch.distributions.Bernoulli(logits=logits), lambda z: z).backward()  # no noise at even odds
    >>> logits.grad.item()
    0.25
    """

    traits = Traits(
        serves="Bernoulli and OneHotCategorical",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="2 S",
        second_order=False,
        transforms=True,
        reference="Dong, Mnih and Tucker (2020), https://arxiv.org/abs/2006.10680",
    )

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return is_relaxable(q)

    def _weight(self, u: Tensor, first: Tensor, second: Tensor, logits: Tensor) -> Tensor:
        return (first - second) * torch.sigmoid(logits.abs())


def binary_logits(q: Distribution) -> Tensor:
    r"""Return the logits of the binary variables that q is made of, ``[*B, *E]``, or ``[*B, ..., K - 1]`` if one-hot.

    .. math:: \alpha_k = \log\pi_k - \log\textstyle\sum_{j>k}\pi_j
    """
    logits = logits_of(q)
    if isinstance(factor(q), td.Bernoulli):
        return logits
    after = logits.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return logits[..., :-1] - after


def decode(q: Distribution, binary: Tensor) -> Tensor:
    """Return the sample of q that the binary variables spell: of a one-hot one, the first that says yes."""
    if isinstance(factor(q), td.Bernoulli):
        return binary
    reached = _reached(binary)  # [..., K]
    return reached * torch.cat([binary, torch.ones_like(binary[..., :1])], -1)


def matters(q: Distribution, first: Tensor, second: Tensor) -> Tensor | float:
    """Return 1 where one sample of the pair, at least, depends on the binary variable."""
    if isinstance(factor(q), td.Bernoulli):
        return 1.0
    return torch.maximum(_reached(first), _reached(second))[..., :-1]


def _reached(binary: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(binary[..., :1]), (1 - binary).cumprod(-1)], -1)


class Weak(NamedTuple):
    r"""A weak derivative :math:`\partial_\theta q = c\,(q^+ - q^-)` of one parameter."""

    constant: Tensor  # [*B, *E]
    plus: Tensor  # [S, *B, *E]
    minus: Tensor  # [S, *B, *E]


class Signed(NamedTuple):
    """Samples, and samples of both halves of each weak derivative."""

    z: Tensor  # [S, *B, *E]
    halves: list[Weak]


class MeasureValued(Estimator):
    r"""The measure-valued derivative: the derivative of a density is a difference of two densities.

    .. math:: \partial_{\theta_j} E_q[f] = c_j\,\big(E_{q^+_j q_{-j}}[f] - E_{q^-_j q_{-j}}[f]\big)

    Both halves share their noise, and the other coordinates. f may be a black box; the support of q may move.

    Args:
        num_samples: S.
        chunk_size: replacements a call of f, to bound memory; by default one call does them all.

    Reference:
        `Monte Carlo Gradient Estimation in Machine Learning <https://arxiv.org/abs/1906.10652>`_, Mohamed, Rosca,
        Figurnov and Mnih, 2020; `Optimization of Stochastic Models
        <https://doi.org/10.1007/978-1-4613-1449-3>`_, Pflug, 1996.

    >>> rate = torch.tensor(2.3, requires_grad=True)
    >>> MeasureValued()(torch.distributions.Poisson(rate), lambda z: 3 * z).backward()
    >>> rate.grad.item()
    3.0
    """

    traits = Traits(
        serves="normal, Laplace, exponential, gamma (rate), Weibull (scale), uniform, Bernoulli, binomial, geometric, "
        "Poisson",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S (1 + 2 d P)",
        second_order=False,
        transforms=True,
        reference="Mohamed et al. (2020), https://arxiv.org/abs/1906.10652",
    )

    def __init__(self, num_samples: int = 1, chunk_size: int | None = None) -> None:
        super().__init__(num_samples)
        self.chunk_size = check_chunk_size(chunk_size)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        p = factor(q)
        return type(p) in RULES and not any(wants_gradient(getattr(p, name)) for name in FIXED.get(type(p), ()))

    def evaluations(self, q: Distribution) -> int:
        return self.num_samples * (1 + 2 * number_of_factors(q) * len(_parameters(q)))

    def draw(self, q: Distribution) -> Signed:
        size = torch.Size([self.num_samples])
        with torch.no_grad():
            halves = [RULES[type(factor(q))][name](factor(q), size) for name in _parameters(q)]
        return Signed(sample(q, size), halves)

    def estimate(self, q: Distribution, f: Cost, noise: Signed, context: Tensor | None = None) -> Tensor:
        cost = f(noise.z)  # [S, *B]
        loss, names = cost.mean(0), _parameters(q)
        if not names:
            return loss
        halves = torch.stack([x for weak in noise.halves for x in (weak.plus, weak.minus)])  # [2 P, S, *B, *E]
        values = halves.reshape(*halves.shape[: halves.ndim - len(q.event_shape)], number_of_factors(q))
        costs = replace_each(q, f, noise.z, values, self.chunk_size).movedim(1, -1)  # [2 P, S, *B, d]
        for name, weak, plus, minus in zip(names, noise.halves, costs[::2], costs[1::2], strict=True):
            gradient = weak.constant * (plus - minus).mean(0).reshape(weak.constant.shape)
            loss = attach(loss, getattr(factor(q), name), gradient)
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}"


def _parameters(q: Distribution) -> list[str]:
    """Return the parameters of q that have a rule and want a gradient."""
    return [name for name in RULES[type(factor(q))] if wants_gradient(getattr(factor(q), name))]


def _size(p: Distribution, size: torch.Size) -> torch.Size:
    return size + p.batch_shape


def _sign(p: Distribution, size: torch.Size, like: Tensor) -> Tensor:
    return torch.where(torch.rand(_size(p, size), device=like.device) < 0.5, -1.0, 1.0).to(like.dtype)


def _exponentials(p: Distribution, size: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    one, two = standard_exponential(torch.Size([2]) + _size(p, size), like)
    return one, two


def _normal_loc(p: Distribution, size: torch.Size) -> Weak:
    """Rayleigh to both sides."""
    step = p.scale * (2 * standard_exponential(_size(p, size), p.loc)).sqrt()
    return Weak(1 / (p.scale * math.sqrt(math.tau)), p.loc + step, p.loc - step)


def _normal_scale(p: Distribution, size: torch.Size) -> Weak:
    """A two-sided Maxwell; times a uniform it is the normal itself."""
    normal = torch.randn(torch.Size([3]) + _size(p, size), dtype=p.loc.dtype, device=p.loc.device)
    step = p.scale * normal.square().sum(0).sqrt() * _sign(p, size, p.loc)
    return Weak(1 / p.scale, p.loc + step, p.loc + step * torch.rand_like(step))


def _laplace_loc(p: Distribution, size: torch.Size) -> Weak:
    step = p.scale * standard_exponential(_size(p, size), p.loc)
    return Weak(1 / (2 * p.scale), p.loc + step, p.loc - step)


def _laplace_scale(p: Distribution, size: torch.Size) -> Weak:
    one, two = _exponentials(p, size, p.loc)
    side = p.scale * _sign(p, size, p.loc)
    return Weak(1 / p.scale, p.loc + side * (one + two), p.loc + side * one)


def _exponential_rate(p: Distribution, size: torch.Size) -> Weak:
    one, two = _exponentials(p, size, p.rate)
    return Weak(1 / p.rate, one / p.rate, (one + two) / p.rate)


def _gamma_rate(p: Distribution, size: torch.Size) -> Weak:
    """One more exponential raises the shape by one."""
    z = sample(p, size)
    return Weak(p.concentration / p.rate, z, z + standard_exponential(_size(p, size), p.rate) / p.rate)


def _weibull_scale(p: Distribution, size: torch.Size) -> Weak:
    one, two = _exponentials(p, size, p.scale)
    plus, minus = (p.scale * e ** (1 / p.concentration) for e in (one + two, one))
    return Weak(p.concentration / p.scale, plus, minus)


def _uniform_low(p: Distribution, size: torch.Size) -> Weak:
    z = sample(p, size)
    return Weak(1 / (p.high - p.low), z, p.low.expand_as(z))


def _uniform_high(p: Distribution, size: torch.Size) -> Weak:
    z = sample(p, size)
    return Weak(1 / (p.high - p.low), p.high.expand_as(z), z)


def _bernoulli_probs(p: Distribution, size: torch.Size) -> Weak:
    one = torch.ones(_size(p, size), dtype=p.probs.dtype, device=p.probs.device)
    return Weak(torch.ones_like(p.probs), one, torch.zeros_like(one))


def _binomial_probs(p: Distribution, size: torch.Size) -> Weak:
    z = td.Binomial((p.total_count - 1).clamp_min(0), probs=p.probs).sample(size)
    return Weak(p.total_count.to(z), z + 1, z)


def _geometric_probs(p: Distribution, size: torch.Size) -> Weak:
    one, two = p.sample(size), p.sample(size)
    return Weak(1 / p.probs, one, one + two + 1)


def _poisson_rate(p: Distribution, size: torch.Size) -> Weak:
    z = sample(p, size)
    return Weak(torch.ones_like(p.rate), z + 1, z)


RULES: dict[type[Distribution], dict[str, Callable[[Distribution, torch.Size], Weak]]] = {
    td.Normal: {"loc": _normal_loc, "scale": _normal_scale},
    td.Laplace: {"loc": _laplace_loc, "scale": _laplace_scale},
    td.Exponential: {"rate": _exponential_rate},
    td.Gamma: {"rate": _gamma_rate},
    td.Weibull: {"scale": _weibull_scale},
    td.Uniform: {"low": _uniform_low, "high": _uniform_high},
    td.Bernoulli: {"probs": _bernoulli_probs},
    td.Binomial: {"probs": _binomial_probs},
    td.Geometric: {"probs": _geometric_probs},
    td.Poisson: {"rate": _poisson_rate},
}
"""The weak derivatives, by distribution and parameter."""

FIXED: dict[type[Distribution], tuple[str, ...]] = {td.Gamma: ("concentration",), td.Weibull: ("concentration",)}
"""Parameters without a rule: a q whose gradient wants them is not served."""
