"""Stochastic backpropagation: gradient rules from the characteristic function of a distribution."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from gradlab.bernoulli import BernoulliAfterLinear
from gradlab.distributions import factor, number_of_factors
from gradlab.estimator import Cost, Estimator, Traits, value_and_slope, value_to_differentiate
from gradlab.flips import check_chunk_size, differentiate_each, move_each, replace_each
from gradlab.rules.registry import (
    CUMULANTS,
    GAMMAS,
    LATENTS,
    LOG_CFS,
    REMAINDERS,
    Rule,
    Shift,
    cumulants_of,
    parameter,
    rules_of,
    uncovered,
    wanted,
)
from gradlab.samplers import sample
from gradlab.surrogate import attach
from gradlab.taylor import Kinks

__all__ = ["StochasticBackprop"]


class Jumps(NamedTuple):
    """Samples, what was hidden behind them, and for each parameter and order the jumps of its rule."""

    z: Tensor  # [S, *B, *E]
    latents: tuple[Tensor, ...]
    jumps: dict[tuple[str, int], tuple[Tensor, ...]]


class StochasticBackprop(Estimator):
    r"""Generalized stochastic backpropagation: rules from :math:`\varphi_\theta(\omega) = E[e^{i\omega z}]`.

    .. math:: \nabla_\theta E_q[f] = \int \hat f(\omega)\,\nabla_\theta\varphi_\theta(\omega)\,d\omega

    ``form="series"`` expands :math:`\nabla\log\varphi` in powers of :math:`i\omega`, which gives derivatives of f at
    the sample, :math:`\sum_n \nabla\kappa_n\,E f^{(n)} / n!` with the cumulants :math:`\kappa_n`, cut at ``order``: it
    is biased, and diverges for most costs. ``form="exact"`` sums the series first, which gives differences and
    derivatives of f at points that have jumped away from the sample. ``form="remainder"`` keeps the series up to
    ``order`` and adds its exact stochastic remainder.

    Args:
        num_samples: S.
        form: "exact", "series" or "remainder".
        order: for the series and the remainder, the highest derivative of f. For "exact", which rule: 0 uses
            differences of f only, n uses derivatives up to n; by default each parameter has the rule of least variance,
            or, if f has kinks, one that is right there.
        chunk_size: points a call of f, to bound memory; by default one call does them all.

    Reference:
        `Generalized Stochastic Backpropagation <https://hal.science/hal-02968975v3>`_, Echraibi, Flocon Cholet,
        Gosselin and Vaton, 2020.

    >>> rate = torch.tensor(2.3, requires_grad=True)
    >>> StochasticBackprop()(torch.distributions.Poisson(rate), lambda z: 3 * z).backward()
    >>> rate.grad.item()
    3.0
    """

    traits = Traits(
        serves="distributions with a rule: most of torch's, and those of gradlab; for counts, f may be a black box",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S (1 + d P) and more",
        second_order=False,
        transforms=True,
        reference="Echraibi et al. (2020), https://hal.science/hal-02968975v3",
    )

    def __init__(
        self,
        num_samples: int = 1,
        form: Literal["exact", "series", "remainder"] = "exact",
        order: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(num_samples)
        if form not in ("exact", "series", "remainder"):
            raise ValueError(f"form: found {form!r}, expected 'exact', 'series' or 'remainder'.")
        if form != "exact" and (order is None or order < 1):
            raise ValueError(
                f"order: found {order} for form={form!r}, expected the highest derivative of f, 1 or more."
            )
        if form == "exact" and order is not None and order < 0:
            raise ValueError(f"order: found {order}, expected None, 0, 1 or 2.")
        self.form, self.order = form, order
        self.chunk_size = check_chunk_size(chunk_size)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        p = factor(q)
        names = list(rules_of(p))
        return bool(names) and not uncovered(p, names)

    def evaluations(self, q: Distribution) -> int:
        """Return the number of points (of a series, of lines) at which f is evaluated for one problem."""
        p, d = factor(q), number_of_factors(q)
        if self.form == "series":
            law = GAMMAS[type(p)](p)[0] if type(p) in GAMMAS else p
            return self.num_samples * (1 + d * law.batch_shape.numel() // p.batch_shape.numel())
        noise, points = self.draw(q), 0
        with torch.no_grad():
            for name, options in self._rules(p).items():
                for shift in self._shifts(p, noise, name, options[0]):
                    inner = shift.weight.shape[noise.z.ndim - len(p.event_shape) :]
                    points += 0 if _is_slope(shift) else d * inner.numel()
        return self.num_samples * (1 + points)

    def draw(self, q: Distribution) -> Jumps:
        p, size = factor(q), torch.Size([self.num_samples])
        self._check_form(p)
        with torch.no_grad():
            if self.form == "series" and type(p) in GAMMAS:
                return Jumps(sample(GAMMAS[type(p)](p)[0], size), (), {})
            z, *latents = LATENTS[type(p)](p, size) if type(p) in LATENTS else (sample(q, size),)
            if self.form == "series":
                return Jumps(z, (), {})
            jumps = {
                (name, rule.order): draw_jumps(rule, p, z, latents)
                for name, rules in self._rules(p).items()
                for rule in rules
            }
        return Jumps(z, tuple(latents), jumps)

    def _check_form(self, p: Distribution) -> None:
        """Raise unless p has rules of the form."""
        have: set[type[Distribution]] = {*GAMMAS, *CUMULANTS, *LOG_CFS}
        if self.form == "remainder":
            names = wanted(p, list(rules_of(p)))
            complete = all((type(p), name) in REMAINDERS for name in names)
            have = {type(p)} if complete else {cls for cls, _ in REMAINDERS} - {type(p)}
        if self.form != "exact" and type(p) not in have:
            known = ", ".join(sorted(cls.__name__ for cls in have))
            raise TypeError(
                f"StochasticBackprop: found {type(p).__name__} with form={self.form!r}, expected one of {known}; or "
                "form='exact'; or register its own, see gradlab.rules."
            )

    def _rules(self, p: Distribution) -> dict[str, list[Rule]]:
        """Return for each parameter that wants a gradient its rule, and the one for costs with kinks."""
        if self.form == "remainder":
            assert self.order is not None
            return {name: [REMAINDERS[type(p), name](self.order)] for name in wanted(p, list(rules_of(p)))}
        rules = rules_of(p)
        return {name: _choose(rules[name], self.order) for name in wanted(p, list(rules))}

    def estimate(self, q: Distribution, f: Cost, noise: Jumps, context: Tensor | None = None) -> Tensor:
        if self.form == "series":
            return self._series(q, f, noise.z)
        p, z = factor(q), noise.z
        rules = self._rules(p)
        with torch.no_grad():
            found = {name: self._shifts(p, noise, name, options[0]) for name, options in rules.items()}
        order = max([0, *(rule.order for options in rules.values() for rule in options)])
        along = order > 1 or any(_is_slope(shift) for shifts in found.values() for shift in shifts)
        cost, slope, kinks = _evaluate(f, z, order, along)
        loss = cost.mean(0)
        for name, options in rules.items():
            rule = options[-1 if kinks.found else 0]
            if kinks.found and rule.order > 1:
                self._warn(kinks, name, rule.order)
            with torch.no_grad():
                shifts = found[name] if rule is options[0] else self._shifts(p, noise, name, rule)
                gradient = functools.reduce(
                    torch.add, (s.weight * self._gain(q, f, z, cost.detach(), slope, s) for s in shifts)
                )
            loss = attach(loss, parameter(p, name), gradient.mean(0))
        return loss

    @staticmethod
    def _shifts(p: Distribution, noise: Jumps, name: str, rule: Rule) -> Sequence[Shift]:
        return rule.shifts(p, noise.z, *noise.latents, *noise.jumps[name, rule.order])

    def _warn(self, kinks: Kinks, name: str, order: int) -> None:
        warnings.warn(
            f"StochasticBackprop: found {kinks.found} in f, and a rule for {name} that uses its derivative of order "
            f"{order}, which misses the kink: the gradient is biased. Expected a smooth f; use form='exact' with "
            "order=1 or 0, which is right for kinks.",
            stacklevel=4,
        )

    def _gain(self, q: Distribution, f: Cost, z: Tensor, cost: Tensor, slope: Tensor | None, shift: Shift) -> Tensor:
        p = factor(q)
        lead = z.ndim - len(p.event_shape)
        inner = shift.weight.shape[lead:]  # *P
        if slope is not None and _is_slope(shift):
            return slope if shift.direction is None else _along(slope, z, shift.direction, z.ndim - lead)
        point = z.reshape(*z.shape[:lead], *(1 for _ in inner), *z.shape[lead:]) if shift.point is None else shift.point
        shape = (*z.shape[:lead], math.prod(inner), *p.event_shape)
        full = (*z.shape[:lead], *inner, *p.event_shape)
        values = self._by_factor(q, point.expand(full).reshape(shape))
        if shift.order == 0:
            new = replace_each(q, f, z, values, self.chunk_size) - cost
        else:
            direction = shift.direction
            if direction is not None:
                direction = self._by_factor(q, direction.expand(full).reshape(shape))
            new = differentiate_each(q, f, z, values, direction, shift.order, self.chunk_size)
        return new.movedim((1, 0), (-2, -1)).reshape(shift.weight.shape)  # [N, d, S, *B] -> [S, *B, d, N]

    @staticmethod
    def _by_factor(q: Distribution, x: Tensor) -> Tensor:
        """Return ``[S, *batch, N, *F]`` as ``[N, S, *B, d, *F]``."""
        dims = len(factor(q).event_shape)
        x = x.movedim(-1 - dims, 0)
        return x.reshape(*x.shape[:2], *q.batch_shape, number_of_factors(q), *factor(q).event_shape)

    def _series(self, q: Distribution, f: Cost, z: Tensor) -> Tensor:
        p, order = factor(q), self.order
        assert order is not None
        if type(p) in GAMMAS:
            gammas, make = GAMMAS[type(p)](p)
            law = Independent(gammas, len(gammas.batch_shape) - len(q.batch_shape))
            return self._series(law, lambda zeta: f(make(zeta)), z)
        values = self._by_factor(q, z[..., None])
        with Kinks() as kinks:
            loss = f(z).mean(0)
        if kinks.found and order > 1:
            self._warn(kinks, "the parameters", order)
        terms = move_each(q, f, z, values, torch.ones_like(values), order, self.chunk_size)
        for n, kappa in enumerate(cumulants_of(p, order), 1):
            if kappa.requires_grad:
                derivative = terms[n].movedim((1, 0), (-2, -1)).reshape(z.shape).mean(0)
                loss = attach(loss, kappa, derivative / float(math.factorial(n)))
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}, order={self.order}, chunk_size={self.chunk_size}"


def draw_jumps(rule: Rule, p: Distribution, z: Tensor, latents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one sample of each jump for each sample of each factor, ``[S, *batch, ...]``."""
    if rule.part is not None:
        p, z = rule.part(p, z, *latents)
    lead = z.shape[: z.ndim - len(p.event_shape)]
    return tuple(sample(law.expand(lead)) for law in rule.jumps(p, z))


def _evaluate(f: Cost, z: Tensor, order: int, along: bool) -> tuple[Tensor, Tensor | None, Kinks]:
    """Return f at the samples, with its graph; its slope there, if wanted; and its kinks, if it should be smooth."""
    if isinstance(f, BernoulliAfterLinear):
        return f(z), f.slope(z) if along else None, Kinks()
    with Kinks() if order > 1 else nullcontext(Kinks()) as kinks:
        if along:
            return *value_and_slope(f, z), kinks
        return value_to_differentiate(f, z)[0] if order else f(z), None, kinks


def _is_slope(shift: Shift) -> bool:
    """Whether one gradient of f at the sample serves the shift, for all coordinates and directions."""
    return shift.point is None and shift.order == 1


def _along(slope: Tensor, z: Tensor, direction: Tensor, dims: int) -> Tensor:
    """Return the slope ``[S, *batch, *F]`` along directions ``[S, *batch, *P, *F]``, ``[S, *batch, *P]``."""
    lead = z.ndim - dims
    ones = (1 for _ in range(direction.ndim - z.ndim))
    along = slope.reshape(*z.shape[:lead], *ones, *z.shape[lead:]) * direction
    return along.sum(tuple(range(along.ndim - dims, along.ndim))) if dims else along


def _choose(rules: dict[int, Rule], order: int | None) -> list[Rule]:
    """Return the rule of the order, or the default and the best one of lower order, for costs with kinks."""
    if order is not None:
        return [rules[max([n for n in rules if n <= order] or [min(rules)])]]
    default = next(iter(rules.values()))
    smooth_enough = [r for r in rules.values() if r.order < 2]
    return [default] if default.order < 2 or not smooth_enough else [default, smooth_enough[0]]
