"""Rules for finite supports: local expectations."""

from __future__ import annotations

import torch
import torch.distributions as td

from gradlab.rules.registry import Shift, register_rule


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
