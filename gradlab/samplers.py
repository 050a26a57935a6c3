"""Samplers: an ``rsample`` with a chosen backward, usable alone inside a network."""

from __future__ import annotations

import torch
from torch import Size, Tensor
from torch.distributions import Beta, Dirichlet, Distribution

from gradlab.distributions import base, has_icdf, quantile, tensors
from gradlab.implicit import implicit
from gradlab.surrogate import first_order

__all__ = ["implicit", "inverse_cdf", "rsample"]


def rsample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return ``q.rsample(sample_shape)``, ``[*sample_shape, *B, *E]``.

    torch's Beta and Dirichlet return wrong second derivatives without a word; here they raise.

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
    z = q.rsample(sample_shape)
    return first_order(z) if isinstance(base(q), Beta | Dirichlet) else z


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
