r"""Discrete laws as thresholds of a noisy logit: the Gumbel tricks, for Bernoulli and one-hot variables alike.

A sample is :math:`H(\theta + g)`, where g is noise free of :math:`\theta` and H hardens: the one-hot argmax for
Gumbel noise, a step at 0 for logistic noise, the difference of two Gumbels. :class:`Discrete` holds what the samplers
and the estimators need to know about either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from gradlab.distributions import factor

__all__ = ["concrete_log_prob", "conditional_gumbels", "gumbel"]


SHORT = 32
"""Values, below which :func:`softmax` is written out on a CPU."""


@dataclass(frozen=True)
class Discrete:
    """A family of discrete laws, as data; logits and samples are ``[*B, *E]``.

    Attributes:
        noise: ``(size, logits) -> g``, noise that does not depend on the logits.
        harden: ``x -> H(x)``, the sample at the noisy logit x.
        soften: ``(x, temperature) -> `` the relaxed sample at the noisy logit x.
        given: ``(logits, hard, noise) -> `` the noise conditioned on the sample ``hard``, made from fresh noise and
            differentiable in the logits.
        dims: event dims of one factor.
    """

    noise: Callable[[Size, Tensor], Tensor]
    harden: Callable[[Tensor], Tensor]
    soften: Callable[[Tensor, Tensor | float], Tensor]
    given: Callable[[Tensor, Tensor, Tensor], Tensor]
    dims: int


def discrete(q: Distribution) -> Discrete:
    """Return the relaxation of q's family.

    Raises:
        TypeError: q is neither Bernoulli nor one-hot.
    """
    if not is_relaxable(q):
        raise TypeError(
            f"found {type(factor(q)).__name__}, expected a Bernoulli or a OneHotCategorical (or an Independent): "
            "a relaxed sample is a point between their values. Replace Categorical by OneHotCategorical."
        )
    return BINARY if isinstance(factor(q), Bernoulli) else ONE_HOT


def is_relaxable(q: Distribution) -> bool:
    """Whether q is made of Bernoulli or of one-hot variables."""
    return isinstance(factor(q), Bernoulli | OneHotCategorical)


def logits_of(q: Distribution) -> Tensor:
    """Return the logits of q with their graph, ``[*B, *E]``; those of a one-hot variable are log probabilities."""
    return factor(q).logits


def gumbel(size: Size, like: Tensor) -> Tensor:
    r"""Return standard Gumbel noise, :math:`-\log(-\log u)`, in the dtype and on the device of ``like``.

    The uniform has 53 bits: those of float32 would let one draw in 17 million win any argmax, and could not tell the
    winners of 10^5 categories apart.
    """
    u = torch.rand(size, dtype=torch.float64, device=like.device)
    return u.neg_().log1p_().neg_().clamp_min_(2.0**-54).log_().neg_().to(like.dtype)


def _logistic(size: Size, like: Tensor) -> Tensor:
    """Return standard logistic noise, the difference of two Gumbels."""
    u = torch.rand(size, dtype=torch.float64, device=like.device).clamp_min(2.0**-54)
    return (u.log() - torch.log1p(-u)).to(like.dtype)


def conditional_gumbels(logits: Tensor, hard: Tensor, noise: Tensor) -> Tensor:
    r"""Return Gumbel noise under the condition that ``hard`` wins, made from free Gumbel noise.

    With :math:`E_i = e^{-g_i}` exponential, p the probabilities and b the winner,

    .. math:: g_b \to -\log E_b - \log p_b, \qquad g_i \to -\log(E_i + p_i E_b) .

    Args:
        logits: ``[..., K]``; the result is differentiable in them.
        hard: the winner, one-hot, ``[..., K]``.
        noise: standard Gumbels, ``[..., K]``.

    Reference:
        `Gumbel Machinery <https://cmaddison.com/writing/gumbel-machinery>`_, Maddison and Tarlow, 2017.

    >>> logits, hard = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> noise = conditional_gumbels(logits, hard, gumbel(torch.Size([1000, 2]), logits))
    >>> (logits + noise).argmax(-1).unique().tolist()
    [1]
    """
    log_p = torch.log_softmax(logits, -1)
    top = -(hard * noise).sum(-1, keepdim=True)  # log E_b
    return torch.where(hard > 0, noise - log_p, -torch.logaddexp(-noise, top + log_p))


def _conditional_logistic(logits: Tensor, hard: Tensor, noise: Tensor) -> Tensor:
    """Return logistic noise under the condition that a Bernoulli of these logits came out as ``hard``."""
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    sign = 2 * hard - 1
    ours, theirs = torch.where(hard > 0, log_p, log_q), torch.where(hard > 0, log_q, log_p)
    return sign * (torch.logaddexp(sign * noise, theirs) - ours)


def one_hot_argmax(x: Tensor) -> Tensor:
    """Return the one-hot argmax over the last dim, in the dtype of x."""
    return one_hot(x.argmax(-1, keepdim=True), x)


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Return one-hots of the index ``[..., 1]``, as many values as the last dim of ``like`` has, in its dtype."""
    return (index == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dim; over few values, torch's own takes three times as long on a CPU."""
    if x.device.type != "cpu" or x.shape[-1] >= SHORT or torch.compiler.is_compiling():
        return torch.softmax(x, -1)
    power = (x - x.detach().amax(-1, keepdim=True)).exp()
    return power / power.sum(-1, keepdim=True)


def concrete_log_prob(log_x: Tensor, logits: Tensor, temperature: Tensor | float) -> Tensor:
    r"""Return the log density of the Concrete law (Gumbel-softmax) at x, given log x, so that tiny x do no harm.

    .. math:: p(x) = (K-1)!\,\tau^{K-1}\prod_k x_k^{-1}
              \frac{\alpha_k x_k^{-\tau}}{\sum_j\alpha_j x_j^{-\tau}}, \qquad \log\alpha = \text{logits},

    with respect to the Lebesgue measure of any K - 1 coordinates.

    Args:
        log_x: log of a point of the simplex, ``[..., K]``.
        logits: ``[..., K]``.
        temperature: :math:`\tau`.

    Reference:
        `The Concrete Distribution <https://arxiv.org/abs/1611.00712>`_, Maddison, Mnih and Teh, 2017.

    >>> concrete_log_prob(torch.tensor([0.5, 0.5]).log(), torch.zeros(2), 1.0).exp()  # uniform
    tensor(1.)
    """
    size = logits.shape[-1]
    tau = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    weight = torch.log_softmax(logits - tau * log_x, -1) - log_x
    return math.lgamma(size) + (size - 1) * tau.log() + weight.sum(-1)


BINARY = Discrete(
    noise=_logistic,
    harden=lambda x: (x > 0).to(x.dtype),
    soften=lambda x, temperature: torch.sigmoid(x / temperature),
    given=_conditional_logistic,
    dims=0,
)
ONE_HOT = Discrete(
    noise=gumbel,
    harden=one_hot_argmax,
    soften=lambda x, temperature: softmax(x / temperature),
    given=conditional_gumbels,
    dims=1,
)
