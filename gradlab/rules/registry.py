r"""What a rule is, and where rules are kept.

A rule says how the expectation moves with one parameter, by evaluations of f near the sample:

.. math:: \partial_\theta E_q[f(z)] = E\Big[\sum_i w_i\,\big(f(z_i) - f(z)\big)\Big]
          \quad\text{or}\quad E\Big[\sum_i w_i\,\partial^n f(z_i)\Big],

where the points :math:`z_i` differ from the sample z in one factor, by *jumps* of a known law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from gradlab.surrogate import wants_gradient
from gradlab.taylor import derivatives

__all__ = [
    "Rule",
    "Shift",
    "from_log_cf",
    "log_mgf",
    "register_cumulants",
    "register_log_cf",
    "register_remainder",
    "register_rule",
]


class Shift(NamedTuple):
    """One term of a rule: a weight, times f or a derivative of f at a point.

    For a parameter of shape P per factor (none for a scalar, K for a vector) and factors with event dims F:

    Attributes:
        weight: ``[S, *batch, *P]``.
        point: the factor's new value, ``[S, *batch, *P, *F]``; None leaves the sample as it is.
        order: 0 for :math:`f(z_i) - f(z)`, n for the n-th derivative at :math:`z_i`.
        direction: along which to differentiate, as ``point``; None is the unit of a scalar factor.
    """

    weight: Tensor
    point: Tensor | None = None
    order: int = 0
    direction: Tensor | None = None


Shifts = Callable[..., Sequence[Shift]]
"""``(p, z, *jumps) -> shifts``; p is one factor's distribution, z its samples ``[S, *batch, *F]``."""


class Rule(NamedTuple):
    """Shifts, and the laws of the jumps that they are made from.

    Args:
        shifts: ``(p, z, *jumps) -> [Shift, ...]``.
        jumps: ``(p, z) -> laws``, the distributions of the jumps; they may depend on the sample.
        order: the highest derivative of f that is used.
        part: ``(p, z, *latents) -> (p, z)``, the distribution and the sample that the jumps belong to where those are a
            part of p; None if they are p and z.
    """

    shifts: Shifts
    jumps: Callable[[Distribution, Tensor], Sequence[Distribution]]
    order: int
    part: Callable[..., tuple[Distribution, Tensor]] | None = None


Key = tuple[type[Distribution], str]

RULES: dict[Key, dict[int, Rule]] = {}
"""By distribution and parameter: the exact rules, by the highest derivative of f that they use; the default first."""

REMAINDERS: dict[Key, Callable[[int], Rule]] = {}
"""By distribution and parameter: N derivatives, and the exact remainder."""

CUMULANTS: dict[type[Distribution], Callable[[Distribution, int], Sequence[Tensor]]] = {}
"""By distribution: the cumulants up to an order, with their graph."""

LOG_CFS: dict[type[Distribution], Callable[[Distribution, Tensor], Tensor]] = {}
"""By distribution: the log characteristic function."""

GAMMAS: dict[type[Distribution], Callable[[Distribution], tuple[Distribution, Callable[[Tensor], Tensor]]]] = {}
"""By distribution: gamma variables, and the function that makes the distribution of them; for the series only."""

LATENTS: dict[type[Distribution], Callable[[Distribution, torch.Size], tuple[Tensor, ...]]] = {}
"""By distribution: a sampler of z together with hidden variables, which come before the jumps."""

DERIVED: dict[type[Distribution], Callable[[Distribution], dict[str, dict[int, Rule]]]] = {}
"""By distribution: its rules, where they depend on the distributions that it is made of."""

ALIASES = {"probs": ("probs", "logits"), "covariance_matrix": ("covariance_matrix", "precision_matrix", "scale_tril")}
"""The parameters that the gradient of one of them serves, since torch computes it from them."""


def no_jumps(p: Distribution, z: Tensor) -> Sequence[Distribution]:
    return ()


def register_rule(
    cls: type[Distribution],
    parameter: str,
    order: int = 0,
    jumps: Callable[[Distribution, Tensor], Sequence[Distribution]] = no_jumps,
) -> Callable[[Shifts], Shifts]:
    r"""Register the decorated function as a rule for one parameter of a distribution.

    Args:
        cls: the distribution of one factor.
        parameter: the attribute of the distribution that the rule differentiates by, a dotted name if it is nested.
        order: the highest derivative of f that the rule uses. A parameter may have one rule for each order; the first
            to be registered is the default.
        jumps: ``(p, z) -> laws`` of the jumps; by default there are none.

    The decorated function is ``(p, z, *jumps) -> [Shift, ...]``.

    >>> class Shifted(torch.distributions.Poisson):
    ...     "1 + Poisson(rate)."
    ...     def sample(self, sample_shape=torch.Size()):
    ...         return super().sample(sample_shape) + 1
    >>> @register_rule(Shifted, "rate")
    ... def _(p, z):
    ...     return [Shift(torch.ones_like(z), z + 1)]  # d/d rate E f = E[f(z + 1) - f(z)]
    """

    def register(shifts: Shifts) -> Shifts:
        RULES.setdefault((cls, parameter), {})[order] = Rule(shifts, jumps, order)
        return shifts

    return register


def location(p: Distribution, z: Tensor, *hidden: Tensor) -> Sequence[Shift]:
    r"""The rule of every location: :math:`E f'`. On a circle f must have its period, else the cut is missed."""
    return [Shift(torch.ones_like(z), None, 1)]


def location_remainder(order: int) -> Rule:
    """The series of a location ends with its first term."""
    return Rule(location, no_jumps, 1)


def register_remainder(cls: type[Distribution], parameter: str) -> Callable[[Callable[[int], Rule]], Callable]:
    """Register the decorated function, ``N -> Rule``, as GSB-N with its exact remainder."""

    def register(make: Callable[[int], Rule]) -> Callable[[int], Rule]:
        REMAINDERS[cls, parameter] = make
        return make

    return register


def register_cumulants(cls: type[Distribution]) -> Callable[[Callable], Callable]:
    r"""Register the decorated function, ``(p, order) -> [kappa_1, ..., kappa_order]``, for the series of a law.

    The coefficients of the series are :math:`a_n = \nabla_\theta\kappa_n / n!`, by autograd.
    """

    def register(cumulants: Callable[[Distribution, int], Sequence[Tensor]]) -> Callable:
        CUMULANTS[cls] = cumulants
        return cumulants

    return register


def register_log_cf(cls: type[Distribution]) -> Callable[[Callable], Callable]:
    r"""Register the decorated function, ``(p, omega) -> log phi(omega)``; omega is complex.

    The series of a distribution without registered cumulants is made from it, by :func:`from_log_cf`.
    """

    def register(log_cf: Callable[[Distribution, Tensor], Tensor]) -> Callable:
        LOG_CFS[cls] = log_cf
        return log_cf

    return register


def register_gammas(cls: type[Distribution]) -> Callable[[Callable], Callable]:
    """Register the decorated function, ``p -> (gammas, function of them)``."""

    def register(make: Callable) -> Callable:
        GAMMAS[cls] = make
        return make

    return register


def register_derived(cls: type[Distribution]) -> Callable[[Callable], Callable]:
    """Register the decorated function, ``p -> {name: {order: Rule}}``, for a distribution made of others."""

    def register(make: Callable) -> Callable:
        DERIVED[cls] = make
        return make

    return register


def cumulants_of(p: Distribution, order: int) -> Sequence[Tensor]:
    """Return the cumulants of p, with their graph."""
    if type(p) in CUMULANTS:
        return CUMULANTS[type(p)](p, order)
    return from_log_cf(LOG_CFS[type(p)])(p, order)


def log_mgf(p: Distribution, s: Tensor) -> Tensor:
    r"""Return :math:`\log E[e^{s z}] = \log\varphi(-is)`, with its graph, for a law with a log characteristic function.

    For :math:`f(z) = e^{sz}` it sums the whole series: ``magic_box(log_mgf(q, s)) * torch.exp(s * z)`` has the value f,
    and the gradient :math:`f\,\nabla\log\varphi(-is)`. Infinite where the formula leaves the real axis, since the
    expectation does not exist there.

    >>> q = torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(1.0))
    >>> log_mgf(q, torch.tensor(-1.0)).exp()  # E exp(-z)
    tensor(0.2500)
    """
    omega = -1j * s.to(torch.promote_types(s.dtype, torch.complex64))
    value = LOG_CFS[type(p)](p, omega)
    real = value.real  # where it is a logarithm of a negative number, value and gradient are infinite
    return real * torch.where(value.imag.abs() > 1e-6, real.detach().sign() * torch.inf, 1.0)


def from_log_cf(log_cf: Callable[[Distribution, Tensor], Tensor]) -> Callable[[Distribution, int], list[Tensor]]:
    r"""Return the cumulants of a distribution, from its log characteristic function :math:`\log\varphi(\omega)`.

    .. math:: \kappa_n = (-i)^n\,\partial_\omega^n \log\varphi(0)

    Args:
        log_cf: ``(p, omega) -> log phi``, with :math:`\varphi(\omega) = E[e^{i\omega z}]`, written with operations that
            ``gradlab.taylor.Taylor`` knows; omega is complex.

    >>> cumulants = from_log_cf(lambda p, w: -p.concentration * torch.log(1 - 1j * w / p.rate))
    >>> q = torch.distributions.Gamma(torch.tensor(3.0), torch.tensor(1.0))
    >>> [k.item() for k in cumulants(q, 4)]
    [3.0, 3.0, 6.0, 18.0]
    """

    def cumulants(p: Distribution, order: int) -> list[Tensor]:
        like = p.mean
        omega = torch.zeros_like(like.detach()).to(torch.promote_types(like.dtype, torch.complex64))
        terms = derivatives(lambda w: log_cf(p, w), omega, torch.ones_like(omega), max(order, 3), taylor=True)
        return [((-1j) ** n * terms[n]).real for n in range(1, order + 1)]

    return cumulants


def rules_of(p: Distribution) -> dict[str, dict[int, Rule]]:
    """Return the exact rules for the parameters of p, by name and order."""
    if type(p) in DERIVED:
        return DERIVED[type(p)](p)
    return {name: rules for (cls, name), rules in RULES.items() if cls is type(p)}


def parameter(p: Distribution, name: str) -> Tensor:
    """Return the parameter of p by its (dotted) name, with its graph."""
    return attrgetter(name)(p)


def wanted(p: Distribution, names: Sequence[str]) -> list[str]:
    """Return those names whose parameter wants a gradient."""
    return [name for name in names if wants_gradient(parameter(p, name))]


def uncovered(p: Distribution, names: Sequence[str]) -> list[str]:
    """Return the parameters of p that want a gradient, and that none of the names serves."""
    served = {alias for name in names for alias in ALIASES.get(name, (name,))}
    given = [name for name in p.arg_constraints if isinstance(p.__dict__.get(name), Tensor)]
    missing = [name for name in given if name not in served and wants_gradient(p.__dict__[name])]
    if type(p) in DERIVED or isinstance(p, Independent):
        for key, inner in vars(p).items():
            if isinstance(inner, Distribution):
                prefix = key.removeprefix("_") + "."
                below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
                missing += [prefix + name for name in uncovered(inner, below)]
    return missing
