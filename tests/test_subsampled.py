"""Guessing every flip and evaluating a few: unbiased whatever the guess, exact where the guess is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributions as td
from cases import taught
from test_exact import check, exact, gradients, joint_outcomes, moments
from torch import Tensor, nn

import gradlab as gl
from gradlab.subsampled import Subsample, flips_of, inclusion, second_order, systematic

pytestmark = pytest.mark.usefixtures("device")

FINITE = ["bernoulli_toy", "bernoulli_3", "onehot_3", "onehot_10", "binomial_square"]


def cut(ends: Tensor, flips: int) -> tuple[Tensor, Tensor]:
    """Return the middles and the lengths of the pieces of [0, 1) on which the selection does not change."""
    edges = torch.cat([torch.zeros(1), (ends / ends[-1] * flips) % 1, torch.ones(1)]).sort().values
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def outcomes(estimator: gl.Estimator, problem: gl.Problem, f: gl.Cost) -> tuple[Subsample, Tensor]:
    """Return all joint values of z with all selections of their flips, and the probabilities."""
    z, probability = joint_outcomes(problem, 1)
    q = problem.make_q({k: p.expand(len(probability), *p.shape) for k, p in problem.params.items()})
    here = flips_of(q, z)
    before = f.before(z) if isinstance(f, gl.AfterLinear) and not estimator._follows(f) else None
    chance = inclusion(here.pi, estimator._guess(q, f, here, before).error, estimator.flips).flatten(-2)[0]
    pieces = [cut(c.cumsum(-1), round(c.sum().item())) for c in chance.expand(len(probability), -1)]
    which = torch.repeat_interleave(torch.tensor([len(middle) for middle, _ in pieces]))
    start, length = (torch.cat(x) for x in zip(*pieces, strict=True))
    return Subsample(z[:, which], start[None]), probability[which] * length


def learned(problem: gl.Problem) -> gl.Estimator:
    """After a few steps of real learning."""
    torch.manual_seed(1)
    estimator = gl.AdaptiveLocalExpectation(flips=1, decay=0.7)
    for _ in range(7):
        q = problem.make_q({k: p.clone().requires_grad_() for k, p in problem.params.items()})
        (-3 * estimator(q, problem.f)).backward()
    assert estimator.count.sum() > 2
    return estimator


ESTIMATORS: dict[str, Callable[[gl.Problem], gl.Estimator]] = {
    "taylor 1": lambda p: gl.TaylorLocalExpectation(flips=1),
    "taylor 2": lambda p: gl.TaylorLocalExpectation(flips=2),
    "adaptive, new": lambda p: gl.AdaptiveLocalExpectation(flips=1),
    "adaptive, any table": taught,
    "adaptive, after seven steps": learned,
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("key", ESTIMATORS)
def test_mean_is_exact(key: str, name: str) -> None:
    """Over all samples and all selections of flips; the variance is not below that of all flips."""
    problem = gl.problem(name)
    estimator = ESTIMATORS[key](problem).eval()
    noise, weights = outcomes(estimator, problem, problem.f)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    variance = check(estimator, problem, noise, weights)
    floor = check(gl.LocalExpectation(), problem, *joint_outcomes(problem, 1))
    assert (variance > floor - 1e-12).all()


PIXELS = torch.tensor([[1.0, 0.0, 1.0, 1.0]])


def pixels(width: int, separable: bool = True) -> gl.AfterLinear:
    """A Bernoulli likelihood of 4 pixels; with ``separable=False``, two layers of it."""
    torch.manual_seed(2)
    linear, tail = nn.Linear(width, 4), nn.Linear(4, 4)
    linear.weight.data *= 4

    def g(h: Tensor) -> Tensor:
        h = h if separable else tail(h.tanh())
        return (nn.functional.softplus(h) - h * PIXELS[0].to(h)).sum(-1)

    return gl.AfterLinear(linear, g, separable)


def of_cost(problem: gl.Problem, f: gl.Cost) -> gl.Problem:
    return gl.Problem(**{**vars(problem), "cost": lambda z, t: f(z) + 0 * t})


def mean_of(estimator: gl.Estimator, problem: gl.Problem, f: gl.Cost) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and variance of the gradient over all noise, and the exact gradient."""
    noise, weights = outcomes(estimator, problem, f)
    logits = problem.params["logits"].expand(len(weights), *problem.params["logits"].shape).clone().requires_grad_()
    (grads,) = torch.autograd.grad(estimator.estimate(problem.make_q({"logits": logits}), f, noise).sum(), logits)
    point = problem.params["logits"].clone().requires_grad_()
    (right,) = torch.autograd.grad(gl.Enumerate()(problem.make_q({"logits": point}), f), point)
    return *moments(grads.flatten(1), weights), right.flatten()


@pytest.mark.parametrize("name", ["bernoulli_3", "onehot_3", "binomial_square"])
@pytest.mark.parametrize("claim", ["separable", "not separable", "a wrong claim"])
@pytest.mark.parametrize("make", [gl.TaylorLocalExpectation, gl.AdaptiveLocalExpectation])
def test_mean_is_exact_after_a_linear_layer(make: type[gl.Estimator], claim: str, name: str) -> None:
    problem = gl.problem(name)
    if name == "binomial_square":
        problem = two_binomials()
    f = pixels(problem.q().event_shape.numel(), claim == "separable")
    f.separable = claim != "not separable"
    mean, _, right = mean_of(make(flips=1).eval(), problem, f)
    torch.testing.assert_close(mean, right, rtol=1e-10, atol=1e-10)


def two_binomials() -> gl.Problem:
    base = gl.problem("bernoulli_3")
    return gl.Problem(
        **{
            **vars(base),
            "params": {"logits": torch.tensor([0.3, -0.8])},
            "make_q": lambda p: td.Independent(td.Binomial(3, logits=p["logits"]), 1),
        }
    )


class ForgottenWeight(gl.TaylorLocalExpectation):
    """Flips that were evaluated replace their guesses, as if all flips were."""

    def estimate(self, q, f, noise, context=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "gradlab.subsampled.systematic",
                lambda *args: (lambda c, w: (c, torch.ones_like(w)))(*systematic(*args)),
            )
            return super().estimate(q, f, noise, context)


def test_the_mutant_dies() -> None:
    problem, mutant = gl.problem("bernoulli_3"), ForgottenWeight(flips=1)
    with pytest.raises(AssertionError):
        check(mutant, problem, *outcomes(mutant, problem, problem.f))


# ----------------------------------------------------------------------------------- limits and identities

LAWS = {
    "bits": (lambda p: td.Independent(td.Bernoulli(logits=p), 1), (5, 4)),
    "one bit": (lambda p: td.Bernoulli(logits=p), (5,)),
    "one-hots": (lambda p: td.Independent(td.OneHotCategorical(logits=p), 1), (5, 2, 3)),
    "binomials": (lambda p: td.Independent(td.Binomial(3, logits=p), 1), (5, 3)),
}


def both(law: str, estimator: gl.Estimator, f: gl.Cost) -> tuple[Tensor, Tensor]:
    """Return the gradients of the estimator and of the local expectation, on the same samples."""
    make_q, shape = LAWS[law]
    torch.manual_seed(4)
    leaf = torch.randn(shape, requires_grad=True)
    noise = estimator.draw(make_q(leaf))
    ours, theirs = (
        torch.autograd.grad(e.estimate(make_q(leaf), f, n).sum(), leaf)[0]
        for e, n in ((estimator, noise), (gl.LocalExpectation(estimator.num_samples), noise.z))
    )
    return ours, theirs


def on_law(law: str, cost: gl.Cost) -> gl.Cost:
    """Return the cost of all numbers of a z of this law, in one dim."""
    dims = len(LAWS[law][0](torch.zeros(LAWS[law][1])).event_shape)
    return lambda z: cost(z.flatten(z.ndim - dims) if dims else z[..., None])


def curved(z: Tensor) -> Tensor:
    return torch.sin(z.cumsum(-1)).sum(-1) + z.prod(-1)


def linear(z: Tensor) -> Tensor:
    return (z * torch.arange(1, 1 + z.shape[-1], device=z.device)).sum(-1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [gl.TaylorLocalExpectation, gl.AdaptiveLocalExpectation])
def test_all_flips_are_the_local_expectation(make: type[gl.Estimator], law: str) -> None:
    torch.testing.assert_close(*both(law, make(2, flips=1000), on_law(law, curved)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["bits", "one-hots", "binomials"])
def test_all_flips_are_the_local_expectation_after_a_linear_layer(law: str) -> None:
    for separable in (True, False):
        f = pixels(LAWS[law][0](torch.zeros(LAWS[law][1])).event_shape.numel(), separable)
        torch.testing.assert_close(*both(law, gl.TaylorLocalExpectation(2, 1000), f), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["bits", "one-hots", "binomials"])
def test_taylor_is_exact_for_a_quadratic(law: str) -> None:
    """One flip of many is evaluated, and corrects nothing."""
    linear = nn.Linear(LAWS[law][0](torch.zeros(LAWS[law][1])).event_shape.numel(), 6)
    f = gl.AfterLinear(linear, lambda h: (h.square() - 0.3 * h).sum(-1), separable=True)
    torch.testing.assert_close(*both(law, gl.TaylorLocalExpectation(2, 1), f), rtol=1e-12, atol=1e-12)
    f.separable = False  # to first order, it is not
    ours, theirs = both(law, gl.TaylorLocalExpectation(2, 1), f)
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [gl.TaylorLocalExpectation, gl.AdaptiveLocalExpectation])
def test_both_are_exact_for_a_linear_cost(make: type[gl.Estimator], law: str) -> None:
    estimator = make(2, flips=1)
    for _ in range(4):  # the table that it learns is zero
        torch.testing.assert_close(*both(law, estimator, on_law(law, linear)), rtol=1e-10, atol=1e-10)
        step(estimator, f=linear, law=law)


@pytest.mark.parametrize("law", ["bits", "one-hots", "binomials"])
def test_second_order_is_that_of_autograd(law: str) -> None:
    make_q, shape = LAWS[law]
    q = make_q(torch.randn(shape))
    f, z = pixels(q.event_shape.numel()), q.sample((2,))
    here = flips_of(q, z)
    first, second = second_order(q, f, here, f.before(z))
    flat = z.flatten(2)
    slope = torch.func.vmap(torch.func.vmap(torch.func.grad(f)))(flat)
    curvature = torch.func.vmap(torch.func.vmap(torch.func.jacrev(torch.func.grad(f))))(flat)
    d, turns = here.others.shape[-2:]
    for j in range(d):
        for turn in range(turns):
            move = torch.zeros(2, 5, d, q.event_shape.numel() // d)
            if law == "one-hots":
                move[:, :, j] = torch.eye(3)[here.others[..., j, turn]] - here.parts[..., j, :]
            else:
                move[:, :, j, 0] = here.others[..., j, turn] - z[..., j]
            move = move.reshape(2, 5, -1)
            along = (slope * move).sum(-1)
            bend = torch.einsum("sbi,sbij,sbj->sb", move, curvature, move) / 2
            torch.testing.assert_close(first[..., j, turn], along)
            torch.testing.assert_close(second[..., j, turn], bend)


def test_known_derivatives_may_take_the_place_of_autograd() -> None:
    f, h = pixels(3), torch.randn(2, 5, 4)
    slope, curvature = f.derivatives(h)
    mean = h.sigmoid()
    torch.testing.assert_close(slope, mean - PIXELS)
    torch.testing.assert_close(curvature, mean * (1 - mean))
    assert not slope.requires_grad


# -------------------------------------------------------------------------------------- which are evaluated


@pytest.mark.parametrize("flips", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("error", [0.0, 1.0, torch.tensor([[1e-30], [1.0], [1e30], [0.0]])], ids=["0", "1", "wide"])
def test_inclusion_has_m_flips_and_leaves_none_out(error: float | Tensor, flips: int) -> None:
    pi = torch.tensor([[0.5, 0.2], [1.0, 1e-300], [0.9, 0.0], [1e-5, 0.3]])
    chance = inclusion(pi, error, flips)
    assert chance.sum().item() == pytest.approx(min(flips, 8))
    assert (chance <= 1 + 1e-12).all()
    assert (chance >= 0.1 * min(flips, 8) / 8 - 1e-12).all()


def test_systematic_takes_each_with_its_probability() -> None:
    torch.manual_seed(0)
    for flips in (1, 3, 6):
        chance = inclusion(torch.rand(4, 2), torch.rand(4, 2), flips)
        start, length = cut(chance.flatten().cumsum(0), flips)
        chosen, weight = systematic(chance.expand(len(start), 4, 2), start, flips)
        assert all(len(set(row)) == flips for row in chosen.tolist())
        taken = torch.zeros(len(start), 8).scatter(-1, chosen, 1.0)
        torch.testing.assert_close(length @ taken, chance.flatten())
        torch.testing.assert_close(weight, 1 / chance.flatten()[chosen])


@pytest.mark.parametrize("start", [0.0, 0.5, 1 - 2**-53])
def test_systematic_stays_inside(start: float) -> None:
    chance = inclusion(torch.rand(50, 9).float(), torch.rand(50, 9).float(), 5)
    chosen, weight = systematic(chance, torch.tensor(start), 5)
    assert (chosen < 450).all()
    assert weight.isfinite().all()


# ------------------------------------------------------------------------------------------------ the table


def step(estimator: gl.Estimator, scale: float = 1.0, f: gl.Cost = curved, law: str = "bits") -> Tensor:
    make_q, shape = LAWS[law]
    leaf = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
    (scale * estimator(make_q(leaf), f if isinstance(f, gl.AfterLinear) else on_law(law, f))).sum().backward()
    return leaf.grad


def test_the_table_holds_what_the_slope_misses() -> None:
    """One problem, all flips of one sample: every entry by hand."""
    estimator = gl.AdaptiveLocalExpectation(flips=3)
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    q = td.Independent(td.Bernoulli(logits=logits), 1)
    noise = estimator.draw(q)
    estimator.estimate(q, curved, noise).backward()
    z = noise.z[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(curved(z[None])[0], z)
    for j in range(3):
        other = z.detach().clone()
        other[j] = 1 - other[j]
        left = curved(other[None])[0] - curved(z[None])[0] - slope[j] * (other - z)[j]
        torch.testing.assert_close(estimator.total[j, z[j].long(), 0], left.detach())
        torch.testing.assert_close(estimator.square[j, z[j].long(), 0], left.detach() ** 2)
    assert estimator.count.sum() == 3


def test_the_table_does_not_see_the_scale_of_the_loss() -> None:
    tables = []
    for scale in (1.0, -1.0, 1e-4):
        torch.manual_seed(6)
        estimator = gl.AdaptiveLocalExpectation(2, flips=2)
        for _ in range(3):
            step(estimator, scale)
        tables.append(estimator.total)
    torch.testing.assert_close(tables[1], tables[0])
    torch.testing.assert_close(tables[2], tables[0])


def test_problems_that_the_loss_leaves_out_teach_nothing() -> None:
    estimator = gl.AdaptiveLocalExpectation(flips=2)
    q = td.Independent(td.Bernoulli(logits=torch.zeros(5, 4, requires_grad=True)), 1)
    estimator(q, curved)[:2].sum().backward()
    assert estimator.count.sum() == 4
    assert estimator.total.isfinite().all()


def test_learning_reduces_the_variance() -> None:
    torch.manual_seed(0)
    f = pixels(4, separable=False)
    estimator = gl.AdaptiveLocalExpectation(flips=1)

    def spread() -> float:
        frozen = copy.deepcopy(estimator).eval()
        return gl.replicate(lambda p: frozen(LAWS["bits"][0](p), f), torch.zeros(4), 20_000).var(0).sum().item()

    before = spread()
    for _ in range(100):
        step(estimator, f=f)
    after, estimator = spread(), gl.LocalExpectation()
    assert after - spread() < 0.7 * (before - spread())


def test_the_table_is_frozen_outside_of_training() -> None:
    estimator = gl.AdaptiveLocalExpectation()
    step(estimator.eval())
    with torch.no_grad():
        estimator.train()(LAWS["bits"][0](torch.zeros(5, 4, requires_grad=True)), curved)
    assert not len(estimator.count)
    with pytest.raises(
        RuntimeError, match=r"found training mode inside torch\.func or torch\.compile, expected eval mode"
    ):
        torch.func.grad(lambda p: estimator(LAWS["bits"][0](p), curved).sum())(torch.zeros(5, 4))


def test_a_run_resumes_exactly() -> None:
    estimator = gl.AdaptiveLocalExpectation(flips=2)
    for _ in range(3):
        step(estimator, law="one-hots")
    torch.set_default_dtype(torch.float32)
    other = gl.AdaptiveLocalExpectation(flips=2)
    torch.set_default_dtype(torch.float64)
    other.load_state_dict(estimator.state_dict())
    for _ in range(2):
        torch.manual_seed(9)
        first = step(estimator, law="one-hots")
        torch.manual_seed(9)
        assert torch.equal(step(other, law="one-hots"), first)
    assert all(torch.equal(a, b) for a, b in zip(estimator.buffers(), other.buffers(), strict=True))


def test_a_black_box_is_served() -> None:
    """Without a slope the table stays empty, and the flips that are evaluated do all."""
    problem = gl.problem("bernoulli_3")
    stepped = of_cost(problem, lambda z: (z.detach().sum(-1) > 1.5).to(z) + z.detach()[..., 0])
    for estimator in (gl.TaylorLocalExpectation(flips=1), gl.AdaptiveLocalExpectation(flips=1)):
        noise, weights = outcomes(estimator, stepped, stepped.f)
        mean, _ = moments(gradients(estimator, stepped, noise, len(weights)), weights)
        torch.testing.assert_close(mean, exact(stepped), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [50.0, 1e4])
@pytest.mark.parametrize("make", [gl.TaylorLocalExpectation, gl.AdaptiveLocalExpectation])
def test_saturated_logits_stay_finite(make: type[gl.Estimator], value: float) -> None:
    logits = torch.tensor([[value, -value, 0.0]], dtype=torch.float32, requires_grad=True)
    estimator = make(flips=1)
    for _ in range(3):
        logits.grad = None
        estimator(td.Independent(td.Bernoulli(logits=logits), 1), curved).sum().backward()
        assert logits.grad.isfinite().all()


def test_bad_input() -> None:
    for make in (gl.TaylorLocalExpectation, gl.AdaptiveLocalExpectation):
        for flips in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=r"found flips=.*expected a positive int"):
                make(flips=flips)
    with pytest.raises(ValueError, match=r"found decay=1.0, expected a number in \(0, 1\)"):
        gl.AdaptiveLocalExpectation(decay=1.0)
    with pytest.raises(TypeError, match="TaylorLocalExpectation cannot serve Categorical"):
        gl.TaylorLocalExpectation()(td.Categorical(logits=torch.zeros(3, requires_grad=True)), lambda z: z)
    estimator = gl.AdaptiveLocalExpectation()
    step(estimator)
    with pytest.raises(ValueError, match="found 2 factors of 3 values, expected 4 of 2, those of its table"):
        step(estimator, law="one-hots")
