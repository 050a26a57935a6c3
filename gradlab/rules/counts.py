"""Rules for counts."""

from __future__ import annotations

import torch
import torch.distributions as td

from gradlab.rules.registry import Shift, register_cumulants, register_rule


@register_rule(td.Poisson, "rate")
def _poisson(p, z):
    r""":math:`E[f(z + 1) - f(z)]`."""
    return [Shift(torch.ones_like(z), z + 1)]


@register_cumulants(td.Poisson)
def _poisson_cumulants(p, order):
    return [p.rate for _ in range(order)]
