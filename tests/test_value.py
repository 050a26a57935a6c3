"""The value of every estimator is an unbiased estimate of the expectation, with or without a gradient."""

from __future__ import annotations

import pytest
import torch
from cases import IDS, PAIRS, Case, on

import gradlab as gl


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_value_is_a_monte_carlo_estimate(case: Case, problem: gl.Problem, device: torch.device) -> None:
    if case.name == "gumbel-softmax":
        return  # its value is that of the relaxed cost
    problem = on(device, problem)
    count = 20_000
    q = problem.make_q({k: p.expand(count, *p.shape) for k, p in problem.params.items()})
    with torch.no_grad():
        value = case.make(problem)(q, problem.f)
    assert value.shape == (count,)
    assert not value.requires_grad
    exact = problem.value(problem.params, problem.t)
    gap, error = (value.mean() - exact).abs(), value.std() / count**0.5
    assert gap < 6.5 * error + 1e-9 * (1 + exact.abs()), f"z = {gap / error}"


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_value_does_not_depend_on_grad_mode(case: Case, problem: gl.Problem, device: torch.device) -> None:
    if case.name == "control variate, optimal":
        return  # without a gradient its coefficient is zero: plain Monte Carlo
    problem = on(device, problem)
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    estimator = case.make(problem)
    torch.manual_seed(3)
    with torch.no_grad():
        plain = estimator(problem.make_q(params), problem.f)
    estimator = case.make(problem)
    torch.manual_seed(3)
    with_graph = estimator(problem.make_q(params), problem.f)
    torch.testing.assert_close(plain, with_graph.detach())
