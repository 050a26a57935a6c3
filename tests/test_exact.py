"""Rung 1: the mean and the variance of an estimator, integrated exactly over its noise.

No seed and no standard error: all joint outcomes of a discrete noise are enumerated, a continuous one is
integrated by quadrature. The mutants at the end are the mistakes that these tests must catch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.baselines import weighted
from gradlab.coupled import binary_logits
from gradlab.distributions import support
from gradlab.exact import Split
from gradlab.generalized import Accepted, log_accepted
from gradlab.gumbel import discrete
from gradlab.quadrature import gauss_legendre
from gradlab.rebar import Coupled

TOLERANCE = 1e-10
TORCH_BESSEL = 1e-7  # torch's von Mises log_prob is a polynomial of that accuracy


def moments(grads: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of ``grads [N, P]`` under ``weights [N]``."""
    mean = weights @ grads
    return mean, weights @ grads**2 - mean**2


def gradients(estimator: gl.Estimator, problem: gl.Problem, noise: object, count: int, of_t: bool = False) -> Tensor:
    """Return the gradient for each of ``count`` outcomes of the noise, which sits in the batch: ``[count, P]``."""
    params = {k: p.expand(count, *p.shape).clone().requires_grad_() for k, p in problem.params.items()}
    t = problem.t.expand(count).clone().requires_grad_()
    q = problem.make_q(params)
    loss = estimator.estimate(q, problem.f_at(t), noise).sum()
    wrt = [t] if of_t else list(params.values())
    grads = torch.autograd.grad(loss, wrt, materialize_grads=True)
    return torch.cat([g.reshape(count, -1) for g in grads], 1)


def joint_outcomes(problem: gl.Problem, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return all outcomes of S independent samples, ``[S, N, *E]``, and their probabilities ``[N]``."""
    q = problem.q()
    values = support(q)
    probs = q.log_prob(values).exp()
    index = torch.tensor(list(itertools.product(range(len(values)), repeat=num_samples)))
    return values[index].transpose(0, 1), probs[index].prod(1)


def exact(problem: gl.Problem) -> Tensor:
    return torch.cat([g.reshape(-1) for g in problem.exact()[0].values()])


def check(estimator: gl.Estimator, problem: gl.Problem, noise: object, weights: Tensor) -> Tensor:
    """Assert that the mean gradients are exact, of q's parameters and of f's; return the variance."""
    tolerance = TORCH_BESSEL if problem.name == "von_mises_cos" else TOLERANCE
    mean, variance = moments(gradients(estimator, problem, noise, len(weights)), weights)
    torch.testing.assert_close(mean, exact(problem), rtol=tolerance, atol=tolerance)
    mean_t, _ = moments(gradients(estimator, problem, noise, len(weights), of_t=True), weights)
    torch.testing.assert_close(mean_t, problem.exact()[1].reshape(1), rtol=tolerance, atol=tolerance)
    return variance


# ---------------------------------------------------------------------------- discrete noise, enumerated


def _zeta(z: Tensor) -> Tensor:
    return torch.cos(z.sum(tuple(range(-len(z.shape) + 2, 0)))) if z.ndim > 2 else torch.cos(1.0 * z)


def _control(**kwargs: object) -> gl.ControlVariate:
    return gl.ControlVariate(_zeta, lambda q: gl.Enumerate()(q, _zeta), **kwargs)


DISCRETE = {
    "score": gl.ScoreFunction(1),
    "constant": gl.ScoreFunction(2, 0.7),
    "leave-one-out 2": gl.ScoreFunction(2, gl.LeaveOneOut()),
    "leave-one-out 3": gl.ScoreFunction(3, gl.LeaveOneOut()),
    "control variate": _control(),
    "control variate 0.3": _control(coefficient=0.3, num_samples=2),
    "control variate optimal": _control(coefficient="optimal", num_samples=3),
    "muprop": gl.MuProp(1),
    "muprop leave-one-out": gl.MuProp(2, gl.LeaveOneOut()),
    "local expectation": gl.LocalExpectation(1),
    "local expectation 2": gl.LocalExpectation(2, chunk_size=2),
    "double control variate 2": gl.DoubleControlVariate(2, coefficient=0.7),
    "double control variate 3": gl.DoubleControlVariate(3),
}
FINITE = [
    "bernoulli_toy",
    "bernoulli_toy_499",
    "bernoulli_3",
    "categorical_3",
    "onehot_3",
    "onehot_10",
    "binomial_square",
]


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("key", DISCRETE)
def test_discrete_mean_is_exact(key: str, name: str) -> None:
    estimator, problem = DISCRETE[key], gl.problem(name)
    if not estimator.supports(problem.q()):
        assert name == "categorical_3" or key.startswith("double")  # an index has no mean
        return
    noise, weights = joint_outcomes(problem, estimator.num_samples)
    check(estimator, problem, noise, weights)


def _parts(name: str) -> tuple[gl.Problem, Tensor, Tensor, Tensor, Tensor]:
    """Return the problem with p [N], f [N] and the score [N, P] of each joint value, by hand."""
    problem = gl.problem(name)
    logits = problem.params["logits"]
    values = support(problem.q())
    f = problem.f(values)
    if name.startswith("bernoulli"):
        flat = values.reshape(len(values), -1)
        score = flat - logits.sigmoid()
        p = torch.where(flat > 0, logits.sigmoid(), 1 - logits.sigmoid()).prod(-1)
    else:
        p = logits.softmax(-1)
        score = torch.eye(len(p)) - p
    return problem, p, f, score, (p * f) @ score


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_3", "categorical_3", "onehot_10"])
@pytest.mark.parametrize("b", [0.0, 0.7])
def test_variance_of_the_score_function(name: str, b: float) -> None:
    problem, p, f, score, mean = _parts(name)
    noise, weights = joint_outcomes(problem, 1)
    expected = p @ ((f - b)[:, None] * score) ** 2 - mean**2
    torch.testing.assert_close(check(gl.ScoreFunction(1, b), problem, noise, weights), expected)


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_3", "categorical_3", "onehot_10"])
def test_variance_of_leave_one_out(name: str) -> None:
    """With two samples it is the pairwise form (f1 - f2)(s1 - s2) / 2."""
    problem, p, f, score, mean = _parts(name)
    noise, weights = joint_outcomes(problem, 2)
    pairwise = (f[:, None] - f)[..., None] * (score[:, None] - score) / 2
    expected = torch.einsum("i,j,ijp->p", p, p, pairwise**2) - mean**2
    torch.testing.assert_close(check(gl.ScoreFunction(2, gl.LeaveOneOut()), problem, noise, weights), expected)


@pytest.mark.parametrize("name", ["bernoulli_3", "onehot_10"])
@pytest.mark.parametrize("a", [1.0, -0.4])
def test_variance_of_the_control_variate(name: str, a: float) -> None:
    problem, p, f, score, mean = _parts(name)
    zeta = _zeta(support(problem.q())[None])[0]
    noise, weights = joint_outcomes(problem, 1)
    known = (p * zeta) @ score
    expected = p @ ((f - a * zeta)[:, None] * score + a * known) ** 2 - mean**2
    torch.testing.assert_close(check(_control(coefficient=a), problem, noise, weights), expected)


@pytest.mark.parametrize("name", ["bernoulli_3", "onehot_10"])
def test_variance_of_muprop(name: str) -> None:
    problem, p, f, score, mean = _parts(name)
    values = support(problem.q())
    center = (p @ values).requires_grad_()
    at_center = problem.f(center)
    (slope,) = torch.autograd.grad(at_center, center)
    residual = f - at_center.detach() - (values - center.detach()) @ slope
    known = torch.einsum("n,nd,np->dp", p, values, score).T @ slope  # slope . dE[z]
    expected = p @ (residual[:, None] * score + known) ** 2 - mean**2
    noise, weights = joint_outcomes(problem, 1)
    torch.testing.assert_close(check(gl.MuProp(1), problem, noise, weights), expected)


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_3", "onehot_3", "onehot_10", "categorical_3"])
def test_local_expectation_is_the_conditional_mean_of_the_score_function(name: str) -> None:
    """Its variance, worked out from the definition: all values of one factor, given the others."""
    problem = gl.problem(name)
    noise, weights = joint_outcomes(problem, 1)
    variance = check(gl.LocalExpectation(), problem, noise, weights)
    if name != "bernoulli_3":
        torch.testing.assert_close(variance, torch.zeros_like(variance), rtol=0, atol=1e-14)
        return
    p = problem.params["logits"].sigmoid()
    flips = torch.stack([problem.f(noise[0].index_fill(1, torch.tensor([j]), v)) for v in (1.0, 0.0) for j in range(3)])
    gain = (flips[:3] - flips[3:]).T * p * (1 - p)
    torch.testing.assert_close(variance, weights @ gain**2 - (weights @ gain) ** 2)


@pytest.mark.parametrize("name", ["bernoulli_3", "categorical_3", "onehot_3", "onehot_10"])
@pytest.mark.parametrize("top", [1, 2, 100])
def test_sum_and_sample_is_exact(top: int, name: str) -> None:
    problem = gl.problem(name)
    estimator = gl.SumAndSample(top, 1, 0.3)
    values = support(problem.q())
    p = problem.q().log_prob(values).exp()
    heavy = p.topk(min(top, len(p))).indices
    rest = p.index_fill(0, heavy, 0.0)
    weights = rest / rest.sum() if top < len(p) else torch.full_like(p, 1 / len(p))
    noise = Split(values[heavy][:, None].expand(-1, len(p), *values.shape[1:]), values[None])
    variance = check(estimator, problem, noise, weights)
    if top >= len(p) - 1:
        torch.testing.assert_close(variance, torch.zeros_like(variance), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["bernoulli_3", "categorical_3", "onehot_3", "onehot_10"])
@pytest.mark.parametrize("size", [2, 3])
def test_unordered_set_is_exact(size: int, name: str) -> None:
    problem = gl.problem(name)
    values = support(problem.q())
    p = problem.q().log_prob(values).exp()
    orders = torch.tensor(list(itertools.permutations(range(len(p)), size)))
    before = torch.cat([torch.zeros(len(orders), 1), p[orders].cumsum(1)[:, :-1]], 1)
    weights = (p[orders] / (1 - before)).prod(1)  # drawn one after the other, without replacement
    variance = check(gl.UnorderedSet(size), problem, values[orders].transpose(0, 1), weights)
    if size == len(p):
        torch.testing.assert_close(variance, torch.zeros_like(variance), rtol=0, atol=1e-14)


def cut_uniforms(problem: gl.Problem) -> tuple[Tensor, Tensor]:
    """Return uniforms on the pieces between p and 1 - p, two Gauss-Legendre nodes each, and their weights."""
    p = torch.sigmoid(binary_logits(problem.q())).reshape(-1)
    axes, masses = [], []
    for one in p.tolist():
        edges = torch.tensor([0.0, min(one, 1 - one), max(one, 1 - one), 1.0])
        middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
        axes.append(torch.cat([middle - half / 3**0.5, middle + half / 3**0.5]))
        masses.append(torch.cat([half, half]))
    grid = [torch.cartesian_prod(*x).reshape(-1, len(p)) for x in (axes, masses)]
    return grid[0].reshape(1, -1, *binary_logits(problem.q()).shape), grid[1].prod(1)


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_toy_499", "bernoulli_3", "onehot_3"])
@pytest.mark.parametrize("estimator", [gl.ARM(), gl.DisARM()], ids=repr)
def test_antithetic_pairs_are_exact(estimator: gl.Estimator, name: str) -> None:
    problem = gl.problem(name)
    if estimator.supports(problem.q()):
        check(estimator, problem, *cut_uniforms(problem))
    else:
        assert name == "onehot_3"


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_3"])
def test_disarm_is_arm_averaged(name: str) -> None:
    problem = gl.problem(name)
    noise, weights = cut_uniforms(problem)
    arm, disarm = (check(e, problem, noise, weights) for e in (gl.ARM(), gl.DisARM()))
    assert (disarm < arm).all()


def test_variance_of_disarm_on_one_bernoulli() -> None:
    """It is (f1 - f0) / 2 times sigma(|logit|) with the chance that the pair differs, and zero otherwise."""
    problem = gl.problem("bernoulli_toy")
    logit = problem.params["logits"]
    gap = (problem.f(torch.ones(())) - problem.f(torch.zeros(()))) / 2 * torch.sigmoid(logit.abs())
    differ = 2 * torch.sigmoid(-logit.abs())
    expected = differ * gap**2 - (differ * gap) ** 2
    variance = check(gl.DisARM(), problem, *cut_uniforms(problem))
    torch.testing.assert_close(variance, expected.reshape(1))


class Cosine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.cos(x) + 0.2 * torch.tanh(x)


@pytest.mark.parametrize("name", ["bernoulli_toy", "bernoulli_toy_499"])
@pytest.mark.parametrize(
    "estimator",
    [gl.REBAR(1, 0.4, 0.7), gl.REBAR(1, 1.5, -0.3), gl.RELAX(Cosine()), gl.RELAX(Cosine(), temperature=0.8)],
    ids=["rebar", "rebar hot", "relax", "relax with the relaxed cost"],
)
def test_rebar_and_relax_are_exact(estimator: gl.Estimator, name: str) -> None:
    """Two logistic noises, the first cut where the sample changes."""
    problem = gl.problem(name)
    x, m = logistic_nodes(-problem.params["logits"].item())
    y, w = logistic_nodes(0.0)
    grid, weights = torch.cartesian_prod(x, y), torch.cartesian_prod(m, w).prod(1)
    noise, fresh = grid[:, 0][None], grid[:, 1][None]
    hard = (problem.params["logits"] + noise > 0).to(noise)
    check(estimator, problem, Coupled(hard, noise, fresh), weights)


@pytest.mark.parametrize("other", [(0.4, -1.2), (-2.0, 0.3), (1.5, 2.5)])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_rebar_of_two_bits_is_exact_given_the_other(temperature: float, other: tuple[float, float]) -> None:
    r"""With the second bit's :math:`x_2, \tilde x_2` held fixed, the mean over the first one's noises is
    :math:`\partial_1 E f(b_1, b_2) + \partial_1 E c(x_1, x_2) - \partial_1 E c(x_1, \tilde x_2)`.

    The last two cancel in the mean, since :math:`x_2` and its twin have one law.
    """
    logits, eta = torch.tensor([0.3, -0.8]), 0.7

    def f(z: Tensor) -> Tensor:
        return (z[..., 0] - 0.45) ** 2 * torch.cos(2 * z[..., 1]) + z.prod(-1)

    x, m = logistic_nodes(-logits[0].item())
    y, w = logistic_nodes(0.0)
    grid, weights = torch.cartesian_prod(x, y), torch.cartesian_prod(m, w).prod(1)
    noise, fresh = (torch.stack([grid[:, i], torch.full_like(weights, other[i])], -1)[None] for i in (0, 1))
    many = logits.expand(len(weights), 2).clone().requires_grad_()
    q = td.Independent(td.Bernoulli(logits=many), 1)
    hard = (many.detach() + noise > 0).to(noise)
    loss = gl.REBAR(1, temperature, eta).eval().estimate(q, f, Coupled(hard, noise, fresh))
    mean = weights @ torch.autograd.grad(loss.sum(), many)[0][:, 0]

    twin = logits[1] + discrete(q).given(many.detach(), hard, fresh)[0, 0, 1]
    bit, p = hard[0, 0, 1], torch.sigmoid(logits[0])
    zero, one = (f(torch.stack([torch.tensor(b, dtype=bit.dtype, device=bit.device), bit])) for b in (0.0, 1.0))
    ends = torch.stack([logits[1] + other[0], twin])
    first = logits[0].clone().requires_grad_()
    relaxed = torch.sigmoid(torch.stack(torch.broadcast_tensors((first + x)[:, None], ends), -1) / temperature)
    (slope,) = torch.autograd.grad((m @ f(relaxed)) @ torch.tensor([1.0, -1.0]), first)
    torch.testing.assert_close(mean, p * (1 - p) * (one - zero) + eta * slope, rtol=0, atol=1e-10)


def logistic_nodes(cut: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights for logistic noise on the line, with a cut."""
    x, w = (torch.as_tensor(a) for a in gauss_legendre(40.0, 40, [cut]))
    return x, w * torch.sigmoid(x) * torch.sigmoid(-x)


# -------------------------------------------------------------------------- continuous noise, integrated


def sample_nodes(problem: gl.Problem) -> tuple[Tensor, Tensor]:
    """Return one-sample noise ``[1, N]`` and its weights, from the quadrature of q."""
    q = problem.q()
    nodes = problem.oracle().draw(q)
    weights = nodes.weight * q.log_prob(nodes.z).exp()
    keep = torch.isfinite(weights) & (weights > 1e-40)
    return nodes.z[keep][None], weights[keep]


def uniform_nodes(ends: float = 3.3) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on (0, 1) that are dense at both ends, where inverse cdfs are singular."""
    t, w = (torch.as_tensor(x) for x in gauss_legendre(ends, 128, []))
    s = torch.sigmoid(math.pi * t.sinh())
    return s.clamp(2**-53, 1 - 2**-53), w * math.pi * t.cosh() * s * torch.sigmoid(-math.pi * t.sinh())


LINE = ["normal_square", "normal_relu", "laplace_cos", "logistic_square", "student_cos", "mixture_cos"]
HALF = ["gamma_square", "gamma_exp", "gamma_small", "beta_square", "truncated_square", "von_mises_cos"]


@pytest.mark.parametrize("name", [*LINE, "normal_step", *HALF])
@pytest.mark.parametrize("estimator", [gl.ScoreFunction(1), gl.ScoreFunction(1, 0.7)], ids=["0", "0.7"])
def test_score_function_is_exact_on_continuous_q(estimator: gl.Estimator, name: str) -> None:
    problem = gl.problem(name)
    noise, weights = sample_nodes(problem)
    check(estimator, problem, noise, weights)


@pytest.mark.parametrize("name", [*LINE, "gamma_square", "gamma_exp", "gamma_small", "beta_square"])
def test_muprop_is_exact_on_continuous_q(name: str) -> None:
    problem = gl.problem(name)
    check(gl.MuProp(1), problem, *sample_nodes(problem))


@pytest.mark.parametrize("name", ["normal_square", "gamma_square", "beta_square"])
def test_control_variate_is_exact_on_continuous_q(name: str) -> None:
    problem = gl.problem(name)
    estimator = gl.ControlVariate(lambda z: z**2, lambda q: q.variance + q.mean**2, coefficient=0.8)
    check(estimator, problem, *sample_nodes(problem))


def _partial(q: td.Distribution) -> td.Transform:
    """A transform that removes some of the parameters from the noise, and not all."""
    if isinstance(q, td.Gamma):
        return td.ComposeTransform([td.AffineTransform(0.0, q.concentration.rsqrt()), td.ExpTransform()])
    return td.AffineTransform(q.loc - q.scale * q.loc, q.scale)


@pytest.mark.parametrize("name", [*LINE, "gamma_square", "gamma_exp", "gamma_small", "beta_square"])
@pytest.mark.parametrize("transform", [None, _partial], ids=["standardize", "partial"])
def test_g_rep_is_exact(transform: Callable[..., td.Transform] | None, name: str) -> None:
    problem = gl.problem(name)
    if transform is not None and name in ("mixture_cos", "beta_square"):
        transform = lambda q: td.identity_transform  # noqa: E731
    check(gl.GeneralizedReparameterization(transform), problem, *sample_nodes(problem))


@pytest.mark.parametrize("name", ["normal_square", "laplace_cos", "logistic_square"])
def test_lax_is_exact(name: str) -> None:
    from gradlab.paths import _rule

    problem = gl.problem(name)
    z, weights = sample_nodes(problem)
    check(gl.LAX(Cosine()), problem, _rule(problem.q()).invert(problem.q(), z), weights)


@pytest.mark.parametrize("name", ["normal_square", "laplace_cos", "logistic_square", "uniform_square"])
def test_inverse_cdf_is_exact(name: str) -> None:
    problem = gl.problem(name)
    u, weights = uniform_nodes()

    def nodes(q: td.Distribution, shape: torch.Size) -> Tensor:
        return q.icdf(u)[None]

    params = {k: p.expand(len(u)).clone().requires_grad_() for k, p in problem.params.items()}
    q = problem.make_q(params)
    estimator = gl.Reparameterization(1, nodes)
    loss = estimator.estimate(q, problem.f, estimator.draw(q)).sum()
    grads = torch.stack(torch.autograd.grad(loss, list(params.values())), 1)
    mean, _ = moments(grads, weights)
    torch.testing.assert_close(mean, exact(problem), rtol=1e-9, atol=1e-9)  # the mass beyond a double is missing


@pytest.mark.parametrize("name", ["gamma_square", "gamma_exp", "student_cos", "von_mises_cos", "truncated_square"])
def test_implicit_is_exact(name: str) -> None:
    """The noise of these is the standardised sample itself, so q's own quadrature integrates it."""
    from gradlab.paths import _rule

    problem = gl.problem(name)
    z, weights = sample_nodes(problem)
    estimator = gl.ImplicitReparameterization(1)
    noise = _rule(problem.q()).invert(problem.q(), z)
    mean, _ = moments(gradients(estimator, problem, noise, len(weights)), weights)
    torch.testing.assert_close(mean, exact(problem), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gamma_square", "gamma_exp", "gamma_small"])
@pytest.mark.parametrize("boost", [0, 1])
def test_rsvi_is_exact(boost: int, name: str) -> None:
    problem = gl.problem(name)
    alpha = problem.params["concentration"] + boost
    if alpha < 1:
        with pytest.raises(ValueError, match=r"expected\s+at least 1"):
            gl.RejectionReparameterization(1, boost=0)(problem.q(), problem.f)
        return
    mean, _ = moments(*_rsvi_gradients(gl.RejectionReparameterization(1, boost), problem))
    torch.testing.assert_close(mean, exact(problem), rtol=1e-9, atol=1e-9)


def _rsvi_gradients(estimator: gl.RejectionReparameterization, problem: gl.Problem) -> tuple[Tensor, Tensor]:
    """Return the gradients on a grid of accepted noise x uniforms, and the weights of the grid."""
    alpha = problem.params["concentration"] + estimator.boost
    end = math.sqrt(9 * alpha - 3)  # the noise lives on (-end, infinity)
    t, w = (torch.as_tensor(x) for x in gauss_legendre(1.0, 24, []))
    epsilon = -end + (end + 12) * (t + 1) / 2
    density = log_accepted(epsilon, alpha).exp() * w * (end + 12) / 2
    u, v = uniform_nodes() if estimator.boost else (torch.ones(1), torch.ones(1))
    grid = [x.reshape(-1) for x in torch.meshgrid(epsilon, u, indexing="ij")]
    weights = (density[:, None] * v).reshape(-1)
    uniforms = grid[1][None, None] if estimator.boost else torch.ones(0, 1, len(weights))
    return gradients(estimator, problem, Accepted(grid[0][None], uniforms), len(weights)), weights


# ---------------------------------------------------------------------- mutants that the rung must kill


class SelfIncludingMean(gl.Baseline):
    def forward(self, cost: Tensor, context: Tensor | None = None) -> Tensor:
        return cost.mean(0).expand_as(cost)


class ForgottenMean(gl.ControlVariate):
    def estimate(self, q, f, noise, context=None):
        return (gl.magic_box(q.log_prob(noise)) * (f(noise) - self.zeta(noise))).mean(0)


class ForgottenSlope(gl.MuProp):
    def estimate(self, q, f, noise, context=None):
        whole = super().estimate(q, f, noise, context)
        center = q.mean.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(center[None]).sum(), center)
        return whole - (slope * gl.zero(q.mean)).sum(-1)


class ForgottenJacobian(gl.GeneralizedReparameterization):
    def estimate(self, q, f, noise, context=None):
        transform = self.transform(q)
        z = transform(transform.inv(noise).detach())
        return weighted(q.log_prob(z), f(z), self.baseline, context)


class ForgottenCorrection(gl.RejectionReparameterization):
    def estimate(self, q, f, noise, context=None):
        value = super().estimate(q, lambda z: gl.zero(f(z)), noise, context)  # f = 0 forward: no score term
        return value


def test_self_including_mean_shrinks_by_exactly_s_minus_one_over_s() -> None:
    for size in (2, 3, 4):
        problem = gl.problem("bernoulli_toy")
        noise, weights = joint_outcomes(problem, size)
        mean, _ = moments(gradients(gl.ScoreFunction(size, SelfIncludingMean()), problem, noise, len(weights)), weights)
        torch.testing.assert_close(mean, exact(problem) * (size - 1) / size, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "mutant",
    [
        ForgottenMean(_zeta, lambda q: gl.Enumerate()(q, _zeta)),
        ForgottenSlope(1),
        gl.ScoreFunction(3, SelfIncludingMean()),
    ],
    ids=["mean", "slope", "self"],
)
def test_discrete_mutants_die(mutant: gl.Estimator) -> None:
    problem = gl.problem("bernoulli_3")
    with pytest.raises(AssertionError):
        check(mutant, problem, *joint_outcomes(problem, mutant.num_samples))


class ForgottenReach(gl.REBAR):
    """The conditional noise taken as a constant: the derivative through the logits is lost."""

    def estimate(self, q, f, noise, context=None):
        rule = discrete(q)
        frozen = rule.given(q.logits.detach(), noise.hard, noise.fresh)
        self_rule = replace(rule, given=lambda logits, hard, fresh: frozen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradlab.rebar.discrete", lambda q: self_rule)
            return super().estimate(q, f, noise, context)


def test_rebar_with_a_frozen_twin_dies() -> None:
    """v is not differentiated through the logits."""
    with pytest.raises(AssertionError):
        test_rebar_and_relax_are_exact(ForgottenReach(1, 0.4, 0.7), "bernoulli_toy")


class ForgottenHalf(gl.DisARM):
    def _weight(self, u, first, second, logits):
        return 2 * super()._weight(u, first, second, logits)


class SampledOthers(gl.LocalExpectation):
    """The flips of one sample, weighed with the cost of another."""

    def estimate(self, q, f, noise, context=None):
        return super().estimate(q, f, noise.roll(1, -1), context)


def test_discrete_world_mutants_die() -> None:
    problem = gl.problem("bernoulli_3")
    with pytest.raises(AssertionError):
        check(ForgottenHalf(), problem, *cut_uniforms(problem))
    with pytest.raises(AssertionError):
        check(SampledOthers(), problem, *joint_outcomes(problem, 1))


def test_continuous_mutants_die() -> None:
    problem = gl.problem("gamma_square")
    with pytest.raises(AssertionError):
        check(ForgottenJacobian(), problem, *sample_nodes(problem))
    mean, _ = moments(*_rsvi_gradients(ForgottenCorrection(1, 0), problem))
    assert (mean - exact(problem))[0].abs() > 0.01 * exact(problem)[0].abs()


def test_a_wrong_baseline_that_is_unbiased_shows_in_the_variance() -> None:
    """The pinned variance catches what the mean cannot."""
    problem, p, f, score, mean = _parts("bernoulli_3")
    noise, weights = joint_outcomes(problem, 1)
    expected = p @ ((f - 0.7)[:, None] * score) ** 2 - mean**2
    wrong = check(gl.ScoreFunction(1, -0.7), problem, noise, weights)
    assert ((wrong - expected).abs() > 0.1 * expected).all()
