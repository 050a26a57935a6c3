"""Continuous rules, exact in the noise: the sample and the jumps are integrated by double-exponential quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats as st
import torch
import torch.distributions as td
from scipy.integrate import quad
from torch import Tensor

import gradlab as gl
from gradlab.rules.continuous import frullani
from gradlab.rules.registry import CUMULANTS, LOG_CFS, REMAINDERS, RULES, Rule, from_log_cf
from gradlab.taylor import derivatives

pytestmark = pytest.mark.usefixtures("device")

H = 0.1
T = np.arange(-3.4, 3.4 + H / 2, H)
LOW = 1 / (1 + np.exp(math.pi * np.sinh(-T)))  # u and 1 - u, each without a difference
HIGH = LOW[::-1]
LEGENDRE = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2
WEIGHT = H * math.pi * np.cosh(T) * LOW * HIGH


def nodes(law: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of the expectation under a law of scipy."""
    if law.dist.name == "expon":  # a mixture of jumps has a kink at 1
        scale = law.args[1] if law.args else 1.0
        return scale * np.append(LOW, 1 - np.log(LOW)), np.append(np.exp(-LOW) * WEIGHT, math.exp(-1) * WEIGHT)
    if law.dist.name == "laplace":
        x, w = -np.log(LOW), WEIGHT / 2
        loc, scale = law.args
        return np.append(loc - scale * x, loc + scale * x), np.append(w, w)
    if law.dist.name == "norm":
        x, w = np.polynomial.hermite_e.hermegauss(24)
        return x, w / w.sum()
    return np.where(LOW < 0.5, law.ppf(LOW), law.isf(HIGH)), WEIGHT


def scipy_law(law: td.Distribution) -> Any:
    """Return a jump's law by scipy; the parameters are the same for all samples."""
    while isinstance(law, td.Independent):
        law = law.base_dist

    def first(x: Tensor) -> float:
        assert (x == x.flatten()[0]).all()
        return x.flatten()[0].item()

    match law:
        case td.Uniform():
            return st.uniform()
        case td.Exponential():
            return st.expon(0, 1 / first(law.rate))
        case td.Gamma():
            return st.gamma(first(law.concentration), 0, 1 / first(law.rate))
        case td.Beta():
            return st.beta(first(law.concentration1), first(law.concentration0))
        case td.Laplace():
            return st.laplace(0, first(law.scale))
    raise TypeError(law)


def plans(laws: list[td.Distribution]) -> list[tuple[float, list[Any]]]:
    """Return (probability, nodes of each jump): both outcomes of a Bernoulli, and what it leaves unused at 1/2."""
    fixed = (np.array([0.5]), np.ones(1))
    at = [i for i, law in enumerate(laws) if type(base(law)) is td.Bernoulli]
    if not at:
        return [(1.0, [LEGENDRE if isinstance(law, td.Uniform) else nodes(scipy_law(law)) for law in laws])]
    [i] = at
    share = base(laws[i]).probs.flatten()[0].item()
    before, after = [nodes(scipy_law(law)) for law in laws[:i]], laws[i + 1 :]
    no = [fixed] * (len(after) - 1) + [nodes(scipy_law(after[-1]))]
    yes = [nodes(scipy_law(after[0])), fixed] if len(after) == 2 else [fixed]
    if isinstance(base(laws[i]), td.Bernoulli) and share == 0.5:  # the two sides of a stable jump
        no = yes = [nodes(scipy_law(law)) for law in after]
    one = [(np.array([x]), np.ones(1)) for x in (0.0, 1.0)]
    return [(1 - share, [*before, one[0], *no]), (share, [*before, one[1], *yes])]


def base(law: td.Distribution) -> td.Distribution:
    return law.base_dist if isinstance(law, td.Independent) else law


def integrate(
    rule: Rule, p: td.Distribution, start: tuple[Tensor, ...], weights: Tensor, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the mean of the rule's gradient, over samples (and latents) with weights, and over the jumps."""
    z, dims = start[0], len(p.event_shape)
    total: Any = 0.0
    for share, columns in plans(list(rule.jumps(p, z))):
        sizes = [len(x) for x, _ in columns]
        index = torch.cartesian_prod(*(torch.arange(n) for n in (len(z), *sizes))).reshape(-1, 1 + len(sizes))
        jumps = [torch.as_tensor(x)[index[:, i + 1]] for i, (x, _) in enumerate(columns)]
        if dims:  # every coordinate takes the jump: they are not compared with each other
            ranks = [len(law.event_shape) for law in rule.jumps(p, z)]
            jumps = [j[:, None].expand(len(j), z.shape[-1]) if r else j for j, r in zip(jumps, ranks, strict=True)]
        mass = share * weights[index[:, 0]]
        for i, (_, w) in enumerate(columns):
            mass = mass * torch.as_tensor(w.copy())[index[:, i + 1]]
        chosen = [x[index[:, 0]] for x in start]
        for shift in rule.shifts(p, *chosen, *jumps):
            points = chosen[0] if shift.point is None else shift.point
            if dims and shift.point is None:
                points = points[..., None, :].expand(*shift.weight.shape, points.shape[-1])
            if shift.order == 0:
                gain = f(points) - (f(chosen[0])[:, None] if dims else f(chosen[0]))
            else:
                way = torch.ones_like(points) if shift.direction is None else shift.direction
                gain = derivatives(f, points, way, shift.order)[-1]
            value = shift.weight * gain
            total = total + (mass[:, None] * value if dims else mass * value).sum(0)
    return total


def simple(law: Callable[..., Any]) -> Callable[..., Any]:
    """Samples of a law of scipy, as nodes."""

    def start(*theta: float) -> tuple[tuple[Tensor, ...], Tensor]:
        x, w = nodes(law(*theta))
        if law is st.beta:
            x = x.clip(max=1 - 2**-53)
        return (torch.as_tensor(x.copy()),), torch.as_tensor(w.copy())

    return start


def grid(*laws: Any) -> tuple[list[Tensor], Tensor]:
    pairs = [nodes(law) for law in laws]
    columns = torch.cartesian_prod(*(torch.as_tensor(x.copy()) for x, _ in pairs)).T
    weights = torch.cartesian_prod(*(torch.as_tensor(w.copy()) for _, w in pairs)).prod(-1)
    return list(columns), weights


def nig_start(loc: float, skew: float, mean: float, shape: float) -> Any:
    (v, eps), weights = grid(st.invgauss(mean / shape, 0, shape), st.norm())
    return (loc + skew * v + v.sqrt() * eps, v), weights


def circle(loc: float, kappa: float) -> Any:
    x = torch.arange(-200, 200) * math.pi / 200
    return (x,), torch.as_tensor(st.vonmises.pdf(x.numpy(), kappa, loc)) * math.pi / 200


def pair_start(a: float, b: float) -> Any:
    x, w = nodes(st.beta(a, b))
    y = nodes(st.beta(b, a))[0][::-1]
    return (torch.as_tensor(np.stack([x, y], -1)),), torch.as_tensor(w.copy())


def two_gammas(loc: float, k: float, right: float, left: float) -> Any:
    return two_points(loc, -k * np.log((1 - 1.3j * right) * (1 + 1.3j * left)), 1.3)


def two_points(loc: float, log_cf: complex, omega: float) -> Any:
    """Two samples with the characteristic function at one frequency: more does not matter for f = cos."""
    spread, middle = math.acos(math.exp(np.real(log_cf))) / omega, loc + np.imag(log_cf) / omega
    return (torch.tensor([middle - spread, middle + spread]),), torch.tensor([0.5, 0.5])


def smooth(z: Tensor) -> Tensor:
    return torch.cos(1.3 * z) + 0.1 * z * z


def heavy(z: Tensor) -> Tensor:
    return torch.tanh(z) + 1 / (1 + (z - 0.5) ** 2)


def periodic(z: Tensor) -> Tensor:
    return torch.cos(z - 0.4) + torch.sin(2 * z)


def wave(z: Tensor) -> Tensor:
    return torch.cos(1.3 * z)


def of_pair(z: Tensor) -> Tensor:
    return torch.cos(1.3 * z[..., 0]) * (1 + z[..., 1] ** 2)


GAMMA = simple(lambda k, b: st.gamma(k, 0, 1 / b))
Case = tuple[Callable[..., td.Distribution], tuple[float, ...], Callable[..., Any], Callable[[Tensor], Tensor]]
CASES: dict[str, Case] = {
    "gamma": (td.Gamma, (2.3, 1.4), GAMMA, smooth),
    "gamma 0.6": (td.Gamma, (0.6, 1.4), GAMMA, smooth),
    "exponential": (td.Exponential, (1.4,), simple(lambda b: st.expon(0, 1 / b)), smooth),
    "laplace": (td.Laplace, (0.3, 0.8), simple(st.laplace), smooth),
    "beta": (td.Beta, (1.7, 2.4), simple(st.beta), smooth),
    "beta 0.6": (td.Beta, (0.6, 0.8), simple(st.beta), smooth),
    "dirichlet": (lambda a, b: td.Dirichlet(torch.stack([a, b])), (2.3, 2.4), pair_start, of_pair),
    "dirichlet 0.6": (lambda a, b: td.Dirichlet(torch.stack([a, b])), (0.6, 0.8), pair_start, of_pair),
    "chi2": (lambda k: td.Chi2(2 * k), (1.3,), simple(lambda k: st.gamma(k, 0, 2)), smooth),
    "asymmetric laplace": (
        gl.AsymmetricLaplace,
        (0.3, 1.2, 0.7),
        lambda loc, a, b: two_gammas(loc, 1.0, a, b),
        wave,
    ),
    "variance-gamma": (gl.VarianceGamma, (0.3, 1.4, 1.2, 0.7), two_gammas, wave),
    "inverse gaussian": (gl.InverseGaussian, (1.2, 1.9), simple(lambda m, k: st.invgauss(m / k, 0, k)), smooth),
    "normal inverse gaussian": (gl.NormalInverseGaussian, (0.3, 0.4, 1.2, 1.9), nig_start, smooth),
    "student": (td.StudentT, (3.3, 0.2, 0.8), simple(st.t), heavy),
    "cauchy": (td.Cauchy, (0.2, 0.8), simple(st.cauchy), heavy),
    "uniform": (td.Uniform, (-0.3, 1.4), simple(lambda a, b: st.uniform(a, b - a)), smooth),
    "von mises": (td.VonMises, (0.3, 1.4), circle, periodic),
    "gumbel": (td.Gumbel, (0.3, 0.8), simple(st.gumbel_r), heavy),
    "logistic": (gl.Logistic, (0.3, 0.8), simple(st.logistic), heavy),
    "half-normal": (td.HalfNormal, (0.8,), simple(lambda s: st.halfnorm(0, s)), smooth),
    "weibull": (td.Weibull, (0.8, 1.7), simple(lambda s, k: st.weibull_min(k, 0, s)), smooth),
    "log-normal": (td.LogNormal, (0.3, 0.4), simple(lambda m, s: st.lognorm(s, 0, math.exp(m))), heavy),
}
"""By name: how to build q, its parameters, its samples as nodes, and a cost."""


def build(name: str) -> td.Distribution:
    make, theta, _, _ = CASES[name]
    return make(*(torch.tensor(x) for x in theta))


RULE_CASES = [
    (name, parameter, order)
    for name in CASES
    for (cls, parameter), rules in RULES.items()
    if cls is type(build(name))
    for order in rules
    if (name, parameter, order) != ("cauchy", "scale", 0)  # is with the stable laws
]


def place(p: td.Distribution, parameter: str) -> int:
    """Return which of the parameters of a case is meant."""
    if isinstance(p, td.Chi2):
        return 0
    names = list(p.arg_constraints)
    order = {"Gamma": ["concentration", "rate"], "Beta": ["concentration1", "concentration0"]}
    return order.get(type(p).__name__, names).index(parameter)


def slope(name: str, i: int) -> float:
    """Return the derivative of E f by central differences of sixth order."""
    _, theta, start, f = CASES[name]

    def mean(step: float) -> float:
        moved = list(theta)
        moved[i] += step
        points, weights = start(*moved)
        return (weights @ f(points[0])).item()

    h = 4e-3
    return sum(c * (mean(k * h) - mean(-k * h)) for k, c in ((1, 0.75), (2, -0.15), (3, 1 / 60))) / h


@pytest.mark.parametrize("name, parameter, order", RULE_CASES)
def test_rule_is_exact(name: str, parameter: str, order: int) -> None:
    with torch.device("cpu"):
        p, (_, theta, start, f) = build(name), CASES[name]
        gradient = integrate(RULES[type(p), parameter][order], p, *start(*theta), f)
        if p.event_shape:
            exact = torch.tensor([slope(name, i) for i in range(2)])
        else:
            exact = torch.tensor(slope(name, place(p, parameter)))
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-8)
        assert not torch.allclose(1.01 * gradient, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha, parameter", [(0.7, 1), (0.7, 2), (1.0, 1), (1.0, 2), (1.6, 1), (1.6, 2), (1.0, 0)])
def test_stable_rules_are_exact(alpha: float, parameter: int) -> None:
    r"""For f = cos, E f(z + r) + E f(z - r) - 2 E f(z) = 2 (cos(omega r) - 1) E f: only the jump is integrated."""
    scale, omega = torch.tensor(0.8), 1.3
    if parameter == 0:
        p, name = td.Cauchy(torch.tensor(0.2), scale), "scale"
    else:
        p, name = (
            gl.SymmetricStable(torch.tensor(0.2), scale, torch.tensor(alpha)),
            ("", "scale", "stability")[parameter],
        )
    rule, z = RULES[type(p), name][0], torch.tensor([0.0])

    def intensity(r: float) -> tuple[float, float]:
        """Return the rule's jump where it draws r, and its weight times the density of r."""
        if parameter == 0:
            noise, density = (2 / math.pi * math.atan(r),), 2 / math.pi / (1 + r * r)
        elif r > 1:
            noise, density = (1.0, r**-alpha), alpha * r ** (-1 - alpha) / 2
        else:
            noise, density = (0.0, r ** (2 - alpha)), (2 - alpha) * r ** (1 - alpha) / 2
        up, down = rule.shifts(p, z, *(torch.tensor([x]) for x in noise))
        assert up.point.item() == -down.point.item() and up.weight.item() == down.weight.item()
        return up.point.item(), up.weight.item() * density

    def near(r: float) -> float:
        jump, weight = intensity(r)
        return weight * -4 * math.sin(omega * jump / 2) ** 2

    def far(r: float) -> float:
        return 2 * intensity(r)[1]

    wave, h = omega * scale.item(), np.finfo(float).eps ** 0.25
    parts = [
        quad(near, 0, h, epsabs=1e-14)[0],
        quad(near, h, 1, epsabs=1e-12, limit=200)[0],
        quad(far, 1, np.inf, weight="cos", wvar=wave, epsabs=1e-11, limlst=200)[0],
        -quad(lambda t: far(math.exp(t)) * math.exp(t), 0, 60, epsabs=1e-12, limit=200)[0],
    ]
    exact = -(wave**alpha) * (math.log(wave) if parameter == 2 else alpha / scale.item())
    assert sum(parts) == pytest.approx(exact, abs=1e-8)


STEPS: dict[tuple[type[td.Distribution], str], tuple[tuple[float, ...], int, Callable[..., Any], float]] = {
    (td.Laplace, "scale"): ((0.3, 0.8), 1, st.laplace, 1.1),
    (td.Exponential, "rate"): ((1.4,), 0, lambda b: st.expon(0, 1 / b), 1.1),
    (td.Gamma, "rate"): ((2.3, 1.4), 1, lambda k, b: st.gamma(k, 0, 1 / b), 1.1),
    (gl.AsymmetricLaplace, "right"): ((0.0, 1.2, 0.7), 1, lambda m, a, b: Skewed(m, a, b), 0.4),
    (gl.AsymmetricLaplace, "left"): ((0.0, 1.2, 0.7), 2, lambda m, a, b: Skewed(m, a, b), -0.4),
    (gl.InverseGaussian, "loc"): ((1.2, 1.9), 0, lambda m, k: st.invgauss(m / k, 0, k), 1.1),
    (gl.InverseGaussian, "concentration"): ((1.2, 1.9), 1, lambda m, k: st.invgauss(m / k, 0, k), 1.1),
    (td.Uniform, "low"): ((-0.3, 1.4), 0, lambda a, b: st.uniform(a, b - a), 0.5),
    (td.Uniform, "high"): ((-0.3, 1.4), 1, lambda a, b: st.uniform(a, b - a), 0.5),
}
"""By rule of order 0: the parameters, which one is meant, the law, and where f has its step."""


class Skewed:
    """The survival function of an asymmetric Laplace."""

    def __init__(self, *theta: float) -> None:
        self.theta = theta

    def sf(self, x: Any) -> Any:
        loc, a, b = self.theta
        y = x - loc
        return np.where(y > 0, a * np.exp(-np.maximum(y, 0) / a), a + b - b * np.exp(np.minimum(y, 0) / b)) / (a + b)


@pytest.mark.parametrize("key", STEPS, ids=lambda k: f"{k[0].__name__} {k[1]}")
def test_difference_forms_are_exact_at_a_step(key: tuple[type[td.Distribution], str]) -> None:
    """E f(z + u) is the survival function at the step minus u, and the jump u is integrated."""
    theta, i, law, step = STEPS[key]

    def chance(delta: float, at: Any = step) -> Any:
        moved = list(theta)
        moved[i] += delta
        return law(*moved).sf(at)

    with torch.device("cpu"):
        p, rule = key[0](*(torch.tensor(x) for x in theta)), RULES[key][0]
        z = torch.zeros(1)
        if not rule.jumps(p, z):  # the point itself
            [shift] = rule.shifts(p, z)
            found = shift.weight.item() * ((shift.point.item() > step) - chance(0.0))
        else:
            [jump] = rule.jumps(p, z)
            drawn = scipy_law(jump)

            def gain(x: float) -> float:
                shifts = rule.shifts(p, z, torch.tensor([x]))
                return sum(s.weight.item() * (chance(0.0, step - s.point.item()) - chance(0.0)) for s in shifts)

            size = abs(rule.shifts(p, z, torch.ones(1))[0].point.item())
            breaks = [0.0, abs(step) / size, 1.0, 4.0, 12.0, 45.0]
            found = sum(
                quad(lambda x: 2 * x * drawn.pdf(x * x) * gain(x * x), math.sqrt(a), math.sqrt(b), epsabs=1e-13)[0]
                for a, b in zip(sorted(breaks)[:-1], sorted(breaks)[1:], strict=True)
            )
    h = 2e-3
    exact = sum(c * (chance(k * h) - chance(-k * h)) for k, c in ((1, 0.75), (2, -0.15), (3, 1 / 60))) / h
    assert found == pytest.approx(exact, abs=1e-8)
    assert 1.01 * found != pytest.approx(exact, abs=1e-8)


# -------------------------------------------------------------------------------- series and remainder


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name, parameter",
    [
        *(("gamma", "concentration"), ("gamma", "rate"), ("exponential", "rate"), ("chi2", "concentration")),
        *(("asymmetric laplace", "left"), ("variance-gamma", "right"), ("variance-gamma", "concentration")),
        *(("inverse gaussian", "loc"), ("laplace", "scale")),
    ],
)
def test_remainder_is_exact(name: str, parameter: str, order: int) -> None:
    with torch.device("cpu"):
        p, (_, theta, start, f) = build(name), CASES[name]
        rule = REMAINDERS[type(p), parameter](order)
        gradient = integrate(rule, p, *start(*theta), f)
        torch.testing.assert_close(gradient.item(), slope(name, place(p, parameter)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", ["series", "remainder"])
def test_forms_that_do_not_exist_are_refused(form: str) -> None:
    """None is left without a gradient in silence."""
    estimator = gl.StochasticBackprop(form=form, order=2)
    with pytest.raises(TypeError, match="form='exact'"):
        estimator(td.StudentT(torch.tensor(3.0, requires_grad=True)), torch.tanh)
    if form == "remainder":
        with pytest.raises(TypeError, match="form='exact'"):
            estimator(gl.NormalInverseGaussian(0.3, 0.4, torch.tensor(1.2, requires_grad=True), 1.9), torch.tanh)


@pytest.mark.parametrize("name", [n for n in CASES if type(build(n)) in CUMULANTS and type(build(n)) in LOG_CFS])
def test_cumulants_are_those_of_the_characteristic_function(name: str) -> None:
    with torch.device("cpu"):
        p = build(name)
        closed = CUMULANTS[type(p)](p, 6)
        torch.testing.assert_close(list(closed), from_log_cf(LOG_CFS[type(p)])(p, 6), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(list(closed[:2]), [p.mean, p.variance])


def test_cumulants_of_the_normal_inverse_gaussian() -> None:
    with torch.device("cpu"):
        p = build("normal inverse gaussian")
        torch.testing.assert_close(from_log_cf(LOG_CFS[type(p)])(p, 3)[:2], [p.mean, p.variance])


# ------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers(dtype: torch.dtype) -> None:
    size, grid = torch.Size([20_000]), np.arange(-20, 40, 1 / 200)
    laws = {
        gl.AsymmetricLaplace: ((0.3, 1.2, 0.7), lambda x: 1 - Skewed(0.3, 1.2, 0.7).sf(x)),
        gl.InverseGaussian: ((1.2, 1.9), st.invgauss(1.2 / 1.9, 0, 1.9).cdf),
        gl.VarianceGamma: ((0.3, 1.0, 1.2, 0.7), lambda x: 1 - Skewed(0.3, 1.2, 0.7).sf(x)),
        gl.NormalInverseGaussian: (
            (0.3, 0.4, 1.2, 1.9),
            lambda x: np.interp(x, grid, np.cumsum(_nig(0.3, 0.4, 1.2, 1.9).pdf(grid)) / 200),
        ),
        gl.SymmetricStable: ((0.3, 0.8, 1.0), st.cauchy(0.3, 0.8).cdf),
    }
    for cls, (theta, cdf) in laws.items():
        q = cls(*(torch.tensor(x, dtype=dtype) for x in theta))
        z = q.expand(torch.Size([2])).sample(size)
        assert z.dtype == dtype and z.shape == (*size, 2)
        x = z[:, 0].double().cpu().numpy()
        assert st.kstest(x, cdf).pvalue > 1e-6, cls
        assert st.kstest(x + 0.2, cdf).pvalue < 1e-6, cls


def _nig(loc: float, skew: float, mean: float, shape: float) -> Any:
    delta, gamma = math.sqrt(shape), math.sqrt(shape) / mean
    return st.norminvgauss(math.hypot(gamma, skew) * delta, skew * delta, loc, delta)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.6, 1.95])
def test_stable_samples_have_their_characteristic_function(alpha: float) -> None:
    q = gl.SymmetricStable(torch.tensor(0.3), torch.tensor(0.8), torch.tensor(alpha))
    z = q.sample(torch.Size([100_000])) - 0.3
    for omega in (0.3, 1.0, 3.0):
        wave = torch.cos(omega * z)
        error = wave.std() / math.sqrt(len(z))
        assert (wave.mean() - math.exp(-((0.8 * omega) ** alpha))).abs() < 5 * error


def test_log_probs() -> None:
    with torch.device("cpu"):
        x = torch.tensor([-0.4, 0.2, 0.9, 2.5])
        nig = build("normal inverse gaussian")
        expected = torch.as_tensor(_nig(0.3, 0.4, 1.2, 1.9).logpdf(x.numpy()))
        torch.testing.assert_close(nig.log_prob(x), expected)
        expected = torch.as_tensor(st.invgauss(1.2 / 1.9, 0, 1.9).logpdf(x[1:].numpy()))
        torch.testing.assert_close(build("inverse gaussian").log_prob(x[1:]), expected)
        q = build("asymmetric laplace")
        y = x.clone().requires_grad_()
        (density,) = torch.autograd.grad(q.cdf(y).sum(), y)
        torch.testing.assert_close(density, q.log_prob(x).exp())
        mean = torch.tensor(1.2, requires_grad=True)
        (found,) = torch.autograd.grad(gl.NormalInverseGaussian(0.3, 0.4, mean, 1.9).log_prob(x).sum(), mean)
        ends = [torch.as_tensor(_nig(0.3, 0.4, 1.2 + h, 1.9).logpdf(x.numpy())).sum() for h in (1e-5, -1e-5)]
        torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------- the estimator, two factors


def log_cf(name: str, theta: tuple[float, ...], omega: float) -> complex:
    make, _, start, _ = CASES.get(name, (gl.SymmetricStable, (), None, None))
    if name.startswith("stable"):
        return 1j * omega * theta[0] - abs(omega * theta[1]) ** theta[2]
    p = make(*(torch.tensor(x) for x in theta))
    if type(p) in LOG_CFS:
        return LOG_CFS[type(p)](p, torch.tensor(omega, dtype=torch.complex128)).item()
    if name == "cauchy":
        return 1j * omega * theta[0] - abs(omega * theta[1])
    points, weights = start(*theta)
    return torch.log((weights * torch.exp(1j * omega * points[0])).sum()).item()


MONTE_CARLO = [n for n in CASES if "dirichlet" not in n] + ["stable 1.6", "stable 0.7"]
STABLE = {"stable 1.6": (0.2, 0.8, 1.6), "stable 0.7": (0.2, 0.8, 0.7)}


@pytest.mark.parametrize("order", [None, 0])
@pytest.mark.parametrize("name", MONTE_CARLO)
def test_gradient_of_two_factors(name: str, order: int | None) -> None:
    """f = cos(a z_1 + b z_2): E f is the real part of a product of characteristic functions."""
    make, theta = (gl.SymmetricStable, STABLE[name]) if name in STABLE else CASES[name][:2]
    both = [theta, tuple(1.1 * x for x in theta)]
    a = (1.0, -2.0) if name == "von mises" else (0.9, -0.6)

    def exact(j: int, i: int) -> float:
        def mean(step: float) -> float:
            moved = [list(t) for t in both]
            moved[j][i] += step
            with torch.device("cpu"):
                return np.exp(sum(log_cf(name, tuple(t), w) for t, w in zip(moved, a, strict=True))).real

        return (8 * (mean(1e-3) - mean(-1e-3)) - (mean(2e-3) - mean(-2e-3))) / 12e-3

    def loss(params: tuple[Tensor, ...]) -> Tensor:
        q = td.Independent(make(*params), 1)
        return gl.StochasticBackprop(order=order)(q, lambda z: torch.cos(a[0] * z[..., 0] + a[1] * z[..., 1]))

    params = tuple(torch.tensor([t[i] for t in both]) for i in range(len(theta)))
    grads = gl.replicate(loss, params, 100_000)
    for i, grad in enumerate(grads):
        truth = torch.tensor([exact(j, i) for j in range(2)])
        error = grad.std(0) / math.sqrt(len(grad))
        assert ((grad.mean(0) - truth).abs() < 5 * error + 1e-9).all(), (name, i, grad.mean(0), truth, error)
        assert (error < 0.05).all()


@pytest.mark.parametrize("order", [0, 1])
def test_gradient_of_two_dirichlets(order: int) -> None:
    alpha = torch.tensor([[0.7, 1.6, 2.4], [1.2, 0.5, 3.0]])

    def loss(alpha: Tensor) -> Tensor:
        q = td.Independent(td.Dirichlet(alpha), 1)
        return gl.StochasticBackprop(order=order)(q, lambda z: z[..., 0, 0] ** 2 * z[..., 0, 1] * z[..., 1, 2])

    x = alpha.clone().requires_grad_()
    s = x.sum(-1)
    first = x[0, 0] * (x[0, 0] + 1) * x[0, 1] / (s[0] * (s[0] + 1) * (s[0] + 2))
    (truth,) = torch.autograd.grad(first * x[1, 2] / s[1], x)
    grad = gl.replicate(loss, alpha, 100_000)
    assert ((grad.mean(0) - truth).abs() < 5 * grad.std(0) / math.sqrt(len(grad))).all()


# -------------------------------------------------------------------------------------------- extremes


def test_the_share_of_log_uniform_jumps_bounds_the_variance_for_log() -> None:
    """E[(w (log(z + V) - log z))²] given z grows as a power of log z; with exponential jumps alone, as 1/z."""
    with torch.device("cpu"):
        for z in (1e-4, 1e-8, 1e-12):
            point = torch.tensor([z])

            def second(share: float, point: Tensor = point) -> float:
                total = 0.0
                for chance, pick in ((1 - share, 0.0), (share, 1.0)):
                    if chance == 0:
                        continue
                    x, w = nodes(st.uniform() if pick else st.expon())
                    if not pick:  # dense below 1: the scale is z
                        log_v, wide = np.linspace(-60, 4, 20_001), np.full(20_001, 64 / 20_000)
                        x, w = np.exp(log_v), wide * np.exp(log_v - np.exp(log_v))
                    noise = torch.as_tensor(x.copy())
                    jump, weight = frullani(point, torch.tensor(share), torch.tensor(pick), noise, noise)
                    total += (
                        chance * (torch.as_tensor(w.copy()) * (weight * torch.log1p(jump / point)) ** 2).sum().item()
                    )
                return total

            assert second(0.1) < 4 * math.log(1 / z) ** 4
            assert second(0.0) > 0.5 / z


EXTREMES = [1e-3, 0.1, 1.0, 30.0, 1e4]
POSITIVE = {
    "gamma": lambda x: td.Gamma(x, torch.ones_like(x)),
    "gamma, rate": lambda x: td.Gamma(torch.ones_like(x), x),
    "gamma, both": lambda x: td.Gamma(x, x),
    "exponential": td.Exponential,
    "chi2": td.Chi2,
    "laplace": lambda x: td.Laplace(torch.zeros_like(x), x),
    "beta": lambda x: td.Beta(x, x),
    "beta, skew": lambda x: td.Beta(x, 1 / x),
    "dirichlet": lambda x: td.Dirichlet(torch.stack([x, 1 / x, x], -1)),
    "asymmetric laplace": lambda x: gl.AsymmetricLaplace(torch.zeros_like(x), x, 1 / x),
    "variance-gamma": lambda x: gl.VarianceGamma(torch.zeros_like(x), x, x, 1 / x),
    "inverse gaussian": lambda x: gl.InverseGaussian(x, 1 / x),
    "inverse gaussian, both": lambda x: gl.InverseGaussian(x, x),
    "normal inverse gaussian": lambda x: gl.NormalInverseGaussian(torch.zeros_like(x), torch.ones_like(x), x, 1 / x),
    "student": td.StudentT,
    "cauchy": lambda x: td.Cauchy(torch.zeros_like(x), x),
    "stable": lambda x: gl.SymmetricStable(torch.zeros_like(x), x, 0.05 + 1.9 * x / (1 + x)),
    "uniform": lambda x: td.Uniform(-x, x),
    "von mises": lambda x: td.VonMises(torch.zeros_like(x), x),
    "weibull": lambda x: td.Weibull(x, torch.ones_like(x)),
}


@pytest.mark.parametrize("order", [None, 0])
@pytest.mark.parametrize("name", POSITIVE)
def test_float32_is_finite_at_extreme_parameters(name: str, order: int | None) -> None:
    def loss(x: Tensor) -> Tensor:
        q = POSITIVE[name](x)

        def f(z: Tensor) -> Tensor:
            return torch.tanh(z).sum(-1) if q.event_shape else torch.tanh(z)

        return gl.StochasticBackprop(4, order=order)(q, f)

    grads = gl.replicate(loss, torch.tensor(EXTREMES, dtype=torch.float32), 5_000)
    assert grads.dtype == torch.float32
    assert grads.isfinite().all(), (name, [(~g.isfinite()).sum().item() for g in grads.T])


@pytest.mark.parametrize("order", [0, 1])
def test_gamma_is_unbiased_in_float32(order: int) -> None:
    k = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e4], dtype=torch.float32)
    rate = k.clamp(min=1.0)

    def loss(p: tuple[Tensor, Tensor]) -> Tensor:
        return gl.StochasticBackprop(order=order)(td.Gamma(*p), lambda z: torch.exp(-0.49 * z))

    x, y = (t.double().requires_grad_() for t in (k, rate))
    truth = torch.autograd.grad(((1 + 0.49 / y) ** -x).sum(), (x, y))
    for grad, exact in zip(gl.replicate(loss, (k, rate), 100_000), truth, strict=True):
        grad = grad.double()
        assert ((grad.mean(0) - exact).abs() < 5 * grad.std(0) / math.sqrt(len(grad)) + 1e-5 * exact.abs()).all()


@pytest.mark.parametrize("order", [0, 1])
def test_beta_is_unbiased_in_float32(order: int) -> None:
    """At 10⁴ a typical jump is a thousand units of rounding: dividing by smaller ones would show."""
    a = torch.tensor([1e-3, 0.1, 30.0, 1e4], dtype=torch.float32)

    def loss(p: tuple[Tensor, Tensor]) -> Tensor:
        return gl.StochasticBackprop(order=order)(td.Beta(*p), lambda z: z * z)

    x, y = (a.double().requires_grad_() for _ in range(2))
    truth = torch.autograd.grad((x * (x + 1) / ((x + y) * (x + y + 1))).sum(), (x, y))
    for grad, exact in zip(gl.replicate(loss, (a, a), 100_000), truth, strict=True):
        grad = grad.double()
        error = grad.std(0) / math.sqrt(len(grad))
        assert ((grad.mean(0) - exact).abs() < 5 * error + 2e-5 * exact.abs()).all()


def test_log_of_a_small_gamma_has_a_finite_variance() -> None:
    def loss(k: Tensor) -> Tensor:
        return gl.StochasticBackprop()(td.Gamma(k, torch.ones_like(k)), torch.log)

    k = torch.tensor([0.5, 1.0])
    grad = gl.replicate(loss, k, 200_000)
    assert ((grad.mean(0) - torch.special.polygamma(1, k)).abs() < 5 * grad.std(0) / math.sqrt(len(grad))).all()
    assert (grad.var(0) < torch.tensor([600.0, 15.0])).all()


def test_stability_two_is_refused() -> None:
    with pytest.raises(ValueError, match="use a Normal"):
        gl.SymmetricStable(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2.0), validate_args=True)


@pytest.mark.parametrize("name", POSITIVE)
def test_rules_serve_vmap(name: str) -> None:
    """Below vmap no value can reach the host: nothing synchronises, and nothing branches on a value."""

    def loss(x: Tensor) -> Tensor:
        q = POSITIVE[name](x)
        return gl.StochasticBackprop(2)(q, lambda z: torch.tanh(z).sum(-1) if q.event_shape else torch.tanh(z))

    x = torch.tensor([0.7, 1.2])
    assert torch.func.vmap(torch.func.grad(loss), randomness="different")(x).isfinite().all()
