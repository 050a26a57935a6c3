r"""The four primitives that hold every gradient trick of the package.

An estimator returns a *surrogate*: a tensor whose value is the Monte Carlo estimate of
:math:`E_q[f]` and whose gradient is the estimator's. No other module of gradlab detaches a
tensor in order to change a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["attach", "descend", "magic_box", "zero"]


def magic_box(log_prob: Tensor) -> Tensor:
    r"""Return :math:`\exp(\ell - \mathrm{sg}(\ell))`: one forward, :math:`\nabla\ell` backward.

    Multiplying a cost by ``magic_box(log_prob)`` makes the density follow its parameters, to
    any order of differentiation.

    Args:
        log_prob: log density :math:`\ell` of the sample, of any shape.

    Reference:
        `DiCE: The Infinitely Differentiable Monte-Carlo Estimator
        <https://arxiv.org/abs/1802.05098>`_, Foerster et al., 2018.

    >>> ell = torch.tensor(-1.3, requires_grad=True)
    >>> box = magic_box(ell)
    >>> box.item(), torch.autograd.grad(box, ell)[0].item()
    (1.0, 1.0)
    """
    return zero(log_prob).exp()


def zero(x: Tensor) -> Tensor:
    r"""Return :math:`x - \mathrm{sg}(x)`: zero forward, the gradient of ``x`` backward.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> zero(x * x).item(), torch.autograd.grad(zero(x * x), x)[0].item()
    (0.0, 6.0)
    """
    return x - x.detach()


def attach(value: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
    r"""Return ``value`` with a hand-written derivative for ``parameter``.

    The result equals ``value``, keeps the graph that ``value`` has, and adds
    :math:`\partial\,\text{value}/\partial\,\text{parameter} = \text{gradient}`.

    Args:
        value: ``[*B]``.
        parameter: a tensor that broadcasts to the shape of ``gradient``.
        gradient: ``[*B, *P]``; the dims ``P`` are those of one problem's parameter.

    Raises:
        RuntimeError: when the result is differentiated twice with respect to ``parameter``. A
            hand-written derivative carries no second one, and zero would be silently wrong.

    >>> a = torch.tensor(2.0, requires_grad=True)
    >>> z = attach(torch.tensor(5.0), a, torch.tensor(0.25))
    >>> z.item(), torch.autograd.grad(z, a)[0].item()
    (5.0, 0.25)
    """
    path = zero(first_order(parameter)) * gradient
    return value + path.sum(dim=tuple(range(value.ndim, path.ndim))) if path.ndim > value.ndim else value + path


def descend(loss: Tensor, parameters: Iterable[Tensor], through: Iterable[Tensor] | None = None) -> Tensor:
    r"""Return zeros whose backward *descends* ``loss``, for ``parameters`` and nothing else.

    For an upstream gradient :math:`g` (shape ``[*B]``) the parameters receive
    :math:`\sum_b |g_b|\,\partial\,\text{loss}_b/\partial\,\text{parameters}`: the size of the
    upstream gradient, not its sign. Adding ``descend(variance, ...)`` to a loss therefore reduces the
    variance whether the caller minimises the loss, maximises it, averages or sums it.

    Args:
        loss: ``[*B]``, one auxiliary loss per problem.
        parameters: the tensors to train.
        through: detached stand-ins that the loss was computed with, one a parameter, so that it can share a graph with
            a surrogate that must not reach the parameters.

    Raises:
        RuntimeError: when differentiated twice with respect to ``parameters``, or when ``torch.func`` asks for
            their gradient. (Inside ``torch.func`` with parameters outside, the result is plain zeros.)

    >>> c = torch.tensor(2.0, requires_grad=True)
    >>> (-3 * descend(c * c, [c])).backward()
    >>> c.grad.item()
    12.0
    """
    pairs = [(p, r) for p, r in zip(*_twice(parameters, through), strict=True) if p.requires_grad]
    leaves, stand_ins = [p for p, _ in pairs], [r for _, r in pairs]
    if any(map(is_transformed, leaves)):
        raise RuntimeError(
            "gradlab: found the parameters of a learned control variate inside torch.func, expected them outside. "
            "Train them with loss.backward(), or differentiate with respect to q's parameters only."
        )
    if not leaves or not torch.is_grad_enabled() or is_transformed(loss):
        return torch.zeros_like(loss)
    return _Descend.apply([loss, *stand_ins], *leaves)


def stand_in(parameter: Tensor) -> Tensor:
    """Return a detached leaf with the parameter's value, for :func:`descend` to train the parameter through."""
    return parameter.detach().requires_grad_(parameter.requires_grad)


def _twice(parameters: Iterable[Tensor], through: Iterable[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    leaves = list(parameters)
    return leaves, leaves if through is None else list(through)


def first_order(x: Tensor) -> Tensor:
    """Return ``x``; a second derivative taken through it raises instead of being wrong."""
    if not x.requires_grad or torch.compiler.is_compiling():  # compiled graphs refuse second derivatives themselves
        return x
    return _FirstOrder.apply(x)


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` lives inside a ``torch.func`` transform, where values cannot be looked at."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` lives inside a ``torch.func.vmap``."""
    while is_transformed(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient of x is wanted, also where ``torch.func`` transforms hide it."""
    while not x.requires_grad and is_transformed(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad + _Poison.apply(x) if torch.is_grad_enabled() else grad


_FirstOrder.forward.__signature__ = inspect.signature(_FirstOrder.forward)  # else torch looks it up at each call


class _Poison(torch.autograd.Function):
    """Zeros that depend on x: added to a gradient they change nothing, and their own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "gradlab: second derivative of an estimator whose gradient is hand-written. Found a double backward, "
            "expected a single one. Use an estimator whose `traits.second_order` is True (for example ScoreFunction)."
        )


class _Descend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, box, *parameters):
        ctx.loss, *ctx.stand_ins = box  # boxed, so that autograd sees the parameters only
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(ctx.loss)

    @staticmethod
    def backward(ctx, grad):
        parameters = ctx.saved_tensors
        grads = torch.autograd.grad(ctx.loss, ctx.stand_ins, grad.abs(), retain_graph=True, allow_unused=True)
        if torch.is_grad_enabled():
            grads = [g if g is None else g + _Poison.apply(p) for g, p in zip(grads, parameters, strict=True)]
        return None, *grads
