"""Rules for finite supports: local expectations; and for a point."""

from __future__ import annotations

import torch
import torch.distributions as td

from gradlab.count_laws import Cliques, Delta
from gradlab.rules.registry import Rule, Shift, location, no_jumps, register_derived, register_rule


@register_rule(td.Bernoulli, "probs")
def _bernoulli(p, z):
    r""":math:`f(1) - f(0)`: one of them is the sample."""
    return [Shift(1 - 2 * z, 1 - z)]


@register_rule(td.OneHotCategorical, "probs")
def _one_hot(p, z):
    r""":math:`\sum_k \partial\pi_k f(e_k)`."""
    size = p.event_shape[-1]
    points = torch.eye(size, dtype=z.dtype, device=z.device).expand(*z.shape[:-1], size, size)
    return [Shift(torch.ones_like(z), points)]


@register_rule(td.Categorical, "probs")
def _categorical(p, z):
    r""":math:`\sum_k \partial\pi_k f(k)`."""
    points = torch.arange(p.probs.shape[-1], device=z.device).expand(*z.shape, -1)
    return [Shift(torch.ones_like(points, dtype=p.probs.dtype), points)]


@register_derived(Cliques)
def _cliques(p):
    r""":math:`\sum_{z_c} \partial\pi_c(z_c)\, f(z_c, z_{-c})` for each block c: 1 + the sum of :math:`K_c` points."""

    def rule(c: int) -> Rule:
        def shifts(p, z):
            values = p.values(c)
            weight = torch.ones((*z.shape[:-1], len(values)), dtype=z.dtype, device=z.device)
            return [Shift(weight, p.replace(z[..., None, :], c, values))]

        return Rule(shifts, no_jumps, 0)

    return {f"clique{c}.probs": {0: rule(c)} for c in range(len(p.blocks))}


register_rule(Delta, "loc", 1)(location)  # backpropagation
