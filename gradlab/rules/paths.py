"""Rules that need no Lévy measure: a moving support, and the laws that are best followed along their path."""

from __future__ import annotations

import math

import torch
import torch.distributions as td

from gradlab.distributions import Logistic
from gradlab.rules.registry import Shift, location, register_rule
from gradlab.special import von_mises_grad

# --------------------------------------------------------------------------------------------------------- uniform


@register_rule(td.Uniform, "high", 0)
def _high(p, z):
    r""":math:`(f(b) - E f) / (b - a)`: no f' is needed, and none is lost at a step.

    The variance is a quarter of the path's for f = z² on (0, 1), and stays bounded as f oscillates.
    """
    return [Shift((1 / (p.high - p.low)).expand_as(z), p.high.expand_as(z))]


@register_rule(td.Uniform, "high", 1)
def _high_path(p, z):
    return [Shift((z - p.low) / (p.high - p.low), None, 1)]


@register_rule(td.Uniform, "low", 0)
def _low(p, z):
    r""":math:`(E f - f(a)) / (b - a)`."""
    return [Shift((-1 / (p.high - p.low)).expand_as(z), p.low.expand_as(z))]


@register_rule(td.Uniform, "low", 1)
def _low_path(p, z):
    return [Shift((p.high - z) / (p.high - p.low), None, 1)]


# ------------------------------------------------------------------------------------------------------- von Mises


for _law in (td.VonMises, td.Gumbel, Logistic):
    register_rule(_law, "loc", 1)(location)


@register_rule(td.VonMises, "concentration", 1)
def _von_mises(p, z):
    r""":math:`E[-\partial_\kappa F / p\; f']`, for f with period :math:`2\pi`."""
    x = torch.remainder(z - p.loc + math.pi, 2 * math.pi) - math.pi
    return [Shift(von_mises_grad(p.concentration, x).to(z.dtype), None, 1)]


# ---------------------------------------------------------------------------------- explicit paths of other laws


@register_rule(td.Gumbel, "scale", 1)
@register_rule(Logistic, "scale", 1)
def _scale(p, z):
    return [Shift((z - p.loc) / p.scale, None, 1)]


@register_rule(td.HalfNormal, "scale", 1)
@register_rule(td.Weibull, "scale", 1)
def _from_zero(p, z):
    return [Shift(z / p.scale, None, 1)]


@register_rule(td.Weibull, "concentration", 1)
def _weibull_shape(p, z):
    x = z / p.scale
    return [Shift(-z * torch.log(x.clamp_min(torch.finfo(x.dtype).tiny)) / p.concentration, None, 1)]


@register_rule(td.LogNormal, "loc", 1)
def _log_normal_loc(p, z):
    return [Shift(z, None, 1)]


@register_rule(td.LogNormal, "scale", 1)
def _log_normal_scale(p, z):
    return [Shift(z * (z.log() - p.loc) / p.scale, None, 1)]
