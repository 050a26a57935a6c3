"""Rules for mixtures, made from those of the components."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor

from gradlab.distributions import factor
from gradlab.rules.registry import LATENTS, Rule, Shift, no_jumps, register_derived, rules_of
from gradlab.samplers import sample


def _sample(p: td.Distribution, size: torch.Size) -> tuple[Tensor, ...]:
    """Return z, one sample of every component, and what is hidden behind those."""
    component = p.component_distribution
    inner = factor(component)
    y, *latents = LATENTS[type(inner)](inner, size) if type(inner) in LATENTS else (sample(component, size),)
    choice = p.mixture_distribution.expand(p.batch_shape).sample(size)  # [S, *batch]
    index = choice.reshape(*choice.shape, 1, *(1 for _ in p.event_shape))
    z = y.gather(choice.ndim, index.expand(*choice.shape, 1, *p.event_shape)).squeeze(choice.ndim)
    return z, y, *latents


LATENTS[td.MixtureSameFamily] = _sample


def _weights(p, z, y, *latents):
    r""":math:`\sum_k \partial w_k f(y_k)`, with one sample of every component."""
    lead = z.ndim - len(p.event_shape)
    return [Shift(torch.ones(y.shape[: lead + 1], dtype=p.mixture_distribution.probs.dtype, device=y.device), y)]


def _part(p, z, y, *latents):
    """Return what the jumps of a component belong to."""
    return factor(p.component_distribution), y


def _component(rule: Rule) -> Rule:
    """Return the rule of a component's parameter, times the weight of the component."""

    def shifts(p, z, y, *noise):
        inner = factor(p.component_distribution)
        found = rule.shifts(inner, y, *noise)
        w = p.mixture_distribution.probs.expand(*p.batch_shape, -1)
        out = [_lift(p, inner, y, w, shift) for shift in found]
        plain = [s for s, old in zip(out, found, strict=True) if old.order == 0]
        if plain:  # f(point) - f(y_k) in place of f(point) - f(z)
            total = torch.stack([s.weight for s in plain]).sum(0)
            point = y.reshape(*y.shape[: z.ndim - len(p.event_shape) + 1], *_ones(plain[0], z, p), *p.event_shape)
            out.append(Shift(-total, point.expand(*total.shape, *p.event_shape)))
        return out

    return Rule(shifts, rule.jumps, rule.order, _part)


def _ones(shift: Shift, z: Tensor, p: td.Distribution) -> list[int]:
    return [1] * (shift.weight.ndim - (z.ndim - len(p.event_shape)) - 1)


def _lift(p, inner: td.Distribution, y: Tensor, w: Tensor, shift: Shift) -> Shift:
    """Return a component's shift as one of the mixture, of parameter dims ``[K, *D, *P]``.

    y is ``[S, *batch, K, *D, *F]``, where D are the independent factors of a component.
    """
    dims, event = len(inner.event_shape), len(p.event_shape)
    head = y.shape[: y.ndim - event]  # [S, *batch, K]
    d = y.shape[y.ndim - event : y.ndim - dims]
    own = y.shape[y.ndim - dims :]
    p_dims = shift.weight.shape[len(head) + len(d) :]
    weight = shift.weight * w.reshape(*w.shape, *(1 for _ in (*d, *p_dims)))
    full = (*head, *d, *p_dims, *own)
    point = y.reshape(*head, *d, *(1 for _ in p_dims), *own) if shift.point is None else shift.point
    point = point.expand(full)
    way = shift.direction
    if way is None and shift.order:
        if p_dims and shift.point is None and own:  # one direction a coordinate
            eye = torch.eye(own.numel(), dtype=y.dtype, device=y.device)
            way = eye.reshape(*own, *own)
        else:
            way = torch.ones((), dtype=y.dtype, device=y.device)
    if not d:
        return Shift(weight, point, shift.order, None if way is None else way.expand(full))
    count = d.numel()
    mask = torch.eye(count, dtype=torch.bool, device=y.device).reshape(
        *(1 for _ in head), *d, *(1 for _ in p_dims), *d, *(1 for _ in own)
    )

    def spread(x: Tensor) -> Tensor:
        return x.reshape(*head, *d, *p_dims, *(1 for _ in d), *own)

    rest = y.reshape(*head, *(1 for _ in (*d, *p_dims)), *d, *own)
    point = torch.where(mask, spread(point), rest)
    return Shift(weight, point, shift.order, None if way is None else torch.where(mask, spread(way.expand(full)), 0.0))


@register_derived(td.MixtureSameFamily)
def _mixture(p):
    component, prefix = p.component_distribution, "component_distribution."
    while isinstance(component, td.Independent):
        component, prefix = component.base_dist, prefix + "base_dist."
    inner = rules_of(component)
    if not inner:
        return {}
    rules = {
        f"{prefix}{name}": {order: _component(rule) for order, rule in options.items()}
        for name, options in inner.items()
    }
    return {"mixture_distribution.probs": {0: Rule(_weights, no_jumps, 0)}, **rules}
