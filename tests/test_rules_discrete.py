"""Rules for counts, finite sets, mixtures, vectors and matrices: every noise summed or integrated, no seed.

The noise is laid out as samples, ``[N, ...]``, with its probabilities; the shifts of a rule are then summed by hand.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.distributions import factor
from gradlab.flips import index_of
from gradlab.rules.registry import LATENTS, LOG_CFS, REMAINDERS, RULES, cumulants_of, from_log_cf, parameter, rules_of
from gradlab.taylor import derivatives

TOLERANCE = 1e-9


def smooth(z: Tensor) -> Tensor:
    return torch.cos(1.3 * z) + 0.1 * z**2


def step(z: Tensor) -> Tensor:
    return (z >= 2).double() - 0.3 * (z - 1).abs()


def wave(dims: int) -> Callable[[Tensor], Tensor]:
    def f(z: Tensor) -> Tensor:
        x = z.flatten(-dims)
        return torch.cos(x @ torch.linspace(0.5, 1.1, x.shape[-1])) + 0.1 * (x**2).sum(-1) * x[..., 0]

    return f


def product(*parts: tuple[Any, Any]) -> tuple[list[Tensor], Tensor]:
    """Return every combination of points ``[n, ...]`` with weights ``[n]``: the points of each, and the weights."""
    parts = [(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(w, dtype=torch.float64)) for x, w in parts]
    index = torch.cartesian_prod(*(torch.arange(len(w)) for _, w in parts)).reshape(-1, len(parts))
    points = [x[index[:, i]] for i, (x, _) in enumerate(parts)]
    weights = torch.stack([w[index[:, i]] for i, (_, w) in enumerate(parts)]).prod(0)
    return points, weights


def integrate(p: Any, name: str, order: int, noise: list[Tensor], weights: Tensor, f: Any) -> Tensor:
    return summed(rules_of(p)[name][order], p, noise, weights, f)


def summed(rule: Any, p: Any, noise: list[Tensor], weights: Tensor, f: Any) -> Tensor:
    """Return the mean of a rule, ``[*P]``."""
    with torch.no_grad():
        z, dims, found = noise[0], len(p.event_shape), 0.0
        for shift in rule.shifts(p, *noise):
            inner = shift.weight.ndim - (z.ndim - dims)
            here = z.reshape(*z.shape[: z.ndim - dims], *(1 for _ in range(inner)), *z.shape[z.ndim - dims :])
            point = here if shift.point is None else shift.point
            if shift.order == 0:
                gain = f(point) - f(here)
            elif shift.direction is None and dims:  # a parameter of the shape of z
                with torch.enable_grad():
                    x = z.clone().requires_grad_()
                    (gain,) = slopes(f(x).sum(), x)
            else:
                way = torch.ones_like(point) if shift.direction is None else shift.direction
                full = torch.broadcast_shapes(point.shape, way.shape)
                gain = derivatives(f, point.expand(full), way.expand(full), shift.order)[-1]
            value = shift.weight * gain
            found = found + (weights.reshape(-1, *(1 for _ in value.shape[1:])) * value).sum(0)
    return found


def counts(law: Any, low: int = 0, high: int = 120) -> tuple[Tensor, Tensor]:
    z = np.arange(low, high)
    return torch.tensor(z, dtype=torch.float64), torch.tensor(law.pmf(z))


def legendre(n: int, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor(low + (high - low) * (x + 1) / 2), torch.tensor(w * (high - low) / 2)


def laguerre(n: int, shape: float = 1.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A gamma law."""
    x, w = sp.roots_genlaguerre(n, shape - 1)
    return torch.tensor(x * scale), torch.tensor(w / w.sum())


def hermite(n: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(x), torch.tensor(w / w.sum())


def below(k: int) -> tuple[Tensor, Tensor]:
    """Uniforms, one in the middle of each of k equal cells."""
    return (torch.arange(k) + 0.5) / k, torch.full((k,), 1 / k)


def slopes(value: Tensor, leaves: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True)


def t(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


# ----------------------------------------------------------------------- laws of one count: the noise of each rule


def _dispersion_noise() -> tuple[list[Tensor], Tensor]:
    q = 0.3 * 1.5 / (1 + 0.3 * 1.5)
    z, pz = counts(st.nbinom(1 / 0.3, 1 - q), high=50)
    rows = []
    for k in range(1, 28):
        (u, v), w = product(below(k + 1), below(k))
        rows.append(torch.stack([u, v, torch.full_like(u, k - 1), 0 * u, w * k * q ** (k - 1) * (1 - q) ** 2], 1))
    u, v, g, h, w = torch.cat(rows).T
    index = torch.arange(len(z)).repeat_interleave(len(w))
    u, v, g, h, w = (x.repeat(len(z)) for x in (u, v, g, h, w))
    return [z[index], u, v, g, h], pz[index] * w


def _inflated_noise() -> tuple[list[Tensor], Tensor]:
    (count, shut), w = product(counts(st.poisson(2.3)), ([0.0, 1.0], [0.7, 0.3]))
    return [torch.where(shut == 1, 0.0, count), count], w


def _items_noise(p: Any, items: Tensor, log_prob: Tensor, s: float) -> tuple[list[Tensor], Tensor]:
    """Every outcome of n draws, I, W and the flips."""
    n = p.total_count
    rates = 1 / (s + torch.arange(n, dtype=torch.float64))
    edges = torch.cat([torch.zeros(1), rates.cumsum(0)]) / rates.sum()
    rows = []
    for j, (draws, i) in enumerate(itertools.product(items, range(n))):
        x, w = sp.roots_jacobi(6, s + i - 1, 0.0)
        share = (x + 1) / 2
        for a, b in zip(share, w / w.sum(), strict=True):
            for flips in itertools.product([0, 1], repeat=n):
                chance = np.prod([a if k else 1 - a for k in flips])
                weight = log_prob[j // n].exp() * (edges[i + 1] - edges[i]) * b * chance
                v = 1.0 - torch.tensor(flips, dtype=torch.float64)
                rows.append((draws, (edges[i] + edges[i + 1]) / 2, 1 - (1 - a) ** (s + i), v, weight))
    draws, u, w, v, weights = (torch.stack([torch.as_tensor(x) for x in c]) for c in zip(*rows, strict=True))
    return [draws.sum(-2) if draws.ndim == 3 else draws.sum(-1), draws, u, w, v], weights


def _beta_noise() -> tuple[list[Tensor], Tensor]:
    p = gl.BetaBinomial(3, torch.tensor(0.8), torch.tensor(1.7))
    items = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    z = items.sum(-1)
    log_prob = p.log_prob(z) - torch.log(torch.tensor(sp.comb(3, z.numpy())))
    return _items_noise(p, items, log_prob, 2.5)


def _dirichlet_noise() -> tuple[list[Tensor], Tensor]:
    p = gl.DirichletMultinomial(3, torch.tensor([0.8, 1.7, 0.6]))
    items = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=3)))]
    z = items.sum(-2)
    ways = 6 / torch.tensor(sp.factorial(z.numpy())).prod(-1)
    return _items_noise(p, items, p.log_prob(z) - ways.log(), 3.1)


def _multinomial_noise() -> tuple[list[Tensor], Tensor]:
    z = torch.tensor([z for z in itertools.product(range(5), repeat=3) if sum(z) == 4], dtype=torch.float64)
    pz = td.Multinomial(4, torch.tensor([0.2, 0.5, 0.3])).log_prob(z).exp()
    points, weights = product((z, pz), below(4))
    return points, weights


NB = counts(st.nbinom(2.3, 0.6), high=90)
COUNTS: dict[str, tuple[Callable[..., Any], dict[str, Any], str, Callable[[], Any]]] = {
    "Poisson rate": (td.Poisson, {"rate": 2.3}, "rate", lambda: product(counts(st.poisson(2.3)))),
    "Binomial probs": (
        lambda probs: td.Binomial(torch.tensor(5.0), probs=probs),
        {"probs": 0.3},
        "probs",
        lambda: product(counts(st.binom(5, 0.3), high=6), below(5)),
    ),
    "Geometric probs": (
        lambda probs: td.Geometric(probs=probs),
        {"probs": 0.3},
        "probs",
        lambda: product(counts(st.nbinom(1, 0.3)), counts(st.nbinom(1, 0.3))),
    ),
    "NegativeBinomial probs": (
        lambda total_count, probs: td.NegativeBinomial(total_count, probs=probs),
        {"total_count": 2.3, "probs": 0.4},
        "probs",
        lambda: product(NB, counts(st.nbinom(1, 0.6))),
    ),
    "NegativeBinomial total_count": (
        lambda total_count, probs: td.NegativeBinomial(total_count, probs=probs),
        {"total_count": 2.3, "probs": 0.4},
        "total_count",
        lambda: product(NB, counts(st.nbinom(1, 0.6))),
    ),
    "MeanNegativeBinomial loc": (
        gl.MeanNegativeBinomial,
        {"loc": 1.5, "dispersion": 0.3},
        "loc",
        lambda: product(counts(st.nbinom(1 / 0.3, 1 / 1.45)), counts(st.nbinom(1, 1 / 1.45))),
    ),
    "MeanNegativeBinomial dispersion": (
        gl.MeanNegativeBinomial,
        {"loc": 1.5, "dispersion": 0.3},
        "dispersion",
        _dispersion_noise,
    ),
    "ZeroInflatedPoisson gate": (gl.ZeroInflatedPoisson, {"rate": 2.3, "gate": 0.3}, "gate", _inflated_noise),
    "ZeroInflatedPoisson rate": (gl.ZeroInflatedPoisson, {"rate": 2.3, "gate": 0.3}, "rate", _inflated_noise),
    "BetaBinomial concentration1": (
        lambda concentration1, concentration0: gl.BetaBinomial(3, concentration1, concentration0),
        {"concentration1": 0.8, "concentration0": 1.7},
        "concentration1",
        _beta_noise,
    ),
    "BetaBinomial concentration0": (
        lambda concentration1, concentration0: gl.BetaBinomial(3, concentration1, concentration0),
        {"concentration1": 0.8, "concentration0": 1.7},
        "concentration0",
        _beta_noise,
    ),
    "Categorical probs": (
        lambda logits: td.Categorical(logits=logits),
        {"logits": [0.3, -0.2, 1.1]},
        "probs",
        lambda: ([torch.arange(3)], td.Categorical(logits=torch.tensor([0.3, -0.2, 1.1])).probs),
    ),
    "Bernoulli probs": (
        lambda probs: td.Bernoulli(probs=probs),
        {"probs": 0.3},
        "probs",
        lambda: product(([0.0, 1.0], [0.7, 0.3])),
    ),
}


def slope_of_sum(make: Any, values: dict[str, Any], name: str, f: Any) -> Tensor:
    """Differentiate the sum of pmf x f over the support."""
    leaves = {k: t(v) for k, v in values.items()}
    p = make(**leaves)
    finite = getattr(p, "has_enumerate_support", False)
    z = p.enumerate_support(expand=False) if finite else torch.arange(300.0, dtype=torch.float64)
    theta = parameter(p, name)
    (slope,) = slopes((p.log_prob(z).exp() * f(z)).sum(), theta)
    return slope


@pytest.mark.parametrize("f", [smooth, step])
@pytest.mark.parametrize("case", COUNTS)
def test_rules_of_counts_are_exact(case: str, f: Any) -> None:
    make, values, name, noise = COUNTS[case]
    points, weights = noise()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    p = make(**{k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
    found = integrate(p, name, 0, points, weights, f)
    if case == "Categorical probs":  # only the gradient within the simplex means something
        logits = t(values["logits"])
        p = make(logits=logits)
        (expected,) = slopes((p.probs * f(torch.arange(3))).sum(), logits)
        (found,) = slopes((p.probs * found).sum(), logits)
    elif case == "Bernoulli probs":
        expected = f(torch.ones(())) - f(torch.zeros(()))
    else:
        expected = slope_of_sum(make, values, name, f)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_wrong_rules_are_noticed() -> None:
    """Mutants: the geometric jump one too long, and the dispersion rule without its order statistics."""
    (z, g), w = product(NB, counts(st.nbinom(1, 0.6)))
    p = td.NegativeBinomial(torch.tensor(2.3), probs=torch.tensor(0.4))
    exact = integrate(p, "probs", 0, [z, g], w, smooth)
    assert (integrate(p, "probs", 0, [z, g + 1], w, smooth) - exact).abs() > 1e-2
    (z, u, v, g, h), w = _dispersion_noise()
    p = gl.MeanNegativeBinomial(torch.tensor(1.5), torch.tensor(0.3))
    exact = integrate(p, "dispersion", 0, [z, u, v, g, h], w, smooth)
    assert (integrate(p, "dispersion", 0, [z, u, 0 * v, g, h], w, smooth) - exact).abs() > 1e-3


@pytest.mark.parametrize("f", [smooth, step])
@pytest.mark.parametrize("name", ["rate1", "rate2"])
def test_skellam(name: str, f: Any) -> None:
    law = st.skellam(2.3, 0.9)
    p = gl.Skellam(torch.tensor(2.3), torch.tensor(0.9))
    points, weights = product(counts(law, -60, 80))
    rates = {"rate1": t(2.3), "rate2": t(0.9)}
    n = torch.arange(100.0)
    one, two = (td.Poisson(r).log_prob(n).exp() for r in rates.values())
    (expected,) = slopes((one[:, None] * two * f(n[:, None] - n)).sum(), rates[name])
    torch.testing.assert_close(integrate(p, name, 0, points, weights, f), expected, rtol=1e-8, atol=1e-8)


LAMBDA, B = 2.0, 0.7


def compound(jumps: int, kink: float = 1.0, size: int = 44) -> tuple[list[Tensor], Tensor]:
    """Return z, and exponential (or one gamma) jumps whose panels meet where the sum of all is at the kink."""

    def density(z: np.ndarray) -> np.ndarray:
        return sum(st.poisson(LAMBDA).pmf(n) * st.gamma(n, scale=B).pdf(z) for n in range(1, 60))

    panels = [legendre(size, a, b) for a, b in [(0, kink), (kink, 4), (4, 12), (12, 40)]]
    z = torch.cat([x for x, _ in panels])
    w = torch.cat([w * torch.tensor(density(x.numpy())) for x, w in panels])
    points, weights = [torch.cat([torch.zeros(1), z])], torch.cat([torch.tensor([np.exp(-LAMBDA)]), w])
    for shape in [2.0] if jumps == 0 else [1.0] * jumps:
        gap = (kink - sum(points)).clamp_min(0)
        x, wx = legendre(14 if jumps == 2 else size)
        y, wy = laguerre(26 if jumps == 2 else size, 1.0, B)
        near, far = gap[:, None] * x, gap[:, None] + y
        pdf = st.gamma(shape, scale=B).pdf
        at = torch.cat([near, far], 1)
        mass = torch.cat(
            [gap[:, None] * wx * torch.tensor(pdf(near)), wy * torch.tensor(pdf(far)) * B * (y / B).exp()], 1
        )
        points = [q.repeat_interleave(at.shape[1]) for q in points] + [at.flatten()]
        weights = (weights[:, None] * mass).flatten()
    return points, weights


COMPOUND = {("rate", 0): 1, ("rate", 1): 1, ("scale", 1): 0, ("scale", 0): 2}


@pytest.mark.parametrize("kinked", [False, True])
@pytest.mark.parametrize("key", COMPOUND)
def test_compound_poisson(key: tuple[str, int], kinked: bool) -> None:
    (name, order), n = key, np.arange(1, 80)
    p = gl.CompoundPoisson(torch.tensor(LAMBDA), torch.tensor(B))
    found = integrate(p, name, order, *compound(COMPOUND[key]), (lambda z: (z - 1).abs()) if kinked else smooth)
    if kinked:  # E|bG - 1| for G ~ Gamma(n), by incomplete gamma functions
        less, more = sp.gammainc(n, 1 / B), sp.gammainc(n + 1, 1 / B)
        size = n * B * (1 - 2 * more) - (1 - 2 * less)
        pmf = st.poisson(LAMBDA).pmf
        both = {"rate": (pmf(n - 1) - pmf(n)) @ size - pmf(0), "scale": pmf(n) @ (n * (1 - 2 * more))}
        expected = torch.tensor(both[name])
    else:
        leaves = {"rate": t(LAMBDA), "scale": t(B)}
        law = gl.CompoundPoisson(**leaves)
        phi = LOG_CFS[gl.CompoundPoisson](law, torch.tensor(1.3)).exp().real
        (expected,) = slopes(phi + 0.1 * (law.variance + law.mean**2), leaves[name])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_multinomial_and_dirichlet_multinomial() -> None:
    f, z = wave(1), torch.tensor([z for z in itertools.product(range(5), repeat=3)], dtype=torch.float64)
    logits = t([0.2, 0.5, 0.3])
    for weigh in (f, lambda x: (x[..., 0] > 1).double() * x[..., 1]):
        p = td.Multinomial(4, probs=logits)  # torch divides by the sum: only the simplex counts
        keep = z[z.sum(-1) == 4]
        (expected,) = slopes((p.log_prob(keep).exp() * weigh(keep)).sum(), logits)
        found = integrate(td.Multinomial(4, logits.detach()), "probs", 0, *_multinomial_noise(), weigh)
        (found,) = slopes((p.probs * found).sum(), logits)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        alpha = t([0.8, 1.7, 0.6])
        keep = z[z.sum(-1) == 3]
        law = gl.DirichletMultinomial(3, alpha)
        (expected,) = slopes((law.log_prob(keep).exp() * weigh(keep)).sum(), alpha)
        law = gl.DirichletMultinomial(3, alpha.detach())
        found = integrate(law, "concentration", 0, *_dirichlet_noise(), weigh)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


# -------------------------------------------------------------------------------------------- cliques, mixtures, point


def cliques(leaves: dict[str, Tensor]) -> gl.Cliques:
    return gl.Cliques([[0, 3], [2], [1, 4]], [leaves["a"], leaves["b"], leaves["c"]], sizes=[2, 3, 2, 2, 2])


CLIQUES = {
    "a": torch.linspace(-0.5, 0.8, 4).double(),
    "b": torch.tensor([0.3, -0.1]).double(),
    "c": torch.linspace(0.9, -0.2, 6).double(),
}


def test_cliques_are_exact_and_need_no_luck() -> None:
    """Theorem 2 with blocks of 2, 1 and 2 variables."""
    f = wave(1)
    leaves = {k: v.clone().requires_grad_() for k, v in CLIQUES.items()}
    q = cliques(leaves)
    z = q.enumerate_support(expand=False)
    weights = q.log_prob(z).exp()
    assert len(z) == 48 and weights.sum().item() == pytest.approx(1, abs=1e-12)
    expected = slopes((weights * f(z)).sum(), list(leaves.values()))
    for c, leaf in enumerate(leaves.values()):
        found = integrate(q, f"clique{c}.probs", 0, [z], weights.detach(), f)
        (grad,) = slopes((q.laws[c].probs * found).sum(), leaf)
        torch.testing.assert_close(grad, expected[c], rtol=TOLERANCE, atol=TOLERANCE)
    assert gl.StochasticBackprop().evaluations(q) == 1 + 4 + 2 + 6
    for estimator in (gl.Enumerate(), gl.LocalExpectation()):
        for a, b in zip(slopes(estimator(q, f), list(leaves.values())), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    assert index_of(q, z)[:, 0].tolist() == list(range(48))
    torch.testing.assert_close(q.mean, weights @ z)
    torch.testing.assert_close(q.variance, weights @ z**2 - (weights @ z) ** 2)


def binomials(leaves: dict[str, Tensor]) -> td.Distribution:
    parts = td.Independent(td.Binomial(torch.tensor(2.0), probs=leaves["probs"]), 1)
    return td.MixtureSameFamily(td.Categorical(logits=leaves["logits"]), parts)


def test_mixture_of_products_of_counts() -> None:
    f = wave(1)
    leaves = {"probs": t([[0.3, 0.6], [0.7, 0.2]]), "logits": t([0.4, -0.3])}
    q = binomials(leaves)
    one = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64)
    (expected_p, expected_w) = slopes((q.log_prob(one).exp() * f(one)).sum(), list(leaves.values()))
    pmf = q.component_distribution.base_dist.log_prob(torch.arange(3.0)[:, None, None]).exp().detach()  # [3, K, D]
    cells = [(torch.arange(3), pmf[:, k, j]) for k in range(2) for j in range(2)] + [below(2)] * 4
    points, w = product(*cells)
    y, u = torch.stack(points, -1).reshape(-1, 2, 2, 2).unbind(1)
    z = y[:, 0]  # which component is chosen matters to no rule
    name = "component_distribution.base_dist.probs"
    torch.testing.assert_close(integrate(q, name, 0, [z, y, u], w, f), expected_p, rtol=TOLERANCE, atol=TOLERANCE)
    found = integrate(q, "mixture_distribution.probs", 0, [z, y], w, f)
    (found,) = slopes((q.mixture_distribution.probs * found).sum(), leaves["logits"])
    torch.testing.assert_close(found, expected_w, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["normal", "independent", "multivariate"])
def test_mixture_of_normals(kind: str) -> None:
    """Slopes, second derivatives and directions are carried over; the reference differentiates the quadrature."""
    x, w = hermite(12)
    logits = t([0.4, -0.3])
    if kind == "normal":
        leaves = {"loc": t([0.3, -0.5]), "scale": t([0.7, 1.1])}
        law, prefix, f = td.Normal(**leaves), "component_distribution.", smooth
        (e1, e2), weights = product((x, w), (x, w))
        eps = torch.stack([e1, e2], -1)
        y = leaves["loc"] + leaves["scale"] * eps
    elif kind == "independent":
        leaves = {"loc": t([[0.3, -0.5], [0.1, 0.9]]), "scale": t([[0.7, 1.1], [0.5, 0.8]])}
        law, prefix, f = td.Independent(td.Normal(**leaves), 1), "component_distribution.base_dist.", wave(1)
        e, weights = product(*[(x, w)] * 4)
        y = leaves["loc"] + leaves["scale"] * torch.stack(e, -1).reshape(-1, 2, 2)
    else:
        leaves = {"loc": t([[0.3, -0.5], [0.1, 0.9]]), "covariance_matrix": t([[[1.0, 0.3], [0.3, 0.5]]] * 2)}
        law, prefix, f = td.MultivariateNormal(**leaves), "component_distribution.", wave(1)
        e, weights = product(*[(x, w)] * 4)
        root = torch.linalg.cholesky(leaves["covariance_matrix"])
        y = leaves["loc"] + (root @ torch.stack(e, -1).reshape(-1, 2, 2)[..., None])[..., 0]
    q = td.MixtureSameFamily(td.Categorical(logits=logits), law)
    probs = q.mixture_distribution.probs
    exact = (weights[:, None] * probs * f(y)).sum()
    expected = slopes(exact, [logits, *leaves.values()])
    (y, z), both = ((y.detach(), y[:, 0].detach()), weights)  # the choice matters to no rule
    for value, (name, _) in zip(expected[1:], leaves.items(), strict=True):
        for order in rules_of(q)[prefix + name]:
            found = integrate(q, prefix + name, order, [z, y], both, f)
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8)
    found = integrate(q, "mixture_distribution.probs", 0, [z, y], both, f)
    (found,) = slopes((probs * found).sum(), logits)
    torch.testing.assert_close(found, expected[0], rtol=1e-8, atol=1e-8)


def test_a_point_is_backpropagation() -> None:
    a = torch.randn(3, 4, requires_grad=True)
    q = td.Independent(gl.Delta(a), 1)
    (found,) = slopes(gl.StochasticBackprop(2)(q, wave(1)).sum(), a)
    (expected,) = slopes(wave(1)(a).sum(), a)
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------- vectors and matrices


@pytest.mark.parametrize("given", ["covariance_matrix", "scale_tril", "precision_matrix", "low rank"])
def test_multivariate_normal(given: str) -> None:
    f, (x, w) = wave(1), hermite(24)
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    if given == "low rank":
        leaves = {"loc": t([0.4, -0.2]), "cov_factor": t([[0.6], [-0.4]]), "cov_diag": t([0.5, 0.8])}
        q = td.LowRankMultivariateNormal(**leaves)
        root = torch.linalg.cholesky(leaves["cov_factor"] @ leaves["cov_factor"].mT + leaves["cov_diag"].diag())
    else:
        start = {"scale_tril": torch.linalg.cholesky(cov), "precision_matrix": cov.inverse()}.get(given, cov)
        leaves = {"loc": t([0.4, -0.2]), given: start.clone().requires_grad_()}
        q = td.MultivariateNormal(**leaves)
        root = q.scale_tril
    e, weights = product((x, w), (x, w))
    z = leaves["loc"] + torch.stack(e, -1) @ root.mT
    expected = slopes((weights * f(z)).sum(), list(leaves.values()))
    z = z.detach()
    names = list(leaves) if given == "low rank" else ["loc", "covariance_matrix"]
    for name, leaf, value in zip(names, leaves.values(), expected, strict=True):
        for order in rules_of(q)[name]:
            found = integrate(q, name, order, [z], weights, f)
            theta = parameter(q, name)
            (found,) = slopes((theta * found).sum(), leaf)
            if given in ("covariance_matrix", "precision_matrix") and name != "loc":
                value = (value + value.mT) / 2
                found = (found + found.mT) / 2
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8)


def wishart(df: float, tril: Tensor, with_jumps: bool) -> tuple[list[Tensor], Tensor]:
    parts = [laguerre(9, df / 2, 2.0), laguerre(9, (df - 1) / 2, 2.0), hermite(9)]
    parts += [legendre(9), laguerre(9, 1.0, 2.0)] if with_jumps else []
    (c1, c2, n, *jumps), weights = product(*parts)
    a = torch.stack([torch.stack([c1.sqrt(), 0 * n], -1), torch.stack([n, c2.sqrt()], -1)], -2)
    root = tril @ a
    return [root @ root.mT, a, *(j[:, None].expand(-1, 2) for j in jumps)], weights


def test_wishart() -> None:
    """Against E exp(-tr B z) = det(I + 2 Sigma B)^(-df/2) and E (tr z)^2."""
    cov, weight = torch.tensor([[0.6, 0.2], [0.2, 0.5]]), torch.tensor([[0.05, 0.01], [0.01, 0.03]])
    leaves = {"df": t(4.3), "covariance_matrix": cov.clone().requires_grad_()}
    q = td.Wishart(**leaves)

    def exponential(z: Tensor) -> Tensor:
        return (-(weight * z).sum((-2, -1))).exp()

    def trace(z: Tensor) -> Tensor:
        return z.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2

    s, df = leaves["covariance_matrix"], leaves["df"]
    means = {
        exponential: torch.linalg.det(torch.eye(2) + 2 * s @ weight) ** (-df / 2),
        trace: df**2 * s.trace() ** 2 + 2 * df * (s @ s).trace(),
    }
    tril = torch.linalg.cholesky(cov)
    for f, mean in means.items():
        by_df, by_cov = slopes(mean, [df, s])
        (z, a, u, v), w = wishart(4.3, tril, True)
        torch.testing.assert_close(integrate(q, "df", 1, [z, a, u, v], w, f), by_df, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(integrate(q, "df", 0, [z, a, v], w, f), by_df, rtol=1e-8, atol=1e-8)
        (z, a), w = wishart(4.3, tril, False)
        found = integrate(q, "covariance_matrix", 1, [z, a], w, f)
        torch.testing.assert_close(found, (by_cov + by_cov.mT) / 2, rtol=1e-8, atol=1e-8)
        assert (integrate(q, "covariance_matrix", 1, [2 * z, a], w, f) - found).abs().max() > 1e-3  # a mutant


# -------------------------------------------------------------------------------------------- series and remainders


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["rate", "rate1", "rate2"])
def test_the_remainder_of_a_step_is_exact(name: str, order: int) -> None:
    law = td.Poisson(torch.tensor(2.3)) if name == "rate" else gl.Skellam(torch.tensor(2.3), torch.tensor(0.9))
    z = counts(st.poisson(2.3) if name == "rate" else st.skellam(2.3, 0.9), -60, 90)
    x, w = sp.roots_jacobi(20, order - 1, 0.0)
    noise, weights = product(z, ((x + 1) / 2, w / w.sum()))
    found = summed(REMAINDERS[type(law), name](order), law, noise, weights, smooth)
    expected = integrate(law, name, 0, *product(z), smooth)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


CUMULANTS = {
    "binomial": (lambda: td.Binomial(torch.tensor(5.0), torch.tensor(0.3)), st.binom(5, 0.3)),
    "geometric": (lambda: td.Geometric(torch.tensor(0.4)), st.nbinom(1, 0.4)),
    "negative binomial": (lambda: td.NegativeBinomial(torch.tensor(2.3), torch.tensor(0.4)), st.nbinom(2.3, 0.6)),
    "mean": (lambda: gl.MeanNegativeBinomial(torch.tensor(1.5), torch.tensor(0.3)), st.nbinom(1 / 0.3, 1 / 1.45)),
    "skellam": (lambda: gl.Skellam(torch.tensor(2.3), torch.tensor(0.9)), st.skellam(2.3, 0.9)),
}


@pytest.mark.parametrize("case", CUMULANTS)
def test_cumulants(case: str) -> None:
    make, law = CUMULANTS[case]
    p = make()
    mean, variance, skew, kurtosis = map(float, law.stats("mvsk"))
    expected = [mean, variance, skew * variance**1.5, kurtosis * variance**2]
    assert [float(k) for k in cumulants_of(p, 4)] == pytest.approx(expected, rel=1e-6)


def test_cumulants_of_the_compound_laws() -> None:
    p = gl.CompoundPoisson(torch.tensor(2.0), torch.tensor(0.7))
    torch.testing.assert_close(cumulants_of(p, 5), from_log_cf(LOG_CFS[gl.CompoundPoisson])(p, 5))
    p = gl.ZeroInflatedPoisson(torch.tensor(2.0), torch.tensor(0.3))
    torch.testing.assert_close(torch.stack(cumulants_of(p, 2)), torch.stack([p.mean, p.variance]))


# -------------------------------------------------------------------------------------------------------- new laws


SAMPLED = {
    "mean": (lambda: gl.MeanNegativeBinomial(torch.tensor(1.5), torch.tensor(0.3)), st.nbinom(1 / 0.3, 1 / 1.45)),
    "skellam": (lambda: gl.Skellam(torch.tensor(2.3), torch.tensor(0.9)), st.skellam(2.3, 0.9)),
    "beta": (lambda: gl.BetaBinomial(6, torch.tensor(0.8), torch.tensor(1.7)), st.betabinom(6, 0.8, 1.7)),
    "inflated": (lambda: gl.ZeroInflatedPoisson(torch.tensor(2.3), torch.tensor(0.3)), None),
}


def chi_square(found: Tensor, values: np.ndarray, pmf: np.ndarray) -> float:
    size, seen = len(found), found.numpy()
    keep = size * pmf > 5
    number = np.array([(seen == v).sum() for v in values[keep]])
    rest = np.array([size - number.sum()]), np.array([size * (1 - pmf[keep].sum())])
    observed, expected = (number, size * pmf[keep]) if rest[1] < 1 else map(np.append, (number, size * pmf[keep]), rest)
    return st.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("case", SAMPLED)
def test_samples_moments_and_mass(case: str) -> None:
    make, law = SAMPLED[case]
    p = make()
    values = np.arange(-40 if case == "skellam" else 0, 7 if case == "beta" else 60)
    pmf = 0.7 * st.poisson(2.3).pmf(values) + 0.3 * (values == 0) if law is None else law.pmf(values)
    z = p.sample(torch.Size([20_000]))
    assert chi_square(z, values, pmf) > 1e-6
    mean = pmf @ values
    assert float(p.mean) == pytest.approx(mean) and float(p.variance) == pytest.approx(pmf @ (values - mean) ** 2)
    if case != "skellam":
        torch.testing.assert_close(p.log_prob(torch.tensor(values).double()).exp(), torch.tensor(pmf))


def test_samples_of_vectors() -> None:
    p = gl.DirichletMultinomial(3, torch.tensor([0.8, 1.7, 0.6]))
    values = torch.tensor([z for z in itertools.product(range(4), repeat=3) if sum(z) == 3], dtype=torch.float64)
    place = torch.tensor([16.0, 4.0, 1.0])
    pmf = p.log_prob(values).exp()
    assert float(pmf.sum()) == pytest.approx(1)
    assert chi_square(p.sample(torch.Size([20_000])) @ place, (values @ place).numpy(), pmf.numpy()) > 1e-6
    torch.testing.assert_close(p.mean, pmf @ values)
    torch.testing.assert_close(p.variance, pmf @ values**2 - (pmf @ values) ** 2)
    q = cliques(CLIQUES)
    values = q.enumerate_support(expand=False)
    place = torch.tensor([81.0, 27.0, 9.0, 3.0, 1.0])
    pmf = q.log_prob(values).exp().numpy()
    assert chi_square(q.sample(torch.Size([20_000])) @ place, (values @ place).numpy(), pmf) > 1e-6
    assert q.expand(torch.Size([2, 3])).sample(torch.Size([4])).shape == (4, 2, 3, 5)


def test_samples_of_the_compound_law() -> None:
    p = gl.CompoundPoisson(torch.tensor(LAMBDA), torch.tensor(B))
    z = p.sample(torch.Size([20_000])).numpy()
    assert st.binomtest(int((z == 0).sum()), len(z), float(np.exp(-LAMBDA))).pvalue > 1e-6

    def cdf(x: np.ndarray) -> np.ndarray:
        n = np.arange(1, 60)
        return st.poisson(LAMBDA).pmf(n) @ sp.gammainc(n[:, None], x[None] / B) / (1 - np.exp(-LAMBDA))

    assert st.kstest(z[z > 0], cdf).pvalue > 1e-6


def test_samples_of_wishart() -> None:
    """The squared diagonal of A is chi-squared, and z is a Wishart sample."""
    q = td.Wishart(torch.tensor(4.3), torch.tensor([[0.6, 0.2], [0.2, 0.5]]))
    z, a = LATENTS[td.Wishart](q, torch.Size([20_000]))
    for j in range(2):
        assert st.kstest(a[:, j, j].numpy() ** 2, st.chi2(4.3 - j).cdf).pvalue > 1e-6
    error = (q.variance / 20_000).sqrt()
    assert ((z.mean(0) - q.mean) / error).abs().max() < 5


# ------------------------------------------------------------------------------------- through the estimator, sampled


def phi(p: Any, omega: Tensor) -> Tensor:
    """The characteristic function of each factor: registered, or summed."""
    if type(p) in LOG_CFS:
        return LOG_CFS[type(p)](p, omega).exp()
    if isinstance(p, td.Poisson):
        return (p.rate * (torch.exp(1j * omega) - 1)).exp()
    if isinstance(p, gl.Skellam):
        return (p.rate1 * (torch.exp(1j * omega) - 1) + p.rate2 * (torch.exp(-1j * omega) - 1)).exp()
    z = p.enumerate_support()
    return (p.log_prob(z).exp() * torch.exp(1j * omega * z)).sum(0)


def independent(make: Any) -> Any:
    return lambda leaves: td.Independent(make(**leaves), 1)


OMEGA = torch.tensor([0.9, 0.5]).double()


def cosine(z: Tensor) -> Tensor:
    return torch.cos((z * OMEGA.to(z.device)).sum(-1))


SAMPLE = {
    "Poisson": (td.Poisson, {"rate": [2.3, 0.6]}),
    "Binomial": (lambda probs: td.Binomial(torch.tensor([5.0, 3.0]), probs=probs), {"probs": [0.3, 0.8]}),
    "Binomial logits": (
        lambda logits: td.Binomial(torch.tensor([5.0, 5.0]), logits=logits),
        {"logits": [0.3, 0.8]},
    ),
    "Geometric": (lambda probs: td.Geometric(probs=probs), {"probs": [0.3, 0.6]}),
    "NegativeBinomial": (
        lambda total_count, logits: td.NegativeBinomial(total_count, logits=logits),
        {"total_count": [2.3, 1.1], "logits": [-0.4, 0.1]},
    ),
    "MeanNegativeBinomial": (gl.MeanNegativeBinomial, {"loc": [1.5, 0.7], "dispersion": [0.3, 1.2]}),
    "Skellam": (gl.Skellam, {"rate1": [1.3, 0.6], "rate2": [0.5, 1.0]}),
    "ZeroInflatedPoisson": (gl.ZeroInflatedPoisson, {"rate": [2.3, 0.6], "gate": [0.3, 0.2]}),
    "CompoundPoisson": (gl.CompoundPoisson, {"rate": [2.3, 0.6], "scale": [0.3, 0.7]}),
    "BetaBinomial": (
        lambda concentration1, concentration0: gl.BetaBinomial(4, concentration1, concentration0),
        {"concentration1": [0.8, 2.0], "concentration0": [1.7, 0.6]},
    ),
}


def z_scores(make_q: Any, f: Any, leaves: dict[str, Tensor], exact: dict[str, Tensor], **kwargs: Any) -> None:
    grads = gl.replicate(lambda p: gl.StochasticBackprop(**kwargs)(make_q(p), f), leaves, 100_000, 50_000)
    for name, grad in grads.items():
        error = grad.std(0) / len(grad) ** 0.5
        z = (grad.mean(0) - exact[name]) / error.clamp_min(1e-12)
        assert z.abs().max() < 5, (name, grad.mean(0), exact[name])


@pytest.mark.parametrize("case", SAMPLE)
def test_sampled_gradients_of_two_factors(case: str) -> None:
    make, values = SAMPLE[case]
    leaves = {k: t(v) for k, v in values.items()}
    mean = phi(make(**leaves), OMEGA).prod(-1).real
    exact = dict(zip(leaves, slopes(mean, list(leaves.values())), strict=True))
    z_scores(independent(make), cosine, {k: v.detach() for k, v in leaves.items()}, exact)


def enumerated(make_q: Any, f: Any, leaves: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    mean = (make_q(leaves).log_prob(z).exp() * f(z)).sum()
    return dict(zip(leaves, slopes(mean, list(leaves.values())), strict=True))


def test_sampled_gradients_of_vectors() -> None:
    """Two factors of three categories each; then cliques; then a mixture of binomials."""
    one = torch.tensor([z for z in itertools.product(range(4), repeat=3) if sum(z) == 3], dtype=torch.float64)
    both = torch.stack([one[:, None].expand(10, 10, 3), one.expand(10, 10, 3)], -2).reshape(-1, 2, 3)
    f = lambda z: torch.cos(z.flatten(-2) @ torch.linspace(0.2, 1.3, 6))  # noqa: E731
    alpha = torch.tensor([[0.8, 1.7, 0.6], [1.1, 0.4, 2.0]])
    makers = [
        lambda p: td.Independent(gl.DirichletMultinomial(3, p["alpha"]), 1),
        lambda p: td.Independent(td.Multinomial(3, probs=p["alpha"]), 1),
    ]
    for make_q in makers:
        z_scores(make_q, f, {"alpha": alpha}, enumerated(make_q, f, {"alpha": alpha}, both))
    leaves = CLIQUES
    z = cliques(leaves).enumerate_support(expand=False)
    z_scores(cliques, wave(1), leaves, enumerated(cliques, wave(1), leaves, z))
    leaves = {"probs": torch.tensor([[0.3, 0.6], [0.7, 0.2]]), "logits": torch.tensor([0.4, -0.3])}
    z = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64)
    z_scores(binomials, cosine, leaves, enumerated(binomials, cosine, leaves, z))


def test_sampled_gradients_of_mixtures_with_hidden_variables() -> None:
    """Components whose rules have jumps, and latents: below Independent, two mixtures of two components."""
    leaves = {"logits": torch.tensor([[0.4, -0.3], [0.1, 0.2]]), "rate": torch.tensor([[2.3, 0.6], [1.0, 3.0]])}
    cases = [
        lambda rate: gl.ZeroInflatedPoisson(rate, torch.tensor(0.3)),
        lambda rate: gl.MeanNegativeBinomial(rate, torch.tensor(0.5)),
        lambda rate: gl.CompoundPoisson(rate, torch.tensor(0.5)),
    ]
    for case in cases:

        def make_q(p: Any, case: Any = case) -> td.Distribution:
            return td.Independent(td.MixtureSameFamily(td.Categorical(logits=p["logits"]), case(p["rate"])), 1)

        grown = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        law = factor(make_q(grown))
        each = (law.mixture_distribution.probs * phi(law.component_distribution, OMEGA[:, None])).sum(-1)
        exact = dict(zip(grown, slopes(each.prod(-1).real, list(grown.values())), strict=True))
        z_scores(make_q, cosine, leaves, exact)


@pytest.mark.parametrize("kinked", [False, True])
def test_sampled_gradients_of_normals_and_wishart(kinked: bool) -> None:
    """The half Hessian for a smooth cost, the path for one with a kink."""
    leaves = {"loc": torch.tensor([0.4, -0.2]), "root": torch.tensor([[1.0, 0.0], [0.3, 0.6]])}

    def make_q(p: Any) -> td.Distribution:
        return td.MultivariateNormal(p["loc"], scale_tril=p["root"].tril())

    way = torch.tensor([0.9, 0.5])
    f = (lambda z: (z @ way).relu()) if kinked else (lambda z: torch.cos(z @ way))
    grown = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    mean, scale = grown["loc"] @ way, (way @ grown["root"].tril()).norm()
    if kinked:
        unit = td.Normal(torch.tensor(0.0), torch.tensor(1.0))
        value = mean * unit.cdf(mean / scale) + scale * unit.log_prob(mean / scale).exp()
    else:
        value = torch.cos(mean) * torch.exp(-(scale**2) / 2)
    exact = dict(zip(grown, slopes(value, list(grown.values())), strict=True))
    z_scores(make_q, f, leaves, exact)
    if not kinked:
        leaves = {"df": torch.tensor(4.3), "root": torch.tensor([[1.0, 0.0], [0.3, 0.6]])}
        weight = torch.tensor([[0.3, 0.1], [0.1, 0.2]])
        grown = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        cov = grown["root"].tril() @ grown["root"].tril().mT
        value = torch.linalg.det(torch.eye(2) + 2 * cov @ weight) ** (-grown["df"] / 2)
        exact = dict(zip(grown, slopes(value, list(grown.values())), strict=True))
        z_scores(
            lambda p: td.Wishart(p["df"], scale_tril=p["root"].tril(), validate_args=False),
            lambda z: (-(weight * z).sum((-2, -1))).exp(),
            leaves,
            exact,
        )


# ------------------------------------------------------------------------------------------- options and extremes

EVERY = {
    **{k: (independent(make), v) for k, (make, v) in SAMPLE.items()},
    "Multinomial": (lambda p: td.Multinomial(3, probs=p["probs"]), {"probs": [0.2, 0.5, 0.3]}),
    "DirichletMultinomial": (lambda p: gl.DirichletMultinomial(3, p["a"]), {"a": [0.2, 0.5, 0.3]}),
    "Cliques": (cliques, {k: v.tolist() for k, v in CLIQUES.items()}),
    "Mixture": (binomials, {"probs": [[0.3, 0.6], [0.7, 0.2]], "logits": [0.4, -0.3]}),
    "MultivariateNormal": (
        lambda p: td.MultivariateNormal(p["loc"], scale_tril=p["root"].tril()),
        {"loc": [0.4, -0.2], "root": [[1.0, 0.0], [0.3, 0.6]]},
    ),
    "LowRank": (
        lambda p: td.LowRankMultivariateNormal(p["loc"], p["factor"], p["diag"]),
        {"loc": [0.4, -0.2], "factor": [[0.6], [-0.4]], "diag": [0.5, 0.8]},
    ),
    "Wishart": (
        lambda p: td.Wishart(p["df"], scale_tril=p["root"].tril(), validate_args=False),
        {"df": 4.3, "root": [[1.0, 0.0], [0.3, 0.6]]},
    ),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", EVERY)
def test_chunks_and_linear_layers_change_nothing(case: str) -> None:
    make_q, values = EVERY[case]
    leaves = {k: t(v) for k, v in values.items()}
    q = make_q(leaves)
    linear = torch.nn.Linear(q.event_shape.numel(), 4)

    def f(z: Tensor) -> Tensor:
        return linear(z.flatten(-len(q.event_shape))).sin().sum(-1)

    costs = [(f, None), (f, 3), (gl.AfterLinear(linear, lambda h: h.sin().sum(-1)), None)]
    found = []
    for cost, chunk_size in costs:
        estimator = gl.StochasticBackprop(3, chunk_size=chunk_size)
        torch.manual_seed(1)
        found.append(slopes(estimator(q, cost), list(leaves.values())))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)
            assert a.abs().sum() > 0


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", EVERY)
def test_float32_and_batches(case: str) -> None:
    torch.set_default_dtype(torch.float32)
    make_q, values = EVERY[case]
    leaves = {k: torch.tensor(v).expand(7, *np.shape(v)).clone() for k, v in values.items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    q = make_q(leaves)
    loss = gl.StochasticBackprop(2)(q, lambda z: z.flatten(-len(q.event_shape)).sum(-1).sin())
    assert loss.shape == (7,) and loss.dtype == torch.float32
    for g in slopes(loss.sum(), list(leaves.values())):
        assert g.dtype == torch.float32 and g.isfinite().all()


@pytest.mark.parametrize("case", ["MeanNegativeBinomial", "ZeroInflatedPoisson", "BetaBinomial", "Cliques", "Mixture"])
def test_torch_func(case: str) -> None:
    make_q, values = EVERY[case]

    def loss(p: dict[str, Tensor]) -> Tensor:
        return gl.StochasticBackprop(2)(make_q(p), lambda z: z.sum(-1).sin())

    leaves = {k: torch.tensor(v).expand(3, *np.shape(v)) for k, v in values.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own remarks on batching
        td.Distribution.set_default_validate_args(False)
        try:
            grads = torch.func.vmap(torch.func.grad(loss), randomness="different")(leaves)
        finally:
            td.Distribution.set_default_validate_args(__debug__)
    assert all(g.shape == leaves[k].shape and g.isfinite().all() for k, g in grads.items())


EXTREMES = [
    (lambda x: td.Bernoulli(logits=x), [-200.0, 200.0, 0.0]),
    (lambda x: td.OneHotCategorical(logits=x), [-300.0, 300.0, 0.0]),
    (lambda x: td.Categorical(logits=x), [-300.0, 300.0, 0.0]),
    (lambda x: gl.Cliques([[0]], [x], sizes=3), [-300.0, 300.0, 0.0]),
    (lambda x: td.Binomial(torch.tensor(1e4), logits=x), [-200.0, 200.0, 0.0]),
    (lambda x: td.NegativeBinomial(torch.tensor(1e-4), logits=x), [-60.0, 10.0, 0.0]),
    (lambda x: td.Geometric(probs=x), [1e-5, 1.0 - 1e-7, 0.5]),
    (lambda x: gl.MeanNegativeBinomial(torch.tensor(1.5), x), [1e-7, 1e-3, 1e3]),
    (lambda x: gl.MeanNegativeBinomial(x, torch.tensor(1e-6)), [1e-7, 1e-3, 1e3]),
    (td.Poisson, [1e-30, 1e-3, 1e5]),
    (lambda x: gl.ZeroInflatedPoisson(torch.tensor(2.0), x), [0.0, 1.0, 0.5]),
    (lambda x: gl.CompoundPoisson(x, torch.tensor(2.0)), [1e-30, 1e-3, 1e4]),
    (lambda x: gl.BetaBinomial(5, x, torch.tensor(1.0)), [1e-4, 1e6, 0.5]),
    (lambda x: gl.DirichletMultinomial(5, x), [1e-4, 1e6, 0.5]),
    (lambda x: td.Multinomial(5, logits=x), [-200.0, 200.0, 0.0]),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("i", range(len(EXTREMES)))
def test_extreme_parameters_stay_finite_in_float32(i: int) -> None:
    make, values = EXTREMES[i]
    x = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    q = make(x)
    dims = len(q.event_shape)
    f = (lambda z: z.sum(-1).sin()) if dims else (lambda z: (z.float() / 10).sin())
    (g,) = slopes(gl.StochasticBackprop(20)(q, f).sum(), x)
    assert g.isfinite().all(), g


def test_the_dispersion_rule_reaches_the_poisson_law() -> None:
    """At dispersion 0+, the derivative is half m^2 times a second difference, without noise for a parabola."""
    alpha = torch.tensor([1e-8, 0.3, 4.0]).requires_grad_()
    q = td.Independent(gl.MeanNegativeBinomial(torch.tensor(1.5), alpha), 1)
    (g,) = slopes(gl.StochasticBackprop()(q, lambda z: (z**2).sum(-1)), alpha)
    torch.testing.assert_close(g, torch.full((3,), 1.5**2))


def test_what_cannot_be_served_is_said() -> None:
    with pytest.raises(ValueError, match="found total_count="):
        gl.BetaBinomial(0, torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="in one block"):
        gl.Cliques([[0, 1], [1]], [torch.zeros(4), torch.zeros(2)])
    with pytest.raises(ValueError, match="one a joint value"):
        gl.Cliques([[0, 1]], [torch.zeros(3)])
    weibull = td.Weibull(torch.ones(2), torch.ones(2).requires_grad_())
    unknown = td.MixtureSameFamily(td.Categorical(torch.ones(2).requires_grad_()), weibull)
    if td.Weibull not in {cls for cls, _ in RULES}:
        assert not gl.StochasticBackprop.supports(unknown)


# --------------------------------------------------------------------- variance against the score at equal evaluations


@pytest.mark.parametrize("law", ["Poisson", "NegativeBinomial", "Binomial"])
def test_smooth_costs_are_better_served_than_by_the_score(law: str) -> None:
    """Against the score with leave-one-out and as many evaluations of f, summed over the parameters, d = 10."""
    makers = {
        "Poisson": lambda p: td.Poisson(p.exp()),
        "NegativeBinomial": lambda p: td.NegativeBinomial(torch.tensor(3.0), logits=p),
        "Binomial": lambda p: td.Binomial(torch.tensor(5.0), logits=p),
    }
    theta, weight = torch.linspace(-0.5, 0.5, 10), torch.linspace(-1.0, 1.0, 10) / 10**0.5

    def make_q(p: Tensor) -> td.Distribution:
        return td.Independent(makers[law](p), 1)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight) + (0.3 * (z @ weight.flip(0)) - 0.5) ** 2

    ours = gl.StochasticBackprop()
    theirs = gl.ScoreFunction(ours.evaluations(make_q(theta.clone().requires_grad_())), gl.LeaveOneOut())
    small, large = (gl.replicate(lambda p, e=e: e(make_q(p), f), theta, 2000).var(0).sum() for e in (ours, theirs))
    assert 3 * small < large
