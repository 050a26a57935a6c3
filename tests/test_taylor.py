"""Derivatives along a line: Taylor arithmetic against nested reverse mode, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

from gradlab.taylor import Kinks, Taylor, derivatives

pytestmark = pytest.mark.usefixtures("device")


def net(z: Tensor) -> Tensor:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).requires_grad_(False)
    return layers(z).squeeze(-1)


COSTS = {
    "polynomial": lambda z: (z.sum(-1) - 0.4) ** 2 + z[..., 0] ** 5,
    "exp": lambda z: torch.exp(-0.5 * z).sum(-1) + torch.expm1(z[..., 1]),
    "log sigmoid": lambda z: F.logsigmoid(2 * z[..., 0] - z[..., 2]),
    "softplus": lambda z: F.softplus(z).mean(-1) * 2 - z[..., 0] + F.softplus(z[..., 1], beta=2.0),
    "network": net,
    "trigonometric": lambda z: (z.sin() * torch.cos(2 * z)).sum(-1),
    "log": lambda z: torch.log(1 + z**2).sum(-1) / (2 + z[..., 1].tanh()),
    "log1p": lambda z: torch.log1p(z.square()).sum(-1) - torch.reciprocal(2 + z[..., 0].sigmoid()),
    "sqrt": lambda z: (z**2 + 1).sqrt().prod(-1) + (z**2 + 2).rsqrt().sum(-1) + (z[..., 0] ** 2 + 1) ** 0.3,
    "softmax": lambda z: torch.logsumexp(z, -1) - torch.log_softmax(z, -1)[..., 0] + z.softmax(-1).square().sum(-1),
    "normal": lambda z: -td.Normal(z, 1.3).log_prob(torch.tensor([0.1, 0.2, 0.3])).sum(-1),
    "cross-entropy": lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none").sum(-1),
    "cat": lambda z: torch.cat([z, z * z], -1).sum(-1) + torch.stack([z[..., 0], 3 * z[..., 1]], -1).prod(-1),
    "where": lambda z: torch.where(z > 0, z**3, z).sum(-1) + torch.relu(z).square().sum(-1) + z.abs().sum(-1),
    "constants": lambda z: torch.tensor(2.0) * z.sum(-1) - (1 / (3.0 + z[..., 2] ** 2) - z @ torch.ones(3)) - 1.0,
    "erf": lambda z: torch.erf(z).sum(-1) + F.gelu(z).sum(-1) + F.silu(z).sum(-1) + torch.atan(z).sum(-1),
    "linear": lambda z: 3 * z[..., 0] - z[..., 2],
    "power of a constant": lambda z: (2.0 ** z).sum(-1),
}  # fmt: skip


def nested(f, z: Tensor, v: Tensor, order: int) -> list[Tensor]:
    """Reverse mode, nested: exponential in the order."""
    t = torch.zeros(len(z), requires_grad=True)
    found = [f(z + t[:, None] * v)]
    for _ in range(order):
        if found[-1].requires_grad:
            found += torch.autograd.grad(found[-1].sum(), t, create_graph=True, materialize_grads=True)
        else:
            found.append(torch.zeros_like(found[0]))
    return found


@pytest.mark.parametrize("name", COSTS)
def test_taylor_arithmetic_is_nested_autograd(name: str) -> None:
    torch.manual_seed(0)
    z, v = 0.5 * torch.randn(2, 3) + 0.3, torch.randn(2, 3)
    expected = nested(COSTS[name], z, v, 4)
    for order in (1, 2, 4):
        found = derivatives(COSTS[name], z, v, order)
        assert len(found) == order + 1
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_sixteen_derivatives_of_log_sigmoid() -> None:
    """d^n log sigma = -d^(n-1) sigma(-z); at 0 its Taylor coefficients are tangent numbers."""
    found = derivatives(F.logsigmoid, torch.zeros(()), torch.ones(()), 8)
    torch.testing.assert_close(torch.stack(found[1:]), torch.tensor([1 / 2, -1 / 4, 0, 1 / 8, 0, -1 / 4, 0, 17 / 16]))


def test_a_cost_without_z_has_no_derivatives() -> None:
    found = derivatives(lambda z: torch.tensor(3.0), torch.zeros(()), torch.ones(()), 3)
    assert [d.item() for d in found] == [3.0, 0.0, 0.0, 0.0]


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"found lgamma in a cost.*expected operations with a Taylor rule.*form='exact'"
    ):
        derivatives(torch.lgamma, torch.ones(()), torch.ones(()), 3)


def test_facts_of_a_series_are_those_of_its_terms() -> None:
    t = Taylor([torch.zeros(2, 3), torch.ones(2, 3)])
    assert (t.shape, t.ndim, t.dtype, t.size(0), len(t)) == ((2, 3), 2, t.terms[0].dtype, 2, 2)


@pytest.mark.parametrize("f", [torch.relu, F.leaky_relu, torch.abs, lambda z: z.clamp(0, 1), lambda z: z.max()])
def test_kinks_are_noticed(f) -> None:
    with Kinks() as kinks:
        f(torch.zeros(3))
    assert kinks.found


def test_smooth_functions_have_no_kinks() -> None:
    with Kinks() as kinks:
        F.softplus(torch.zeros(3)).sum()
    assert not kinks.found
