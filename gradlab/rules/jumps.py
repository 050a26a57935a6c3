"""The laws that jumps are made of, one jump a sample; none is validated, since that looks at values."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor


def unit(z: Tensor) -> td.Distribution:
    """Uniform on (0, 1)."""
    return td.Uniform(torch.zeros_like(z), torch.ones_like(z), validate_args=False)


def exponential(z: Tensor) -> td.Distribution:
    """Exponential(1)."""
    return td.Exponential(torch.ones_like(z), validate_args=False)


def gamma(shape: float, z: Tensor) -> td.Distribution:
    """Gamma(shape, 1)."""
    return td.Gamma(torch.full_like(z, shape), torch.ones_like(z), validate_args=False)


def place(order: int, z: Tensor) -> td.Distribution:
    """Beta(1, N): where on its jump the last derivative of a remainder is taken."""
    return td.Beta(torch.ones_like(z), torch.full_like(z, order), validate_args=False)
