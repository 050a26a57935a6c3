"""Rules for continuous laws on the line."""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

from gradlab.rules.registry import (
    Rule,
    Shift,
    register_cumulants,
    register_gammas,
    register_log_cf,
    register_remainder,
    register_rule,
)

# ---------------------------------------------------------------------------------------------------------- normal


@register_rule(td.Normal, "loc", 1)
@register_rule(td.Laplace, "loc", 1)
def _loc(p, z):
    return [Shift(torch.ones_like(z), None, 1)]


@register_rule(td.Normal, "scale", 2)
def _normal_scale(p, z):
    r""":math:`\partial_{\sigma^2} E f = E f'' / 2`."""
    return [Shift(p.scale.expand_as(z), None, 2)]


@register_rule(td.Normal, "scale", 1)
def _normal_path(p, z):
    return [Shift((z - p.loc) / p.scale, None, 1)]


@register_cumulants(td.Normal)
def _normal_cumulants(p, order):
    return [p.loc, p.scale**2, *(torch.zeros_like(p.loc) for _ in range(order - 2))][:order]


# --------------------------------------------------------------------------------------------------------- Laplace


def _double(p, z):
    return (td.Laplace(torch.zeros_like(p.scale), p.scale),)


def _scale_exponential(p, z):
    return (td.Exponential(1 / p.scale),)


@register_rule(td.Laplace, "scale", 2, _double)
def _laplace_second(p, z, w):
    r""":math:`\partial_{b^2} E f = E f''(z + W)`, W ~ Laplace(0, b)."""
    return [Shift((2 * p.scale).expand_as(z), z + w, 2)]


@register_rule(td.Laplace, "scale", 1, _scale_exponential)
def _laplace_first(p, z, v):
    one = torch.ones_like(z)
    return [Shift(one, z + v, 1), Shift(-one, z - v, 1)]


@register_rule(td.Laplace, "scale", 0, _scale_exponential)
def _laplace_difference(p, z, v):
    weight = (1 / p.scale).expand_as(z)
    return [Shift(weight, z + v), Shift(weight, z - v)]


@register_cumulants(td.Laplace)
def _laplace_cumulants(p, order):
    def kappa(n: int) -> Tensor:
        if n == 1:
            return p.loc
        return torch.zeros_like(p.scale) if n % 2 else 2 * math.factorial(n - 1) * p.scale**n

    return [kappa(n) for n in range(1, order + 1)]


@register_remainder(td.Laplace, "scale")
def _laplace_remainder(order: int) -> Rule:
    r""":math:`2b\,[\sum_{n<N} b^{2n-2} f^{(2n)}(z) + b^{2N-2} f^{(2N)}(z + W)]`, order = 2 N."""
    terms = max(order // 2, 1)

    def shifts(p, z, w):
        def weight(n: int) -> Tensor:
            return (2 * p.scale ** (2 * n - 1)).expand_as(z)

        return [*(Shift(weight(n), None, 2 * n) for n in range(1, terms)), Shift(weight(terms), z + w, 2 * terms)]

    return Rule(shifts, _double, 2 * terms)


@register_remainder(td.Laplace, "loc")
@register_remainder(td.Normal, "loc")
def _loc_remainder(order: int) -> Rule:
    return Rule(_loc, lambda p, z: (), 1)


# ----------------------------------------------------------------------------------------------------------- gamma


def _unit(z: Tensor) -> td.Distribution:
    return td.Uniform(torch.zeros_like(z), torch.ones_like(z), validate_args=False)


def _rate_exponential(p, z):
    return (td.Exponential(p.rate),)


def _safe(v: Tensor) -> Tensor:
    """Return a jump that can be divided by."""
    return v.clamp_min(torch.finfo(v.dtype).tiny)


@register_rule(td.Gamma, "concentration", 1, lambda p, z: (_unit(z), td.Exponential(p.rate)))
def _gamma_shape_first(p, z, u, v):
    r""":math:`E f'(z + UV) / \beta`, V ~ Exp(rate :math:`\beta`), U uniform."""
    return [Shift((1 / p.rate).expand_as(z), z + u * v, 1)]


@register_rule(td.Gamma, "concentration", 0, _rate_exponential)
def _gamma_shape_difference(p, z, v):
    r""":math:`E[(f(z + V) - f(z)) / (\beta V)]`: infinite variance for f = log z at shapes below 1."""
    return [Shift(1 / (p.rate * _safe(v)), z + v)]


@register_rule(td.Gamma, "rate", 1, _rate_exponential)
def _gamma_rate_first(p, z, v):
    return [Shift((-p.concentration / p.rate**2).expand_as(z), z + v, 1)]


@register_rule(td.Gamma, "rate", 0, _rate_exponential)
def _gamma_rate_difference(p, z, v):
    return [Shift((-p.concentration / p.rate).expand_as(z), z + v)]


@register_cumulants(td.Gamma)
def _gamma_cumulants(p, order):
    return [math.factorial(n - 1) * p.concentration / p.rate**n for n in range(1, order + 1)]


@register_log_cf(td.Gamma)
def _gamma_log_cf(p, omega):
    return -p.concentration * torch.log(1 - 1j * omega / p.rate)


@register_log_cf(td.Laplace)
def _laplace_log_cf(p, omega):
    return 1j * p.loc * omega - torch.log(1 + (p.scale * omega) ** 2)


@register_log_cf(td.Normal)
def _normal_log_cf(p, omega):
    return 1j * p.loc * omega - (p.scale * omega) ** 2 / 2


@register_remainder(td.Gamma, "rate")
def _gamma_rate_remainder(order: int) -> Rule:
    r""":math:`-(k/\beta^2)\,[\sum_{n<N} \beta^{1-n} f^{(n)}(z) + \beta^{1-N} f^{(N)}(z + V)]`."""

    def shifts(p, z, v):
        def weight(n: int) -> Tensor:
            return (-p.concentration / p.rate ** (n + 1)).expand_as(z)

        return [*(Shift(weight(n), None, n) for n in range(1, order)), Shift(weight(order), z + v, order)]

    return Rule(shifts, _rate_exponential, order)


@register_remainder(td.Gamma, "concentration")
def _gamma_shape_remainder(order: int) -> Rule:
    r""":math:`\sum_{n<N} \beta^{-n} f^{(n)}(z)/n + \beta^{-N} f^{(N)}(z + BG)/N`, B ~ Beta(1, N), G ~ Gamma(N)."""

    def jumps(p, z):
        size = torch.full_like(z, order)
        return td.Beta(torch.ones_like(z), size), td.Gamma(size, p.rate.expand_as(z))

    def shifts(p, z, b, g):
        def weight(n: int) -> Tensor:
            return (1 / (n * p.rate**n)).expand_as(z)

        return [*(Shift(weight(n), None, n) for n in range(1, order)), Shift(weight(order), z + b * g, order)]

    return Rule(shifts, jumps, order)


# ------------------------------------------------------------------------------------------------ beta, Dirichlet


def _towards(p, z):
    r"""Beta(1, s), s the sum of the concentrations."""
    total = p.concentration1 + p.concentration0
    return (td.Beta(torch.ones_like(total), total),)


@register_rule(td.Beta, "concentration1", 1, lambda p, z: (_unit(z), *_towards(p, z)))
def _beta_one(p, z, u, v):
    r""":math:`E[(1 - z) f'(z + UV(1 - z))] / s`, V ~ Beta(1, s)."""
    return [Shift((1 - z) / (p.concentration1 + p.concentration0), z + u * v * (1 - z), 1)]


@register_rule(td.Beta, "concentration1", 0, _towards)
def _beta_one_difference(p, z, v):
    return [Shift(1 / ((p.concentration1 + p.concentration0) * _safe(v)), z + v * (1 - z))]


@register_rule(td.Beta, "concentration0", 1, lambda p, z: (_unit(z), *_towards(p, z)))
def _beta_zero(p, z, u, v):
    return [Shift(-z / (p.concentration1 + p.concentration0), z - u * v * z, 1)]


@register_rule(td.Beta, "concentration0", 0, _towards)
def _beta_zero_difference(p, z, v):
    return [Shift(1 / ((p.concentration1 + p.concentration0) * _safe(v)), z - v * z)]


def _towards_corner(p, z):
    total = p.concentration.sum(-1)
    return (td.Beta(torch.ones_like(total), total),)


def _corners(z: Tensor) -> Tensor:
    """Return :math:`e_k - z` for each k, ``[..., K, K]``."""
    return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) - z[..., None, :]


@register_rule(td.Dirichlet, "concentration", 1, lambda p, z: (_unit(z[..., 0]), *_towards_corner(p, z)))
def _dirichlet(p, z, u, v):
    r""":math:`E[(e_k - z)^\top\nabla f(z + UV(e_k - z))] / s`, V ~ Beta(1, s)."""
    ways = _corners(z)
    weight = (1 / p.concentration.sum(-1, keepdim=True)).expand_as(z)
    return [Shift(weight, z[..., None, :] + (u * v)[..., None, None] * ways, 1, ways)]


@register_rule(td.Dirichlet, "concentration", 0, _towards_corner)
def _dirichlet_difference(p, z, v):
    weight = 1 / (p.concentration.sum(-1) * _safe(v))
    return [Shift(weight[..., None].expand_as(z), z[..., None, :] + v[..., None, None] * _corners(z))]


@register_gammas(td.Beta)
def _beta_gammas(p):
    shape = torch.stack([p.concentration1, p.concentration0], -1)
    return td.Gamma(shape, torch.ones_like(shape)), lambda zeta: zeta[..., 0] / (zeta[..., 0] + zeta[..., 1])


@register_gammas(td.Dirichlet)
def _dirichlet_gammas(p):
    shape = p.concentration
    return td.Gamma(shape, torch.ones_like(shape)), lambda zeta: zeta / zeta.sum(-1, keepdim=True)
