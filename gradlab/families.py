"""Continuous distributions that torch lacks, for which stochastic backpropagation has rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from gradlab.distributions import Family, standard_exponential
from gradlab.surrogate import attach

__all__ = ["AsymmetricLaplace", "InverseGaussian", "NormalInverseGaussian", "SymmetricStable", "VarianceGamma"]


class AsymmetricLaplace(Family):
    r"""A Laplace distribution with one scale for each side: ``loc`` + exponential - exponential.

    .. math:: p(z) = \frac{1}{a+b}\begin{cases} e^{-(z-\mathrm{loc})/a} & z \ge \mathrm{loc} \\
              e^{(z-\mathrm{loc})/b} & z < \mathrm{loc} \end{cases}

    Args:
        loc: the mode.
        right: positive; the scale a above the mode.
        left: positive; the scale b below it.

    Reference:
        `The Laplace Distribution and Generalizations <https://doi.org/10.1007/978-1-4612-0173-1>`_, Kotz, Kozubowski
        and Podgórski, 2001.

    >>> AsymmetricLaplace(torch.tensor(0.0), torch.tensor(3.0), torch.tensor(1.0)).mean.item()
    2.0
    """

    arg_constraints = {"loc": constraints.real, "right": constraints.positive, "left": constraints.positive}
    support = constraints.real

    def __init__(self, loc, right, left, validate_args=None):
        super().__init__(loc, right, left, validate_args=validate_args)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        x = value - self.loc
        return -torch.where(x < 0, -x / self.left, x / self.right) - torch.log(self.right + self.left)

    def cdf(self, value):
        x = value - self.loc
        below = self.left * torch.exp(x.clamp(max=0) / self.left)
        return torch.where(x < 0, below, self.left - self.right * torch.expm1(-x.clamp(min=0) / self.right)) / (
            self.left + self.right
        )

    def _draw(self, size):
        up, down = standard_exponential(torch.Size((2, *size)), self.loc)
        return self.loc + self.right * up - self.left * down

    @property
    def mean(self):
        return self.loc + self.right - self.left

    @property
    def variance(self):
        return self.right**2 + self.left**2


class VarianceGamma(Family):
    r"""The difference of two gamma variables of one shape: ``loc`` + gamma - gamma.

    .. math:: E\,e^{i\omega z} = e^{i\omega\,\mathrm{loc}}\,[(1 - i\omega a)(1 + i\omega b)]^{-k}

    With shape 1 it is the asymmetric Laplace. It is also a normal whose variance is a gamma variable.

    Args:
        loc: location.
        concentration: positive; the shape k.
        right: positive; the scale a of the gamma that is added.
        left: positive; the scale b of the gamma that is subtracted.

    Reference:
        `The Variance Gamma Process and Option Pricing <https://doi.org/10.1023/A:1009703431535>`_, Madan, Carr and
        Chang, 1998.

    >>> VarianceGamma(*torch.tensor([0.0, 2.0, 3.0, 1.0])).variance.item()
    20.0
    """

    arg_constraints = {
        "loc": constraints.real,
        "concentration": constraints.positive,
        "right": constraints.positive,
        "left": constraints.positive,
    }
    support = constraints.real

    def __init__(self, loc, concentration, right, left, validate_args=None):
        super().__init__(loc, concentration, right, left, validate_args=validate_args)

    def _draw(self, size):
        shape = self.concentration.expand(2, *size)
        up, down = torch._standard_gamma(shape)
        return self.loc + self.right * up - self.left * down

    @property
    def mean(self):
        return self.loc + self.concentration * (self.right - self.left)

    @property
    def variance(self):
        return self.concentration * (self.right**2 + self.left**2)


class InverseGaussian(Family):
    r"""The inverse Gaussian: when a Brownian motion with drift first reaches a level.

    .. math:: p(z) = \sqrt{\frac{\lambda}{2\pi z^3}}\,\exp\!\Big(-\frac{\lambda (z-m)^2}{2 m^2 z}\Big)

    Args:
        loc: positive; the mean m.
        concentration: positive; the shape :math:`\lambda`. The variance is :math:`m^3/\lambda`.

    Reference:
        `Generating Random Variates Using Transformations with Multiple Roots
        <https://doi.org/10.1080/00031305.1976.10479147>`_, Michael, Schucany and Haas, 1976.

    >>> InverseGaussian(torch.tensor(2.0), torch.tensor(4.0)).variance.item()
    2.0
    """

    arg_constraints = {"loc": constraints.positive, "concentration": constraints.positive}
    support = constraints.positive

    def __init__(self, loc, concentration, validate_args=None):
        super().__init__(loc, concentration, validate_args=validate_args)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        chi = self.concentration * ((value - self.loc) / self.loc) ** 2 / value
        return (torch.log(self.concentration) - math.log(math.tau) - 3 * torch.log(value) - chi) / 2

    def _draw(self, size):
        return inverse_gaussian(self.loc, self.concentration, size)

    @property
    def mean(self):
        return self.loc

    @property
    def variance(self):
        return self.loc**3 / self.concentration


def inverse_gaussian(mean: Tensor, shape: Tensor, size: torch.Size) -> Tensor:
    """Return inverse Gaussian samples; the smaller root is written without a difference, in float64."""
    normal = torch.randn(size, dtype=torch.float64, device=mean.device)
    w = mean.double() * normal**2 / (2 * shape.double())
    ratio = 1 / (1 + w + torch.sqrt(w * (w + 2)))
    z = mean * torch.where(torch.rand_like(ratio) * (1 + ratio) <= 1, ratio, 1 / ratio)
    info = torch.finfo(mean.dtype)
    return z.clamp(info.tiny, info.max).to(mean.dtype)


class NormalInverseGaussian(Family):
    r"""A normal whose variance v is inverse Gaussian, and whose mean moves with it.

    .. math:: z = \mathrm{loc} + \beta v + \sqrt v\,\epsilon, \qquad
              v \sim \mathrm{InverseGaussian}(m, \lambda),\quad \epsilon \sim \mathcal N(0, 1)

    In the other usual parameters, :math:`\delta = \sqrt\lambda` and
    :math:`\alpha = \sqrt{\lambda/m^2 + \beta^2}`:

    .. math:: p(z) = \frac{\alpha\delta\,K_1(\alpha r)}{\pi r}\,e^{\lambda/m + \beta(z - \mathrm{loc})},
              \qquad r = \sqrt{\lambda + (z - \mathrm{loc})^2}

    Args:
        loc: location.
        skewness: the drift :math:`\beta`.
        mixing_mean: positive; the mean m of v.
        mixing_shape: positive; the shape :math:`\lambda` of v.

    Reference:
        `Normal Inverse Gaussian Distributions and Stochastic Volatility Modelling
        <https://doi.org/10.1111/1467-9469.00045>`_, Barndorff-Nielsen, 1997.

    >>> NormalInverseGaussian(*torch.tensor([0.0, 2.0, 3.0, 1.0])).mean.item()
    6.0
    """

    arg_constraints = {
        "loc": constraints.real,
        "skewness": constraints.real,
        "mixing_mean": constraints.positive,
        "mixing_shape": constraints.positive,
    }
    support = constraints.real

    def __init__(self, loc, skewness, mixing_mean, mixing_shape, validate_args=None):
        super().__init__(loc, skewness, mixing_mean, mixing_shape, validate_args=validate_args)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        x, delta, gamma = value - self.loc, self.mixing_shape.sqrt(), self.mixing_shape.sqrt() / self.mixing_mean
        r, alpha = torch.sqrt(self.mixing_shape + x * x), torch.sqrt(gamma**2 + self.skewness**2)
        return (
            torch.log(alpha * delta / (math.pi * r)) + _log_k1e(alpha * r) - alpha * r
            + delta * gamma + self.skewness * x
        )  # fmt: skip

    def sample_with_variance(self, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return z and its hidden variance v, each ``size``."""
        v = inverse_gaussian(self.mixing_mean, self.mixing_shape, size)
        return self.loc + self.skewness * v + v.sqrt() * torch.randn_like(v), v

    def _draw(self, size):
        return self.sample_with_variance(size)[0]

    @property
    def mean(self):
        return self.loc + self.skewness * self.mixing_mean

    @property
    def variance(self):
        return self.mixing_mean + self.skewness**2 * self.mixing_mean**3 / self.mixing_shape


def _log_k1e(x: Tensor) -> Tensor:
    """Return log(exp(x) K_1(x)), with the derivative that torch lacks."""
    y = x.detach()
    k0, k1 = torch.special.scaled_modified_bessel_k0(y), torch.special.scaled_modified_bessel_k1(y)
    return attach(k1.log(), x, 1 - k0 / k1 - 1 / y) if x.requires_grad else k1.log()


class _Between(constraints.Constraint):
    """Between 0 and 2, ends excluded: a normal is no case of the Lévy measure."""

    def check(self, value):
        return (value > 0) & (value < 2)

    def __repr__(self):
        return "0 < stability < 2 (for 2, use a Normal of scale sqrt(2) * scale)"


class SymmetricStable(Family):
    r"""The symmetric stable distribution: Cauchy at stability 1; a normal would have 2.

    .. math:: E\,e^{i\omega z} = e^{i\omega\,\mathrm{loc} - |\omega c|^\alpha}

    Args:
        loc: location, the median.
        scale: positive; c.
        stability: :math:`\alpha`, between 0 and 2; the smaller, the heavier the tails.

    Reference:
        `A Method for Simulating Stable Random Variables <https://doi.org/10.1080/01621459.1976.10480344>`_, Chambers,
        Mallows and Stuck, 1976.

    >>> SymmetricStable(*torch.tensor([0.0, 1.0, 1.5])).variance.item()
    inf
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "stability": _Between(),
    }
    support = constraints.real

    def __init__(self, loc, scale, stability, validate_args=None):
        super().__init__(loc, scale, stability, validate_args=validate_args)

    def _draw(self, size):
        alpha = self.stability.double()
        u = torch.rand(torch.Size((2, *size)), dtype=torch.float64, device=self.loc.device)
        angle, e = math.pi * (u[0] - 0.5), -torch.log1p(-u[1]).clamp(max=-torch.finfo(torch.float64).tiny)
        log_x = torch.log(torch.cos((1 - alpha) * angle) / e) * (1 - alpha) / alpha - torch.log(angle.cos()) / alpha
        top = math.log(torch.finfo(self.loc.dtype).max) / 2  # beyond it no cost is finite
        x = torch.sin(alpha * angle) * torch.exp(log_x.clamp(max=top))
        return self.loc + self.scale * x.to(self.loc.dtype)

    @property
    def mean(self):
        return torch.where(self.stability > 1, self.loc, torch.nan)

    @property
    def variance(self):
        return torch.full_like(self.scale, torch.inf)
