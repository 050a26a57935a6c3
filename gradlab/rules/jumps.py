"""The laws that jumps are made of, one jump a sample; none is validated, since that looks at values."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor


class _Unit(td.Uniform):
    """Uniform on (0, 1): no sample is scaled."""

    def rsample(self, sample_shape=torch.Size()):
        return torch.rand(self._extended_shape(sample_shape), dtype=self.low.dtype, device=self.low.device)


class _UnitExponential(td.Exponential):
    """Exponential(1): no sample is scaled."""

    def rsample(self, sample_shape=torch.Size()):
        return self.rate.new_empty(self._extended_shape(sample_shape)).exponential_()


def unit(z: Tensor) -> td.Distribution:
    """Uniform on (0, 1)."""
    return _Unit(z.new_zeros(()).expand_as(z), z.new_ones(()).expand_as(z), validate_args=False)


def exponential(z: Tensor) -> td.Distribution:
    """Exponential(1)."""
    return _UnitExponential(z.new_ones(()).expand_as(z), validate_args=False)


def gamma(shape: float, z: Tensor) -> td.Distribution:
    """Gamma(shape, 1)."""
    return td.Gamma(torch.full_like(z, shape), torch.ones_like(z), validate_args=False)


def place(order: int, z: Tensor) -> td.Distribution:
    """Beta(1, N): where on its jump the last derivative of a remainder is taken."""
    return td.Beta(torch.ones_like(z), torch.full_like(z, order), validate_args=False)
