"""The oracles agree with each other, with finite differences and with closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradlab as gl

NO_ORACLE = {
    "bernoulli_20", "onehot_5x10", "cauchy_cos", "poisson_exp", "geometric_exp", "normals_3", "dirichlet_quadratic",
    "mixture_plane",
}  # fmt: skip
CLOSED_AND_ORACLE = [p.name for p in gl.PROBLEMS.values() if p.expectation is not None and p.name not in NO_ORACLE]


@pytest.mark.parametrize("name", CLOSED_AND_ORACLE)
def test_closed_form_equals_quadrature(name: str) -> None:
    problem = gl.problem(name)
    oracle = problem.oracle()
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    value = oracle(problem.make_q(params), problem.f)
    tolerance = 1e-7 if name == "von_mises_cos" else 1e-10  # torch's von Mises log_prob is a polynomial
    torch.testing.assert_close(value, problem.value(params, problem.t), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(value, list(params.values()))
    for got, expected in zip(grads, problem.exact()[0].values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(gl.PROBLEMS))
def test_exact_gradient_equals_finite_differences(name: str) -> None:
    problem = gl.problem(name)
    params, t = problem.exact()
    h = 1e-5
    for key, grad in params.items():
        for index in range(grad.numel()):
            step = torch.zeros_like(grad).flatten()
            step[index] = h
            step = step.reshape(grad.shape)
            moved = [problem.value({**problem.params, key: problem.params[key] + s * step}, problem.t) for s in (1, -1)]
            difference = (moved[0] - moved[1]) / (2 * h)
            torch.testing.assert_close(grad.flatten()[index], difference, rtol=1e-5, atol=2e-7)
    moved = [problem.value(problem.params, problem.t + s * h) for s in (1, -1)]
    torch.testing.assert_close(t, (moved[0] - moved[1]) / (2 * h), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("name", ["bernoulli_20", "onehot_5x10", "poisson_exp", "geometric_exp"])
def test_closed_form_of_the_others(name: str) -> None:
    problem = gl.problem(name)
    if name in ("poisson_exp", "geometric_exp"):
        z = torch.arange(0.0, 80)
        value = (problem.q().log_prob(z).exp() * problem.f(z)).sum()
    else:
        value = gl.Enumerate().estimate(problem.q(), problem.f, gl.Enumerate().draw(problem.q()))
    torch.testing.assert_close(value, problem.value(problem.params, problem.t))


def test_known_numbers() -> None:
    """Closed forms worked out by hand."""

    def grad(name: str, key: str) -> float:
        return problem_grad(name)[key].item()

    assert grad("bernoulli_toy", "logits") == pytest.approx(0.014914645207033285, rel=1e-12)
    assert grad("bernoulli_toy_499", "logits") == pytest.approx(0.00029829290414066573, rel=1e-12)
    assert grad("normal_square", "loc") == pytest.approx(1.4)
    assert grad("normal_square", "scale") == pytest.approx(2.6)
    assert problem_grad("bernoulli_3")["logits"][1].item() == pytest.approx(-0.17191598066279914, rel=1e-12)
    assert problem_grad("categorical_3")["logits"][0].item() == pytest.approx(0.20486841056077576, rel=1e-12)


def problem_grad(name: str) -> dict[str, Tensor]:
    return gl.problem(name).exact()[0]


def test_unknown_problem() -> None:
    with pytest.raises(KeyError, match="found 'nope', expected one of bernoulli_toy"):
        gl.problem("nope")


def test_quadrature_integrates_densities_to_one() -> None:
    for problem in gl.PROBLEMS.values():
        if gl.Quadrature.supports(problem.q()):
            total = gl.Quadrature().estimate(problem.q(), torch.ones_like, gl.Quadrature().draw(problem.q()))
            torch.testing.assert_close(total, torch.ones(()), rtol=1e-8, atol=1e-8)
