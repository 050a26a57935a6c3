r"""Elementwise numerics of implicit reparameterization: how a sample moves with its parameter.

At a fixed uniform, a sample :math:`z` with density :math:`p_\theta` obeys

.. math:: \frac{dz}{d\theta} = -\frac{\partial_\theta F_\theta(z)}{p_\theta(z)}
          = \int_z^\infty s_\theta(t)\,\frac{p_\theta(t)}{p_\theta(z)}\,dt
          = -\int_{-\infty}^z s_\theta(t)\,\frac{p_\theta(t)}{p_\theta(z)}\,dt,
          \qquad s_\theta = \partial_\theta\log p_\theta .

The score :math:`s_\theta` of every family here changes sign once, so one of the two tails has a
positive integrand: Gauss-Legendre quadrature on *that* tail, in a variable in which the integrand
is smooth, loses no digit to cancellation. The same formula serves all parameters, centre and tails.

Everything is computed in float64 (a float32 result is cast back), elementwise with broadcasting,
without a graph, a host synchronisation or a data-dependent branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.special import digamma, i0e, i1e, ndtri

__all__ = [
    "log_diff_ndtr",
    "log_gamma_grad",
    "log_ndtr",
    "ndtr",
    "ndtri_exp",
    "student_t_grad",
    "student_t_tail",
    "von_mises_cdf",
    "von_mises_grad",
]

_BLOCK = 8192  # elements
_DROP = 22.0  # integrands are cut where they have fallen by exp(-22) = 3e-10


def log_gamma_grad(concentration: Tensor, log_z: Tensor) -> Tensor:
    r"""Return :math:`d\log z/d\alpha` of a standard gamma sample :math:`z`, from :math:`\log z`.

    .. math:: D(\alpha) = \frac{d\log z}{d\alpha}
              = \int_0^\infty (x + \sigma L)\, e^{\sigma\alpha x - z(e^{\sigma x} - 1)}\,dx,
              \qquad L = \log z - \psi(\alpha),\ \sigma = \mathrm{sign}(L).

    Below the centre, :math:`\alpha D(\alpha) = \psi(\alpha+1) - \log z + z D(\alpha+1)`, a sum of positive
    terms, is first used three times: then no :math:`\alpha` is small, and :math:`z` may underflow.

    Args:
        concentration: :math:`\alpha`, broadcasts with ``log_z``.
        log_z: log of the sample.

    >>> log_gamma_grad(torch.tensor(1e-3), torch.tensor(-1000.)).item()  # (psi(1.001) + 1000) / 0.001
    999424.375
    """
    alpha, log_z64 = _double(concentration, log_z)
    z, psi = log_z64.exp(), digamma(alpha + 1)
    lower = log_z64 < psi
    psi_up = psi + 1 / (alpha + 1) + 1 / (alpha + 2)  # psi(alpha + 3)
    a = torch.where(lower, alpha + 3, alpha)
    gap = torch.where(lower, psi_up - log_z64, log_z64 - (psi - 1 / alpha))
    width = torch.where(lower, _width_below(a, z), _width_above(a, z))
    step = torch.where(lower, -width, width)
    slope = a * step
    grad = width * _integrate(_gamma_integrand, 14, width, gap, slope, step, z)
    for k in (2, 1, 0):
        grad = torch.where(lower, (psi_up - log_z64 + z * grad) / (alpha + k), grad)
        psi_up = psi_up - 1 / (alpha + k)
    return grad.to(_dtype(concentration, log_z))


def _gamma_integrand(u, width, gap, slope, step, z):
    return (width * u + gap) * torch.exp(slope * u - z * (torch.exp(step * u) - 1))


def _width_below(a: Tensor, z: Tensor) -> Tensor:
    """x with (a - z) x + z x^2/(2 + x) = drop, a lower bound of the true fall a x - z (1 - exp(-x))."""
    b = 2 * (a - z) - _DROP
    return 4 * _DROP / (b + torch.sqrt(b * b + 8 * a * _DROP))


def _width_above(a: Tensor, z: Tensor) -> Tensor:
    """The lesser of two x where z (exp(x) - 1) - a x has surely fallen: quadratic and exponential bound."""
    b = z - a
    quadratic = 2 * _DROP / (b + torch.sqrt(b * b + 2 * _DROP * z))
    return torch.minimum(quadratic, torch.log1p((_DROP + a * quadratic) / z))


def von_mises_grad(concentration: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`dx/d\kappa` of a von Mises sample with mean 0, :math:`x\in[-\pi,\pi]`.

    .. math:: \frac{dx}{d\kappa} = -\mathrm{sign}(x)\int \Bigl|\cos t - \tfrac{I_1(\kappa)}{I_0(\kappa)}\Bigr|
              e^{\kappa(\cos t - \cos x)}\,dt

    over :math:`[0,|x|]` where :math:`\cos x > I_1/I_0`, else over :math:`[|x|,\pi]`.

    >>> von_mises_grad(torch.tensor(2.), torch.tensor(1.)).item()
    -0.3384...
    """
    kappa, y = _double(concentration, x)
    w, mean = y.abs(), i1e(kappa) / i0e(kappa)
    top = torch.cos(w)
    inner = top > mean
    start = torch.where(inner, 0.0, w)
    width = torch.where(inner, w, _arc(top, kappa)) - start
    size = width * _integrate(_von_mises_integrand, 14, start, width, kappa, mean, kappa * top)
    return (-y.sign() * size).to(_dtype(concentration, x))


def _von_mises_integrand(u, start, width, kappa, mean, level):
    t = torch.cos(start + width * u)
    return (t - mean).abs() * torch.exp(kappa * t - level)


def von_mises_cdf(concentration: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`F(x)=\int_{-\pi}^x e^{\kappa\cos t}dt\,/\,2\pi I_0(\kappa)`, for :math:`x\in[-\pi,\pi]`.

    >>> von_mises_cdf(torch.tensor(2.), torch.tensor(0.)).item()
    0.5
    """
    kappa, y = _double(concentration, x)
    w = y.abs()
    width = _arc(torch.cos(w), kappa) - w
    mass = width * _integrate(lambda u, w, width, k: torch.exp(k * torch.cos(w + width * u) - k), 20, w, width, kappa)
    tail = mass / (2 * math.pi * i0e(kappa))
    return torch.where(y > 0, 1 - tail, tail).to(_dtype(concentration, x))


def _arc(top: Tensor, kappa: Tensor) -> Tensor:
    """The angle t where exp(kappa (cos t - top)) has fallen enough, or pi."""
    return torch.acos((top - _DROP / kappa).clamp(min=-1.0))


def student_t_grad(df: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`dx/d\nu` of a standard Student-t sample. With :math:`x=\sqrt\nu\sinh Y`,

    .. math:: \frac{dx}{d\nu} = -\mathrm{sign}(x)\,\sqrt\nu\cosh Y \int |s_\nu(y)|
              \left(\frac{\cosh Y}{\cosh y}\right)^{\nu} dy

    over :math:`[0,|Y|]` where the score :math:`s_\nu(Y)>0`, else over :math:`[|Y|,\infty)`.
    """
    nu, sample = _double(df, x)
    end, bias = torch.asinh(sample.abs() / nu.sqrt()), _student_bias(nu)
    level, score = _student_score(end, nu, bias)
    start = torch.where(score > 0, 0.0, end)
    width = torch.where(score > 0, end, _student_end(nu, level)) - start
    size = torch.sqrt(nu + sample * sample) * width * _integrate(_student_integrand, 20, start, width, nu, bias, level)
    return (-sample.sign() * size).to(_dtype(df, x))


def _student_integrand(u, start, width, nu, bias, level):
    log_cosh, score = _student_score(start + width * u, nu, bias)
    return score.abs() * torch.exp(nu * (level - log_cosh))


def _student_score(y, nu, bias):
    """log cosh(y) and the derivative of the log density of sqrt(nu) sinh(y) for nu."""
    m = torch.expm1(-2 * y)
    log_cosh = y + torch.log1p(m / 2)
    return log_cosh, bias - log_cosh + (nu + 1) / (2 * nu) * (m / (2 + m)) ** 2


def student_t_tail(df: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`P(T > |x|)` of a standard Student-t variable :math:`T` (torch has no Student-t cdf)."""
    nu, sample = _double(df, x)
    start = torch.asinh(sample.abs() / nu.sqrt())
    level = _log_cosh(start)
    width = _student_end(nu, level) - start
    log_norm = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - math.log(math.pi) / 2
    tail = width * _integrate(_student_density, 36, start, width, nu, log_norm)
    return tail.to(_dtype(df, x))


def _student_density(u, start, width, nu, log_norm):
    return torch.exp(log_norm - nu * _log_cosh(start + width * u))


def _log_cosh(y: Tensor) -> Tensor:
    return y + torch.log1p(torch.expm1(-2 * y) / 2)


def _student_end(nu: Tensor, level: Tensor) -> Tensor:
    """The y where cosh(y)^-nu has fallen enough from exp(-nu level)."""
    log_cosh = level + _DROP / nu
    return log_cosh + torch.log1p(torch.sqrt(-torch.expm1(-2 * log_cosh)))


def _student_bias(nu: Tensor) -> Tensor:
    """(psi((nu+1)/2) - psi(nu/2) - 1/nu)/2, by its asymptotic series where the difference cancels."""
    r = 4 / (nu * nu).clamp(min=900.0)
    series = r * (1 / 16 - r * (1 / 128 - r * (1 / 256 - r * 17 / 4096)))
    direct = (digamma((nu + 1) / 2) - digamma(nu / 2) - 1 / nu) / 2
    return torch.where(nu > 30, series, direct)


def ndtr(x: Tensor) -> Tensor:
    r"""Return :math:`\Phi(x)`; ``torch.special.ndtr`` is ``(1 + erf)/2``, which has no digit left at x = -8.

    >>> ndtr(torch.tensor(-10., dtype=torch.float64)).item()
    7.6198530241605...e-24
    """
    return torch.erfc(-x / math.sqrt(2)) / 2


def log_ndtr(x: Tensor) -> Tensor:
    """Return the log of :func:`ndtr` (torch's own has no batching rule for vmap)."""
    left = x.clamp(max=-1.0)
    tail = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left * left / 2
    return torch.where(x < -1, tail, torch.log1p(-torch.erfc(x.clamp(min=-1.0) / math.sqrt(2)) / 2))


def log_diff_ndtr(a: Tensor, b: Tensor) -> Tensor:
    r"""Return :math:`\log(\Phi(b)-\Phi(a))` for :math:`a<b`, accurate far in both tails.

    >>> log_diff_ndtr(torch.tensor(30.), torch.tensor(torch.inf)).item()
    -454.3212...
    """
    flip = a > 0
    low, high = torch.where(flip, -b, a), torch.where(flip, -a, b)
    top = log_ndtr(high)
    return top + torch.log(-torch.expm1(log_ndtr(low) - top))


def ndtri_exp(log_p: Tensor) -> Tensor:
    r"""Return :math:`\Phi^{-1}(e^{\ell})`: the inverse of ``log_ndtr``.

    >>> ndtri_exp(torch.tensor(-1000., dtype=torch.float64)).item()
    -44.6...
    """
    tail = log_p.clamp(max=-2.0)
    x = -torch.sqrt(-2 * tail - torch.log(-2 * math.tau * tail) + 1e-3)
    for _ in range(4):  # Newton on the concave log_ndtr
        value = log_ndtr(x)
        x = x - (value - tail) * torch.exp(value + x * x / 2) * math.sqrt(math.tau)
    upper = -ndtri(-torch.expm1(log_p))
    return torch.where(log_p < -2.0, x, torch.where(log_p < -0.7, ndtri(log_p.exp()), upper))


def _integrate(f: Callable[..., Tensor], num_nodes: int, *tensors: Tensor) -> Tensor:
    """Gauss-Legendre quadrature of ``f(u, *tensors)`` over u in (0, 1), elementwise."""
    tensors = torch.broadcast_tensors(*tensors)
    if tensors[0].numel() <= _BLOCK or not has_cache(tensors[0]):
        terms = (weight * f(node, *tensors) for node, weight in _NODES[num_nodes])
        return sum(terms, torch.zeros_like(tensors[0]))
    blocks = zip(*(t.reshape(-1).split(_BLOCK) for t in tensors), strict=True)  # each fits into the cache
    return torch.cat([_integrate(f, num_nodes, *block) for block in blocks]).view(tensors[0].shape)


def has_cache(x: Tensor) -> bool:
    """Whether blocks that fit into a cache save time: not on a GPU, and not in a compiled graph."""
    return not (x.is_cuda or torch.compiler.is_compiling())


def _legendre(num_nodes: int) -> list[tuple[float, float]]:
    x, w = np.polynomial.legendre.leggauss(num_nodes)
    return list(zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


_NODES = {n: _legendre(n) for n in (14, 20, 36)}


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.promote_types(*(t.dtype for t in tensors))
