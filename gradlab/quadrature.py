"""Integrate in one dimension: deterministic, and so the oracle of the continuous problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, VonMises

from gradlab.distributions import ends, has_icdf, has_log_prob, is_discrete, quantile, tensors
from gradlab.estimator import Cost, Estimator, Traits, describe
from gradlab.surrogate import is_transformed

__all__ = ["Quadrature"]


class Quadrature(Estimator):
    r"""The expectation of a one-dimensional continuous q by deterministic quadrature.

    .. math:: E_q[f] = \int f(z)\,q_\theta(z)\,dz \approx \sum_i w_i\,f(z_i)\,q_\theta(z_i)

    The double-exponential map :math:`z(t)` carries the support to a line (it absorbs integrable
    singularities at the ends and heavy tails), where composite 16-point Gauss-Legendre rules integrate. The gradient
    is that of the density, so f need not be differentiable; where the support itself moves with :math:`\theta`, so
    do the nodes, and then f must be.

    Args:
        breakpoints: points where f is not smooth (kinks, steps); the panels are cut there.
        panels: number of Gauss-Legendre panels.

    Raises:
        ValueError: the nodes do not find all of q's mass.

    Reference:
        `Double exponential formulas for numerical integration <https://doi.org/10.2977/prims/1195192451>`_,
        Takahasi and Mori, 1974.

    >>> loc = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    >>> Quadrature(breakpoints=[0.0])(torch.distributions.Normal(loc, 1.3), torch.relu).backward()
    >>> round(loc.grad.item(), 10)  # the normal cdf at 0.7 / 1.3
    0.7048707743
    """

    traits = Traits(
        serves="one-dimensional continuous distributions with a log_prob",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="16 panels",
        second_order=True,
        transforms=False,
        reference="Takahasi and Mori (1974), https://doi.org/10.2977/prims/1195192451",
    )

    def __init__(self, breakpoints: Sequence[float] = (), panels: int = 128) -> None:
        super().__init__()
        self.breakpoints, self.panels = tuple(float(b) for b in breakpoints), panels

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return not q.event_shape and has_log_prob(q) and not is_discrete(q)

    def evaluations(self, q: Distribution) -> int:
        return len(self.draw(q).z)

    def draw(self, q: Distribution) -> Nodes:
        """Return the nodes and weights, ``[N, *B]``; no randomness."""
        line, like = double_exponential(q), next(tensors(q))
        cuts = [t for b in self.breakpoints for t in line.inverse(like.new_tensor(b)).flatten().tolist()]
        t, w = (
            torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(-1, *(1 for _ in q.batch_shape))
            for x in gauss_legendre(line.reach, self.panels, cuts)
        )
        z, slope = line.forward(t)
        return Nodes(*torch.broadcast_tensors(z, slope * w))

    def estimate(self, q: Distribution, f: Cost, noise: Nodes, context: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            density = q.log_prob(noise.z).exp()
            keep = torch.isfinite(density) & (density > 0)  # the far tails under- or overflow: they weigh nothing
            middle = noise.z.gather(0, density.nan_to_num(0.0, 0.0, 0.0).argmax(0, keepdim=True))
            check_mass(torch.where(keep, noise.weight * density, 0.0).sum(0), q)
        z = torch.where(keep, noise.z, middle)
        return torch.where(keep, noise.weight * q.log_prob(z).exp() * f(z), 0.0).sum(0)

    def extra_repr(self) -> str:
        return f"breakpoints={self.breakpoints}, panels={self.panels}"


def check_mass(mass: Tensor, q: Distribution) -> None:
    """Raise unless the nodes see the whole of q."""
    if not is_transformed(mass) and bool(((mass - 1).abs() > 1e-3).any()):
        raise ValueError(
            f"Quadrature: found a total mass between {mass.min().item():.4g} and {mass.max().item():.4g} for "
            f"{describe(q)}, expected 1. Its support or its scale is not what torch says, or it needs more panels."
        )


class Nodes(NamedTuple):
    z: Tensor  # [N, *B]
    weight: Tensor  # [N, *B]


class Line(NamedTuple):
    """A change of variable from t in (-reach, reach) onto the support, written with its bounds' graph."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]  # t -> z, dz/dt
    inverse: Callable[[Tensor], Tensor]  # z -> t
    reach: float


def double_exponential(q: Distribution) -> Line:
    """Return the double-exponential map of q's support: an interval, a half-line or the line."""
    low, high = bounds(q)
    if low is not None and high is not None:
        return _interval(low, high)
    middle, spread = location_scale(q)
    if low is not None:
        return _half_line(low, middle, 1)
    return _line(middle, spread) if high is None else _half_line(high, middle, -1)


def _interval(low: Tensor, high: Tensor) -> Line:
    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(math.pi * t.sinh())
        return low + (high - low) * s, (high - low) * math.pi * t.cosh() * s * torch.sigmoid(-math.pi * t.sinh())

    return Line(forward, lambda z: (torch.logit((z - low) / (high - low)) / math.pi).asinh(), 5.0)


def _half_line(end: Tensor, middle: Tensor, sign: int) -> Line:
    scale = (middle - end.detach()).abs().clamp_min(torch.finfo(end.dtype).tiny)

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        z = scale * (math.pi / 2 * t.sinh()).exp()
        return end + sign * z, z * math.pi / 2 * t.cosh()

    return Line(forward, lambda z: ((sign * (z - end) / scale).log() * 2 / math.pi).asinh(), 6.0)


def _line(middle: Tensor, spread: Tensor) -> Line:
    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        x = math.pi / 2 * t.sinh()
        return middle + spread * x.sinh(), spread * x.cosh() * math.pi / 2 * t.cosh()

    return Line(forward, lambda z: (((z - middle) / spread).asinh() * 2 / math.pi).asinh(), 4.5)


def bounds(q: Distribution) -> tuple[Tensor | None, Tensor | None]:
    """Return the finite ends of the support, with their graph; None where it has none."""
    if isinstance(q, VonMises):  # torch calls its support the whole line; one turn is enough
        return q.loc.detach() - math.pi, q.loc.detach() + math.pi
    like = next(tensors(q))
    low, high = (None if e is None or bool(e.isinf().all()) else e.to(like) for e in ends(q))
    return low, high


def location_scale(q: Distribution) -> tuple[Tensor, Tensor]:
    """Return a rough middle and spread of q, detached: they place the nodes and change no result."""
    with torch.no_grad():
        if has_icdf(q):
            like = next(tensors(q))
            quarter, half, rest = (quantile(q, torch.full_like(like, u)) for u in (0.25, 0.5, 0.75))
            return half, rest - quarter
        if hasattr(q, "loc"):
            return q.loc, q.scale
        middle, spread = q.mean, q.stddev
        return torch.where(middle.isfinite(), middle, 1.0), torch.where(spread.isfinite(), spread, 1.0)


def gauss_legendre(reach: float, panels: int, cuts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of composite 16-point rules on (-reach, reach), cut at the given points."""
    edges = np.unique(np.concatenate([np.linspace(-reach, reach, panels + 1), [c for c in cuts if abs(c) < reach]]))
    x, w = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    return ((edges[:-1, None] + half) + half * x).ravel(), (half * w).ravel()
