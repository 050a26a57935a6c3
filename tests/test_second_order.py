"""Second derivatives are right, or raise: never silently wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from cases import IDS, PAIRS, Case, Critic, on
from torch import Tensor

import gradlab as gl

RAISES = "second derivative|not implemented|once_differentiable|does not require grad"


def hessian(loss: Tensor, leaf: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    rows = [torch.autograd.grad(first[..., i].sum(), leaf, retain_graph=True)[0] for i in range(leaf.shape[-1])]
    return torch.stack(rows, -1)


@pytest.mark.parametrize(
    "estimator",
    [
        gl.ScoreFunction(1, 0.5),
        gl.ScoreFunction(3, gl.LeaveOneOut()),
        gl.MuProp(2, gl.LeaveOneOut()),
        gl.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean.sum(-1), 0.7, 2),
        gl.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean.sum(-1), "optimal", 4),
        gl.REBAR(1, 0.6),
        gl.RELAX(Critic(1)),
        gl.DoubleControlVariate(2),
        gl.SumAndSample(2),
        gl.UnorderedSet(3),
        gl.Enumerate(),
    ],
    ids=lambda e: repr(e),
)
def test_discrete_hessians_are_unbiased(estimator: gl.Estimator, device: torch.device) -> None:
    problem = on(device, gl.problem("bernoulli_3"))
    point = problem.params["logits"].clone().requires_grad_()
    exact = hessian(problem.value({"logits": point}, problem.t), point)
    many = point.detach().expand(60_000, 3).clone().requires_grad_()
    samples = hessian(estimator.to(device)(problem.make_q({"logits": many}), problem.f), many)
    error = samples.std(0) / len(samples) ** 0.5
    gap = (samples.mean(0) - exact).abs()
    assert ((gap < 6 * error) | (gap < 1e-12)).all()


@pytest.mark.parametrize("name", ["normals_3"])
@pytest.mark.parametrize(
    "estimator",
    [
        gl.Reparameterization(),
        gl.Reparameterization(1, gl.inverse_cdf),
        gl.ImplicitReparameterization(),  # explicit for a normal
        gl.GeneralizedReparameterization(),
        gl.GeneralizedReparameterization(
            lambda q: td.AffineTransform(q.base_dist.loc, 1.0), num_samples=2, baseline=gl.LeaveOneOut()
        ),
        gl.ScoreFunction(2, gl.LeaveOneOut()),
    ],
    ids=lambda e: repr(e),
)
def test_continuous_hessians_are_unbiased(estimator: gl.Estimator, name: str, device: torch.device) -> None:
    problem = on(device, gl.problem(name))

    def q(point: Tensor) -> td.Distribution:
        return problem.make_q({"loc": point[..., :3], "scale": point[..., 3:]})

    point = torch.cat(list(problem.params.values())).requires_grad_()
    exact = hessian(problem.value({"loc": point[:3], "scale": point[3:]}, problem.t), point)
    many = point.detach().expand(60_000, 6).clone().requires_grad_()
    samples = hessian(estimator(q(many), problem.f), many)
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - exact).abs() < 6 * error + 1e-12).all()


@pytest.mark.parametrize("name", ["gamma_square", "gamma_exp"])
def test_g_rep_and_rsvi_hessians_are_unbiased(name: str, device: torch.device) -> None:
    problem = on(device, gl.problem(name))
    point = torch.stack(list(problem.params.values())).requires_grad_()
    exact = hessian(problem.value({"concentration": point[0], "rate": point[1]}, problem.t), point)
    for estimator in (gl.RejectionReparameterization(), gl.GeneralizedReparameterization()):
        many = point.detach().expand(60_000, 2).clone().requires_grad_()
        q = problem.make_q({"concentration": many[..., 0], "rate": many[..., 1]})
        samples = hessian(estimator(q, problem.f), many)
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - exact).abs() < 6 * error).all()


@pytest.mark.parametrize("name", ["gamma_square", "gamma_exp"])
def test_quadrature_has_exact_hessians(name: str) -> None:
    problem = gl.problem(name)
    point = torch.stack(list(problem.params.values())).requires_grad_()

    def params() -> dict[str, Tensor]:
        return {"concentration": point[0], "rate": point[1]}

    exact = hessian(problem.value(params(), problem.t), point)
    torch.testing.assert_close(hessian(gl.Quadrature()(problem.make_q(params()), problem.f), point), exact)


HAND_WRITTEN = {
    "gamma_square", "gamma_exp", "gamma_small", "beta_square", "dirichlet_quadratic", "student_cos", "von_mises_cos",
    "truncated_square", "mixture_cos", "mixture_plane",
}  # fmt: skip


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_hand_written_derivatives_raise(case: Case, problem: gl.Problem, device: torch.device) -> None:
    """Where a pathwise derivative is a formula and not a graph, a Hessian must raise."""
    if case.name not in ("implicit", "reparameterization") or problem.name not in HAND_WRITTEN:
        return
    if case.name == "reparameterization" and problem.name == "truncated_square":
        return  # TruncatedNormal.rsample: see the test of its own
    problem = on(device, problem)
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    leaves = list(params.values())
    grads = torch.autograd.grad(
        case.make(problem)(problem.make_q(params), problem.f), leaves, create_graph=True, materialize_grads=True
    )
    explicit = {"von_mises_cos": "loc"}.get(problem.name)
    hand = next(i for i, k in enumerate(params) if k != explicit)
    with pytest.raises(RuntimeError, match=RAISES):
        torch.autograd.grad(grads[hand].sum(), leaves)


@pytest.mark.parametrize(
    "estimator",
    [
        gl.ARM(),
        gl.DisARM(),
        gl.LocalExpectation(),
        gl.MeasureValued(),
        gl.TaylorLocalExpectation(),
        gl.AdaptiveLocalExpectation(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_attached_derivatives_raise(estimator: gl.Estimator) -> None:
    problem = gl.problem("bernoulli_3")
    point = problem.params["logits"].clone().requires_grad_()
    t = problem.t.clone().requires_grad_()
    loss = estimator(problem.make_q({"logits": point}), problem.f_at(t))
    (grad,) = torch.autograd.grad(loss, point, create_graph=True)
    with pytest.raises(RuntimeError, match=RAISES):
        torch.autograd.grad(grad.sum(), point)
