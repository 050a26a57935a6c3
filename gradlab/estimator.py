r"""The contract: an estimator is a noise and a formula.

``estimator(q, f)`` takes a distribution ``q`` and a cost ``f``, and returns a tensor whose value is
the Monte Carlo estimate of :math:`E_q[f]` and whose gradient is the estimator's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from gradlab.distributions import tensors
from gradlab.surrogate import is_transformed

__all__ = ["AfterLinear", "Cost", "Estimator", "Sampler", "Traits"]

Cost = Callable[[Tensor], Tensor]
"""A cost to be minimised: ``z [*L, *B, *E] -> [*L, *B]`` for any leading dims ``*L``."""

Sampler = Callable[[Distribution, torch.Size], Tensor]
"""An ``rsample`` with a chosen backward: ``sampler(q, sample_shape) -> [*sample_shape, *B, *E]``."""


class AfterLinear:
    r"""A cost that begins with a linear layer, :math:`f(z) = g(W z + b)`: estimators that change one coordinate of z
    at a time then update Wz instead of computing it anew.

    The result is that of the same cost written as a plain function, in less time and memory.

    Args:
        linear: the layer, of the flattened event dims of z.
        g: maps ``[*L, *B, H] -> [*L, *B]``.
        separable: whether g is a sum of functions of one output each, :math:`g(h) = \sum_p\gamma_p(h_p)`, as the
            negative log likelihood of independent pixels is. It lets :class:`TaylorLocalExpectation` guess flips to
            second order; where it is not true, they are guessed badly, and the gradient stays unbiased.

    >>> f = AfterLinear(nn.Linear(3, 4), lambda h: h.relu().sum(-1))
    >>> f(torch.ones(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, linear: nn.Linear, g: Cost, separable: bool = False) -> None:
        check_linear(linear, "AfterLinear")
        self.linear, self.g, self.separable = linear, g, separable

    def __call__(self, z: Tensor) -> Tensor:
        return self.g(self.before(z))

    def before(self, z: Tensor) -> Tensor:
        """Return Wz + b, ``[*L, *B, H]``; the trailing dims of z that make up one input are flattened."""
        return apply_linear(self.linear, z)

    def with_tail(self, g: Cost) -> AfterLinear:
        """Return the same cost with another way to compute g."""
        same = copy.copy(self)
        same.g = g
        return same

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the derivatives of a separable g at h, without a graph, ``[*L, *B, H]``.

        .. math:: \gamma_p'(h_p), \qquad \gamma_p''(h_p)

        A subclass that knows them may override this.
        """

        def slope(h: Tensor) -> Tensor:
            return torch.func.grad(lambda h: self.g(h).sum())(h)

        def total(h: Tensor) -> tuple[Tensor, Tensor]:
            first = slope(h)
            return first.sum(), first

        with torch.no_grad():
            second, first = torch.func.grad(total, has_aux=True)(h)
        return first, second


def check_linear(linear: nn.Module, name: str) -> None:
    """Raise a TypeError unless the layer is a torch.nn.Linear."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: found a layer of type {type(linear).__name__}, expected a torch.nn.Linear.")


def apply_linear(linear: nn.Linear, z: Tensor) -> Tensor:
    """Return Wz + b, ``[*L, H]``, for z ``[*L, *E]`` whose trailing dims *E make up one input."""
    size, width = 1, linear.in_features
    for dims in range(1, z.ndim + 1):
        if (size := size * z.shape[-dims]) == width:
            return linear(z.flatten(-dims))
    raise ValueError(
        f"AfterLinear: found z of shape {tuple(z.shape)}, expected trailing event dims of {width} numbers in all, "
        "the in_features of its linear layer."
    )


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an estimator promises; the tables of the README and the book are generated from it.

    Attributes:
        serves: the distributions it can serve, in words.
        unbiased: whether the expected gradient is the exact one.
        needs_gradient: whether it uses df/dz.
        relaxes: whether it evaluates f off the support of q.
        evaluations: points at which f is evaluated for one problem, as a formula in S = ``num_samples``,
            K = size of the support.
        second_order: whether second derivatives are right (otherwise they raise).
        transforms: whether ``torch.func`` and ``torch.compile(fullgraph=True)`` work.
        reference: title, authors, year, link.
    """

    serves: str
    unbiased: bool
    needs_gradient: bool
    relaxes: bool
    evaluations: str
    second_order: bool
    transforms: bool
    reference: str


class Estimator(nn.Module, ABC):
    r"""A stochastic gradient estimator: a noise and a formula.

    Subclasses say how to :meth:`draw` the noise and how to :meth:`estimate` from it;
    calling the estimator checks the input and composes the two.

    Args:
        num_samples: S, the number of samples per problem.

    Shapes:
        ``q`` has batch dims ``*B`` (independent problems) and event dims ``*E`` (drawn jointly);
        ``f`` maps ``[*L, *B, *E]`` to ``[*L, *B]``; the result is ``[*B]``.
    """

    traits: ClassVar[Traits]

    def __init__(self, num_samples: int = 1) -> None:
        super().__init__()
        if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__") or num_samples < 1:
            raise ValueError(f"{type(self).__name__}: found num_samples={num_samples!r}, expected a positive int.")
        self.num_samples = int(num_samples)

    @classmethod
    @abstractmethod
    def supports(cls, q: Distribution) -> bool:
        """Whether this estimator can serve ``q``."""

    @abstractmethod
    def draw(self, q: Distribution) -> Any:
        """Return the noise: everything random that :meth:`estimate` needs."""

    @abstractmethod
    def estimate(self, q: Distribution, f: Cost, noise: Any, context: Tensor | None = None) -> Tensor:
        """Return the surrogate ``[*B]``, a pure function of its arguments. No input is checked here."""

    def evaluations(self, q: Distribution) -> int:
        """Return the number of points at which f is evaluated for one problem; it may depend on which parameters of
        q require a gradient.
        """
        return self.num_samples

    def forward(self, q: Distribution, f: Cost, context: Tensor | None = None) -> Tensor:
        """Return the estimate of :math:`E_q[f]`, ``[*B]``, that carries the estimator's gradient.

        Args:
            q: the distribution whose parameters need a gradient.
            f: the cost, to be minimised.
            context: what a learned baseline may look at (the input x, say), ``[*B, *C]``.

        Raises:
            TypeError: q is no Distribution, or one that this estimator cannot serve.
            ValueError: f returns a wrong shape or NaN, or nothing requires a gradient.
        """
        check_distribution(self, q)
        loss = self.estimate(q, checked(f, q), self.draw(q), context)
        check_result(self, loss, q)
        check_gradient(self, loss, q)
        return loss

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}"


def estimators(cls: type[Estimator] = Estimator) -> Iterator[type[Estimator]]:
    """Yield every estimator class that can be used as it is."""
    if not getattr(cls, "__abstractmethods__", None):
        yield cls
    for sub in cls.__subclasses__():
        yield from estimators(sub)


def describe(q: Distribution) -> str:
    """Name a distribution with its shapes, for an error message."""
    name = type(q).__name__
    inner = q
    while (inner := getattr(inner, "base_dist", None)) is not None:
        name += f"({type(inner).__name__})"
    return f"{name} with batch_shape {tuple(q.batch_shape)} and event_shape {tuple(q.event_shape)}"


def check_distribution(estimator: Estimator, q: Distribution) -> None:
    """Raise a TypeError unless ``estimator`` can serve ``q``."""
    name = type(estimator).__name__
    if not isinstance(q, Distribution):
        raise TypeError(f"{name}: found q of type {type(q).__name__}, expected a torch.distributions.Distribution.")
    if not estimator.supports(q):
        able = ", ".join(sorted(e.__name__ for e in estimators() if e.supports(q))) or "none in gradlab"
        raise TypeError(
            f"{name} cannot serve {describe(q)}. It serves {estimator.traits.serves}. Estimators that can: {able}."
        )


def check_result(estimator: Estimator, loss: Tensor, q: Distribution) -> None:
    """Raise when something that the user gave has broadcast."""
    if loss.shape != q.batch_shape:
        raise ValueError(
            f"{type(estimator).__name__}: found a result of shape {tuple(loss.shape)}, expected the batch shape "
            f"{tuple(q.batch_shape)} of q. Look for a control variate, a mean or a baseline that keeps the event dims."
        )


def check_gradient(estimator: Estimator, loss: Tensor, q: Distribution) -> None:
    """Raise a ValueError when a gradient is wanted and the loss carries none."""
    if not torch.is_grad_enabled() or loss.requires_grad or is_transformed(loss):
        return
    remedy = (
        "Make f differentiable in z (no rounding, comparison or .detach() of z), or use an estimator that needs no "
        "df/dz, such as ScoreFunction; and build"
        if estimator.traits.needs_gradient
        else "Build"
    )
    raise ValueError(
        f"{type(estimator).__name__}: found a result without gradient for {describe(q)}, expected one for a parameter "
        f"of q or of f. {remedy} q from tensors with requires_grad=True that are not detached. Call the estimator "
        "under torch.no_grad() if only the value is wanted."
    )


def checked(f: Cost, q: Distribution) -> Cost:
    """Return ``f`` with its shape and its values checked at every call; an :class:`AfterLinear` stays one."""
    if isinstance(f, AfterLinear):
        return f.with_tail(_checked(f.g, q, 1))
    return _checked(f, q, len(q.event_shape))


def _checked(f: Cost, q: Distribution, event_dims: int) -> Cost:
    def cost(z: Any) -> Any:
        value = f(z)
        if not isinstance(z, Tensor):  # a Taylor series of points that were checked
            return value
        check_shape(value, z, q, event_dims)
        value = value if value.is_floating_point() else value.to(next(tensors(q)).dtype)  # a count is a cost too
        if q._validate_args and not is_transformed(value) and not torch.compiler.is_compiling():
            check_finite(value)
        return value

    return cost


def check_shape(value: Tensor, z: Tensor, q: Distribution, event_dims: int) -> None:
    """Raise unless f mapped ``z [*L, *B, *E]`` to ``[*L, *B]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"f(z): found {type(value).__name__}, expected a Tensor of costs.")
    expected = z.shape[: z.ndim - event_dims]
    if value.shape == expected:
        return
    message = (
        f"f(z): found shape {tuple(value.shape)} for z of shape {tuple(z.shape)}, expected {tuple(expected)}: "
        f"f maps [*L, *B, *E] to [*L, *B] for any leading dims *L, and q is {describe(q)}. "
    )
    missing = len(expected) - value.ndim
    if 0 < missing <= len(q.batch_shape) and value.shape == expected[: value.ndim]:
        message += (
            f"If the last {missing} dim(s) of z belong to one problem, tell q so: "
            f"torch.distributions.Independent(q, {missing})."
        )
    elif missing < 0:
        message += "Sum f over the event dims of z, for example with .sum(-1)."
    else:
        message += "Reduce f over the event dims only, never over the leading or batch dims."
    raise ValueError(message)


def check_finite(value: Tensor) -> None:
    """Raise when a cost is NaN or infinite: a baseline would turn the second into the first."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(
            f"f(z): found NaN or infinity in {bad} of {value.numel()} costs, expected finite numbers. Look for log(0), "
            "0/0 or an overflow in f; a distribution built with validate_args=False skips this check."
        )


def value_and_slope(f: Cost, z: Tensor, at: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return f at all points, with its graph, and its derivative at those of the slice, without."""
    with torch.enable_grad():
        if is_transformed(z):  # autograd cannot look inside torch.func, whose vjp cannot serve a BatchNorm in f
            cost, pullback, *_ = torch.func.vjp(f, z)
            chosen = torch.zeros_like(cost)
            chosen[at] = 1.0
            return cost, pullback(chosen)[0][at].detach()
        cost, z = value_to_differentiate(f, z)
        (grad,) = torch.autograd.grad(cost[at].sum(), z, retain_graph=True, materialize_grads=True)
    return cost, grad[at]


def value_to_differentiate(f: Cost, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return f at all points, with its graph, and those points as leaves of it; raise if there is no derivative."""
    with torch.enable_grad():
        if not is_transformed(z):
            z = z.detach().requires_grad_()
        cost = f(z)
    if not (cost.requires_grad or is_transformed(z)):
        raise ValueError(
            "f(z): found a cost without derivative by z (a step, an argmax, a detach, or no z at all), expected a "
            "differentiable f. Use an estimator whose `traits.needs_gradient` is False (for example ScoreFunction)."
        )
    return cost, z
