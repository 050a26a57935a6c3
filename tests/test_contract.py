"""The contract of every estimator: shapes, dtype, device, independence of problems, counts, errors."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributions as td
from cases import CASES, IDS, PAIRS, Case, on
from torch import Tensor, nn

import gradlab as gl
from gradlab.estimator import estimators


@contextlib.contextmanager
def td_validation_off() -> Iterator[None]:
    """torch validates by looking at values, which vmap forbids."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        td.Distribution.set_default_validate_args(before)


def params_of(problem: gl.Problem, *batch: int) -> dict[str, Tensor]:
    return {k: p.expand((*batch, *p.shape)).clone().requires_grad_() for k, p in problem.params.items()}


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_shapes_and_counts(case: Case, problem: gl.Problem, device: torch.device) -> None:
    """The loss has q's batch shape, f is called once, or once a chunk, at as many points as declared."""
    problem = on(device, problem)
    points = []

    def f(z: Tensor) -> Tensor:
        points.append(z.shape[: z.ndim - 2 - len(problem.q().event_shape)].numel())
        return problem.f(z)

    estimator = case.make(problem)
    params = params_of(problem, 2, 3)
    q = problem.make_q(params)
    loss = estimator(q, f)
    assert loss.shape == (2, 3) == q.batch_shape
    assert loss.dtype == torch.float64
    assert loss.device.type == device.type
    assert sum(points) == estimator.evaluations(q)
    assert len(points) == 1 or hasattr(estimator, "chunk_size") or hasattr(estimator, "flips")
    grads = torch.autograd.grad(loss.sum(), list(params.values()), materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_problems_of_a_batch_do_not_influence_each_other(case: Case, problem: gl.Problem, device: torch.device) -> None:
    problem = on(device, problem)
    estimator, params = case.make(problem), params_of(problem, 4)
    loss = estimator(problem.make_q(params), problem.f)
    grads = torch.autograd.grad(loss[1], list(params.values()), materialize_grads=True)
    for g in grads:
        others = g.clone()
        others[1] = 0
        assert others.eq(0).all()


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_float32_stays_float32(case: Case, problem: gl.Problem, device: torch.device) -> None:
    problem = on(device, problem)
    if case.name == "enumerate" and problem.name == "binomial_square":
        return  # torch lists the binomial's support in the dtype of its count
    torch.set_default_dtype(torch.float32)
    params = {k: p.float().requires_grad_() for k, p in problem.params.items()}
    narrow = replace(problem, params={k: p.detach() for k, p in params.items()}, t=problem.t.float())
    loss = case.make(narrow)(narrow.make_q(params), narrow.f)
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_is_a_module(case: Case) -> None:
    problem = gl.problem("gamma_square" if case.name in ("rsvi", "lax") else "bernoulli_3")
    estimator = case.make(problem)
    assert isinstance(estimator, nn.Module)
    assert repr(estimator).startswith(type(estimator).__name__)
    other = case.make(problem)
    other.load_state_dict(estimator.state_dict())


def test_the_seed_decides_everything_and_no_global_changes() -> None:
    for case, problem in PAIRS:
        estimator, params = case.make(problem), params_of(problem)
        before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            state = copy.deepcopy(estimator.state_dict())
            results.append(estimator(problem.make_q(params), problem.f).item())
            estimator.load_state_dict(state)
        assert results[0] == results[1], (case.name, problem.name)
        assert before == (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        )  # fmt: skip


def test_the_noise_can_be_replayed() -> None:
    """estimate is a pure function of its arguments."""
    problem = gl.problem("bernoulli_3")
    estimator, params = gl.ScoreFunction(3, gl.LeaveOneOut()), params_of(problem)
    q = problem.make_q(params)
    noise = estimator.draw(q)
    first, second = (estimator.estimate(q, problem.f, noise) for _ in range(2))
    assert torch.equal(first, second)


def test_probs_and_logits_agree() -> None:
    logits = torch.tensor([0.3, -0.5, 1.1], requires_grad=True)
    noise = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 1.0, 1.0]]])
    f = gl.problem("bernoulli_3").f
    grads = []
    for q in (td.Bernoulli(logits=logits), td.Bernoulli(probs=logits.sigmoid())):
        estimator = gl.ScoreFunction(2, gl.LeaveOneOut())
        loss = estimator.estimate(td.Independent(q.expand((1, 3)), 1), f, noise).sum()
        grads.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # torch clamps probs at eps


def test_no_grad_leaves_no_graph() -> None:
    q = td.Normal(torch.tensor(0.3, requires_grad=True), 1.0)
    with torch.no_grad():
        assert not gl.ScoreFunction(2, gl.LeaveOneOut())(q, torch.sin).requires_grad


# ---------------------------------------------------------------------------- baselines with a state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def learned_gradients(sign: float, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    w = torch.tensor(1.5, requires_grad=True)
    logits = torch.zeros(4, 3, requires_grad=True)
    estimator = gl.ScoreFunction(2, gl.Learned(Net()))
    context = torch.ones(4, 2)
    q = td.Independent(td.Bernoulli(logits=logits), 1)
    loss = estimator(q, lambda z: w * (z.sum(-1) + 3), context=context)
    (sign * getattr(loss, reduce)()).backward()
    return estimator.baseline.net.weight.grad, w.grad, logits.grad


def test_one_backward_trains_the_baseline_whatever_the_sign() -> None:
    up, w_up, q_up = learned_gradients(1.0, "sum")
    down, w_down, q_down = learned_gradients(-1.0, "sum")
    torch.testing.assert_close(up, down)
    torch.testing.assert_close(w_up, -w_down)
    torch.testing.assert_close(q_up, -q_down)
    assert (up < 0).all()  # the costs are positive and the prediction is zero: it must grow


def test_the_baseline_sees_the_scale_of_the_loss_and_its_mean() -> None:
    whole, w_whole, _ = learned_gradients(1.0, "sum")
    mean, w_mean, _ = learned_gradients(1.0, "mean")
    scaled, _, _ = learned_gradients(1024.0, "sum")
    torch.testing.assert_close(mean, whole / 4)
    torch.testing.assert_close(w_mean, w_whole / 4)
    torch.testing.assert_close(scaled, 1024 * whole)


def test_the_baseline_loss_reaches_nothing_else() -> None:
    """w's gradient is that of the plain estimate, as if there were no baseline."""
    _, w_grad, _ = learned_gradients(1.0, "sum")
    torch.manual_seed(0)
    w = torch.tensor(1.5, requires_grad=True)
    q = td.Independent(td.Bernoulli(logits=torch.zeros(4, 3, requires_grad=True)), 1)
    gl.ScoreFunction(2)(q, lambda z: w * (z.sum(-1) + 3)).sum().backward()
    torch.testing.assert_close(w_grad, w.grad)


def test_learning_the_baseline_reduces_the_variance() -> None:
    context = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    level = torch.tensor([5.0, -3.0])
    estimator = gl.ScoreFunction(1, gl.Learned(Net()))
    optimiser = torch.optim.SGD(estimator.parameters(), lr=0.2)

    def gradients() -> Tensor:
        return gl.replicate(
            lambda p: estimator(td.Independent(td.Bernoulli(logits=p), 1), f, context.expand(len(p), 2, 2)),
            torch.zeros(2, 3),
            2000,
        )

    def f(z: Tensor) -> Tensor:
        return z.sum(-1) + level

    before = gradients().var(0).sum()
    for _ in range(60):
        optimiser.zero_grad()
        q = td.Independent(td.Bernoulli(logits=torch.zeros(2, 3, requires_grad=True)), 1)
        (-estimator(q, f, context).mean()).backward()
        optimiser.step()
    assert gradients().var(0).sum() < before / 5


def test_moving_average_moves_in_training_and_freezes_in_eval() -> None:
    baseline = gl.MovingAverage(0.5)
    assert baseline(torch.full((2, 3), 4.0)).eq(0).all()
    torch.testing.assert_close(baseline(torch.full((2, 3), 8.0)), torch.full((2, 3), 4.0))
    baseline.eval()
    for _ in range(2):
        torch.testing.assert_close(baseline(torch.zeros(1)), torch.tensor([20 / 3]))
    assert set(baseline.state_dict()) == {"average", "weight"}
    other = gl.MovingAverage(0.5).eval()
    other.load_state_dict(baseline.state_dict())
    torch.testing.assert_close(other(torch.zeros(1)), baseline(torch.zeros(1)))


# --------------------------------------------------------------------------------------- bad input


def bernoulli() -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=torch.zeros(3, requires_grad=True)), 1)


def test_missing_independent() -> None:
    q = td.Bernoulli(logits=torch.zeros(5, 3, requires_grad=True))
    with pytest.raises(ValueError, match=r"found shape \(1, 5\).*expected \(1, 5, 3\).*Independent\(q, 1\)"):
        gl.ScoreFunction()(q, lambda z: z.sum(-1))


def test_cost_that_keeps_the_event_dims() -> None:
    with pytest.raises(ValueError, match=r"found shape \(1, 3\).*expected \(1,\).*Sum f over the event dims"):
        gl.ScoreFunction()(bernoulli(), lambda z: z)


def test_cost_that_reduces_the_samples() -> None:
    with pytest.raises(ValueError, match=r"found shape \(\).*expected \(4,\)"):
        gl.ScoreFunction(4)(bernoulli(), lambda z: z.sum())


def test_cost_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="found float, expected a Tensor"):
        gl.ScoreFunction()(bernoulli(), lambda z: 1.0)


def test_cost_with_nan() -> None:
    with pytest.raises(ValueError, match=r"found NaN or infinity in 2 of 4 costs"):
        gl.ScoreFunction(4)(bernoulli(), lambda z: torch.tensor([1.0, float("nan"), 2.0, float("nan")]))


def test_support_that_moves_below_a_transform() -> None:
    """The score function would be silently biased: the package must see the edge behind the transform."""
    theta = torch.tensor(1.2, requires_grad=True)
    shifted = td.TransformedDistribution(td.Exponential(1.0), [td.AffineTransform(theta, 1.0)])
    stretched = td.TransformedDistribution(td.Uniform(0.0, theta), [td.ExpTransform()])
    for q in (shifted, stretched, td.Pareto(theta, 2.0), td.Independent(td.Uniform(torch.zeros(2), theta), 1)):
        assert not gl.ScoreFunction.supports(q)
    scaled = td.TransformedDistribution(td.Exponential(1.0), [td.AffineTransform(0.0, theta)])
    for q in (scaled, td.LogNormal(theta, 1.0), td.Gumbel(theta, 1.0), td.Weibull(theta, 2.0), td.HalfNormal(theta)):
        assert gl.ScoreFunction.supports(q)


def test_a_circular_mean_is_no_mean() -> None:
    circle = td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.VonMises(torch.zeros(2), 2.0))
    assert not gl.MuProp.supports(circle)
    with pytest.raises(TypeError, match="standardize: found MixtureSameFamily"):
        gl.standardize(circle)


def test_control_variate_that_keeps_the_event_dims() -> None:
    q = td.Independent(td.Normal(torch.zeros(3, requires_grad=True), 1.0), 1)
    with pytest.raises(ValueError, match=r"f\(z\): found shape \(3, 3\)"):
        gl.ControlVariate(lambda z: z, lambda q: q.mean, num_samples=3)(q, lambda z: z.sum(-1))
    with pytest.raises(ValueError, match=r"found a mean of zeta of shape \(3,\), expected \(\)"):
        gl.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean)(q, lambda z: z.sum(-1))


def test_integer_costs_and_infinite_costs() -> None:
    logits = torch.zeros(3, requires_grad=True)
    for baseline in (0.5, gl.LeaveOneOut(), gl.MovingAverage()):
        gl.ScoreFunction(3, baseline)(td.Categorical(logits=logits), lambda z: z).backward()
    with pytest.raises(ValueError, match="found NaN or infinity"):
        gl.ScoreFunction(9, gl.LeaveOneOut())(bernoulli(), lambda z: 1 / z.sum(-1).mul(0))


def test_muprop_serves_a_batch_norm_in_f() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    logits = torch.zeros(5, 3, requires_grad=True)
    q = td.Independent(td.Bernoulli(logits=logits), 1)
    gl.MuProp(2)(q, lambda z: net(z.reshape(-1, 3)).reshape(z.shape[:-1])).sum().backward()
    assert net[1].weight.grad.isfinite().all()
    assert logits.grad.isfinite().all()


def test_moving_average_in_training_under_torch_func() -> None:
    estimator = gl.ScoreFunction(2, gl.MovingAverage())
    with pytest.raises(RuntimeError, match="expected eval mode"):
        torch.func.grad(lambda p: estimator(td.Normal(p, 1.0), torch.sin))(torch.tensor(0.3))


def test_parameters_of_a_transform_have_no_scores() -> None:
    q = td.TransformedDistribution(
        td.Normal(0.0, 1.0), [td.AffineTransform(torch.tensor(0.3, requires_grad=True), 1.0)]
    )
    with pytest.raises(ValueError, match="found no parameter that TransformedDistribution holds"):
        gl.ControlVariate(lambda z: z, lambda q: torch.zeros(()), "optimal", 4)(q, torch.sin)


def test_truncated_normal_with_an_infinite_bound() -> None:
    loc, scale = torch.tensor(0.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    half = gl.TruncatedNormal(loc, scale, 0.0, float("inf"))
    value = gl.Quadrature()(half, lambda z: z)
    assert value.item() == pytest.approx((2 / torch.pi) ** 0.5, rel=1e-10)
    grads = torch.autograd.grad(value, [loc, scale])
    expected = torch.autograd.grad(half.mean, [loc, scale])
    torch.testing.assert_close(grads, expected)
    value = gl.Quadrature()(gl.TruncatedNormal(loc, scale, float("-inf"), 0.5), lambda z: z)
    torch.testing.assert_close(value, gl.TruncatedNormal(loc, scale, float("-inf"), 0.5).mean)


def test_quadrature_that_misses_mass_raises() -> None:
    q = td.TransformedDistribution(td.Exponential(torch.ones((), requires_grad=True), validate_args=False),
                                   [td.AffineTransform(0.5, 1.0)], validate_args=False)  # fmt: skip
    with pytest.raises(ValueError, match="found a total mass"):
        gl.Quadrature()(q, lambda z: z)


def test_unequal_binomials_cannot_be_enumerated() -> None:
    assert not gl.Enumerate.supports(td.Binomial(torch.tensor([3.0, 5.0]), logits=torch.zeros(2)))


def test_transform_in_place_of_a_number() -> None:
    with pytest.raises(TypeError, match="found transform=4"):
        gl.GeneralizedReparameterization(4)


def test_q_without_gradient() -> None:
    q = td.Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"result without gradient for Normal.*requires_grad=True"):
        gl.ScoreFunction()(q, torch.sin)


def test_cost_without_derivative() -> None:
    q = td.Normal(torch.zeros((), requires_grad=True), 1.0)
    with pytest.raises(ValueError, match=r"Make f differentiable in z.*ScoreFunction"):
        gl.Reparameterization()(q, lambda z: (z > 0).double())


def test_q_that_is_no_distribution() -> None:
    with pytest.raises(TypeError, match=r"found q of type Tensor, expected a torch\.distributions\.Distribution"):
        gl.ScoreFunction()(torch.zeros(3), torch.sin)


@pytest.mark.parametrize(
    ("estimator", "q", "able"),
    [
        (gl.Reparameterization(), bernoulli(), "ControlVariate, Enumerate, MuProp, ScoreFunction"),
        (gl.ImplicitReparameterization(), td.Poisson(torch.tensor(2.0)), "ControlVariate, MuProp, ScoreFunction"),
        (gl.Enumerate(), td.Poisson(torch.tensor(2.0)), "ControlVariate, MuProp, ScoreFunction"),
        (gl.Enumerate(), td.Normal(0.0, 1.0), "Reparameterization"),
        (gl.RejectionReparameterization(), td.Normal(0.0, 1.0), "Reparameterization"),
        (gl.MuProp(), td.Categorical(torch.ones(3)), "Enumerate"),
        (gl.ScoreFunction(), td.Uniform(0.0, torch.tensor(1.0, requires_grad=True)), "Reparameterization"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_unsupported_q_names_those_that_can(estimator: gl.Estimator, q: td.Distribution, able: str) -> None:
    with pytest.raises(TypeError, match=rf"{type(estimator).__name__} cannot serve .*{type(q).__name__}") as error:
        estimator(q, lambda z: z)
    named = str(error.value).split("Estimators that can: ")[1]
    assert all(re.search(rf"\b{name}\b", named) for name in able.split(", "))


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True, "3"])
def test_number_of_samples(num_samples: object) -> None:
    with pytest.raises(ValueError, match="expected a positive int"):
        gl.ScoreFunction(num_samples)


def test_one_sample_for_leave_one_out() -> None:
    with pytest.raises(ValueError, match=r"LeaveOneOut: found num_samples=1, expected at least 2"):
        gl.ScoreFunction(1, gl.LeaveOneOut())


def test_baseline_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="found str, expected None, a number or a gradlab baseline"):
        gl.ScoreFunction(1, "mean")


def test_coefficient_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="expected a number or 'optimal'"):
        gl.ControlVariate(torch.sin, lambda q: q.mean, "best")
    with pytest.raises(ValueError, match="expected at least 3"):
        gl.ControlVariate(torch.sin, lambda q: q.mean, "optimal", 2)


def test_learned_baseline_without_context() -> None:
    with pytest.raises(ValueError, match=r"found no context.*context=x"):
        gl.ScoreFunction(1, gl.Learned(Net()))(bernoulli(), lambda z: z.sum(-1))


def test_learned_baseline_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"found a baseline of shape \(5,\).*expected \(\) or \(1,\)"):
        gl.ScoreFunction(1, gl.Learned(Net()))(bernoulli(), lambda z: z.sum(-1), context=torch.ones(5, 2))


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        gl.MovingAverage(1.0)


def test_too_many_values_to_enumerate() -> None:
    q = td.Independent(td.Bernoulli(logits=torch.zeros(30, requires_grad=True)), 1)
    with pytest.raises(ValueError, match="found 1073741824 joint values, expected at most 1048576"):
        gl.Enumerate()(q, lambda z: z.sum(-1))


def test_samplers_name_their_remedy() -> None:
    with pytest.raises(TypeError, match=r"rsample: found VonMises.*gradlab.implicit"):
        gl.rsample(td.VonMises(0.0, 1.0))
    with pytest.raises(TypeError, match=r"inverse_cdf: found Gamma.*no icdf"):
        gl.inverse_cdf(td.Gamma(1.0, 1.0))
    with pytest.raises(TypeError, match=r"standardize: found Dirichlet.*Pass transform="):
        gl.standardize(td.Dirichlet(torch.ones(3)))


# ------------------------------------------------------------------------------ torch.func and compile


@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_torch_func(case: Case, problem: gl.Problem, device: torch.device) -> None:
    """grad equals autograd on the same seed; vmap of grad gives one gradient a problem."""
    problem = on(device, problem)
    estimator = case.make(problem).eval()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return estimator(problem.make_q(params), problem.f)

    torch.manual_seed(1)
    ours = torch.func.grad(loss)({k: p.clone() for k, p in problem.params.items()})
    torch.manual_seed(1)
    params = params_of(problem)
    theirs = torch.autograd.grad(loss(params), list(params.values()), materialize_grads=True)
    for got, expected in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("case", "problem"), PAIRS, ids=IDS)
def test_vmap_of_grad(case: Case, problem: gl.Problem, device: torch.device) -> None:
    """One gradient a problem, with randomness of its own."""
    if problem.name in ("binomial_square", "geometric_exp"):
        return  # torch samples neither below vmap
    if problem.name == "student_cos" and case.name not in ("implicit", "score"):
        return  # StudentT.mean has no batching rule
    problem = on(device, problem)
    estimator = case.make(problem).eval()

    def loss(params: dict[str, Tensor]) -> Tensor:
        with td_validation_off():
            return estimator(problem.make_q(params), problem.f)

    many = {k: p.expand(100, *p.shape) for k, p in problem.params.items()}
    try:
        grads = torch.func.vmap(torch.func.grad(loss), randomness="different")(many)
    except (RuntimeError, UserWarning):
        if case.name == "reparameterization":  # torch's rsample: some refuse, none may be silently wrong
            return
        raise
    for name, g in grads.items():
        assert g.shape == many[name].shape
        assert g.isfinite().all()
    plain = gl.replicate(loss, problem.params, 100)
    assert any(map(_spread, grads.values())) == any(map(_spread, plain.values()))


def _spread(grads: Tensor) -> bool:
    return bool((grads.std(0) > 1e-9).any())


COMPILED = [
    ("gumbel-softmax, hard", "onehot_5x3"),
    ("reinmax", "bernoulli_3"),
    ("rebar", "bernoulli_3"),
    ("relax", "onehot_5x3"),
    ("disarm", "onehot_5x3"),
    ("measure-valued", "normals_3"),
    ("local expectation", "onehot_5x3"),
    ("taylor local expectation", "bernoulli_3"),
    ("adaptive local expectation", "onehot_5x3"),
    ("score", "normal_square"),
    ("score, leave-one-out", "normals_3"),
    ("control variate", "normal_square"),
    ("reparameterization", "normals_3"),
    ("inverse cdf", "laplace_cos"),
    ("implicit", "gamma_square"),
    ("implicit", "mixture_cos"),
    ("g-rep", "normal_square"),
    ("rsvi", "gamma_square"),
]


@pytest.mark.parametrize(("name", "problem"), COMPILED, ids=lambda x: x)
def test_compiles_to_one_graph(name: str, problem: str, device: torch.device) -> None:
    """The eager backend: one graph and the right numbers, without the minutes of a code generator."""
    case, at = next((c, on(device, p)) for c, p in PAIRS if (c.name, p.name) == (name, problem))
    estimator = case.make(at).eval()

    def gradients(call) -> list[Tensor]:
        params = params_of(at, 3)
        torch.manual_seed(4)
        with td_validation_off():
            loss = call(params)
        return list(torch.autograd.grad(loss.sum(), list(params.values()), materialize_grads=True))

    def loss(params: dict[str, Tensor]) -> Tensor:
        return estimator(at.make_q(params), at.f)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(got, expected)


def test_every_estimator_is_tested() -> None:
    tested = {type(case.make(gl.problem("bernoulli_3"))) for case in CASES} | {gl.Quadrature}
    public = {e for e in estimators() if e.__module__.startswith("gradlab")}
    assert public <= tested
