"""Change one factor of a sample at a time, and see what that does to the cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from gradlab.bernoulli import BernoulliAfterLinear
from gradlab.distributions import factor, number_of_factors
from gradlab.estimator import AfterLinear, Cost, value_and_slope
from gradlab.gumbel import is_relaxable
from gradlab.taylor import derivatives

__all__: list[str] = []


def values_of(q: Distribution) -> Tensor:
    """Return the K values of one factor of q, ``[K, *F]``; F are the event dims of a factor."""
    values = factor(q).enumerate_support(expand=False)
    return values.reshape(values.shape[:1] + factor(q).event_shape)


def probabilities(q: Distribution) -> Tensor:
    """Return the probability of each value of each of the d factors, with its graph, ``[*B, d, K]``."""
    p = factor(q)
    if isinstance(p, OneHotCategorical):
        return p.logits.exp().reshape(*q.batch_shape, number_of_factors(q), -1)
    if isinstance(p, Bernoulli):
        both = torch.stack([torch.sigmoid(-p.logits), torch.sigmoid(p.logits)], -1)
        return both.reshape(*q.batch_shape, number_of_factors(q), 2)
    values = values_of(q)
    table = p.log_prob(values.reshape(len(values), *(1 for _ in p.batch_shape), *p.event_shape)).exp()
    return table.movedim(0, -1).reshape(*q.batch_shape, number_of_factors(q), len(values))


def by_factor(q: Distribution, z: Tensor) -> Tensor:
    """Return z ``[*L, *E]`` as ``[*L, d, *F]``."""
    lead = z.shape[: z.ndim - len(q.event_shape)]
    return z.reshape(*lead, number_of_factors(q), *factor(q).event_shape)


def index_of(q: Distribution, z: Tensor) -> Tensor:
    """Return which of the K values each factor of z has, ``[*L, d]``."""
    parts, dims = by_factor(q, z), len(factor(q).event_shape)
    if isinstance(factor(q), OneHotCategorical):
        return parts.argmax(-1)
    if isinstance(factor(q), Bernoulli):
        return parts.long()
    same = parts.unsqueeze(parts.ndim - dims) == values_of(q)
    return (same.flatten(-dims).all(-1) if dims else same).to(torch.uint8).argmax(-1)


def replace_each(q: Distribution, f: Cost, z: Tensor, values: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the cost of z with each of its factors replaced by each of N values, ``[N, d, *L]``, without a graph.

    Args:
        q: says what a factor of z is.
        f: the cost; an :class:`AfterLinear` has its first layer updated in place of computed.
        z: ``[*L, *E]``.
        values: ``[N, *L, d, *F]``.
        chunk_size: replacements a call of f, to bound memory; by default one call does them all.
    """
    with torch.no_grad():
        return move_each(q, f, z, values, torch.zeros_like(values), 0, chunk_size)[0]


def replace_all(
    q: Distribution, f: Cost, z: Tensor, cost: Tensor, before: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """Return what replacing each factor of z by each of its K values adds to the cost, ``[*L, d, K]``, without a graph.

    Args:
        q, f, z, chunk_size: as in :func:`replace_each`.
        cost: f(z), ``[*L]``.
        before: the first layer of an :class:`AfterLinear` at z, if known.
    """
    values, index = values_of(q), index_of(q, z)  # [K, *F], [*L, d]
    if isinstance(f, BernoulliAfterLinear) and is_relaxable(q):
        with torch.no_grad():
            return f.flips(q, f.before(z) if before is None else before, index).to(cost.dtype)
    if len(values) == 1:
        return cost.new_zeros(*index.shape, 1)
    turns = torch.arange(1, len(values), device=index.device).reshape(-1, *(1 for _ in index.shape))
    others = (index + turns) % len(values)  # [K - 1, *L, d]
    flipped = replace_each(q, f, z, values[others], chunk_size)  # [K - 1, d, *L]
    gain = flipped.movedim((0, 1), (-1, -2)) - cost.detach()[..., None, None]  # [*L, d, K - 1]
    return gain.new_zeros(*index.shape, len(values)).scatter(-1, others.movedim(0, -1), gain)


def differentiate_each(
    q: Distribution,
    f: Cost,
    z: Tensor,
    values: Tensor,
    directions: Tensor | None,
    order: int,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the last of :func:`move_each`, ``[N, d, *L]``; without directions, each factor is a number that grows."""
    lead = z.ndim - len(q.event_shape)
    if directions is None and order == 2 and isinstance(f, BernoulliAfterLinear):
        return f.bends(z, values - by_factor(q, z)).movedim(-1, 1)
    if directions is None and order == 1 and number_of_factors(q) == 1 and chunk_size is None:
        return value_and_slope(f, values.reshape(len(values), *z.shape))[1].reshape(len(values), 1, *z.shape[:lead])
    directions = torch.ones_like(values) if directions is None else directions
    return move_each(q, f, z, values, directions, order, chunk_size)[-1]


def move_each(
    q: Distribution, f: Cost, z: Tensor, values: Tensor, directions: Tensor, order: int, chunk_size: int | None = None
) -> list[Tensor]:
    r"""Return :math:`\partial_t^n f` at t = 0 for n = 0, ..., order, where each factor in turn is value + t direction.

    Args:
        q, f, z, values, chunk_size: as in :func:`replace_each`.
        directions: of the shape of the values.
        order: the highest derivative.

    Returns:
        order + 1 tensors ``[N, d, *L]``, without a graph.
    """
    parts, d, dims = by_factor(q, z), number_of_factors(q), len(factor(q).event_shape)
    size = len(values)
    move = _updated(f, z, parts, dims) if isinstance(f, AfterLinear) else _replaced(f, z, parts, dims)
    values, directions = (x.movedim(x.ndim - 1 - dims, 1).flatten(0, 1) for x in (values, directions))  # [N d, *L, *F]

    def of(n: Tensor) -> list[Tensor]:
        start, direction, tail = move(values[n], directions[n], n % d)
        return [c.detach() for c in derivatives(tail, start, direction, order)]

    pairs = torch.arange(size * d, device=z.device).split(chunk_size or max(size * d, 1))
    costs = [torch.cat(c) for c in zip(*map(of, pairs), strict=True)]
    return [c.reshape(size, d, *c.shape[1:]) for c in costs]


Line = tuple[Tensor, Tensor, Cost]
"""A start, a direction, and the function along the line that begins there."""


def _replaced(f: Cost, z: Tensor, parts: Tensor, dims: int) -> Callable[[Tensor, Tensor, Tensor], Line]:
    """Return ``(new [C, *L, *F], direction [C, *L, *F], factor [C]) -> the line of f``."""
    d = parts.shape[-1 - dims]

    def line(new: Tensor, direction: Tensor, j: Tensor) -> Line:
        if d == 1:  # nothing stays
            return new.reshape(len(j), *z.shape), direction.reshape(len(j), *z.shape), f
        chosen = j[:, None] == torch.arange(d, device=j.device)  # [C, d]
        chosen = chosen.reshape(len(j), *(1 for _ in new.shape[1 : new.ndim - dims]), d, *(1 for _ in range(dims)))
        points = torch.where(chosen, new.unsqueeze(new.ndim - dims), parts)
        moves = torch.where(chosen, direction.unsqueeze(new.ndim - dims), 0.0)
        return points.reshape(len(j), *z.shape), moves.reshape(len(j), *z.shape), f

    return line


def _updated(f: AfterLinear, z: Tensor, parts: Tensor, dims: int) -> Callable[[Tensor, Tensor, Tensor], Line]:
    """The same, by a rank-one update of the first layer a replacement: the line lies in its image."""
    before = f.before(z)  # [*L, H]
    d = parts.shape[-1 - dims]
    weight = f.linear.weight.reshape(len(f.linear.weight), d, -1).movedim(0, -1)  # [d, F, H]

    def image(x: Tensor, j: Tensor) -> Tensor:
        x = x.reshape(len(j), -1, weight.shape[1])  # [C, L, F]
        return (x.to(weight) @ weight[j]).reshape(len(j), *before.shape)

    def line(new: Tensor, direction: Tensor, j: Tensor) -> Line:
        old = parts.movedim(parts.ndim - 1 - dims, 0)[j]  # [C, *L, *F]
        return before + image(new - old, j), image(direction, j), f.g

    return line


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Return it, if it is None or positive."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: found {chunk_size}, expected None or a positive int.")
    return chunk_size
