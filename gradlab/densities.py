"""Log densities inside a cost: of a distribution whose parameters are held, and at points between its values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical, Transform, kl_divergence

from gradlab.surrogate import is_transformed

__all__: list[str] = []

CERTAIN = 1000.0
"""A logit: beyond it a bit is 0 or 1, in every dtype exactly."""

EXACT = (torch.float32, torch.float64)
"""Dtypes with digits enough to subtract logits from each other."""


def freeze(q: Distribution) -> Distribution:
    """Return a copy of q whose parameters carry no graph: its density is a function of z alone.

    A parameter that torch hides in a module (that of a flow) keeps its graph.
    """
    return _mapped(q, Tensor.detach)


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return x with the tensors of every distribution and transform in it changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, list | tuple) and any(isinstance(item, Transform) for item in x):
        return type(x)(_mapped(item, change) for item in x)
    if not isinstance(x, Distribution | Transform):
        return x
    new = copy.copy(x)
    vars(new).update({name: _mapped(value, change) for name, value in vars(new).items()})
    if isinstance(new, Transform) and new._cache_size:
        new._cached_x_y = None, None  # else the inverse of a sample is the point that it came from, with its graph
    return new


def _unvalidated(q: Distribution) -> Distribution:
    new = copy.copy(q)
    new._validate_args = False
    return new


def log_density(q: Distribution, z: Tensor) -> Tensor:
    r"""Return :math:`\log q(z)`, ``[*L, *B]``, also where an estimator looks between the values of q.

    Relaxed zeros and ones have the log density that is linear in z, :math:`\sum_k z_k\log\pi_k`; a Taylor series of
    points is taken as it comes. Everywhere else torch checks that z lies in the support.

    Args:
        q: the distribution.
        z: ``[*L, *B, *E]``.

    >>> q = OneHotCategorical(probs=torch.tensor([0.25, 0.75]))
    >>> mean = log_density(q, torch.tensor([0.5, 0.5]))
    >>> mean.isclose(q.probs.log().mean())
    tensor(True)
    """
    if isinstance(q, Independent):
        inner = log_density(q.base_dist, z)
        return _over_events(q, inner)
    if isinstance(q, OneHotCategorical):
        return (q.logits.clamp_min(torch.finfo(q.logits.dtype).min) * z).sum(-1)
    if isinstance(q, Bernoulli) or not isinstance(z, Tensor):
        return _unvalidated(q).log_prob(z)
    return q.log_prob(z)


def _over_events(q: Independent, inner: Tensor) -> Tensor:
    """Return the sum over the dims that q makes one event."""
    dims = tuple(range(-q.reinterpreted_batch_ndims, 0))
    return inner.sum(dims) if dims else inner


def unchecked_log_prob(q: Distribution, z: Tensor) -> Tensor:
    r"""Return :math:`\log q(z)`, ``[*L, *B]``, for a z that needs no check: a sample of q itself, say.

    >>> q = Independent(OneHotCategorical(logits=torch.zeros(2, 4)), 1)
    >>> z = q.sample((3,))
    >>> torch.equal(unchecked_log_prob(q, z), q.log_prob(z))
    True
    """
    if type(q) is Independent:
        bits = type(q.base_dist) is Bernoulli
        inner = _cross_entropy(q.base_dist, z) if bits else unchecked_log_prob(q.base_dist, z)
        return -_over_events(q, inner) if bits else _over_events(q, inner)
    if isinstance(q, OneHotCategorical):
        return log_density(q, z)
    if type(q) is Bernoulli:
        return -_cross_entropy(q, z)
    return _unvalidated(q).log_prob(z)


def _cross_entropy(q: Bernoulli, z: Tensor) -> Tensor:
    logits, z = (q.logits, z) if q.logits.shape == z.shape else torch.broadcast_tensors(q.logits, z)
    return F.binary_cross_entropy_with_logits(logits, z, reduction="none")


def exact_kl(q: Distribution, p: Distribution) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q\,\|\,p)`, ``[*B]``; of bits and one-hots with a finite gradient where q has zeros.

    Raises:
        NotImplementedError: torch registers none.

    >>> q, p = OneHotCategorical(logits=torch.tensor([0.0, -torch.inf])), OneHotCategorical(torch.tensor([0.5, 0.5]))
    >>> exact_kl(q, p).exp()
    tensor(2.)
    """
    if type(q) is type(p) is Independent and q.reinterpreted_batch_ndims == p.reinterpreted_batch_ndims:
        inner = exact_kl(q.base_dist, p.base_dist)
        return _over_events(q, inner)
    if type(q) is type(p) is OneHotCategorical:
        return _relative_entropy(*_one_hot(q), _one_hot(p)[1]).sum(-1)
    if type(q) is type(p) is Bernoulli:
        return _kl_of_bits(q, p)
    return kl_divergence(q, p.expand(q.batch_shape))  # some of torch's KLs do not broadcast


def made_from_logits(q: Distribution) -> bool:
    """Whether bits or one-hots were made from logits; those that torch makes from probs are clamped, and know no 0."""
    return q._param is q.logits


def _relative_entropy(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    return q * torch.where(q > 0, log_q - log_p, 0.0)


def _one_hot(q: OneHotCategorical) -> tuple[Tensor, Tensor]:
    """Return the probabilities and their logarithms."""
    return (q.logits.exp(), q.logits) if made_from_logits(q) else (q.probs, _safe(torch.log, q.probs, 0))


def _bits(q: Bernoulli) -> list[tuple[Tensor, Tensor]]:
    """Return the same of 1 and of 0."""
    if made_from_logits(q):
        return [(torch.sigmoid(x), F.logsigmoid(x)) for x in (q.logits, -q.logits)]
    p = q.probs
    return [(p, _safe(torch.log, p, 0)), (1 - p, _safe(lambda p: torch.log1p(-p), p, 1))]


def _safe(log: Callable[[Tensor], Tensor], p: Tensor, end: float) -> Tensor:
    """Return the logarithm, -inf at the end with the derivative 0: that of log would make NaN of zeros."""
    return log(torch.where(p == end, 0.5, p)).masked_fill(p == end, -torch.inf)


def _kl_of_bits(q: Bernoulli, p: Bernoulli) -> Tensor:
    if made_from_logits(q) and made_from_logits(p) and p.logits.dtype in EXACT:  # in two thirds of the time
        most = torch.finfo(p.logits.dtype).max / 2  # 0 * inf would be NaN
        ours, theirs = q.logits.clamp(-CERTAIN, CERTAIN), p.logits.clamp(-most, most)
        return torch.sigmoid(ours) * (ours - theirs) - (F.softplus(ours) - F.softplus(theirs))
    ones, zeros = (_relative_entropy(*a, b) for a, (_, b) in zip(_bits(q), _bits(p), strict=True))
    return ones + zeros


def path_log_density(q: Distribution, z: Any) -> Any:
    r"""Return :math:`\log q_\theta(z)`, whose first derivative follows z but not :math:`\theta`, ``[*L, *B]``.

    .. math:: \log q_\theta(z) + \frac{q_{\bar\theta}(z)}{q_\theta(z)} - 1, \qquad \bar\theta = \mathrm{sg}(\theta)

    The last two terms are 0, and 0 is their mean under :math:`q_\theta` at *every* :math:`\theta`: they take the score
    :math:`\nabla_\theta\log q_\theta(z)`, which is noise of mean zero, out of the gradient, and leave derivatives of
    every order right. (For a support that moves with :math:`\theta` the mean is another, and so is the gradient.)

    >>> loc = torch.tensor(0.3, requires_grad=True)
    >>> z = torch.tensor(1.0, requires_grad=True)
    >>> path_log_density(torch.distributions.Normal(loc, 1.0), z).backward()
    >>> loc.grad.item(), round(z.grad.item(), 4)
    (0.0, -0.7)
    """
    if not isinstance(z, Tensor):  # a Taylor series in z, where the parameters play no part
        return log_density(freeze(q), z)
    log_q = log_density(q, z)
    moves = z.requires_grad or is_transformed(z)
    held = log_density(freeze(q), z) if moves else log_q.detach()
    return log_q + torch.expm1(held - log_q)


def log_likelihood_at(likelihood: Callable[[Tensor], Distribution], x: Tensor, z: Tensor, shape: torch.Size) -> Tensor:
    """Return log p(x | z), checked to have the shape ``[*L, *B]``.

    Raises:
        TypeError: the likelihood returns no distribution.
        ValueError: its log_prob has another shape, as without ``Independent``; or x is outside its support.
    """
    p = _checked("likelihood(z)", likelihood(z))
    return _shaped(p.log_prob(x) if p._validate_args else unchecked_log_prob(p, x), p, z, x, shape)


def log_density_at(likelihood: Callable[[Tensor], Distribution], x: Tensor, z: Tensor, shape: torch.Size) -> Tensor:
    """The same for an x that is itself a sample, which an estimator may relax."""
    p = _checked("likelihood(z)", likelihood(z))
    return _shaped(log_density(p, x), p, z, x, shape)


def distribution_of(source: Any, name: str, *args: Tensor) -> Distribution:
    """Return what a module (or function) returns, or the distribution given in its place."""
    return _checked(name, source if isinstance(source, Distribution) else source(*args))


def _checked(name: str, q: Any) -> Distribution:
    if not isinstance(q, Distribution):
        raise TypeError(f"{name}: found {type(q).__name__}, expected a torch.distributions.Distribution.")
    return q


def _shaped(value: Tensor, p: Distribution, z: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(
            f"likelihood(z): found log p(x | z) of shape {tuple(value.shape)} for z of shape {tuple(z.shape)} and x of "
            f"shape {tuple(x.shape)}, expected {tuple(shape)}, one number a problem. The likelihood is "
            f"{type(p).__name__} with batch_shape {tuple(p.batch_shape)} and event_shape {tuple(p.event_shape)}: wrap "
            "the dims of one x in torch.distributions.Independent."
        )
    return value
