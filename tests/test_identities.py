"""Rung 2: limits and algebra that force the answer, sample by sample, with no standard error."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.distributions import scores
from gradlab.score import optimal_coefficient


def grads(estimator: gl.Estimator, q_of, f, leaves: list[Tensor], noise: object) -> tuple[Tensor, ...]:
    loss = estimator.estimate(q_of(*leaves), f, noise).sum()
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def normal(loc: Tensor, scale: Tensor) -> td.Distribution:
    return td.Normal(loc, scale)


def leaves() -> list[Tensor]:
    return [torch.randn(7).requires_grad_(), (torch.rand(7) + 0.5).requires_grad_()]


def f(z: Tensor) -> Tensor:
    return z**3 - torch.sin(z)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_leave_one_out_with_two_samples_is_the_pairwise_form() -> None:
    at = leaves()
    noise = normal(*at).sample((2,))
    ours = grads(gl.ScoreFunction(2, gl.LeaveOneOut()), normal, f, at, noise)
    q = normal(*at)
    pairwise = ((f(noise[0]) - f(noise[1])) * (q.log_prob(noise[0]) - q.log_prob(noise[1])) / 2).sum()
    same(ours, torch.autograd.grad(pairwise, at))


def test_leave_one_out_is_s_over_s_minus_one_times_the_mean_subtracted() -> None:
    at = leaves()
    noise = normal(*at).sample((5,))
    ours = grads(gl.ScoreFunction(5, gl.LeaveOneOut()), normal, f, at, noise)
    cost = f(noise)
    by_hand = ((cost - cost.mean(0)) * normal(*at).log_prob(noise)).sum() / 4
    same(ours, torch.autograd.grad(by_hand, at))


def test_score_function_by_hand() -> None:
    at = leaves()
    noise = normal(*at).sample((3,))
    ours = grads(gl.ScoreFunction(3, 0.4), normal, f, at, noise)
    same(ours, torch.autograd.grad(((f(noise) - 0.4) * normal(*at).log_prob(noise)).mean(0).sum(), at))


def test_g_rep_with_the_identity_is_the_score_function() -> None:
    at = leaves()
    noise = normal(*at).sample((3,))
    g_rep = gl.GeneralizedReparameterization(lambda q: td.identity_transform, 3)
    same(grads(g_rep, normal, f, at, noise), grads(gl.ScoreFunction(3), normal, f, at, noise))


def test_g_rep_that_whitens_is_reparameterization() -> None:
    at = leaves()
    epsilon = torch.randn(3, 7)
    noise = (at[0] + at[1] * epsilon).detach()
    ours = grads(gl.GeneralizedReparameterization(num_samples=3), normal, f, at, noise)
    path = gl.Reparameterization(3, lambda q, shape: q.loc + q.scale * epsilon)
    q = normal(*at)
    theirs = torch.autograd.grad(path.estimate(q, f, path.draw(q)).sum(), at)
    same(ours, theirs)


def test_implicit_is_explicit_for_location_scale() -> None:
    at = leaves()
    torch.manual_seed(1)
    q = normal(*at)
    z = gl.implicit(q, (3,))
    epsilon = ((z - q.loc) / q.scale).detach()
    same(
        torch.autograd.grad(f(z).sum(), at),
        torch.autograd.grad(f(normal(*at).loc + normal(*at).scale * epsilon).sum(), at),
    )


def test_coefficient_zero_is_the_score_function() -> None:
    at = leaves()
    noise = normal(*at).sample((3,))
    control = gl.ControlVariate(torch.cos, lambda q: q.mean, 0.0, 3)
    same(grads(control, normal, f, at, noise), grads(gl.ScoreFunction(3), normal, f, at, noise))


def test_control_variate_equal_to_f_leaves_no_noise() -> None:
    at = leaves()
    noise = normal(*at).sample((1,))
    control = gl.ControlVariate(lambda z: z**2, lambda q: q.mean**2 + q.variance)
    ours = grads(control, normal, lambda z: z**2, at, noise)
    same(ours, (2 * at[0].detach(), 2 * at[1].detach()))


def test_optimal_coefficient_is_the_regression_on_the_other_samples() -> None:
    at = leaves()
    noise = normal(*at).sample((6,))
    score, cost, zeta = scores(normal(*at), noise), f(noise), torch.cos(noise)
    a = optimal_coefficient(score, cost, zeta)
    others = torch.tensor([0, 1, 3, 4, 5])
    g, h = (score * cost[..., None])[others], (score * zeta[..., None])[others]
    g, h = g - g.mean(0), h - h.mean(0)
    torch.testing.assert_close(a[2], (g * h).sum((0, -1)) / (h * h).sum((0, -1)))


def test_optimal_coefficient_ignores_the_sample_it_is_used_for() -> None:
    score, cost, zeta = torch.randn(4, 2, 3), torch.randn(4, 2), torch.randn(4, 2)
    a = optimal_coefficient(score, cost, zeta)[1]
    cost[1], zeta[1], score[1] = 1e3, -7.0, 5.0
    assert torch.equal(optimal_coefficient(score, cost, zeta)[1], a)


def test_optimal_coefficient_is_zero_when_the_others_agree() -> None:
    same_score = torch.ones(4, 3) * 0.1
    a = optimal_coefficient(same_score, torch.ones(4) * 0.3, torch.ones(4) * 0.7)
    assert a.eq(0).all()


@pytest.mark.parametrize("name", ["bernoulli_3", "normals_3"])
def test_muprop_is_exact_on_linear_costs(name: str) -> None:
    problem = gl.problem(name)
    weights = torch.tensor([0.3, -1.2, 2.0])
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    loss = gl.MuProp(2)(problem.make_q(params), lambda z: z @ weights + 5)
    expected = (problem.make_q(params).mean * weights).sum()
    got = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    same(got, torch.autograd.grad(expected, list(params.values()), materialize_grads=True))


def test_scores_are_those_of_each_sample() -> None:
    at = leaves()
    noise = normal(*at).sample((2,))
    ours = scores(normal(*at), noise)
    loc, scale = (p.detach() for p in at)
    epsilon = (noise - loc) / scale
    torch.testing.assert_close(ours, torch.stack([epsilon / scale, (epsilon**2 - 1) / scale], -1))


def test_price_and_bonnet() -> None:
    """d/dmu E f = E f', d/dsigma^2 E f = E f'' / 2 for a normal, by quadrature."""
    loc, variance = torch.tensor(0.3, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    q = td.Normal(loc, variance.sqrt())
    quadrature = gl.Quadrature()
    got = torch.autograd.grad(quadrature(q, torch.sin), [loc, variance])
    same(got, (quadrature(q, torch.cos).detach(), -quadrature(q, torch.sin).detach() / 2))
