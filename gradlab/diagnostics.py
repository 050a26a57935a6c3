"""Measure estimators: bias with its z-score, variance, evaluations, time, and variance x time."""

from __future__ import annotations

import copy
import html
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from gradlab.distributions import has_finite_support, support_size
from gradlab.estimator import Cost, Estimator
from gradlab.exact import Enumerate

__all__ = ["Comparison", "Row", "compare", "replicate"]

WARM_UP = 50  # single gradients before an estimator is measured: enough for a moving average to arrive


def replicate(loss: Callable[[Any], Tensor], params: Any, replicates: int, chunk_size: int | None = None) -> Any:
    """Return ``replicates`` independent gradients of ``loss``, from one backward a chunk.

    Args:
        loss: ``params -> [R, *B]``, an estimator's result. Its parameters arrive with a leading dim R, and each
            slice must be a problem of its own: a gradlab estimator keeps batch elements apart.
        params: a Tensor, or a dict or tuple of Tensors.
        replicates: R.
        chunk_size: replicates a backward, to bound memory.

    Returns:
        The gradients, in the structure of ``params``, each ``[R, *shape]``, without a graph.

    >>> _ = torch.manual_seed(0)
    >>> grads = replicate(lambda p: (p * torch.randn(len(p))) ** 2, torch.tensor(1.0), replicates=1000)
    >>> grads.shape
    torch.Size([1000])
    """
    if replicates < 1:
        raise ValueError(f"replicate: found replicates={replicates}, expected a positive int.")
    leaves, spec = pytree.tree_flatten(params)
    chunks = []
    for start in range(0, replicates, size := chunk_size or replicates):
        count = min(size, replicates - start)
        copies = [p.detach().expand(count, *p.shape).clone().requires_grad_() for p in leaves]
        value = loss(pytree.tree_unflatten(copies, spec))
        chunks.append(torch.autograd.grad(value.sum(), copies, materialize_grads=True))
    return pytree.tree_unflatten([torch.cat(parts) for parts in zip(*chunks, strict=True)], spec)


@dataclass(frozen=True)
class Row:
    """What was measured for one estimator; bias, error and variance refer to the gradient of all parameters.

    Attributes:
        name: the estimator.
        mean: the mean gradient, one number a parameter.
        bias: Euclidean norm of mean minus exact (None without an exact gradient).
        error: the standard error that the norm would have if there were no bias.
        z: the largest abs(z) over the parameters.
        variance: summed over the parameters.
        evaluations: points at which f is evaluated for one gradient.
        microseconds: time for one gradient, forward and backward, amortised over the replicates of a chunk.
        cost: variance x time, the number to minimise.
    """

    name: str
    mean: list[float]
    bias: float | None
    error: float
    z: float | None
    variance: float
    evaluations: int
    microseconds: float
    cost: float


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: a table in text or HTML, a dict, or a plot."""

    rows: list[Row]
    replicates: int
    exact: list[float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return asdict(self)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: expected one of {[r.name for r in self.rows]}.")

    def __str__(self) -> str:
        cells = [_HEADER, *(_cells(r) for r in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        return "\n".join([f"{self.replicates} replicates", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line("td", _cells(r)) for r in self.rows)
        return (
            f"<table><caption>{self.replicates} replicates</caption><thead>{line('th', _HEADER)}</thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw variance against time, one point an estimator; return the axes. Needs matplotlib."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for row in self.rows:
            ax.loglog(row.microseconds, max(row.variance, 1e-32), "o", label=row.name)
        ax.set(xlabel="microseconds a gradient", ylabel="variance of the gradient")
        ax.legend()
        return ax


def compare(
    estimators: Mapping[str, Estimator],
    make_q: Callable[[Any], Distribution],
    f: Cost,
    params: Any,
    exact: Any = None,
    replicates: int = 10_000,
    chunk_size: int | None = None,
    context: Tensor | None = None,
) -> Comparison:
    """Measure estimators side by side on one problem.

    Each estimator is copied, and warmed up by a few single gradients so that a moving average has arrived. A learned
    baseline is measured as it is: train it first.

    Args:
        estimators: name to estimator.
        make_q: ``params -> q``, for parameters with any leading dims.
        f: the cost, ``z [*L, *B, *E] -> [*L, *B]``.
        params: a Tensor, or a dict or tuple of Tensors.
        exact: the exact gradient, in the structure of ``params``. By default it is computed by
            :class:`~gradlab.Enumerate` where the support is finite and small, and no bias is reported elsewhere.
        replicates: independent gradients per estimator, at least 2.
        chunk_size: replicates a backward, to bound memory.
        context: what learned baselines look at, ``[*B, *C]``.

    >>> from gradlab import LeaveOneOut, ScoreFunction
    >>> _ = torch.manual_seed(0)
    >>> table = compare(
    ...     {"REINFORCE": ScoreFunction(4), "RLOO": ScoreFunction(4, LeaveOneOut())},
    ...     lambda logits: torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1),
    ...     lambda z: (z.sum(-1) + 1) ** 2, torch.zeros(3), replicates=2000)
    >>> table["RLOO"].variance < table["REINFORCE"].variance, table["RLOO"].z < 4
    (True, True)
    """
    if replicates < 2:
        raise ValueError(f"compare: found replicates={replicates}, expected at least 2 to measure a variance.")
    exact = exact_gradient(make_q, f, params) if exact is None else exact
    target = None if exact is None else _flatten(_like(exact, params), 0)
    rows = [
        _measure(name, e, make_q, f, params, target, replicates, chunk_size, context) for name, e in estimators.items()
    ]
    return Comparison(rows, replicates, None if target is None else target.tolist())


def exact_gradient(make_q: Callable[[Any], Distribution], f: Cost, params: Any, limit: int = 2**12) -> Any:
    """Return the gradient by enumeration, or None where the support is not finite or has over ``limit`` values."""
    q = make_q(params)
    if not has_finite_support(q) or support_size(q) > limit:
        return None
    return pytree.tree_map(lambda g: g[0], replicate(lambda p: Enumerate()(make_q(p), f), params, 1))


def _measure(
    name: str,
    estimator: Estimator,
    make_q: Callable[[Any], Distribution],
    f: Cost,
    params: Any,
    exact: Tensor | None,
    replicates: int,
    chunk_size: int | None,
    context: Tensor | None,
) -> Row:
    def loss(p: Any) -> Tensor:
        copies = len(pytree.tree_leaves(p)[0])
        return estimator(make_q(p), f, None if context is None else context.expand(copies, *context.shape))

    estimator = copy.deepcopy(estimator)  # its moving averages move; the caller's stay
    for _ in range(WARM_UP):
        replicate(loss, params, 1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    grads = _flatten(replicate(loss, params, replicates, chunk_size), 1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    microseconds = 1e6 * (time.perf_counter() - start) / replicates
    mean, variance = grads.mean(0), grads.var(0)
    error = (variance / replicates).sqrt()
    bias = z = None
    if exact is not None:
        gap = (mean - exact.to(mean)).abs()
        rounding = 1e3 * torch.finfo(gap.dtype).eps * (1 + mean.abs())
        bias = gap.norm().item()
        z = torch.where(gap <= rounding, 0.0, gap / error).max().item()  # NaN stays NaN
    total = variance.sum().item()
    return Row(
        name=name,
        mean=mean.tolist(),
        bias=bias,
        error=error.norm().item(),
        z=z,
        variance=total,
        evaluations=estimator.evaluations(make_q(pytree.tree_map(lambda p: p.detach().requires_grad_(), params))),
        microseconds=microseconds,
        cost=total * microseconds,
    )


def _like(exact: Any, params: Any) -> Any:
    """Return the exact gradient in the order and the shapes of ``params``."""
    if isinstance(params, Mapping):
        return {k: torch.as_tensor(exact[k]).expand(p.shape) for k, p in params.items()}
    return pytree.tree_map(lambda p, e: torch.as_tensor(e).expand(p.shape), params, exact)


_HEADER = ["estimator", "bias", "+-", "max|z|", "variance", "f evals", "us/gradient", "variance x us"]


def _cells(row: Row) -> list[str]:
    return [row.name, *(_number(getattr(row, f.name)) for f in fields(Row)[2:])]


def _number(x: float | int | None) -> str:
    if x is None:
        return "-"
    if isinstance(x, int):
        return str(x)
    return f"{x:.3g}" if math.isfinite(x) else str(x)


def _flatten(tree: Any, batch_dims: int) -> Tensor:
    return torch.cat(
        [t.flatten(batch_dims) if t.ndim > batch_dims else t[..., None] for t in pytree.tree_leaves(tree)], -1
    )
