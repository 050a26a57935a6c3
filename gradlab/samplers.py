"""Samplers: an ``rsample`` with a chosen backward, usable alone inside a network."""

from __future__ import annotations

import torch
from torch import Size, Tensor
from torch.distributions import Beta, Categorical, Dirichlet, Distribution, OneHotCategorical

from gradlab.distributions import base, factor, has_icdf, quantile, tensors
from gradlab.paths import has_path, implicit
from gradlab.surrogate import is_batched

__all__ = ["implicit", "inverse_cdf", "rsample"]


def sample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return samples without a graph, ``[*sample_shape, *B, *E]``, also inside ``torch.func`` transforms.

    There torch samples neither its Beta, Dirichlet and OneHotCategorical nor, below ``vmap``, most others; and its
    Beta and Dirichlet degenerate in float32 at small concentrations.
    """
    p = factor(q)
    if isinstance(p, Beta | Dirichlet) or (any(map(is_batched, tensors(p))) and has_path(p)):
        with torch.no_grad():
            return implicit(p, sample_shape)
    if isinstance(p, OneHotCategorical):
        index = Categorical(logits=p.logits).sample(sample_shape)[..., None]
        return (index == torch.arange(p.logits.shape[-1], device=index.device)).to(p.logits.dtype)
    return p.sample(sample_shape).detach()


def rsample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return ``q.rsample(sample_shape)``, ``[*sample_shape, *B, *E]``.

    torch's Beta and Dirichlet return wrong second derivatives without a word, so they are sampled by :func:`implicit`.

    Raises:
        TypeError: q has no rsample.

    >>> loc = torch.tensor(0.5, requires_grad=True)
    >>> rsample(torch.distributions.Normal(loc, 1.0), torch.Size([3])).sum().backward()
    >>> loc.grad.item()
    3.0
    """
    if not q.has_rsample:
        raise TypeError(
            f"rsample: found {type(q).__name__}, which has none, expected a distribution that torch can sample "
            "along a path. Try gradlab.implicit or gradlab.inverse_cdf, or a ScoreFunction estimator."
        )
    return implicit(q, sample_shape) if isinstance(base(q), Beta | Dirichlet) else q.rsample(sample_shape)


def inverse_cdf(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    r"""Return :math:`F_\theta^{-1}(u)` for uniform u, ``[*sample_shape, *B, *E]``.

    Works for every univariate q with an ``icdf``, and for independent products of such q.

    Raises:
        TypeError: q has no icdf.

    >>> scale = torch.tensor(2.0, requires_grad=True)
    >>> z = inverse_cdf(torch.distributions.Laplace(0.0, scale), torch.Size([5]))
    >>> z.sum().backward()
    >>> torch.allclose(scale.grad, z.detach().sum() / 2)
    True
    """
    if not has_icdf(q):
        raise TypeError(
            f"inverse_cdf: found {type(q).__name__}, which has no icdf, expected a univariate distribution that has "
            "one (or an Independent of such). gradlab.implicit needs the cdf only."
        )
    like = next(tensors(q))
    shape = Size(sample_shape) + q.batch_shape + q.event_shape
    eps = torch.finfo(like.dtype).eps
    u = torch.rand(shape, dtype=like.dtype, device=like.device).clamp(eps / 2, 1 - eps / 2)
    return quantile(q, u)
