r"""Baselines: what to subtract from a cost before it multiplies a score.

A baseline b may depend on anything but the sample that it is subtracted for; then
:math:`E_q[b\,\nabla\log q] = 0` and the gradient stays unbiased.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gradlab.surrogate import descend, is_transformed, zero

__all__ = ["Baseline", "Constant", "Learned", "LeaveOneOut", "MovingAverage"]


class Baseline(nn.Module, ABC):
    """Maps the costs ``[S, *B]`` and the context to a baseline that broadcasts to ``[S, *B]``."""

    min_samples = 1

    @abstractmethod
    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        """Return b. ``cost`` carries no graph; a graph in b reaches the baseline's own parameters only."""

    def training_loss(self, cost: Tensor, b: Tensor) -> Tensor:
        r"""Return zeros ``[*B]`` whose backward descends :math:`\frac1S\sum_s (f_s - b_s)^2`."""
        return descend((cost - b).square().mean(0), self.parameters())


class Constant(Baseline):
    """The same number for every problem; 0 is plain REINFORCE."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.full_like(cost, self.value)

    def extra_repr(self) -> str:
        return f"{self.value}"


class LeaveOneOut(Baseline):
    r"""The mean cost of the *other* samples, :math:`b_s = \frac{1}{S-1}\sum_{t\ne s} f_t`.

    Needs two samples at least. With all S samples in the mean, the gradient would shrink by exactly (S-1)/S.

    Reference:
        `Buy 4 REINFORCE Samples, Get a Baseline for Free! <https://openreview.net/forum?id=r1lgTGL5DE>`_,
        Kool, van Hoof and Welling, 2019.

    >>> LeaveOneOut()(torch.tensor([1.0, 2.0, 6.0])).tolist()
    [4.0, 3.5, 1.5]
    """

    min_samples = 2

    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        return (cost.sum(0) - cost) / (len(cost) - 1)


class MovingAverage(Baseline):
    r"""The exponential moving average of past costs, over all problems.

    After each call in training mode :math:`m \leftarrow \beta m + (1-\beta)\bar f`; the baseline is
    :math:`m / (1-\beta^t)`, zero before the first call. It is frozen in eval mode. Every rank of a DDP model
    stays unbiased; with DDP's default ``broadcast_buffers=True`` all use the average of rank 0, with False each keeps
    its own.

    Args:
        decay: :math:`\beta` in [0, 1).
    """

    average: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"MovingAverage: found decay={decay}, expected a number in [0, 1).")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        b = self.average / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        b = b.to(cost).expand_as(cost).clone()
        if self.training and is_transformed(cost):
            raise RuntimeError(
                "MovingAverage: found training mode inside torch.func, expected eval mode: a transform cannot update a "
                "buffer. Call estimator.eval() first."
            )
        if self.training:
            self.average.lerp_(cost.mean().to(self.average), 1 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        return b

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class Learned(Baseline):
    r"""A network of the context, trained to predict the cost: :math:`b(x)\approx E_q[f \mid x]`.

    The same ``backward()`` that trains q trains the network, by least squares.

    Args:
        net: maps the context ``[*B, *C]`` to ``[*B]`` or ``[*B, 1]``.

    Reference:
        `Neural Variational Inference and Learning in Belief Networks <https://arxiv.org/abs/1402.0030>`_,
        Mnih and Gregor, 2014.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            raise ValueError(
                "Learned: found no context, expected a Tensor [*B, *C] that the network maps to one baseline a "
                "problem. Call estimator(q, f, context=x)."
            )
        b = self.net(context.detach())
        batch = cost.shape[1:]
        if b.shape not in (batch, (*batch, 1)):
            raise ValueError(
                f"Learned: found a baseline of shape {tuple(b.shape)} for a context of shape {tuple(context.shape)}, "
                f"expected {tuple(batch)} or {(*batch, 1)}, one number a problem."
            )
        return b.reshape(batch)


def weighted(log_prob: Tensor, cost: Tensor, baseline: Baseline, context: Tensor | None) -> Tensor:
    r"""Return the mean over S of :math:`f + (\text{magic box}(\log q) - 1)\,(f - b)`, and train b.

    Args:
        log_prob: ``[S, *B]``.
        cost: ``[S, *B]``.
    """
    b = baseline(cost.detach(), context)
    loss = torch.addcmul(cost, torch.expm1(zero(log_prob)), cost - b.detach()).mean(0)
    return loss + baseline.training_loss(cost.detach(), b) if b.requires_grad else loss


def as_baseline(baseline: Baseline | float | None, num_samples: int) -> Baseline:
    """Return a :class:`Baseline`, and check that S samples are enough for it."""
    if baseline is None or isinstance(baseline, int | float):
        return Constant(float(baseline or 0.0))
    if not isinstance(baseline, Baseline):
        raise TypeError(
            f"baseline: found {type(baseline).__name__}, expected None, a number or a gradlab baseline "
            "(LeaveOneOut(), MovingAverage(), Learned(net))."
        )
    if num_samples < baseline.min_samples:
        raise ValueError(
            f"{type(baseline).__name__}: found num_samples={num_samples}, expected at least {baseline.min_samples}. "
            f"Draw more samples: num_samples={baseline.min_samples}."
        )
    return baseline
