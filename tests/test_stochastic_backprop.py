"""Stochastic backpropagation: rules integrated over the sample and its jumps; series, remainder, contract."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.special as sp
import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

import gradlab as gl
from gradlab.rules.registry import CUMULANTS, LOG_CFS, cumulants_of
from gradlab.stochastic_backprop import Jumps

pytestmark = pytest.mark.usefixtures("device")

SIZE = 48


def nodes(law: td.Distribution) -> tuple[Tensor, Tensor]:
    """Return Gauss nodes and weights for the expectation under a law."""
    if isinstance(law, td.Normal):
        x, w = sp.roots_hermitenorm(SIZE)
        x = law.loc.item() + law.scale.item() * x
    elif isinstance(law, td.Laplace):
        y, v = sp.roots_laguerre(SIZE)
        x, w = law.loc.item() + law.scale.item() * np.concatenate([y, -y]), np.concatenate([v, v])
    elif isinstance(law, td.Gamma):
        x, w = sp.roots_genlaguerre(SIZE, law.concentration.item() - 1)
        x = x / law.rate.item()
    elif isinstance(law, td.Exponential):
        x, w = sp.roots_laguerre(SIZE)
        x = x / law.rate.item()
    elif isinstance(law, td.Uniform):
        x, w = sp.roots_sh_legendre(SIZE)
    elif isinstance(law, td.Beta):
        x, w = sp.roots_jacobi(SIZE, law.concentration0.item() - 1, law.concentration1.item() - 1)
        x = (1 + x) / 2
    else:
        x = np.arange(200.0)
        w = law.log_prob(torch.as_tensor(x)).exp().numpy()
    return torch.as_tensor(x), torch.as_tensor(w / w.sum())


def grid(*laws: td.Distribution) -> tuple[list[Tensor], Tensor]:
    points, weights = zip(*map(nodes, laws), strict=True)
    if len(laws) == 1:
        return list(points), weights[0]
    return list(torch.cartesian_prod(*points).unbind(-1)), torch.cartesian_prod(*weights).prod(-1)


def integrated(estimator: gl.StochasticBackprop, make_q, params: dict[str, Tensor], name: str, f) -> Tensor:
    """Return the mean gradient for one parameter, integrated over the sample and the jumps."""
    wanted = {k: p.clone().requires_grad_(k == name) for k, p in params.items()}
    rules = {k: options[0] for k, options in estimator._rules(make_q(wanted)).items()}
    rule = rules[name]
    p = make_q(params)
    one = torch.zeros(())
    (z, *jumps), weights = grid(p, *rule.jumps(p, one))
    many = params[name].expand(len(weights)).clone().requires_grad_()
    q = make_q(params | {name: many})
    noise = Jumps(z[None], (), {(k, r.order): tuple(j[None] for j in jumps) for k, r in rules.items()})
    loss = estimator.estimate(q, f, noise)
    (grads,) = torch.autograd.grad((loss * weights).sum(), many)
    return grads.sum()


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def normal(p):
    return td.Normal(p["loc"], p["scale"])


def laplace(p):
    return td.Laplace(p["loc"], p["scale"])


def gamma(p):
    return td.Gamma(p["concentration"], p["rate"])


def beta(p):
    return td.Beta(p["concentration1"], p["concentration0"])


def poisson(p):
    return td.Poisson(p["rate"])


LAWS = {
    "normal": (normal, {"loc": number(0.4), "scale": number(1.1)}),
    "laplace": (laplace, {"loc": number(0.4), "scale": number(0.5)}),
    "gamma": (gamma, {"concentration": number(1.7), "rate": number(1.6)}),
    "gamma, shape below 1": (gamma, {"concentration": number(0.4), "rate": number(1.6)}),
    "beta": (beta, {"concentration1": number(1.7), "concentration0": number(1.4)}),
    "poisson": (poisson, {"rate": number(2.3)}),
}
SMOOTH = ["normal", "laplace", "poisson"]  # test_rules_continuous.py integrates the jumps that are mixtures
EXACT = [(law, name, order) for law in SMOOTH for name in LAWS[law][1] for order in (None, 0, 1, 2)]


def cost(z: Tensor) -> Tensor:
    return torch.cos(0.8 * z) + 0.5 * z**2


def expectation(make_q, params: dict[str, Tensor], f) -> Tensor:
    """Return E f with a graph, by a quadrature of the density."""
    q = make_q(params)
    if isinstance(q, td.Poisson):
        z = torch.arange(200.0)
        return (q.log_prob(z).exp() * f(z)).sum()
    oracle = gl.Quadrature()
    return oracle.estimate(q, f, oracle.draw(q))


def exact(make_q, params: dict[str, Tensor], name: str, f=cost) -> Tensor:
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    (grad,) = torch.autograd.grad(expectation(make_q, leaves, f), leaves[name])
    return grad


@pytest.mark.parametrize(("law", "name", "order"), EXACT)
def test_rules_are_exact(law: str, name: str, order: int | None) -> None:
    make_q, params = LAWS[law]
    mean = integrated(gl.StochasticBackprop(order=order), make_q, params, name, cost)
    torch.testing.assert_close(mean, exact(make_q, params, name), rtol=0, atol=1e-8)


def test_dirichlet_is_exact() -> None:
    """Two components: the first is a beta variable."""
    order = 1
    alpha = number(0.7), number(1.9)
    q = td.Dirichlet(torch.stack(alpha))
    total = sum(alpha)
    laws = [td.Beta(*alpha), td.Beta(torch.ones(()), total)]
    (x, *jumps), weights = grid(laws[0], td.Uniform(0.0, 1.0), laws[1])
    many = q.concentration.expand(len(weights), 2).clone().requires_grad_()
    noise = Jumps(torch.stack([x, 1 - x], -1)[None], (), {("concentration", order): tuple(j[None] for j in jumps)})
    estimator = gl.StochasticBackprop(order=order)
    loss = estimator.estimate(td.Dirichlet(many), lambda z: torch.cos(2 * z[..., 0]) + z[..., 1] ** 3, noise)
    (grads,) = torch.autograd.grad((loss * weights).sum(), many)
    first = {"concentration1": alpha[0], "concentration0": alpha[1]}
    for k, name in enumerate(first):
        expected = exact(beta, first, name, lambda z: torch.cos(2 * z) + (1 - z) ** 3)
        torch.testing.assert_close(grads.sum(0)[k], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("law", "name"), [("laplace", "scale"), ("gamma", "concentration"), ("gamma", "rate")])
def test_remainder_is_exact_at_every_order(law: str, name: str, order: int) -> None:
    make_q, params = LAWS[law]
    estimator = gl.StochasticBackprop(form="remainder", order=order * (2 if law == "laplace" else 1))
    mean = integrated(estimator, make_q, params, name, cost)
    torch.testing.assert_close(mean, exact(make_q, params, name), rtol=0, atol=1e-8)


def test_a_forgotten_jump_dies() -> None:
    """The mutant evaluates the last derivative at the sample: the paper's truncation."""
    make_q, params = LAWS["laplace"]
    found = exact(make_q, params, "scale")
    truncated = gl.StochasticBackprop(form="series", order=2)
    z, weights = nodes(make_q(params))
    many = params["scale"].expand(len(z)).clone().requires_grad_()
    loss = truncated.estimate(make_q(params | {"scale": many}), cost, Jumps(z[None], (), {}))
    (grads,) = torch.autograd.grad((loss * weights).sum(), many)
    assert abs(grads.sum() - found) > 1e-3


# ---------------------------------------------------------------------------------------------------------- series

SERIES = {
    "polynomial": (lambda z: z**5 - 2 * z**2, None),
    "exponential": (lambda z: torch.exp(0.3 * z), lambda n, z: 0.3**n * torch.exp(0.3 * z)),
    "cosine": (lambda z: torch.cos(0.7 * z), lambda n, z: 0.7**n * torch.cos(0.7 * z + n * math.pi / 2)),
}


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("f", SERIES)
@pytest.mark.parametrize("law", ["normal", "laplace", "gamma", "poisson"])
def test_series_is_the_truncated_sum(law: str, f: str, order: int) -> None:
    r"""For each sample, :math:`\sum_{n\le N} \nabla\kappa_n f^{(n)}(z) / n!`."""
    make_q, params = LAWS[law]
    z = torch.tensor([[0.3, 1.0, 2.7]])
    many = {k: p.expand(3).clone().requires_grad_() for k, p in params.items()}
    q = make_q(many)
    g, derivative = SERIES[f]
    loss = gl.StochasticBackprop(form="series", order=order).estimate(q, g, Jumps(z, (), {}))
    if derivative is None:
        powers = {n: math.perm(5, n) * z ** max(5 - n, 0) - 2 * math.perm(2, n) * z ** max(2 - n, 0) for n in range(9)}
        derivative = lambda n, z: powers[n]  # noqa: E731
    kappas = CUMULANTS[type(q)](q, order)
    terms = sum(k * derivative(n, z)[0] / math.factorial(n) for n, k in enumerate(kappas, 1))
    for name, leaf in many.items():
        (found,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True, materialize_grads=True)
        (expected,) = torch.autograd.grad(terms.sum(), leaf, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("law", ["normal", "laplace", "gamma"])
def test_cumulants_follow_from_the_characteristic_function(law: str) -> None:
    make_q, params = LAWS[law]
    q = make_q(params)
    found = gl.rules.from_log_cf(LOG_CFS[type(q)])(q, 8)
    for a, b in zip(found, CUMULANTS[type(q)](q, 8), strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-12, atol=1e-12)


def test_a_law_of_the_users_own() -> None:
    """A log characteristic function is enough for the series, a rule for the exact form."""

    class Shifted(td.Poisson):
        """2 z for a Poisson z."""

        def sample(self, sample_shape=torch.Size()):
            return 2 * super().sample(sample_shape)

    gl.rules.register_log_cf(Shifted)(lambda p, omega: p.rate * (torch.exp(2j * omega) - 1))
    gl.rules.register_rule(Shifted, "rate")(lambda p, z: [gl.rules.Shift(torch.ones_like(z), z + 2)])
    rate = torch.tensor(1.5, requires_grad=True)
    kappas = cumulants_of(Shifted(rate), 3)
    assert [round(k.item(), 12) for k in kappas] == [3.0, 6.0, 12.0]
    (slope,) = torch.autograd.grad(kappas[2], rate)
    assert slope.item() == pytest.approx(8.0)
    gl.StochasticBackprop()(Shifted(rate), lambda z: 5 * z).backward()
    assert rate.grad.item() == 10.0


@pytest.mark.parametrize("s", [-0.5, 0.4])
@pytest.mark.parametrize("law", ["normal", "laplace", "gamma"])
def test_exponential_costs_sum_the_whole_series(law: str, s: float) -> None:
    r"""The mean of magic_box(log_mgf) e^{sz} has the gradient of E e^{sz}: the corollary's sign is -i s."""
    make_q, params = LAWS[law]
    z, weights = nodes(make_q(params))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    loss = (weights * torch.exp(s * z)).sum() * gl.magic_box(gl.rules.log_mgf(make_q(leaves), number(s)))
    for name in params:
        (found,) = torch.autograd.grad(loss, leaves[name], retain_graph=True)
        expected = exact(make_q, params, name, lambda z: torch.exp(s * z))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_log_mgf_is_infinite_where_the_expectation_is() -> None:
    one = torch.ones(())
    assert gl.rules.log_mgf(td.Laplace(0 * one, one), 2 * one) == math.inf
    assert gl.rules.log_mgf(td.Gamma(2 * one, one), 3 * one) == math.inf
    assert gl.rules.log_mgf(td.Gamma(0.3 * one, one / 3), 0.49 * one) == math.inf
    rate = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(gl.rules.log_mgf(td.Gamma(2 * one, rate), 3 * one), rate)
    assert not grad.isfinite()
    torch.testing.assert_close(gl.rules.log_mgf(td.Gamma(2 * one, one), -5 * one), torch.tensor(-2 * math.log(6)))


# ----------------------------------------------------------------------------------------------------------- kinks


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_kinks_choose_a_rule_that_is_right_for_them(law: str) -> None:
    """|z| at loc 0: d/d scale E|z| is sqrt(2/pi), and 1; the second-order rule would give 0."""
    make_q, _ = LAWS[law]
    torch.manual_seed(0)
    params = {"loc": torch.zeros(()), "scale": torch.tensor(1.3)}
    right = math.sqrt(2 / math.pi) if law == "normal" else 1.0
    for order in (None, 1, 0):
        estimator = gl.StochasticBackprop(order=order)
        g = gl.replicate(lambda p, e=estimator: e(make_q(p), torch.abs), params, 40_000)["scale"]
        assert abs(g.mean() - right) < 5 * g.std() / 200
    with pytest.warns(UserWarning, match="found abs in f.*misses the kink.*order=1"):
        g = gl.replicate(lambda p: gl.StochasticBackprop(order=2)(make_q(p), torch.abs), params, 100)["scale"]
    assert (g == 0).all()


def test_smooth_costs_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale = torch.tensor(1.3, requires_grad=True)
        gl.StochasticBackprop(order=2)(td.Normal(0.0, scale), F.softplus).backward()


def test_series_of_a_kinked_cost_warns() -> None:
    scale = torch.tensor(1.3, requires_grad=True)
    with pytest.warns(UserWarning, match="misses the kink"):
        gl.StochasticBackprop(form="series", order=4)(td.Laplace(0.0, scale), torch.relu).backward()


# -------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"form": "taylor"}, "form: found 'taylor', expected 'exact'"),
        ({"form": "series"}, "order: found None for form='series'"),
        ({"form": "remainder", "order": 0}, "order: found 0 for form='remainder'"),
        ({"order": -1}, "order: found -1, expected None"),
        ({"chunk_size": 0}, "chunk_size: found 0"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gl.StochasticBackprop(**kwargs)


@pytest.mark.parametrize("form", ["series", "remainder"])
def test_a_law_without_the_form_is_named(form: str) -> None:
    rate = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(TypeError, match=f"found Bernoulli.*form='{form}'.*expected"):
        gl.StochasticBackprop(form=form, order=2)(td.Bernoulli(rate), lambda z: z)


def test_chunks_and_a_first_linear_layer_change_nothing() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    params = {"concentration": torch.full((5,), 1.7), "rate": torch.full((5,), 0.9)}

    def gradient(f, chunk_size: int | None) -> tuple[Tensor, ...]:
        leaves = [p.clone().requires_grad_() for p in params.values()]
        torch.manual_seed(1)
        q = td.Independent(td.Gamma(*leaves), 1)
        gl.StochasticBackprop(3, chunk_size=chunk_size)(q, f).backward()
        return tuple(leaf.grad for leaf in leaves)

    def g(h: Tensor) -> Tensor:
        return torch.tanh(h).square().sum(-1)

    plain = gradient(lambda z: g(linear(z)), None)
    for f, size in ((lambda z: g(linear(z)), 2), (gl.AfterLinear(linear, g), None), (gl.AfterLinear(linear, g), 3)):
        for a, b in zip(gradient(f, size), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_evaluations_count_what_f_sees() -> None:
    seen = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.numel() // 4)
        return (z**2).sum(-1)

    for q in (
        td.Independent(td.Laplace(torch.zeros(4), torch.ones(4, requires_grad=True)), 1),
        td.Independent(td.Gamma(torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)), 1),
        td.Independent(td.Poisson(torch.ones(4, requires_grad=True)), 1),
    ):
        seen.clear()
        estimator = gl.StochasticBackprop(3)
        estimator(q, f)
        assert sum(seen) == estimator.evaluations(q)


def test_high_orders_do_not_overflow() -> None:
    """30! is beyond 64-bit integers."""
    scale = torch.tensor(0.1, requires_grad=True)
    gl.StochasticBackprop(form="series", order=30)(td.Laplace(0.0, scale), torch.cos).backward()
    assert scale.grad.isfinite()


@pytest.mark.parametrize("q", [td.Laplace, td.Normal])
@pytest.mark.parametrize("order", [None, 1, 2])
def test_binary_data_in_closed_form(q, order):
    linear, loc, scale = torch.nn.Linear(6, 5).double(), torch.randn(2, 3, 2).double(), torch.rand(2, 3, 2).double()
    leaves = [loc.requires_grad_(), (scale + 0.2).requires_grad_(), linear.weight]
    law, x = td.Independent(q(*leaves[:2]), 2), torch.rand(2, 5).round().double()
    estimator = gl.StochasticBackprop(7, order=order)
    noise = estimator.draw(law)

    def gradients(f):
        return torch.autograd.grad(estimator.estimate(law, f, noise).sum(), leaves)

    def generic(z):
        return -td.Bernoulli(logits=linear(z.flatten(-2))).log_prob(x).sum(-1)

    for found, expected in zip(gradients(gl.BernoulliAfterLinear(linear, x)), gradients(generic), strict=True):
        torch.testing.assert_close(found, expected)


def test_binary_data_compile_to_one_graph():
    linear, loc, scale = torch.nn.Linear(3, 5), torch.randn(3, requires_grad=True), torch.ones(3, requires_grad=True)
    estimator, x = gl.StochasticBackprop(4, order=2), torch.ones(5)

    def loss(loc, scale):
        q = td.Independent(td.Laplace(loc, scale, validate_args=False), 1)  # torch compiles no check
        return estimator(q, gl.BernoulliAfterLinear(linear, x))

    found = []
    for one in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(one(loc, scale), (loc, scale)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_single_number_is_differentiated_at_once():
    rate = torch.tensor([1.0, 2.0, 3.0])
    found = []
    for chunk_size in (None, 10):  # at once, and along lines
        shape = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
        torch.manual_seed(0)
        gl.StochasticBackprop(7, order=1, chunk_size=chunk_size)(td.Gamma(shape, rate), torch.sin).sum().backward()
        found.append(shape.grad)
    torch.testing.assert_close(*found)


def test_a_step_has_no_slope_at_a_jump():
    q = td.Independent(td.Gamma(torch.ones(2, requires_grad=True), torch.ones(2)), 1)
    with pytest.raises(ValueError, match="without derivative"):
        gl.StochasticBackprop(order=1)(q, lambda z: (z > 1).sum(-1))
