r"""Smooth stand-ins for steps and kinks, and the temperature that says how smooth.

Every relaxation here tends to the thing that it relaxes as the temperature :math:`\tau` tends to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gradlab.surrogate import zero

__all__ = [
    "Schedule",
    "constant_temperature",
    "exponential_annealing",
    "huber",
    "inverse_time_annealing",
    "smooth_l1",
    "smooth_max",
    "soft_max_value",
    "softargmax",
    "softmax",
    "softplus",
    "st_argmax",
    "stop_gradient",
]

Schedule = Callable[[int], float]
"""A temperature schedule: ``step -> temperature``. Use it as ``estimator.temperature = schedule(step)``."""


def softplus(x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`\tau\log(1 + e^{x/\tau})`, a smooth ReLU.

    Its derivative is :math:`\sigma(x/\tau)`; the gap to ReLU is largest at 0, where it is :math:`\tau\log 2`.

    >>> softplus(torch.tensor([-40.0, 0.0, 40.0])).tolist()
    [4.248...e-18, 0.693..., 40.0]
    """
    return _positive(temperature) * torch.logaddexp(x / temperature, torch.zeros_like(x))


def softmax(x: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    r"""Return :math:`e^{x_i/\tau}/\sum_j e^{x_j/\tau}`, a smooth one-hot argmax (not a smooth maximum).

    >>> softmax(torch.tensor([1.1, 4.0, -0.1, 2.3]), temperature=0.6)
    tensor([0.0075, 0.9365, 0.0010, 0.0551])
    """
    return torch.softmax(x / _positive(temperature), dim)


def softargmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`\sum_{i=0}^{K-1} i\,\mathrm{softmax}(x/\tau)_i`, a smooth index, ``[..., K] -> [...]``.

    It treats the index as a number: among tied maxima it tends to the mean of their indices.

    >>> round(softargmax(torch.tensor([1.1, 4.0, -0.1, 2.3])).item(), 4)
    1.2606
    """
    index = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    return (softmax(x, temperature) * index).sum(-1)


def soft_max_value(x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`\sum_i x_i\,\mathrm{softmax}(x/\tau)_i`, a smooth maximum from below, ``[..., K] -> [...]``.

    >>> round(soft_max_value(torch.tensor([1.1, 4.0, -0.1, 2.3])).item(), 3)
    3.571
    """
    return (softmax(x, temperature) * x).sum(-1)


def smooth_max(x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`\tau\log\sum_i e^{x_i/\tau}`, a smooth maximum from above, ``[..., K] -> [...]``.

    It lies in :math:`[\max x, \max x + \tau\log K]`, and its gradient is :func:`softmax`.

    >>> round(smooth_max(torch.tensor([1.1, 4.0, -0.1, 2.3])).item(), 4)
    4.2266
    """
    return _positive(temperature) * torch.logsumexp(x / temperature, -1)


def huber(x: Tensor, delta: float = 1.0) -> Tensor:
    r"""Return :math:`x^2/2` where :math:`|x|\le\delta`, and :math:`\delta(|x| - \delta/2)` beyond.

    Its slope is bounded by :math:`\delta`; it equals ``delta * smooth_l1(x, delta)``.

    Reference:
        `Robust Estimation of a Location Parameter <https://doi.org/10.1214/aoms/1177703732>`_, Huber, 1964.

    >>> huber(torch.tensor([0.5, 3.0]), delta=2.0).tolist()
    [0.125, 4.0]
    """
    return F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=float(_positive(delta)))


def smooth_l1(x: Tensor, beta: float = 1.0) -> Tensor:
    r"""Return :math:`x^2/(2\beta)` where :math:`|x|\le\beta`, and :math:`|x| - \beta/2` beyond.

    As :math:`\beta\to0` it tends to :math:`|x|`, which :func:`huber` does not.

    >>> smooth_l1(torch.tensor([0.5, 3.0]), beta=2.0).tolist()
    [0.0625, 2.0]
    """
    return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=float(_positive(beta)))


def stop_gradient(x: Tensor) -> Tensor:
    r"""Return x, as a constant: :math:`\mathrm{sg}(x)`."""
    return x.detach()


def st_argmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return the index of the maximum, with the gradient of :func:`softargmax`, ``[..., K] -> [...]``.

    .. math:: \mathrm{softargmax}(x) + \mathrm{sg}(\mathrm{argmax}(x) - \mathrm{softargmax}(x))

    >>> x = torch.tensor([1.1, 4.0, -0.1, 2.3], requires_grad=True)
    >>> st_argmax(x).item()
    1.0
    """
    soft = softargmax(x, temperature)
    return x.argmax(-1).to(soft.dtype) + zero(soft)


def constant_temperature(value: float) -> Schedule:
    """Return the schedule that stays at ``value``.

    >>> constant_temperature(0.5)(1000)
    0.5
    """
    _positive(value)
    return lambda step: value


def exponential_annealing(start: float, rate: float, floor: float) -> Schedule:
    r"""Return the schedule :math:`\max(\mathrm{floor},\ \mathrm{start}\cdot e^{-\mathrm{rate}\cdot\mathrm{step}})`.

    Reference:
        `Categorical Reparameterization with Gumbel-Softmax <https://arxiv.org/abs/1611.01144>`_, Jang, Gu and
        Poole, 2017.

    >>> exponential_annealing(1.0, 1e-3, floor=0.5)(100)
    0.904...
    """
    _check_annealing(start, rate, floor)
    return lambda step: max(floor, start * math.exp(-rate * step))


def inverse_time_annealing(start: float, rate: float, floor: float) -> Schedule:
    r"""Return the schedule :math:`\max(\mathrm{floor},\ \mathrm{start}/(1 + \mathrm{rate}\cdot\mathrm{step}))`.

    >>> inverse_time_annealing(1.0, 0.01, floor=0.1)(100)
    0.5
    """
    _check_annealing(start, rate, floor)
    return lambda step: max(floor, start / (1 + rate * step))


def _check_annealing(start: float, rate: float, floor: float) -> None:
    _positive(floor)
    if start < floor or rate < 0:
        raise ValueError(
            f"annealing: found start={start}, rate={rate}, floor={floor}, expected start >= floor, rate >= 0."
        )


def _positive(temperature: float | Tensor) -> float | Tensor:
    """Return the temperature (or delta, or beta); a temperature of 0 is the limit and not a value."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"relaxation: found a temperature (delta, beta) of {temperature}, expected a positive number.")
    return temperature
