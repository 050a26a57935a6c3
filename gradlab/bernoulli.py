"""Binary data after a linear layer: all flips of its latents by products, without an exponential a flip."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, OneHotCategorical

from gradlab.distributions import factor, number_of_factors
from gradlab.estimator import AfterLinear
from gradlab.surrogate import is_batched

__all__ = ["BernoulliAfterLinear"]

FACTORS = 7
"""Factors under one logarithm; more would overflow float32 at smaller weights."""

NUMBERS = {"cpu": 2**17, "cuda": 2**22}
"""Of one chunk of problems: a few of such tensors stay in the cache of a CPU, and keep a GPU busy."""


class BernoulliAfterLinear(AfterLinear):
    r"""The negative log likelihood of binary x whose logits are a linear layer of z.

    .. math:: f(z) = -\log\prod_p \mathrm{Bernoulli}(x_p \mid \sigma(a_p)) = \sum_p \log(1 + e^{a_p}) - x_p a_p,
              \qquad a = W z + b

    For Bernoulli and one-hot z, :class:`gradlab.LocalExpectation` has the cost of every flip from products,

    .. math:: \sum_p \log\big(1 + e^{a_p - w^\text{old}_p + w^\text{new}_p}\big)
              = \sum_{\text{groups}} \log\prod_p \big(1 + e^{a_p}\,e^{-w^\text{old}_p}\,e^{w^\text{new}_p}\big),

    with one exponential a weight and a pixel, and one logarithm a group of pixels, in place of both a flip and a pixel.
    Where the weights of one factor range too widely for their product, each flip has its own exponentials. Memory is
    bounded without a ``chunk_size``.

    Args:
        linear: the layer, of the flattened event dims of z.
        x: zeros and ones, ``[*B, P]``; what lies between has the cross-entropy as its cost.

    >>> linear, x = nn.Linear(3, 2), torch.tensor([[1.0, 0.0]])
    >>> f = BernoulliAfterLinear(linear, x)
    >>> z = torch.ones(5, 1, 3)  # [S, *B, *E]
    >>> pixels = torch.distributions.Bernoulli(logits=linear(z))
    >>> torch.allclose(f(z), -pixels.log_prob(x).sum(-1))
    True
    """

    def __init__(self, linear: nn.Linear, x: Tensor) -> None:
        super().__init__(linear, partial(cross_entropy, x), separable=True)
        if not x.ndim or x.shape[-1] != linear.out_features:
            raise ValueError(
                f"BernoulliAfterLinear: found x of shape {tuple(x.shape)}, expected [*B, {linear.out_features}]: the "
                "layer has as many out_features as there are numbers in one x. Flatten the dims of one x."
            )
        self.x = x

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            p = torch.sigmoid(h)
            return p - self.x.to(h.dtype), torch.addcmul(p, p, p, value=-1)  # p (1 - p)

    def flips(self, q: Distribution, before: Tensor, index: Tensor) -> Tensor:
        r"""Return what each value of each factor would add to the cost, ``[*L, d, K]``, without a graph.

        Args:
            q: of Bernoulli or one-hot factors.
            before: the logits a, ``[*L, P]``.
            index: which value each factor has, ``[*L, d]``.
        """
        d, one_hot = number_of_factors(q), isinstance(factor(q), OneHotCategorical)
        with torch.no_grad():
            dtype = torch.promote_types(before.dtype, torch.float32)
            weight = self.linear.weight.to(dtype).T.contiguous().reshape(d, -1, before.shape[-1])  # [d, K, P]
            if not one_hot:  # a bit moves by its weight, up or down
                weight = torch.cat([weight, -weight], 1)
            by_x = (self.x.to(dtype) @ weight.flatten(0, 1).T).reshape(*self.x.shape[:-1], *weight.shape[:2])
            by_x = by_x.expand(*index.shape, -1)
            rows, places = before.to(dtype).flatten(0, -2), index.reshape(-1, d)
            grown = _growth(rows, weight, places, one_hot).reshape(*index.shape, -1)
            if one_hot:
                cost = grown - by_x
                return cost - cost.gather(-1, index[..., None])
            other = grown - by_x.gather(-1, index[..., None])
            return torch.cat([other * index[..., None], other * (1 - index[..., None])], -1)

    def slope(self, z: Tensor) -> Tensor:
        """Return the gradient by z, of its shape, without a graph."""
        with torch.no_grad():
            before = self.before(z)
            return (self.derivatives(before)[0] @ self.linear.weight.to(before.dtype)).reshape(z.shape)

    def bends(self, z: Tensor, steps: Tensor) -> Tensor:
        r"""Return the second derivative by each number of z where that one alone has moved, without a graph.

        .. math:: \partial_j^2 f(z + t_j e_j) = \sum_p w_{pj}^2\,\sigma'(a_p + t_j w_{pj})

        Args:
            z: ``[*L, *E]``, of d numbers each.
            steps: t, ``[N, *L, d]``, the shape of the result.
        """
        with torch.no_grad():
            before = self.before(z)
            weight = self.linear.weight.to(before.dtype).T.contiguous()  # [d, P]
            squares = weight.square()

            def bend(rows: Tensor, steps: Tensor) -> Tensor:
                p = torch.addcmul(rows[:, None], steps[..., None], weight).sigmoid_()  # [C, d, P]
                return p.addcmul_(p, p, value=-1).mul_(squares).sum(-1)

            rows = before.expand(len(steps), *before.shape).flatten(0, -2)
            return _chunked(bend, rows, steps.flatten(0, -2), weight.numel()).reshape(steps.shape)


def cross_entropy(x: Tensor, h: Tensor) -> Tensor:
    """Return the negative log likelihood of x ``[*B, P]`` at the logits h ``[*L, *B, P]``, ``[*L, *B]``."""
    if isinstance(h, Tensor):
        if h.shape[max(h.ndim - x.ndim, 0) :] != x.shape:
            raise ValueError(
                f"BernoulliAfterLinear: found x of shape {tuple(x.shape)}, expected the batch dims of z and the "
                f"out_features of the layer, the last dims of {tuple(h.shape)}."
            )
        x = x.to(h.dtype).expand(h.shape)
    return F.binary_cross_entropy_with_logits(h, x, reduction="none").sum(-1)


def _growth(rows: Tensor, weight: Tensor, places: Tensor, one_hot: bool) -> Tensor:
    r"""Return :math:`\sum_p \log(1 + e^{a_p + \delta_p}) - \log(1 + e^{a_p})` of each flip, ``[N, d, K]``.

    Args:
        rows: the logits a, ``[N, P]``.
        weight: of each value of each factor, ``[d, K, P]``; :math:`\delta` is the difference of two of them. Of a bit,
            :math:`\delta` for each value that it leaves; the result is then ``[N, d, 1]``.
        places: which value each factor has, ``[N, d]``.
        one_hot: which of the two.
    """
    rows, weight = (F.pad(t, (0, -t.shape[-1] % FACTORS)) for t in (rows, weight))  # no flip moves what is added
    products, directly = partial(_by_products, one_hot=one_hot), partial(_directly, one_hot=one_hot)
    if rows.device.type != "cpu" or any(map(is_batched, (rows, weight, places))):
        return directly(rows, weight, places)  # a choice by value would wait for the GPU; and there an exp is cheap
    high, low = weight.amax(1), weight.amin(1)
    spread = (high - low) if one_hot else high
    fits = _groups(spread).sum(-2).amax() < math.log(torch.finfo(rows.dtype).max) - FACTORS * math.log(2)
    if torch.compiler.is_compiling():
        return torch.cond(fits, products, directly, (rows, weight, places))
    return (products if fits else directly)(rows, weight, places)


def _groups(x: Tensor) -> Tensor:
    """Return ``[..., P]`` as ``[..., FACTORS, P / FACTORS]``."""
    return x.reshape(*x.shape[:-1], FACTORS, x.shape[-1] // FACTORS)


def _by_products(rows: Tensor, weight: Tensor, places: Tensor, one_hot: bool) -> Tensor:
    r"""The growth from products of :math:`e^{-a^+} + e^{-a^-} e^{-w^{old}} e^{w^{new}}`, where :math:`a = a^+ - a^-`.

    No logit is too large for them: the factors grow and shrink with the weights alone.
    """
    if one_hot:
        weight = weight - (weight.amax(1, keepdim=True) + weight.amin(1, keepdim=True)) / 2
    table = weight.exp()

    def growth(rows: Tensor, places: Tensor) -> Tensor:
        off, on = rows.relu().neg().exp()[:, None, None], rows.clamp_max(0).exp()[:, None, None]  # one of the two is 1
        chosen = _pick(table, places)[:, :, None]  # [C, d, 1, P]
        terms = (off, on / chosen, table) if one_hot else (off, on, chosen)
        first, *others = zip(*(t.chunk(FACTORS, -1) for t in terms), strict=True)
        product = torch.addcmul(*first)
        for slices in others:
            product.mul_(torch.addcmul(*slices))
        return product.log_().sum(-1) - (off + on).log().sum(-1)

    return _chunked(growth, rows, places, len(weight) * (weight.shape[1] if one_hot else 1) * rows.shape[-1] // FACTORS)


def _directly(rows: Tensor, weight: Tensor, places: Tensor, one_hot: bool) -> Tensor:
    """The growth from the logits of each flip, however large."""

    def growth(rows: Tensor, places: Tensor) -> Tensor:
        chosen = _pick(weight, places)
        moved = (rows[:, None] - chosen)[:, :, None] + weight if one_hot else (rows[:, None] + chosen)[:, :, None]
        return _softplus_sum(moved) - _softplus_sum(rows)[:, None, None]

    return _chunked(growth, rows, places, len(weight) * (weight.shape[1] if one_hot else 1) * rows.shape[-1])


def _softplus_sum(x: Tensor) -> Tensor:
    r"""Return :math:`\sum \log(1 + e^x) = \sum x^+ + \log\prod(1 + e^{-|x|})` over the last dim."""
    return x.relu().sum(-1) + _groups(x.abs().neg_().exp_().add_(1)).prod(-2).log().sum(-1)


def _pick(table: Tensor, places: Tensor) -> Tensor:
    """Return the chosen row of each factor of ``[d, K, P]``, ``[C, d, P]``."""
    d, size, _ = table.shape
    if size == 2 and torch.compiler.is_compiling():  # a choice is a vector instruction, once it is fused
        return torch.where(places[..., None] > 0, table[:, 1], table[:, 0])
    rows = places + size * torch.arange(d, device=places.device)
    return table.flatten(0, 1).index_select(0, rows.flatten()).reshape(*places.shape, -1)


def _chunked(growth: Callable[[Tensor, Tensor], Tensor], rows: Tensor, places: Tensor, numbers: int) -> Tensor:
    """Return the growth of all rows, chunk by chunk; each row holds so many numbers. A compiler fuses instead."""
    size = max(1, len(rows))
    if not torch.compiler.is_compiling():
        size = max(1, NUMBERS.get(rows.device.type, NUMBERS["cuda"]) // max(1, numbers))
    return torch.cat([growth(*part) for part in zip(rows.split(size), places.split(size), strict=True)])
