"""Derivatives of a cost along a line, of any order: reverse mode up to two, Taylor arithmetic beyond."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradlab.surrogate import is_transformed

__all__ = ["Taylor", "derivatives"]

NESTED = 2
"""Up to this order, reverse mode is used."""


def derivatives(f: Callable[[Any], Any], z: Tensor, direction: Tensor, order: int, taylor: bool = False) -> list[Any]:
    r"""Return :math:`\partial_t^n f(z + t\,v)` at t = 0 for n = 0, ..., order.

    Args:
        f: a function of a tensor, to a tensor.
        z: where.
        direction: v, of the shape of z.
        taylor: whether to use Taylor arithmetic at any order; it keeps the graph of f's parameters.
        order: the highest derivative. Above 2, f must consist of the operations that :class:`Taylor` knows.

    Raises:
        TypeError: f uses an operation without a Taylor rule.

    >>> x = torch.tensor(0.0)
    >>> [d.item() for d in derivatives(torch.exp, x, torch.tensor(2.0), 3)]
    [1.0, 2.0, 4.0, 8.0]
    """
    if taylor or order > NESTED:
        value = f(Taylor([z, direction, *(torch.zeros_like(z) for _ in range(order - 1))]))
        terms = value.terms if isinstance(value, Taylor) else [value, *(torch.zeros_like(value) for _ in range(order))]
        return [float(math.factorial(n)) * c for n, c in enumerate(terms)]
    return _nested(f, z, direction, order)


def _nested(f: Callable[[Any], Any], z: Tensor, direction: Tensor, order: int) -> list[Tensor]:
    """Derivatives by reverse mode, which serves every operation of torch. A point's cost must depend on it alone."""
    if order == 0:
        return [f(z)]
    if is_transformed(z):  # autograd cannot look inside torch.func

        def lower(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            found = _nested(f, x, direction, order - 1)
            return found[-1], tuple(found)

        last, pullback, known = torch.func.vjp(lower, z, has_aux=True)  # type: ignore[misc]
        return [*known, _along(pullback(torch.ones_like(last))[0], direction, last)]
    with torch.enable_grad():
        x = z.detach().requires_grad_()
        found = [f(x)]
        for n in range(order):
            if not found[-1].requires_grad:  # constant
                found.append(torch.zeros_like(found[0]))
                continue
            (slope,) = torch.autograd.grad(found[-1].sum(), x, create_graph=n < order - 1, materialize_grads=True)
            found.append(_along(slope, direction, found[0]))
    return [d.detach() for d in found]


def _along(slope: Tensor, direction: Tensor, cost: Tensor) -> Tensor:
    dims = tuple(range(cost.ndim, slope.ndim))
    return (slope * direction).sum(dims) if dims else slope * direction


class Taylor:
    r"""A truncated power series :math:`\sum_n c_n t^n`, on which torch's functions work.

    Args:
        terms: the coefficients :math:`c_0, \dots, c_N`, tensors of one shape.

    >>> t = Taylor([torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0)])
    >>> [c.item() for c in torch.sigmoid(t).terms]
    [0.5, 0.25, 0.0, -0.02083333395421505]
    """

    def __init__(self, terms: Iterable[Tensor]) -> None:
        self.terms = list(terms)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__
        if name == "__get__":  # a property: shape, dtype, device, ndim, mT, ...
            return getattr(args[0], func.__self__.__name__)
        rule = RULES.get(name.rstrip("_") if not name.startswith("__") else name)
        if rule is None:
            raise TypeError(
                f"found {name} in a cost whose derivatives of order above {NESTED} are wanted, expected operations "
                f"with a Taylor rule ({', '.join(sorted(n for n in RULES if not n.startswith('_')))}). Write the cost "
                "with those, or use form='exact', which needs two derivatives at most."
            )
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(self.terms[0], name)
        if not callable(attribute):
            return attribute if name in FACTS else Taylor(getattr(c, name) for c in self)
        if name in PLAIN:
            return attribute
        func = getattr(Tensor, name)
        return lambda *args, **kwargs: Taylor.__torch_function__(func, (), (self, *args), kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms[0])

    def __getitem__(self, index: Any) -> Taylor:
        return Taylor(c[index] for c in self.terms)

    def __add__(self, other: Any) -> Taylor:
        a, b = _both(self, other)
        return Taylor(x + y for x, y in zip(a, b, strict=True))

    __radd__ = __add__

    def __neg__(self) -> Taylor:
        return Taylor(-c for c in self)

    def __sub__(self, other: Any) -> Taylor:
        return self + -other

    def __rsub__(self, other: Any) -> Taylor:
        return -self + other

    def __mul__(self, other: Any) -> Taylor:
        return _product(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Taylor:
        return _divide(self, other)

    def __rtruediv__(self, other: Any) -> Taylor:
        return _divide(other, self)

    def __matmul__(self, other: Any) -> Taylor:
        return _product(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Taylor:
        return _product(torch.matmul, other, self)

    def __pow__(self, p: Any) -> Taylor:
        return _power(self, p)

    def __rpow__(self, base: Any) -> Taylor:
        return _power(base, self)

    def __gt__(self, other: Any) -> Tensor:
        return self.terms[0] > _value(other)

    def __lt__(self, other: Any) -> Tensor:
        return self.terms[0] < _value(other)

    def __ge__(self, other: Any) -> Tensor:
        return self.terms[0] >= _value(other)

    def __le__(self, other: Any) -> Tensor:
        return self.terms[0] <= _value(other)

    def __eq__(self, other: Any) -> Tensor:  # type: ignore[override]
        return self.terms[0] == _value(other)

    __hash__ = None  # type: ignore[assignment]


KINKED = {"relu", "relu_", "leaky_relu", "leaky_relu_", "rrelu", "prelu", "relu6", "hardtanh", "threshold", "abs",
    "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "max", "min", "amax", "amin", "l1_loss",
    "hardsigmoid", "hardswish", "softshrink", "hardshrink", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool2d", "sort", "topk"}  # fmt: skip


class Kinks(TorchFunctionMode):
    """Notices operations with a kink, where a second derivative has a point mass that autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        self.found = name if name in KINKED else self.found
        return func(*args, **(kwargs or {}))


def _value(x: Any) -> Any:
    return x.terms[0] if isinstance(x, Taylor) else x


def _constant(x: Any, like: Taylor) -> Taylor:
    x = torch.as_tensor(x, device=like.terms[0].device)
    if not x.is_floating_point() and not x.is_complex():
        x = x.to(like.terms[0].dtype)
    return Taylor([x, *(torch.zeros_like(x) for _ in like.terms[1:])])


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _both(a: Any, b: Any) -> tuple[Taylor, Taylor]:
    like = a if isinstance(a, Taylor) else b
    return (a if isinstance(a, Taylor) else _constant(a, like)), (b if isinstance(b, Taylor) else _constant(b, like))


def _product(times: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Taylor:
    """Return a bilinear function of two series: the Cauchy product."""
    if not isinstance(b, Taylor):
        return Taylor(times(c, b) for c in a)
    if not isinstance(a, Taylor):
        return Taylor(times(a, c) for c in b)
    return Taylor(_sum(times(a.terms[k], b.terms[n - k]) for k in range(n + 1)) for n in range(len(a.terms)))


def _divide(a: Any, b: Any) -> Taylor:
    if not isinstance(b, Taylor):
        return Taylor(c / b for c in a)
    a, b = _both(a, b)
    y: list[Tensor] = []
    for n, c in enumerate(a):
        y.append((c - sum(b.terms[k] * y[n - k] for k in range(1, n + 1))) / b.terms[0])
    return Taylor(y)


def _power(x: Any, p: Any) -> Taylor:
    if not isinstance(x, Taylor) or isinstance(p, Taylor):
        x, p = _both(x, p)
        return _exp(p * _log(x))
    if not isinstance(p, Tensor) and float(p).is_integer() and 0 <= p <= 16:
        y = _constant(torch.ones_like(x.terms[0]), x)
        for _ in range(int(p)):
            y = y * x
        return y
    c = x.terms
    y = [c[0] ** p]
    for n in range(1, len(c)):
        y.append(_sum((k * p - (n - k)) * c[k] * y[n - k] for k in range(1, n + 1)) / (n * c[0]))
    return Taylor(y)


def _integrate(x: Taylor, start: Tensor, slope: Callable[[list[Tensor]], Tensor]) -> Taylor:
    r"""Return y with :math:`y' = g\,x'`; ``slope(y)`` gives :math:`g_n`, from :math:`y_0, \dots, y_n`."""
    y, g = [start], [slope([start])]
    for n in range(1, len(x.terms)):
        y.append(_sum(k * x.terms[k] * g[n - k] for k in range(1, n + 1)) / n)
        g.append(slope(y))
    return Taylor(y)


def _square(y: list[Tensor]) -> Tensor:
    """Return the last coefficient of the square of a series."""
    return sum((y[k] * y[-1 - k] for k in range(len(y))), torch.zeros_like(y[0]))


def _of(known: Taylor) -> Callable[[list[Tensor]], Tensor]:
    return lambda y: known.terms[len(y) - 1]


def _exp(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].exp(), lambda y: y[-1])


def _log(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].log(), _of(1 / x))


def _log1p(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].log1p(), _of(1 / (1 + x)))


def _sigmoid(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].sigmoid(), lambda y: y[-1] - _square(y))


def _tanh(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].tanh(), lambda y: (1 if len(y) == 1 else 0) - _square(y))


def _softplus(x: Taylor, beta: float = 1.0, threshold: float = 20.0) -> Taylor:
    return _integrate(beta * x, F.softplus(beta * x.terms[0]), _of(_sigmoid(beta * x))) / beta


def _logsigmoid(x: Taylor) -> Taylor:
    return _integrate(x, F.logsigmoid(x.terms[0]), _of(_sigmoid(-x)))


def _sin_cos(x: Taylor) -> tuple[Taylor, Taylor]:
    sin, cos = [x.terms[0].sin()], [x.terms[0].cos()]
    for n in range(1, len(x.terms)):
        pairs = [(k * x.terms[k] / n, n - k) for k in range(1, n + 1)]
        sin.append(_sum(a * cos[m] for a, m in pairs))
        cos.append(-_sum(a * sin[m] for a, m in pairs))
    return Taylor(sin), Taylor(cos)


def _erf(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].erf(), _of(2 / math.sqrt(math.pi) * _exp(-x * x)))


def _atan(x: Taylor) -> Taylor:
    return _integrate(x, x.terms[0].atan(), _of(1 / (1 + x * x)))


def _times(x: Taylor, factor: Tensor) -> Taylor:
    return Taylor(factor.to(c.dtype) * c for c in x)


def _relu(x: Taylor, inplace: bool = False) -> Taylor:
    return _times(x, x.terms[0] > 0)


def _where(condition: Tensor, a: Any, b: Any) -> Taylor:
    a, b = _both(a, b)
    return Taylor(torch.where(condition, x, y) for x, y in zip(a, b, strict=True))


def _log_sum_exp(x: Taylor, dim: Any, keepdim: bool = False) -> Taylor:
    top = x.terms[0].amax(dim, keepdim=True)
    total = _log(_exp(x - top).sum(dim, keepdim=keepdim))
    return total + (top if keepdim else top.squeeze(dim))


def _softmax(x: Taylor, dim: int = -1, **_: Any) -> Taylor:
    return _exp(x - _log_sum_exp(x, dim, keepdim=True))


def _log_softmax(x: Taylor, dim: int = -1, **_: Any) -> Taylor:
    return x - _log_sum_exp(x, dim, keepdim=True)


def _linear_layer(x: Taylor, weight: Tensor, bias: Tensor | None = None) -> Taylor:
    y = Taylor(F.linear(c, weight) for c in x)
    return y if bias is None else y + bias


def _binary_cross_entropy(x: Any, y: Any, *unused: Any, reduction: str = "mean", **kwargs: Any) -> Taylor:
    if any(a is not None for a in (*unused, *kwargs.values())):
        raise TypeError("binary_cross_entropy_with_logits: found weights, expected none in a Taylor series.")
    loss = _softplus(x) - x * y
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _join(name: str) -> Callable[..., Taylor]:
    def rule(parts: Any, *args: Any, **kwargs: Any) -> Taylor:
        like = next(p for p in parts if isinstance(p, Taylor))
        series = [_both(p, like)[0] for p in parts]
        columns = zip(*(s.terms for s in series), strict=True)
        return Taylor(getattr(torch, name)(list(c), *args, **kwargs) for c in columns)

    return rule


def _termwise(name: str) -> Callable[..., Taylor]:
    def rule(x: Taylor, *args: Any, **kwargs: Any) -> Taylor:
        func = getattr(torch, name) if hasattr(torch, name) else getattr(Tensor, name)
        return Taylor(func(c, *args, **kwargs) for c in x)

    return rule


def _broadcast(*parts: Any) -> list[Any]:
    shape = torch.broadcast_shapes(*(p.shape for p in parts))
    return [p.expand(shape) for p in parts]


LINEAR = """sum mean reshape view flatten unflatten squeeze unsqueeze expand expand_as movedim transpose permute t flip
roll cumsum diff narrow select index_select gather contiguous clone to double float real imag conj"""
FACTS = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "names", "is_sparse"}
PLAIN = {"size", "dim", "numel", "is_floating_point", "is_complex", "stride", "get_device"}

RULES: dict[str, Callable[..., Any]] = {
    **{name: _termwise(name) for name in LINEAR.split()},
    "cat": _join("cat"),
    "stack": _join("stack"),
    "__getitem__": lambda x, i: x[i],
    "broadcast_tensors": _broadcast,
    "exp": _exp,
    "expm1": lambda x: _integrate(x, x.terms[0].expm1(), _of(_exp(x))),
    "log": _log,
    "log1p": _log1p,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "log_sigmoid": _logsigmoid,
    "silu": lambda x, inplace=False: x * _sigmoid(x),
    "gelu": lambda x, approximate="none": x * (1 + _erf(x / math.sqrt(2))) / 2,
    "sin": lambda x: _sin_cos(x)[0],
    "cos": lambda x: _sin_cos(x)[1],
    "erf": _erf,
    "atan": _atan,
    "square": lambda x: x * x,
    "sqrt": lambda x: _power(x, 0.5),
    "rsqrt": lambda x: _power(x, -0.5),
    "reciprocal": lambda x: 1 / x,
    "pow": _power,
    "neg": lambda x: -x,
    "relu": _relu,
    "abs": lambda x: _times(x, x.terms[0].sign()),
    "where": _where,
    "logsumexp": _log_sum_exp,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "linear": _linear_layer,
    "binary_cross_entropy_with_logits": _binary_cross_entropy,
    "add": lambda a, b, *, alpha=1: (_both(a, b)[0]) + alpha * b,
    "sub": lambda a, b, *, alpha=1: (_both(a, b)[0]) - alpha * b,
    "rsub": lambda a, b: -a + b,
    "mul": lambda a, b: _product(torch.mul, a, b),
    "multiply": lambda a, b: _product(torch.mul, a, b),
    "div": _divide,
    "true_divide": _divide,
    "matmul": lambda a, b: _product(torch.matmul, a, b),
    "mm": lambda a, b: _product(torch.mm, a, b),
    "mv": lambda a, b: _product(torch.mv, a, b),
    "dot": lambda a, b: _product(torch.dot, a, b),
    "einsum": lambda equation, *parts: _einsum(equation, *parts),
    "prod": lambda x, dim=None, keepdim=False: _prod(x, dim, keepdim),
    "detach": lambda x: x.terms[0].detach(),
    "zeros_like": lambda x, **kw: torch.zeros_like(x.terms[0], **kw),
    "ones_like": lambda x, **kw: torch.ones_like(x.terms[0], **kw),
}
"""What torch's functions do to a series, by name."""

for _compare in (operator.gt, operator.lt, operator.ge, operator.le, operator.eq):
    RULES[_compare.__name__] = lambda a, b, compare=_compare: compare(_value(a), _value(b))
    RULES[f"__{_compare.__name__}__"] = RULES[_compare.__name__]
for _name in ("add", "sub", "mul", "div", "true_divide", "pow", "matmul"):
    _operator = _name.replace("true_divide", "truediv")
    RULES[f"__{_operator}__"] = RULES[_name]
    RULES[f"__r{_operator}__"] = lambda a, b, rule=RULES[_name]: rule(b, a)


def _einsum(equation: str, *parts: Any) -> Taylor:
    if sum(isinstance(p, Taylor) for p in parts) != 1:
        raise TypeError("einsum: found several operands that depend on z, expected one; write it as a product.")
    i = next(i for i, p in enumerate(parts) if isinstance(p, Taylor))
    return Taylor(torch.einsum(equation, *parts[:i], c, *parts[i + 1 :]) for c in parts[i])


def _prod(x: Taylor, dim: int | None, keepdim: bool) -> Taylor:
    if dim is None:
        x, dim = x.flatten(), 0
    parts = [Taylor(c.select(dim, i) for c in x) for i in range(x.shape[dim])]
    y = parts[0]
    for p in parts[1:]:
        y = y * p
    return y.unsqueeze(dim) if keepdim else y
