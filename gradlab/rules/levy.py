r"""Rules from Lévy measures.

For an infinitely divisible law with Lévy measure :math:`\nu`,

.. math:: \partial_\theta E f(z) = E\int [f(z + u) - f(z)]\,\partial_\theta\nu(du) .

Reference:
    `On covariance identities for infinitely divisible laws <https://doi.org/10.1214/aop/1022855412>`_, Houdré,
    Pérez-Abreu and Surgailis, 1998.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

from gradlab.families import (
    AsymmetricLaplace,
    InverseGaussian,
    NormalInverseGaussian,
    SymmetricStable,
    VarianceGamma,
)
from gradlab.rules.continuous import frullani, positive, resolved
from gradlab.rules.jumps import exponential, gamma, place, unit
from gradlab.rules.registry import (
    LATENTS,
    Rule,
    Shift,
    location,
    location_remainder,
    register_cumulants,
    register_log_cf,
    register_remainder,
    register_rule,
)
from gradlab.special import student_t_grad

# ------------------------------------------------------------------- asymmetric Laplace, variance-gamma: two gammas


def _shape(p: td.Distribution) -> Tensor:
    return p.concentration if isinstance(p, VarianceGamma) else torch.ones_like(p.loc)


for _law in (AsymmetricLaplace, VarianceGamma, NormalInverseGaussian, SymmetricStable, td.StudentT, td.Cauchy):
    register_rule(_law, "loc", 1)(location)
for _law in (AsymmetricLaplace, VarianceGamma, NormalInverseGaussian):
    register_remainder(_law, "loc")(location_remainder)


@register_rule(AsymmetricLaplace, "right", 0, lambda p, z: (gamma(2, z),))
@register_rule(VarianceGamma, "right", 0, lambda p, z: (gamma(2, z),))
def _right_divided(p, z, g):
    r""":math:`k\,E[(f(z + aG) - f(z)) / (aG)]`, G ~ Gamma(2, 1): order 1 with the place on the jump integrated out."""
    jump = resolved(g, z / p.right)
    return [Shift(_shape(p) / (p.right * jump), z + p.right * jump)]


@register_rule(AsymmetricLaplace, "right", 1, lambda p, z: (exponential(z),))
@register_rule(VarianceGamma, "right", 1, lambda p, z: (exponential(z),))
def _right_first(p, z, v):
    r""":math:`k\,E f'(z + aV)`, V ~ Exp(1)."""
    return [Shift(_shape(p).expand_as(z), z + p.right * v, 1)]


@register_rule(AsymmetricLaplace, "left", 0, lambda p, z: (gamma(2, z),))
@register_rule(VarianceGamma, "left", 0, lambda p, z: (gamma(2, z),))
def _left_divided(p, z, g):
    jump = resolved(g, z / p.left)
    return [Shift(_shape(p) / (p.left * jump), z - p.left * jump)]


@register_rule(AsymmetricLaplace, "left", 1, lambda p, z: (exponential(z),))
@register_rule(VarianceGamma, "left", 1, lambda p, z: (exponential(z),))
def _left_first(p, z, v):
    return [Shift(-_shape(p).expand_as(z), z - p.left * v, 1)]


@register_rule(VarianceGamma, "concentration", 0, lambda p, z: (exponential(z), exponential(z)))
def _variance_gamma_shape(p, z, up, down):
    r""":math:`E[(f(z + aV) - f(z)) / V] + E[(f(z - bV') - f(z)) / V']`; the derivative form has more variance."""
    up, down = resolved(up, z / p.right), resolved(down, z / p.left)
    return [Shift(1 / up, z + p.right * up), Shift(1 / down, z - p.left * down)]


@register_rule(
    VarianceGamma, "concentration", 1, lambda p, z: (unit(z), exponential(z), exponential(z))
)  # U is shared: the two jumps are added, not compared
def _variance_gamma_shape_first(p, z, u, up, down):
    return [
        Shift(p.right.expand_as(z), z + p.right * u * up, 1),
        Shift(-p.left.expand_as(z), z - p.left * u * down, 1),
    ]


@register_log_cf(AsymmetricLaplace)
@register_log_cf(VarianceGamma)
def _two_gammas_log_cf(p, omega):
    return 1j * p.loc * omega - _shape(p) * (torch.log(1 - 1j * p.right * omega) + torch.log(1 + 1j * p.left * omega))


@register_cumulants(AsymmetricLaplace)
@register_cumulants(VarianceGamma)
def _two_gammas_cumulants(p, order):
    def kappa(n: int) -> Tensor:
        return float(math.factorial(n - 1)) * _shape(p) * (p.right**n + (-p.left) ** n)

    return [kappa(n) + (p.loc if n == 1 else 0) for n in range(1, order + 1)]


def _side_remainder(name: str, sign: int) -> None:
    @register_remainder(AsymmetricLaplace, name)
    @register_remainder(VarianceGamma, name)
    def make(order: int) -> Rule:
        r""":math:`\pm k\,[\sum_{n<N} (\pm a)^{n-1} f^{(n)}(z) + (\pm a)^{N-1} f^{(N)}(z \pm aV)]`."""

        def shifts(p, z, v):
            def weight(n: int) -> Tensor:
                return (sign**n * _shape(p) * getattr(p, name) ** (n - 1)).expand_as(z)

            last = Shift(weight(order), z + sign * getattr(p, name) * v, order)
            return [*(Shift(weight(n), None, n) for n in range(1, order)), last]

        return Rule(shifts, lambda p, z: (exponential(z),), order)


_side_remainder("right", 1)
_side_remainder("left", -1)


@register_remainder(VarianceGamma, "concentration")
def _variance_gamma_shape_remainder(order: int) -> Rule:
    def jumps(p, z):
        return place(order, z), gamma(order, z), gamma(order, z)

    def shifts(p, z, b, up, down):
        def pair(n: int, up: Tensor | None = None, down: Tensor | None = None) -> list[Shift]:
            weights = [(scale**n / n).expand_as(z) for scale in (p.right, -p.left)]
            return [Shift(w, x, n) for w, x in zip(weights, (up, down), strict=True)]

        last = pair(order, z + p.right * b * up, z - p.left * b * down)
        return [*(s for n in range(1, order) for s in pair(n)), *last]

    return Rule(shifts, jumps, order)


# ---------------------------------------------------------------------------------------------- inverse Gaussian


def _size(mean: Tensor, shape: Tensor) -> Tensor:
    """The scale of the jumps: the Lévy density is proportional to u^(-3/2) exp(-u / size)."""
    return 2 * mean**2 / shape


@register_rule(InverseGaussian, "loc", 1, lambda p, z: (unit(z), gamma(1.5, z)))
def _inverse_gaussian_mean_first(p, z, u, g):
    r""":math:`E f'(z + UG)`, G ~ Gamma(3/2, scale :math:`2m^2/\lambda`), U uniform.

    Its variance is a ninth of the difference form's at :math:`m = \lambda = 1` for f = (z - 0.49)², 1.4 times it for
    tanh z; at :math:`\lambda = 10` a 13th and an eighth.
    """
    return [Shift(torch.ones_like(z), z + _size(p.loc, p.concentration) * u * g, 1)]


@register_rule(InverseGaussian, "loc", 0, lambda p, z: (gamma(0.5, z),))
def _inverse_gaussian_mean(p, z, g):
    r""":math:`(\lambda/m^2)\,E[f(z + G) - f(z)]`, G ~ Gamma(1/2, scale :math:`2m^2/\lambda`)."""
    return [Shift((p.concentration / p.loc**2).expand_as(z), z + _size(p.loc, p.concentration) * g)]


def _by_shape(mean: Tensor, g: Tensor) -> Tensor:
    return (1 / (2 * g) - 1) / (2 * mean)


@register_rule(InverseGaussian, "concentration", 0, lambda p, z: (gamma(0.5, z),))
def _inverse_gaussian_shape(p, z, g):
    r""":math:`E[(f(z + G) - f(z))\,(m/(2\lambda G) - 1/(2m))]`, G ~ Gamma(1/2, scale :math:`2m^2/\lambda`)."""
    g = resolved(g, z / _size(p.loc, p.concentration))
    return [Shift(_by_shape(p.loc, g), z + _size(p.loc, p.concentration) * g)]


@register_rule(InverseGaussian, "concentration", 1, lambda p, z: (unit(z), gamma(0.5, z)))
def _inverse_gaussian_shape_first(p, z, u, g):
    size = _size(p.loc, p.concentration)
    return [Shift((1 / 2 - g) * size / (2 * p.loc), z + size * u * g, 1)]


@register_cumulants(InverseGaussian)
def _inverse_gaussian_cumulants(p, order):
    return [_odd(n - 1) * p.loc ** (2 * n - 1) / p.concentration ** (n - 1) for n in range(1, order + 1)]


def _odd(n: int) -> int:
    """1 * 3 * ... * (2 n - 1)."""
    return math.prod(range(1, 2 * n, 2))


@register_log_cf(InverseGaussian)
def _inverse_gaussian_log_cf(p, omega):
    return p.concentration / p.loc * (1 - torch.sqrt(1 - 2j * p.loc**2 * omega / p.concentration))


@register_remainder(InverseGaussian, "loc")
def _inverse_gaussian_mean_remainder(order: int) -> Rule:
    r"""The series, and its last derivative at z + BG, B ~ Beta(1, N), G ~ Gamma(N + 1/2)."""

    def jumps(p, z):
        return place(order, z), gamma(order + 0.5, z)

    def shifts(p, z, b, g):
        def weight(n: int) -> Tensor:
            slope = _odd(n) * p.loc ** (2 * n - 2) / p.concentration ** (n - 1)
            return (slope / math.factorial(n)).expand_as(z)

        last = Shift(weight(order), z + _size(p.loc, p.concentration) * b * g, order)
        return [*(Shift(weight(n), None, n) for n in range(1, order)), last]

    return Rule(shifts, jumps, order)


# --------------------------------------------------------------------------------------- normal inverse Gaussian


def _with_variance(p: td.Distribution, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return p.sample_with_variance(p._extended_shape(sample_shape))


LATENTS[NormalInverseGaussian] = _with_variance


def _moved(p: NormalInverseGaussian, z: Tensor, v: Tensor, jump: Tensor) -> Tensor:
    """Return the sample whose variance has jumped, with the same normal noise."""
    noise = (z - p.loc - p.skewness * v) / v.sqrt()
    return z + jump * (p.skewness + noise / ((v + jump).sqrt() + v.sqrt()))


@register_rule(NormalInverseGaussian, "skewness", 1)
def _nig_skewness(p, z, v):
    return [Shift(v, None, 1)]


@register_rule(NormalInverseGaussian, "mixing_mean", 1, lambda p, z: (unit(z), gamma(1.5, z)))
def _nig_mean_first(p, z, v, u, g):
    r""":math:`E F'(v + UG)`, with :math:`F(v) = f(\mathrm{loc} + \beta v + \sqrt v\,\epsilon)`.

    Its variance is a fifth of the difference form's at m = :math:`\lambda` = 1, :math:`\beta` = 0.4 for
    f = (z - 0.49)².
    """
    jump = _size(p.mixing_mean, p.mixing_shape) * u * g
    noise = (z - p.loc - p.skewness * v) / v.sqrt()
    return [Shift(p.skewness + noise / (2 * (v + jump).sqrt()), _moved(p, z, v, jump), 1)]


@register_rule(NormalInverseGaussian, "mixing_mean", 0, lambda p, z: (gamma(0.5, z),))
def _nig_mean(p, z, v, g):
    r"""The rule of the inverse Gaussian for F."""
    jump = _size(p.mixing_mean, p.mixing_shape) * g
    return [Shift((p.mixing_shape / p.mixing_mean**2).expand_as(z), _moved(p, z, v, jump))]


@register_rule(NormalInverseGaussian, "mixing_shape", 0, lambda p, z: (gamma(0.5, z),))
def _nig_shape(p, z, v, g):
    g = resolved(g, v / _size(p.mixing_mean, p.mixing_shape))
    return [Shift(_by_shape(p.mixing_mean, g), _moved(p, z, v, _size(p.mixing_mean, p.mixing_shape) * g))]


@register_log_cf(NormalInverseGaussian)
def _nig_log_cf(p, omega):
    exponent = 1j * omega * p.skewness - omega * omega / 2
    root = torch.sqrt(1 - 2 * p.mixing_mean**2 * exponent / p.mixing_shape)
    return 1j * p.loc * omega + p.mixing_shape / p.mixing_mean * (1 - root)


# ----------------------------------------------------------------------------------------------------- Student-t


def _precision(p, z):
    r"""The law of the hidden g ~ Gamma(:math:`\nu/2`) given the sample, in units of its conditional rate."""
    return (td.Gamma(((p.df + 1) / 2).expand_as(z), torch.ones_like(z), validate_args=False),)


def _student_jumps(p, z):
    share = _student_share(p.df).expand_as(z)
    return *_precision(p, z), td.Bernoulli(share, validate_args=False), unit(z), exponential(z)


def _student_share(df: Tensor) -> Tensor:
    return 0.1 * (4 - df / 2).clamp(0, 1)


@register_rule(td.StudentT, "df", 1)
def _student_df_path(p, z):
    r""":math:`E[-\partial_\nu F / p\; f']`: the variance is a tenth to a hundredth of the difference form's.

    It is infinite if that of z f' is: for f = cos z at two degrees of freedom, say, where order 0 is the one to use.
    """
    return [Shift(p.scale * student_t_grad(p.df, (z - p.loc) / p.scale).to(z.dtype), None, 1)]


@register_rule(td.StudentT, "df", 0, _student_jumps)
def _student_df(p, z, g, pick, u, v):
    r"""With :math:`t(g) = \epsilon\sqrt{\nu/2g}`, g ~ Gamma(:math:`\nu/2`), the shape and the scale of g together:

    .. math:: \partial_\nu E f = \tfrac12 E[(f(t(g + V)) - f(t(g)))\,(1/V - 1)]

    with the jumps of :func:`frullani`. There is no series: no exponential moment exists.
    """
    t = (z - p.loc) / p.scale
    g = positive(g / (1 + t * t / p.df))
    jump, weight = frullani(g, _student_share(p.df), pick, u, v)
    return [Shift(weight * (1 - jump) / 2, p.loc + (z - p.loc) * torch.rsqrt(1 + jump / g))]


@register_rule(td.StudentT, "scale", 1)
def _student_scale(p, z):
    return [Shift((z - p.loc) / p.scale, None, 1)]


# ------------------------------------------------------------------------------------------- Cauchy and stable laws


def _apart(r: Tensor) -> Tensor:
    r"""Return the jump, but not so small that second differences cancel.

    Below h = eps^(1/4) the difference at h stands for that at r, after division by r²: a bias of the order of
    :math:`h^{4-\alpha} f''''`, below :math:`10^{-7} f''''` in float32 and :math:`10^{-11} f''''` in float64 at
    :math:`\alpha = 1`, in place of rounding errors of eps f / r².
    """
    info = torch.finfo(r.dtype)
    return r.clamp(info.eps**0.25, info.max**0.25)


def _pair(p, z: Tensor, r: Tensor, weight: Tensor) -> list[Shift]:
    return [Shift(weight, z + p.scale * r), Shift(weight, z - p.scale * r)]


@register_rule(td.Cauchy, "scale", 0, lambda p, z: (unit(z),))
def _cauchy_scale(p, z, u):
    r""":math:`E[(f(z + U) + f(z - U) - 2 f(z))\,(U^2 + \gamma^2) / (2\gamma U^2)]`, U ~ abs(Cauchy(:math:`\gamma`)).

    Its variance is finite for every bounded f with a second derivative or a kink (0.97 for cos 1.3z at scale 1, where
    the path's is infinite; 2.6 for log(1 + z²), where that is 0.5), and large for f with a step.
    """
    r = _apart(torch.tan(math.pi / 2 * u))
    return _pair(p, z, r, (1 + 1 / r**2) / (2 * p.scale))


@register_rule(td.Cauchy, "scale", 1)
def _scale_path(p, z):
    """The path: infinite variance unless z f' has a second moment."""
    return [Shift((z - p.loc) / p.scale, None, 1)]


def _stable_jump(p: SymmetricStable, pick: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return r, log r and :math:`C_\alpha r^{-1-\alpha}` over its density: half of the r below 1, half above."""
    alpha, log_u = p.stability, positive(u).log()
    log_r = log_u * torch.where(pick > 0, -1 / alpha, 1 / (2 - alpha))
    r = _apart(log_r.clamp(max=math.log(torch.finfo(u.dtype).max) / 4).exp())
    constant = torch.exp(torch.lgamma(1 + alpha)) * _sinc(alpha)
    return r, log_r, constant * torch.where(pick > 0, 2 / alpha, 2 * r**-2 / (2 - alpha))


def _sinc(alpha: Tensor) -> Tensor:
    r""":math:`\sin(\pi\alpha/2)/\pi`, also right next to 2."""
    return torch.sin(math.pi / 2 * torch.minimum(alpha, 2 - alpha)) / math.pi


def _stable_jumps(p, z):
    return td.Bernoulli(torch.full_like(z, 0.5), validate_args=False), unit(z)


@register_rule(SymmetricStable, "scale", 0, _stable_jumps)
def _stable_scale(p, z, pick, u):
    r""":math:`(\alpha/c)\int_0^\infty [f(z + cr) + f(z - cr) - 2 f(z)]\,C_\alpha r^{-1-\alpha}\,dr`."""
    r, _, weight = _stable_jump(p, pick, u)
    return _pair(p, z, r, weight * p.stability / p.scale)


register_rule(SymmetricStable, "scale", 1)(_scale_path)


@register_rule(SymmetricStable, "stability", 0, _stable_jumps)
def _stable_stability(p, z, pick, u):
    r""":math:`\int_0^\infty [\dots]\,(C'_\alpha / C_\alpha - \log r)\,C_\alpha r^{-1-\alpha}\,dr`, scale by scale.

    The variance grows as 1 / (2 - :math:`\alpha`) next to 2.
    """
    alpha = p.stability
    r, log_r, weight = _stable_jump(p, pick, u)
    slope = torch.special.digamma(1 + alpha) + math.pi / 2 / torch.tan(math.pi / 2 * alpha)
    return _pair(p, z, r, weight * (slope - log_r))
