"""Rung 4: z-tests of every estimator on every problem that it can serve, for q's parameters and for f's own.

Every case draws at least 20 000 gradients, and more where the smallest bias that the test is sure to see
(at 99.9 % power) would exceed 5 % of the gradient. The threshold keeps the chance that any of the z-scores of the
suite fails by accident below 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import UNBIASED, UNBIASED_IDS, Case, on
from torch import Tensor

import gradlab as gl

FAMILY_ERROR = 1e-6
Z_SCORES = 4000  # more than the suite computes; test_the_family_is_counted holds it to that
THRESHOLD = math.sqrt(2) * torch.erfinv(torch.tensor(1 - FAMILY_ERROR / Z_SCORES, dtype=torch.float64)).item()
POWER = 3.1  # sigmas more for a power of 99.9 %
VISIBLE = 0.05  # of the norm of the gradient
PILOT, MOST = 20_000, 20_000_000

# A gradient that nearly vanishes cannot be resolved to 5 %; there the scale is the typical single-sample gradient.
VANISHING = {"bernoulli_toy_499", "normal_cos"}
# cos(z) has a pathwise derivative -sin(z) e for Cauchy noise e: infinite variance, so a z-score says nothing.
INFINITE_VARIANCE = {("cauchy_cos", name) for name in ("reparameterization", "inverse cdf", "implicit", "lax")} | {
    ("cauchy_cos", name) for name in ("g-rep", "g-rep, leave-one-out")
}


def flat(tree: dict[str, Tensor], batch_dims: int) -> Tensor:
    return torch.cat([g.reshape(*g.shape[:batch_dims], -1) for g in tree.values()], -1)


def sampled(estimator: gl.Estimator, problem: gl.Problem, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` gradients of q's parameters and of t, ``[count, P + 1]``, and their exact value."""
    everything = {**problem.params, "t": problem.t}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return estimator(problem.make_q({k: v for k, v in p.items() if k != "t"}), problem.f_at(p["t"]))

    params, t = problem.exact()
    exact = flat({**params, "t": t}, 0)
    return flat(gl.replicate(loss, everything, count, chunk_size=100_000), 1), exact


@pytest.mark.parametrize(("case", "problem"), UNBIASED, ids=UNBIASED_IDS)
def test_unbiased(case: Case, problem: gl.Problem, device: torch.device) -> None:
    problem = on(device, problem)
    estimator = case.make(problem)
    if (problem.name, case.name) in INFINITE_VARIANCE:
        grads, exact = sampled(estimator, problem, PILOT)
        assert grads.isfinite().all()
        return
    if case.name == "enumerate":
        grads, exact = sampled(estimator, problem, 3)
        torch.testing.assert_close(grads.mean(0), exact, rtol=1e-10, atol=1e-12)
        return
    grads, exact = sampled(estimator, problem, PILOT)
    scale = exact.norm() if problem.name not in VANISHING else grads.square().mean(0).sum().sqrt()
    needed = ((THRESHOLD + POWER) * grads.std(0).max() / (VISIBLE * scale)).square().item()
    if needed > PILOT:
        grads, _ = sampled(estimator, problem, min(int(1.6 * needed), MOST))
    error = grads.std(0) / len(grads) ** 0.5
    visible = (THRESHOLD + POWER) * error.max()
    assert visible <= VISIBLE * scale, f"minimum detectable bias {visible:.3g} exceeds 5 % of {scale:.3g}"
    gap = (grads.mean(0) - exact).abs()
    rounding = 1e-12 * (1 + exact.abs())
    z = torch.where(gap > rounding, gap / error, 0.0)
    assert z.max() < THRESHOLD, f"z = {z.tolist()}, minimum detectable bias {visible:.3g}"


def test_the_family_is_counted() -> None:
    count = sum(sum(p.numel() for p in problem.params.values()) + 1 for _, problem in UNBIASED)
    assert 1000 < count < Z_SCORES


def test_the_test_sees_a_small_bias(device: torch.device) -> None:
    """A gradient that is 5 % too long must be caught."""
    problem = on(device, gl.problem("bernoulli_3"))
    grads, exact = sampled(gl.ScoreFunction(3, gl.LeaveOneOut()), problem, 400_000)
    error = 1.05 * grads.std(0) / len(grads) ** 0.5
    assert ((1.05 * grads.mean(0) - exact).abs() / error).max() > THRESHOLD
