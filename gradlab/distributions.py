"""What the estimators need to know about a distribution, and the two distributions that torch lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from gradlab.special import log_diff_ndtr, log_ndtr, ndtri_exp
from gradlab.surrogate import attach

__all__ = ["Logistic", "TruncatedNormal"]

MAX_SUPPORT = 2**20


def base(q: Distribution) -> Distribution:
    """Return the innermost distribution below ``Independent`` and transforms."""
    while (inner := getattr(q, "base_dist", None)) is not None:
        q = inner
    return q


def is_discrete(q: Distribution) -> bool:
    """Whether q has a countable support."""
    return bool(q.support.is_discrete)


def ends(q: Distribution) -> tuple[Tensor | None, Tensor | None]:
    """Return the ends of the support as torch states them, with their graph; None where there is none."""
    constraint = q.support
    while (inner := getattr(constraint, "base_constraint", None)) is not None:
        constraint = inner
    bounds = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    low, high = (None if b is None else torch.as_tensor(b) for b in bounds)
    return low, high


def has_moving_support(q: Distribution) -> bool:
    """Whether the support of q moves with a parameter that requires a gradient, as U(0, θ)'s does."""
    q = factor(q)
    if any(e is not None and e.requires_grad for e in ends(q)):
        return True
    if not isinstance(q, td.TransformedDistribution) or type(q).support is not td.TransformedDistribution.support:
        return False
    return has_moving_support(q.base_dist) or _moves_an_end(q)


def _moves_an_end(q: td.TransformedDistribution) -> bool:
    """Whether an affine transform moves a finite end: by its location, or by its scale unless the end is 0."""
    found = [e for e in ends(q.base_dist) if e is not None and bool(e.isfinite().any())]
    for transform in q.transforms:
        if isinstance(transform, td.AffineTransform):
            loc, scale = (isinstance(p, Tensor) and p.requires_grad for p in (transform.loc, transform.scale))
            if any(loc or (scale and bool((e != 0).any())) for e in found):
                return True
        found = [transform(e) for e in found]
    return False


def has_log_prob(q: Distribution) -> bool:
    """Whether the class of q implements a density."""
    return type(base(q)).log_prob is not Distribution.log_prob


def has_mean(q: Distribution) -> bool:
    """Whether torch's ``q.mean`` is the mean of the samples (von Mises has a circular one, Cauchy none)."""
    if isinstance(factor(q), td.MixtureSameFamily) and not has_mean(factor(q).component_distribution):
        return False
    if isinstance(base(q), td.Categorical | td.Cauchy | td.VonMises):
        return False
    try:
        return q.mean.shape == q.batch_shape + q.event_shape
    except (AttributeError, NotImplementedError):
        return False


def has_finite_support(q: Distribution) -> bool:
    """Whether all values of q can be listed."""
    p = factor(q)
    if isinstance(p, td.Binomial) and bool((p.total_count != p.total_count.flatten()[0]).any()):
        return False  # torch lists the values of equal counts only
    return bool(getattr(p, "has_enumerate_support", False))


def number_of_factors(q: Distribution) -> int:
    """Return d, the number of independent factors that are drawn jointly."""
    return math.prod(q.event_shape) // math.prod(factor(q).event_shape)


def support_size(q: Distribution) -> int:
    """Return the number of joint values of q, K**d."""
    return len(factor(q).enumerate_support(expand=False)) ** number_of_factors(q)


def support(q: Distribution) -> Tensor:
    """Return every joint value of q, ``[N, *B, *E]``.

    A product of d factors with K values each has N = K**d joint values; the first factor varies slowest.

    Raises:
        ValueError: more than 2**20 joint values.

    >>> support(torch.distributions.Independent(torch.distributions.Bernoulli(torch.zeros(2)), 1)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    one, size = factor(q), support_size(q)
    if size > MAX_SUPPORT:
        raise ValueError(
            f"support: found {size} joint values, expected at most {MAX_SUPPORT}. Enumerate fewer dims jointly, "
            "or use an estimator that samples."
        )
    values = one.enumerate_support(expand=False)  # [K, 1, ..., *E of one factor]
    values = values.reshape(values.shape[:1] + one.event_shape)
    factors = number_of_factors(q)
    place = len(values) ** torch.arange(factors - 1, -1, -1, device=values.device)
    digits = torch.arange(size, device=values.device)[:, None] // place % len(values)  # [N, factors]
    table = values[digits].reshape(-1, *(1 for _ in q.batch_shape), *q.event_shape)
    return table.expand(-1, *q.batch_shape, *q.event_shape)


def has_icdf(q: Distribution) -> bool:
    """Whether every coordinate of q has an inverse cdf of its own."""
    p = factor(q)
    if p.event_shape or (isinstance(p, td.TransformedDistribution) and p.base_dist.event_shape):
        return False
    return type(base(p)).icdf is not Distribution.icdf


def quantile(q: Distribution, u: Tensor) -> Tensor:
    """Return the inverse cdf of q, coordinate by coordinate below ``Independent``."""
    return factor(q).icdf(u)


def scores(q: Distribution, z: Tensor) -> Tensor:
    r"""Return :math:`\nabla\log q(z)` sample by sample, ``[S, *B, P]``, over all P parameters of one problem.

    Args:
        z: ``[S, *B, *E]``.
    """
    batch = z.shape[: z.ndim - len(q.event_shape)]
    with torch.enable_grad():
        expanded = q.expand(batch)  # each sample gets a view of the parameters, hence a gradient of its own
        views = list({id(p): p for p in tensors(expanded) if p.requires_grad}.values())
        if not views:
            _check_hidden_parameters(q, z)
            return z.new_zeros(*batch, 0)
        grads = torch.autograd.grad(expanded.log_prob(z).sum(), views, materialize_grads=True)
    return torch.cat([g.reshape(*batch, -1) for g in grads], dim=-1)


def _check_hidden_parameters(q: Distribution, z: Tensor) -> None:
    if q.log_prob(z).requires_grad:
        raise ValueError(
            f"scores: found no parameter that {type(q).__name__} holds itself, expected at least one: those of its "
            "transforms cannot be told apart sample by sample. Give a number as coefficient."
        )


def factor(q: Distribution) -> Distribution:
    """Return q below its ``Independent`` wrappers."""
    while isinstance(q, td.Independent):
        q = q.base_dist
    return q


def tensors(q: Distribution) -> Iterator[Tensor]:
    """Yield the tensors that q holds, those of the distributions inside it included."""
    for value in vars(q).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Distribution):
            yield from tensors(value)


def standard_exponential(size: torch.Size, like: Tensor) -> Tensor:
    """Return Exponential(1) samples that are never 0 (a uniform can be), so that their logarithm is finite."""
    u = torch.rand(size, dtype=like.dtype, device=like.device)
    return (-torch.log1p(-u)).clamp_min(torch.finfo(like.dtype).tiny)


class Logistic(Distribution):
    r"""The logistic distribution.

    .. math:: F(z) = \sigma\!\left(\frac{z-\mathrm{loc}}{\mathrm{scale}}\right)

    Args:
        loc: mean and median.
        scale: positive; the standard deviation is :math:`\pi\,\mathrm{scale}/\sqrt3`.

    >>> Logistic(torch.tensor(0.), torch.tensor(1.)).cdf(torch.tensor(0.)).item()
    0.5
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc, scale, validate_args=None):
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return _expand(self, batch_shape, _instance, "loc", "scale")

    def _standard(self, value):
        if self._validate_args:
            self._validate_sample(value)
        return (value - self.loc) / self.scale

    def log_prob(self, value):
        x = self._standard(value)
        return F.logsigmoid(x) + F.logsigmoid(-x) - self.scale.log()

    def cdf(self, value):
        return torch.sigmoid(self._standard(value))

    def icdf(self, value):
        return self.loc + self.scale * torch.logit(value)

    def rsample(self, sample_shape=torch.Size()):
        size = self._extended_shape(sample_shape)
        e1, e2 = standard_exponential(torch.Size((2, *size)), self.loc)
        return self.loc + self.scale * (e1.log() - e2.log())

    def entropy(self):
        return self.scale.log() + 2

    @property
    def mean(self):
        return self.loc

    @property
    def mode(self):
        return self.loc

    @property
    def variance(self):
        return (self.scale * math.pi) ** 2 / 3


class TruncatedNormal(Distribution):
    r"""A normal conditioned to lie between ``low`` and ``high``, in log space and so accurate far in the tails.

    .. math:: F(z) = \frac{\Phi(x)-\Phi(a)}{\Phi(b)-\Phi(a)},\qquad
              (x, a, b) = \frac{(z, \mathrm{low}, \mathrm{high}) - \mathrm{loc}}{\mathrm{scale}}

    Args:
        loc: mean of the normal before truncation.
        scale: its standard deviation.
        low: lower bound, may be ``-inf``.
        high: upper bound, may be ``inf``.

    Reference:
        `Simulation of truncated normal variables <https://arxiv.org/abs/0907.4010>`_, Robert, 2009.

    >>> q = TruncatedNormal(torch.tensor(0.), torch.tensor(1.), torch.tensor(20.), torch.tensor(torch.inf))
    >>> q.icdf(torch.tensor(0.5)).item()  # doctest: +ELLIPSIS
    20.034...
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(self, loc, scale, low, high, validate_args=None):
        self.loc, self.scale, self.low, self.high = broadcast_all(loc, scale, low, high)
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args and not (self.low < self.high).all():
            raise ValueError("TruncatedNormal: expected low < high everywhere.")

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return constraints.interval(self.low, self.high)

    def expand(self, batch_shape, _instance=None):
        return _expand(self, batch_shape, _instance, "loc", "scale", "low", "high")

    def _standard(self, value):
        return (value - self.loc) / self.scale

    def _bounds(self):
        return self._standard_bound(self.low), self._standard_bound(self.high)

    def _standard_bound(self, t):
        """An infinite bound has no graph, since its derivative would be 0 x inf."""
        return torch.where(t.isinf(), t, self._standard(torch.where(t.isinf(), 0.0, t)))

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        x = self._standard(value)
        log_p = -x * x / 2 - math.log(math.tau) / 2 - self.scale.log() - self._log_mass()
        return torch.where((value < self.low) | (value > self.high), -torch.inf, log_p)

    def _log_mass(self):
        return log_diff_ndtr(*self._bounds())

    def cdf(self, value):
        a, b = self._bounds()
        x = torch.minimum(torch.maximum(self._standard(value), a), b)
        return torch.exp(log_diff_ndtr(a, x) - log_diff_ndtr(a, b))

    def icdf(self, value):
        return self.through(self._icdf(value))

    def _icdf(self, u):
        a, b = (t.detach().double() for t in self._bounds())
        flip = a > 0
        a, b, u = torch.where(flip, -b, a), torch.where(flip, -a, b), torch.where(flip, 1 - u.double(), u.double())
        x = ndtri_exp(torch.logaddexp(log_ndtr(a) + torch.log1p(-u), log_ndtr(b) + u.log()))
        z = self.loc.detach() + self.scale.detach() * torch.where(flip, -x, x)
        return torch.minimum(torch.maximum(z.to(self.loc.dtype), self.low.detach()), self.high.detach())

    def rsample(self, sample_shape=torch.Size()):
        size = self._extended_shape(sample_shape)
        return self.through(self._icdf(torch.rand(size, dtype=torch.float64, device=self.loc.device)))

    def through(self, z):
        r"""Return ``z`` with the derivative of the sample at a fixed uniform attached, for all four parameters.

        .. math:: \frac{\partial z}{\partial\mathrm{low}} = (1-F)\frac{\varphi(a)}{\varphi(x)},\quad
                  \frac{\partial z}{\partial\mathrm{high}} = F\,\frac{\varphi(b)}{\varphi(x)}
        """
        loc, scale, low, high = (t.detach().double() for t in (self.loc, self.scale, self.low, self.high))
        x, a, b = (z - loc) / scale, (low - loc) / scale, (high - loc) / scale
        log_mass = log_diff_ndtr(a, b)
        by_low = torch.exp((x * x - a * a) / 2 + log_diff_ndtr(x, b) - log_mass)
        by_high = torch.exp((x * x - b * b) / 2 + log_diff_ndtr(a, x) - log_mass)
        by_scale = x - torch.where(by_low > 0, a * by_low, 0.0) - torch.where(by_high > 0, b * by_high, 0.0)
        pairs = (self.loc, 1 - by_low - by_high), (self.scale, by_scale), (self.low, by_low), (self.high, by_high)
        for parameter, gradient in pairs:
            z = attach(z, torch.where(parameter.isinf(), 0.0, parameter), gradient.to(z.dtype))
        return z

    def _edges(self):
        """phi(a)/Z, phi(b)/Z and a phi(a)/Z - b phi(b)/Z, where an infinite bound counts nothing."""
        a, b = self._bounds()
        at_a, at_b = (torch.exp(-t * t / 2 - math.log(math.tau) / 2 - self._log_mass()) for t in (a, b))
        return at_a, at_b, torch.where(a.isinf(), 0.0, a) * at_a - torch.where(b.isinf(), 0.0, b) * at_b

    def entropy(self):
        return self.scale.log() + self._log_mass() + math.log(math.tau * math.e) / 2 + self._edges()[2] / 2

    @property
    def mean(self):
        at_a, at_b, _ = self._edges()
        return self.loc + self.scale * (at_a - at_b)

    @property
    def variance(self):
        at_a, at_b, slope = self._edges()
        return self.scale**2 * (1 + slope - (at_a - at_b) ** 2)


def _expand(q, batch_shape, instance, *names):
    new = q._get_checked_instance(type(q), instance)
    for name in names:
        setattr(new, name, getattr(q, name).expand(batch_shape))
    Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
    new._validate_args = q._validate_args
    return new


class Family(Distribution):
    """A distribution that is given by its parameters, in the order of ``arg_constraints``, and sampled by ``_draw``."""

    has_rsample = False

    def __init__(self, *parameters, validate_args=None):
        names = list(self.arg_constraints)
        for name, value in zip(names, broadcast_all(*parameters), strict=True):
            setattr(self, name, value)
        super().__init__(getattr(self, names[0]).shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return _expand(self, batch_shape, _instance, *self.arg_constraints)

    def sample(self, sample_shape=torch.Size()):
        with torch.no_grad():
            return self._draw(self._extended_shape(sample_shape))

    def _draw(self, size: torch.Size) -> Tensor:
        raise NotImplementedError
