"""The four primitives: values, first derivatives, and second ones that are right or raise."""

from __future__ import annotations

import pytest
import torch

import gradlab as gl

pytestmark = pytest.mark.usefixtures("device")


def test_magic_box_is_one_and_differentiates_to_any_order() -> None:
    x = torch.tensor(0.3, requires_grad=True)
    box = gl.magic_box(x**2)
    (first,) = torch.autograd.grad(box, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert box.item() == 1
    torch.testing.assert_close(first.detach(), 2 * x.detach())
    torch.testing.assert_close(second, 2 + 4 * x.detach() ** 2)  # of exp(x^2) / exp(sg(x^2))


def test_attach_keeps_the_graph_of_the_value() -> None:
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    z = gl.attach(b * b, a, torch.tensor(0.25))
    grads = torch.autograd.grad(z, [a, b])
    assert z.item() == 25
    assert [g.item() for g in grads] == [0.25, 10.0]


def test_attach_sums_over_the_parameter_dims_of_each_problem() -> None:
    param = torch.zeros(4, 3, requires_grad=True)
    gradient = torch.randn(4, 3)
    loss = gl.attach(torch.ones(4), param, gradient)
    (grad,) = torch.autograd.grad((loss * torch.arange(4.0)).sum(), param)
    torch.testing.assert_close(grad, gradient * torch.arange(4.0)[:, None])


def test_attach_broadcasts_the_parameter() -> None:
    a = torch.tensor(1.0, requires_grad=True)
    (grad,) = torch.autograd.grad(gl.attach(torch.zeros(5), a, torch.arange(5.0)).sum(), a)
    assert grad.item() == 10


@pytest.mark.parametrize("through", ["autograd", "func"])
def test_attach_raises_when_differentiated_twice(through: str) -> None:
    def f(a: torch.Tensor) -> torch.Tensor:
        return gl.attach(torch.tensor(5.0), a, torch.tensor(0.25)) ** 2

    with pytest.raises(RuntimeError, match="second derivative"):
        if through == "func":
            torch.func.grad(torch.func.grad(f))(torch.tensor(1.0))
        else:
            a = torch.tensor(1.0, requires_grad=True)
            (first,) = torch.autograd.grad(f(a), a, create_graph=True)
            torch.autograd.grad(first, a)


@pytest.mark.parametrize("scale", [1.0, -1.0, 64.0, -0.5])
def test_descend_follows_the_size_and_not_the_sign_of_the_upstream(scale: float) -> None:
    c = torch.tensor([1.0, 2.0], requires_grad=True)
    value = gl.descend(c**2, [c])
    assert value.eq(0).all()
    (scale * value).sum().backward()
    torch.testing.assert_close(c.grad, abs(scale) * 2 * c.detach())


def test_descend_reaches_its_parameters_and_nothing_else() -> None:
    c, other = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    gl.descend(c * other, [c]).backward()
    assert c.grad.item() == 3
    assert other.grad is None


def test_descend_weighs_each_problem_by_its_own_upstream() -> None:
    c = torch.ones(3, requires_grad=True)
    (gl.descend(c * torch.arange(3.0), [c]) * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    assert c.grad.tolist() == [0.0, 2.0, 6.0]


def test_descend_raises_when_differentiated_twice() -> None:
    c = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(gl.descend(c**3, [c]), c, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad, c)


def test_descend_is_zero_without_gradients() -> None:
    c = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert gl.descend(c**2, [c]).item() == 0
