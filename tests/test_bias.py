"""Biased estimators show the bias that the mathematics predicts, integrated over their noise."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.distributions import support
from gradlab.quadrature import gauss_legendre

TABLE = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
MATRIX = torch.tensor([[0.5, 0.2, -0.3], [0.2, -0.8, 0.6], [-0.3, 0.6, 0.9]], dtype=torch.float64)
LAWS = {
    "bernoulli": lambda p: td.Independent(td.Bernoulli(logits=p), 1),
    "one-hot": lambda p: td.OneHotCategorical(logits=p),
}
POINT = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)
LINEAR = lambda z: (z * TABLE.to(z)).sum(-1)  # noqa: E731
QUADRATIC = lambda z: torch.einsum("...i,ij,...j->...", z, MATRIX.to(z), z) + LINEAR(z)  # noqa: E731
CUBIC = lambda z: LINEAR(z) ** 3  # noqa: E731


def exact(make_q, f) -> Tensor:
    point = POINT.clone().requires_grad_()
    return torch.autograd.grad(gl.Enumerate()(make_q(point), f), point)[0]


def expected(estimator: gl.Estimator, make_q, f) -> Tensor:
    """The mean gradient of an estimator whose noise is the sample itself, by enumeration."""
    values = support(make_q(POINT))
    many = POINT.expand(len(values), 3).clone().requires_grad_()
    loss = estimator.estimate(make_q(many), f, values[None])
    (grads,) = torch.autograd.grad(loss.sum(), many)
    return make_q(POINT).log_prob(values).exp() @ grads


@pytest.mark.parametrize("law", LAWS)
def test_straight_through_is_exact_on_linear_costs_only(law: str) -> None:
    torch.testing.assert_close(
        expected(gl.StraightThrough(), LAWS[law], LINEAR), exact(LAWS[law], LINEAR), rtol=1e-12, atol=1e-12
    )
    assert (expected(gl.StraightThrough(), LAWS[law], QUADRATIC) - exact(LAWS[law], QUADRATIC)).norm() > 1e-2


@pytest.mark.parametrize("law", LAWS)
def test_reinmax_is_exact_on_quadratic_costs_only(law: str) -> None:
    for f in (LINEAR, QUADRATIC):
        torch.testing.assert_close(expected(gl.ReinMax(), LAWS[law], f), exact(LAWS[law], f), rtol=1e-12, atol=1e-12)
    assert (expected(gl.ReinMax(), LAWS[law], CUBIC) - exact(LAWS[law], CUBIC)).norm() > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", [gl.StraightThrough(), gl.ReinMax()], ids=repr)
def test_samples_show_the_enumerated_bias(estimator: gl.Estimator, law: str, device: torch.device) -> None:
    predicted = expected(estimator, LAWS[law], CUBIC)
    grads = gl.replicate(lambda p: estimator(LAWS[law](p), CUBIC), POINT.to(device), 200_000).cpu()
    error = grads.std(0) / len(grads) ** 0.5
    assert ((grads.mean(0) - predicted).abs() < 5 * error).all()
    assert ((predicted - exact(LAWS[law], CUBIC)).abs() > 5 * error).any()  # the bias itself is seen


def logistic_nodes() -> tuple[Tensor, Tensor]:
    t, w = (torch.as_tensor(x) for x in gauss_legendre(60.0, 4096, [-0.4, 0.4]))
    return t, w * torch.sigmoid(t) * torch.sigmoid(-t)


def relaxed_mean(estimator: gl.GumbelSoftmax, logit: float, f) -> Tensor:
    """The mean gradient over logistic noise, by quadrature."""
    nodes, weights = logistic_nodes()
    many = torch.full_like(nodes, logit).requires_grad_()
    (grads,) = torch.autograd.grad(estimator.estimate(td.Bernoulli(logits=many), f, nodes[None]).sum(), many)
    return weights @ grads


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_gumbel_softmax_shows_the_integrated_bias(temperature: float, hard: bool, device: torch.device) -> None:
    estimator = gl.GumbelSoftmax(temperature=temperature, hard=hard)
    f = lambda z: (z - 0.45) ** 2  # noqa: E731
    predicted = relaxed_mean(estimator, 0.4, f)
    point = torch.tensor(0.4, device=device, dtype=torch.float64)
    grads = gl.replicate(lambda p: estimator(td.Bernoulli(logits=p), f), point, 200_000).cpu()
    assert (grads.mean() - predicted).abs() < 5 * grads.std() / len(grads) ** 0.5


def test_gumbel_softmax_on_the_toy_has_the_known_means() -> None:
    known = {5.0: 0.00485, 1.0: 0.01667, 0.5: 0.02146, 0.1: 0.02480}  # exact: 0.025
    for temperature, mean in known.items():
        found = relaxed_mean(gl.GumbelSoftmax(temperature=temperature), 0.0, lambda z: (z - 0.45) ** 2)
        assert found.item() == pytest.approx(mean, abs=2e-5)


@pytest.mark.parametrize("law", LAWS)
def test_gumbel_rao_has_the_mean_of_straight_through_gumbel_softmax(law: str, device: torch.device) -> None:
    makers = gl.GumbelSoftmax(temperature=0.5, hard=True), gl.GumbelRao(temperature=0.5, num_noises=20)
    first, second = (
        gl.replicate(lambda p, e=e: e(LAWS[law](p), CUBIC), POINT.to(device), 100_000).cpu() for e in makers
    )
    error = ((first.var(0) + second.var(0)) / len(first)).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < 5 * error).all()
    assert (second.var(0) < first.var(0)).all()


@pytest.mark.parametrize("law", LAWS)
def test_temperature_zero_makes_gumbel_softmax_hard(law: str) -> None:
    q = LAWS[law](POINT)
    noise = gl.GumbelSoftmax(50).draw(q)
    soft = gl.GumbelSoftmax(50, temperature=1e-6).estimate(q, CUBIC, noise)
    torch.testing.assert_close(soft, gl.GumbelSoftmax(50, hard=True).estimate(q, CUBIC, noise))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["StraightThrough", "ReinMax", "GumbelRao", "GumbelSoftmax"])
def test_second_derivatives_of_hard_samples_raise(name: str, law: str) -> None:
    estimator = gl.GumbelSoftmax(hard=True) if name == "GumbelSoftmax" else getattr(gl, name)()
    point = POINT.clone().requires_grad_()
    (grad,) = torch.autograd.grad(estimator(LAWS[law](point), CUBIC), point, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.sum(), point)
