"""AfterLinear and chunks change the time and the memory of flips, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import gradlab as gl

pytestmark = pytest.mark.usefixtures("device")

LAWS = {
    "bernoulli": (lambda p: td.Independent(td.Bernoulli(logits=p), 1), (4, 6)),
    "one-hot": (lambda p: td.Independent(td.OneHotCategorical(logits=p), 1), (4, 3, 5)),
    "one one-hot": (lambda p: td.OneHotCategorical(logits=p), (4, 5)),
    "binomial": (lambda p: td.Independent(td.Binomial(3, logits=p), 1), (4, 6)),
}


def both(law: str, make) -> list[tuple[Tensor, ...]]:
    """Gradients through the plain cost and through AfterLinear, on the same noise."""
    make_q, shape = LAWS[law]
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    q = make_q(logits)
    width = q.event_shape.numel()
    linear, tail = nn.Linear(width, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 1))

    def plain(z: Tensor) -> Tensor:
        return tail(linear(z.reshape(*z.shape[: z.ndim - len(q.event_shape)], width)))[..., 0]

    structured = gl.AfterLinear(linear, lambda h: tail(h)[..., 0])
    estimator = make()
    noise = estimator.draw(q)
    leaves = [logits, *linear.parameters(), *tail.parameters()]
    out = []
    for f in (plain, structured):
        loss = estimator.estimate(make_q(logits), f, noise)
        out.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    return out


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("law", LAWS)
def test_after_linear_is_the_same_cost(law: str, chunk_size: int | None) -> None:
    for got, expected in zip(*both(law, lambda: gl.LocalExpectation(2, chunk_size)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["bernoulli", "binomial"])
def test_after_linear_serves_measure_valued(law: str) -> None:
    for got, expected in zip(*both(law, lambda: gl.MeasureValued(2, 5)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", [gl.ScoreFunction(2), gl.DisARM(), gl.REBAR(), gl.Enumerate()], ids=repr)
def test_every_estimator_takes_an_after_linear(estimator: gl.Estimator) -> None:
    q = td.Independent(td.Bernoulli(logits=torch.zeros(2, 3, requires_grad=True)), 1)
    estimator(q, gl.AfterLinear(nn.Linear(3, 4), lambda h: h.tanh().sum(-1))).sum().backward()


@pytest.mark.parametrize("make", [gl.LocalExpectation, gl.MeasureValued])
def test_chunks_change_nothing_and_bound_the_calls(make) -> None:
    problem = gl.problem("bernoulli_20")
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    noise, results = make().draw(problem.q(params)), []
    for size in (None, 1, 7):
        points = []

        def f(z: Tensor, points=points) -> Tensor:
            points.append(z.shape[:-1].numel())
            return problem.f(z)

        loss = make(chunk_size=size).estimate(problem.q(params), f, noise)
        results.append(torch.autograd.grad(loss, params["logits"])[0])
        assert max(points[1:]) <= (size or 1000)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-13, atol=1e-13)


def test_flips_leave_no_graph() -> None:
    """Only the samples themselves are differentiated by f."""
    modes = []
    q = td.Independent(td.Bernoulli(logits=torch.zeros(5, requires_grad=True)), 1)

    def f(z: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return z.sum(-1)

    gl.LocalExpectation(chunk_size=2)(q, f).backward()
    assert modes == [True, False, False, False]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="chunk_size: found 0"):
        gl.LocalExpectation(chunk_size=0)
    with pytest.raises(TypeError, match="found a layer of type Tanh"):
        gl.AfterLinear(nn.Tanh(), torch.sum)
    q = td.Independent(td.Bernoulli(logits=torch.zeros(3, requires_grad=True)), 1)
    with pytest.raises(ValueError, match=r"AfterLinear: found z of shape \(1, 3\), expected trailing event dims of 4"):
        gl.LocalExpectation()(q, gl.AfterLinear(nn.Linear(4, 2), lambda h: h.sum(-1)))
    with pytest.raises(ValueError, match=r"f\(z\): found shape \(1, 2\)"):
        gl.LocalExpectation()(q, gl.AfterLinear(nn.Linear(3, 2), lambda h: h))
