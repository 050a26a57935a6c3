r"""A local expectation that one can afford: guess every flip, evaluate a few, and correct the guesses by those.

Both estimators have the gradient

.. math:: \nabla E_q[f] = \sum_{j,k} E\Big[\nabla\pi_{jk}\,\Big(t_{jk} + \frac{I_{jk}}{\rho_{jk}}
          \big(f(z_{-j}, k) - f(z) - t_{jk}\big)\Big)\Big],

where t guesses what the flip of factor j to its value k changes, and the flip is evaluated (I = 1) with probability
:math:`\rho`. Given z, the mean of :math:`I/\rho` is 1: the guess cancels, whatever it is, and what is left is the local
expectation. No :math:`\rho` is below a tenth of an even share, so that the variance is finite.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Distribution, OneHotCategorical

from gradlab.distributions import factor, has_finite_support, number_of_factors
from gradlab.estimator import AfterLinear, Cost, Estimator, Traits
from gradlab.flips import by_factor, index_of, probabilities, values_of
from gradlab.samplers import quick_sample
from gradlab.surrogate import attach, is_transformed, zero

__all__ = ["AdaptiveLocalExpectation", "TaylorLocalExpectation"]

TABLES = ("count", "total", "square")
DEFENSIVE = 0.1
"""The share of the evaluated flips that is spread evenly, so that none has a vanishing probability."""


class Subsample(NamedTuple):
    """The samples, and where the systematic sample of their flips starts."""

    z: Tensor  # [S, *B, *E]
    start: Tensor  # [S, *B], uniform in [0, 1)


class Flips(NamedTuple):
    """The d (K - 1) flips of a sample, turn by turn: the values after the one that the factor has, and around."""

    parts: Tensor  # the sample by factor, [S, *B, d, *F]
    value: Tensor  # the value that each factor has, [S, *B, d]
    others: Tensor  # the value that each flip gives, [S, *B, d, K - 1]
    pi: Tensor  # its probability, with its graph, [S, *B, d, K - 1]


class Chosen(NamedTuple):
    """The flips that are evaluated, ``[S, *B, M]`` each."""

    place: Tensor  # in [d, K - 1] flattened
    factor: Tensor
    old: Tensor  # the value that the factor has
    new: Tensor  # the value that the flip gives


class Guess(NamedTuple):
    """What is known of the flips before any is evaluated, ``[S, *B, d, K - 1]`` each, or a number for all."""

    gain: Tensor | float  # a guess of f(flip) - f(z)
    error: Tensor | float  # its likely error, up to a factor


NOTHING = Guess(0.0, 1.0)


class _Subsampled(Estimator):
    """Guesses every flip, and evaluates M of them to correct the guesses."""

    traits = Traits(
        serves="Bernoulli, OneHotCategorical, binomial: finite support and values of which f has a slope",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S (1 + M)",
        second_order=False,
        transforms=True,
        reference="Titsias and Lázaro-Gredilla (2015), https://arxiv.org/abs/1503.01494",
    )

    def __init__(self, num_samples: int = 1, flips: int = 1) -> None:
        super().__init__(num_samples)
        if isinstance(flips, bool) or not hasattr(flips, "__index__") or flips < 1:
            raise ValueError(
                f"{type(self).__name__}: found flips={flips!r}, expected a positive int: without a flip that is "
                "evaluated, the guesses are not corrected and the gradient is biased."
            )
        self.flips = int(flips)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_finite_support(q) and isinstance(factor(q), Bernoulli | OneHotCategorical | Binomial)

    def evaluations(self, q: Distribution) -> int:
        return self.num_samples * (1 + min(self.flips, number_of_factors(q) * (len(values_of(q)) - 1)))

    def draw(self, q: Distribution) -> Subsample:
        z = quick_sample(q, torch.Size([self.num_samples]))
        batch = z.shape[: z.ndim - len(q.event_shape)]
        return Subsample(z, torch.rand(batch, dtype=torch.float64, device=z.device))

    def estimate(self, q: Distribution, f: Cost, noise: Subsample, context: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return f(noise.z).mean(0)
        here = flips_of(q, noise.z)
        z, before = noise.z, None
        if isinstance(f, AfterLinear) and not self._follows(f):
            before = f.before(z)
        guess = self._guess(q, f, here, before)
        chance = inclusion(here.pi.detach(), guess.error, self.flips)  # [S, *B, d, K - 1]
        place, weight = systematic(chance, noise.start, self.flips)  # [S, *B, M] each
        chosen = choose(here, place)
        if self._follows(f):
            left = _put(torch.ones_like(chance), place, -weight)  # 1 - I / rho, of mean zero
            z = z + zero(_total_move(q, here, here.pi * left)).reshape(z.shape)
            before = f.before(z) if isinstance(f, AfterLinear) else None
        cost = f(z) if before is None else f.g(before)  # [S, *B]
        gain = cost_of_flips(q, f, here, before, chosen) - cost.detach()[..., None]  # [S, *B, M]
        self._watch(q, cost, z, here, chosen, gain)
        known = guess.gain if isinstance(guess.gain, Tensor) else torch.full_like(chance, guess.gain)
        table = _put(known, place, weight * (gain - known.flatten(-2).gather(-1, place)))
        return attach(cost, here.pi, table).mean(0)

    @abstractmethod
    def _guess(self, q: Distribution, f: Cost, here: Flips, before: Tensor | None) -> Guess:
        """Return the guess, beyond the slope of f if that is followed."""

    def _follows(self, f: Cost) -> bool:
        """Whether the slope of f at the samples is a part of the guess, by backpropagation through f."""
        return True

    def _watch(self, q: Distribution, cost: Tensor, z: Tensor, here: Flips, chosen: Chosen, gain: Tensor) -> None:
        """See which flips were evaluated."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, flips={self.flips}"


class TaylorLocalExpectation(_Subsampled):
    r"""The local expectation gradient, each flip guessed by a Taylor polynomial around the sample, M of them evaluated.

    .. math:: t_{jk} = f'(z)^\top\delta, \qquad\text{or}\qquad
              t_{jk} = \sum_p \gamma_p'(h_p)\,\Delta_p + \tfrac12\gamma_p''(h_p)\,\Delta_p^2,
              \qquad \delta = k - z_j,\quad \Delta = W_j\delta

    The second order needs ``f = AfterLinear(linear, g, separable=True)``, a cost
    :math:`f(z) = \sum_p\gamma_p(h_p)` with :math:`h = Wz + b`, and serves all flips at once with two products of
    matrices. Any other f gets the first order, at the price of the backward pass through f that trains f anyway.

    Unbiased: given z, :math:`E[I/\rho] = 1` for the flips that are evaluated, so that t cancels whatever it is. With
    M = d(K - 1) it is :class:`LocalExpectation`, sample by sample; for an f that is quadratic in each :math:`h_p` (to
    first order: linear in z) too, with any M.

    Args:
        num_samples: S.
        flips: M, how many flips of a sample are evaluated; to second order, one of 200 will do.

    Reference:
        `Local Expectation Gradients for Black Box Variational Inference <https://arxiv.org/abs/1503.01494>`_, Titsias
        and Lázaro-Gredilla, 2015, with the control variate of
        `MuProp <https://arxiv.org/abs/1511.05176>`_, Gu, Levine, Sutskever and Mnih, 2016, at the sample.

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> TaylorLocalExpectation()(q, lambda z: (3 * z).sum(-1)).backward()
    >>> p = logits.sigmoid()
    >>> torch.allclose(logits.grad, 3 * p * (1 - p))
    True
    """

    def _follows(self, f: Cost) -> bool:
        return not (isinstance(f, AfterLinear) and f.separable)

    def _guess(self, q: Distribution, f: Cost, here: Flips, before: Tensor | None) -> Guess:
        if not isinstance(f, AfterLinear) or before is None:
            return NOTHING
        with torch.no_grad():
            first, second = second_order(q, f, here, before)
            return Guess(first + second, second.abs())


class AdaptiveLocalExpectation(_Subsampled):
    r"""The local expectation gradient, each flip guessed by the slope of f and a learned table, M of them evaluated.

    .. math:: t_{jk} = f'(z)^\top(k - z_j) + R_{j, z_j, k}, \qquad
              \rho_{jk} \propto \pi_{jk}(1 - \pi_{jk})\,\sigma_{j, z_j, k}
              \quad\text{(and a tenth of the flips evenly)}

    R and :math:`\sigma` are the mean and the standard deviation of what earlier flips of the same factor j, between
    the same two values, changed beyond the slope of f. The ``backward()`` that trains q adds the M new flips to the
    table, in training mode only; no derivative of f is taken twice.

    Unbiased at every step of learning: the table is one of earlier steps, so that given z and the table
    :math:`E[I/\rho] = 1`, and t cancels. For a linear f it is :class:`LocalExpectation`, sample by sample. An f without
    derivative by z has slope zero, and its table stays empty. ``state_dict()`` holds the table. Every rank of a DDP
    model stays unbiased; with DDP's default ``broadcast_buffers=True`` all use the table of rank 0, with False each
    keeps its own.

    One module serves one q: its table has the factors and values of the first that it is trained with.

    Args:
        num_samples: S.
        flips: M, how many flips of a sample are evaluated.
        decay: by which the weight of earlier steps shrinks at each step, in (0, 1).

    Reference:
        `Local Expectation Gradients for Black Box Variational Inference <https://arxiv.org/abs/1503.01494>`_, Titsias
        and Lázaro-Gredilla, 2015; the allocation is that of `On the Two Different Aspects of the Representative Method
        <https://doi.org/10.2307/2342192>`_, Neyman, 1934.

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> estimator = AdaptiveLocalExpectation(flips=1)
    >>> estimator(q, lambda z: (3 * z).sum(-1)).backward()
    >>> p = logits.sigmoid()
    >>> torch.allclose(logits.grad, 3 * p * (1 - p))
    True
    >>> estimator.count.sum()  # one flip is in the table
    tensor(1.)
    """

    count: Tensor  # [d, K, K - 1]: of the flips of a factor from one value to the values after it, and around
    total: Tensor  # [d, K, K - 1]: what they changed beyond the slope of f
    square: Tensor  # [d, K, K - 1]: the same, squared

    def __init__(self, num_samples: int = 1, flips: int = 2, decay: float = 0.996) -> None:
        super().__init__(num_samples, flips)
        if not 0 < decay < 1:
            raise ValueError(f"AdaptiveLocalExpectation: found decay={decay}, expected a number in (0, 1).")
        self.decay = decay
        for name in TABLES:
            self.register_buffer(name, torch.zeros(0))

    def _guess(self, q: Distribution, f: Cost, here: Flips, before: Tensor | None) -> Guess:
        if not len(self.count):
            return NOTHING
        d, size = here.others.shape[-2], here.others.shape[-1] + 1
        if self.count.shape != (d, size, size - 1):
            raise ValueError(
                f"AdaptiveLocalExpectation: found {d} factors of {size} values, expected {self.count.shape[0]} of "
                f"{self.count.shape[1]}, those of its table. Give each q an estimator of its own."
            )
        typical = self.square.sum() / self.count.sum().clamp_min(torch.finfo(self.count.dtype).tiny)
        many = self.count + 1  # one flip more, of the typical size and either sign
        mean = self.total / many
        error = ((self.square + typical) / many - mean.square()).clamp_min(0.0).sqrt()
        row = here.value + size * torch.arange(d, device=mean.device)  # [S, *B, d]
        return Guess(*(F.embedding(row, t.to(here.pi.dtype).flatten(0, 1)) for t in (mean, error)))

    def _watch(self, q: Distribution, cost: Tensor, z: Tensor, here: Flips, chosen: Chosen, gain: Tensor) -> None:
        if not self.training or not (z.requires_grad or is_transformed(z)):
            return
        if is_transformed(z) or torch.compiler.is_compiling():
            raise RuntimeError(
                "AdaptiveLocalExpectation: found training mode inside torch.func or torch.compile, expected eval mode: "
                "neither can update the table. Call estimator.eval() first, or compile f alone."
            )
        upstream: list[Tensor] = []

        def learn(gradient: Tensor) -> None:
            with torch.no_grad():
                along = _along(q, gradient, chosen) / upstream.pop()[..., None]  # of f, not of the loss
                self._learn(here, chosen, gain - along)

        cost.register_hook(lambda gradient: upstream.append(gradient.detach()))
        z.register_hook(learn)

    def _learn(self, here: Flips, chosen: Chosen, residual: Tensor) -> None:
        """Forget a little, and enter the residuals ``[S, *B, M]``; one that is not finite had no slope."""
        d, size = here.others.shape[-2], here.others.shape[-1] + 1
        if not len(self.count):
            for name in TABLES:
                wide = torch.promote_types(residual.dtype, torch.float32)
                setattr(self, name, residual.new_zeros(d, size, size - 1, dtype=wide))
        cell = (chosen.factor * size + chosen.old) * (size - 1) + chosen.place % (size - 1)
        known = residual.isfinite()
        r = torch.where(known, residual, 0.0).to(self.count)
        for table, entry in zip((self.count, self.total, self.square), (known.to(r), r, r * r), strict=True):
            table.mul_(self.decay).view(-1).index_add_(0, cell.flatten(), entry.flatten())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in TABLES:
            if (found := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.zeros_like(found, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"


# ------------------------------------------------------------------------------- which flips to evaluate


def inclusion(pi: Tensor, error: Tensor | float, flips: int) -> Tensor:
    r"""Return the probability of each flip to be evaluated, ``[S, *B, d, K - 1]``: M in all.

    Neyman's allocation, :math:`\rho\propto\pi(1-\pi)\,\sigma`, with a tenth spread evenly; what exceeds 1 goes to the
    others, in proportion to the room that they have. No flip has less than a tenth of an even share, so that the weight
    :math:`1/\rho` is bounded; with M = d(K - 1), every flip has 1.

    Args:
        pi: the probability of each flip's value, ``[S, *B, d, K - 1]``.
        error: :math:`\sigma`, a number or ``[S, *B, d, K - 1]``.
        flips: M.

    >>> inclusion(torch.tensor([[0.5], [0.1]]), 1.0, flips=1).flatten()
    tensor([0.7118, 0.2882])
    """
    number = pi.shape[-2] * pi.shape[-1]
    if flips >= number:
        return torch.ones_like(pi)
    wish = pi * (1 - pi) * error
    whole = wish.sum((-1, -2), keepdim=True).clamp_min(flips * torch.finfo(pi.dtype).tiny)
    chance = (wish * (flips * (1 - DEFENSIVE) / whole) + flips * DEFENSIVE / number).clamp_max(1.0)
    room = 1 - chance
    return chance + room * ((flips - chance.sum((-1, -2), keepdim=True)) / room.sum((-1, -2), keepdim=True))


def systematic(chance: Tensor, start: Tensor, flips: int) -> tuple[Tensor, Tensor]:
    """Return M different flips by their place in ``[d, K - 1]`` flattened, and the weights 1 / chance, ``[S, *B, M]``.

    Equidistant points, of which only the start is random, fall into the flips laid side by side: each contains one
    with the probability that is its length.

    Args:
        chance: ``[S, *B, d, K - 1]``, at most 1 each and M in all.
        start: ``[S, *B]``, in [0, 1).

    Reference:
        `On the Theory of Systematic Sampling, II <https://doi.org/10.1214/aoms/1177729988>`_, Madow, 1949.
    """
    flat = chance.flatten(-2)
    ends, number = flat.cumsum(-1, dtype=torch.float64), min(flips, flat.shape[-1])
    points = (start[..., None] + torch.arange(number, device=flat.device)) * (ends[..., -1:] / number)
    chosen = torch.searchsorted(ends, points, right=True).clamp_max(flat.shape[-1] - 1)
    return chosen, 1 / flat.gather(-1, chosen)


def _put(table: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Return the table ``[S, *B, d, K - 1]`` with the values ``[S, *B, M]`` added at their places."""
    return table.flatten(-2).scatter_add(-1, place, values).reshape(table.shape)


# -------------------------------------------------------------------------------------- what flips change


def flips_of(q: Distribution, z: Tensor) -> Flips:
    """Return the flips of the samples ``[S, *B, *E]``."""
    p, index = factor(q), index_of(q, z)
    if isinstance(p, Bernoulli):
        away = torch.sigmoid((1 - 2 * z) * p.logits).reshape(*index.shape, 1)
        return Flips(by_factor(q, z), index, 1 - index[..., None], away)
    pi = probabilities(q)
    turn = torch.arange(pi.shape[-1], device=z.device)
    others = F.embedding(index, (turn[:, None] + turn[1:]) % len(turn))  # of few, not a remainder for each
    return Flips(by_factor(q, z), index, others, pi.expand(*index.shape, -1).gather(-1, others))


def _total_move(q: Distribution, here: Flips, weight: Tensor) -> Tensor:
    r"""Return :math:`\sum_k w_{jk}(k - z_j)`, the shape of ``here.parts``, for weights ``[S, *B, d, K - 1]``.

    A sample that moves by it, for w = pi c, has the derivative :math:`\partial z_j/\partial\pi_{jk} = c_{jk}(k - z_j)`:
    backpropagation through f then adds :math:`\sum_{jk}\nabla\pi_{jk}\,c_{jk}\,f'(z)^\top(k - z_j)`, the guesses of all
    flips, at no price of its own. (With c = 1 it is straight-through.)
    """
    parts, others = here.parts, here.others
    if isinstance(factor(q), OneHotCategorical):
        return torch.zeros_like(parts).scatter(-1, others, weight) - parts * weight.sum(-1, keepdim=True)
    return (weight * (values_of(q)[others] - parts[..., None])).sum(-1)


def choose(here: Flips, place: Tensor) -> Chosen:
    """Return the flips at these places."""
    turns = here.others.shape[-1]
    j = place.div(turns, rounding_mode="floor") if turns > 1 else place
    return Chosen(place, j, here.value.gather(-1, j), here.others.flatten(-2).gather(-1, place))


def _along(q: Distribution, slope: Tensor, chosen: Chosen) -> Tensor:
    """Return what the slope ``[S, *B, *E]`` makes of the chosen flips, ``[S, *B, M]``."""
    slope, (_, j, old, new) = by_factor(q, slope.detach()), chosen
    if isinstance(factor(q), OneHotCategorical):
        flat, size = slope.flatten(-2), slope.shape[-1]
        return flat.gather(-1, j * size + new) - flat.gather(-1, j * size + old)
    values = values_of(q).to(slope)
    return slope.gather(-1, j) * (values[new] - values[old])


def cost_of_flips(q: Distribution, f: Cost, here: Flips, before: Tensor | None, chosen: Chosen) -> Tensor:
    """Return the cost of the chosen flips ``[S, *B, M]``, without a graph.

    Args:
        q: says what a factor of z is.
        f: the cost.
        here: the flips of z.
        before: for an :class:`AfterLinear`, its first layer at z: the flips then update it.
        chosen: which.
    """
    with torch.no_grad():
        _, j, old, new = (x.movedim(-1, 0).contiguous() for x in chosen)  # [M, S, *B]
        if isinstance(f, AfterLinear) and before is not None:
            shifted = (before + _shift(q, f, j, old, new)).flatten(0, 1)  # [M S, *B, H]: one leading dim is fastest
            return f.g(shifted).reshape(j.shape).movedim(0, -1)
        values = values_of(q)
        flipped = j[..., None] == torch.arange(here.value.shape[-1], device=j.device)  # [M, S, *B, d]
        flipped = flipped.reshape(*flipped.shape, *(1 for _ in values.shape[1:]))
        points = torch.where(flipped, values[new].unsqueeze(j.ndim).to(here.parts), here.parts)
        points = points.reshape(-1, *j.shape[2:], *q.event_shape)
        return f(points).reshape(j.shape).movedim(0, -1)


def _shift(q: Distribution, f: AfterLinear, j: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return what the new value of a factor in place of the old one changes in the first layer, ``[M, S, *B, H]``."""
    rows = f.linear.weight.T
    if isinstance(factor(q), OneHotCategorical):
        size = len(rows) // number_of_factors(q)
        return rows[j * size + new] - rows[j * size + old]
    values = values_of(q)
    return rows[j] * (values[new] - values[old])[..., None].to(rows)


def second_order(q: Distribution, f: AfterLinear, here: Flips, before: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return both terms of the Taylor polynomial of each flip of a separable cost, ``[S, *B, d, K - 1]``.

    .. math:: \sum_p\gamma_p'(h_p)\,\Delta_p, \qquad \tfrac12\sum_p\gamma_p''(h_p)\,\Delta_p^2

    For factors of numbers, :math:`\Delta = W_j(k - z_j)`, these are two products of matrices; for one-hot factors
    the square has a mixed term :math:`W_{jk}W_{jz_j}` that costs one more for each factor.
    """
    slope, curvature = f.derivatives(before.detach())  # [S, *B, H]
    weight = f.linear.weight  # [H, d]
    if isinstance(factor(q), OneHotCategorical):
        return _second_order_of_one_hots(weight.T.unflatten(0, (number_of_factors(q), -1)), slope, curvature, here)
    first, second = (slope @ weight)[..., None], (curvature @ weight.square())[..., None] / 2  # [S, *B, d, 1]
    if isinstance(factor(q), Bernoulli):  # a step of 1, up or down
        return first * (1 - 2 * here.parts)[..., None], second
    step = values_of(q).to(slope)[here.others] - here.parts[..., None]  # [S, *B, d, K - 1]
    return step * first, step.square() * second


def _second_order_of_one_hots(rows: Tensor, slope: Tensor, curvature: Tensor, here: Flips) -> tuple[Tensor, Tensor]:
    """The same for rows ``[d, K, H]`` of weights."""
    index, others = here.value.flatten(0, -2), here.others.flatten(0, -3)  # [N, d] and [N, d, K - 1]
    slope, curvature = slope.flatten(0, -2), curvature.flatten(0, -2)  # [N, H]

    def beyond_own(x: Tensor) -> Tensor:
        x = x.reshape(*index.shape, -1)  # [N, d, K]
        return (x.gather(-1, others) - x.gather(-1, index[..., None])).reshape(here.others.shape)

    own = rows[torch.arange(len(rows), device=index.device)[:, None], index.T]  # [d, N, H]
    mixed = ((curvature * own) @ rows.mT).movedim(0, 1)  # [N, d, K]
    flat = rows.flatten(0, 1)
    square = (curvature @ (flat.square() / 2).T).reshape(mixed.shape)
    return beyond_own(slope @ flat.T), beyond_own(square - mixed)
