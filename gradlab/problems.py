"""Costs x distributions with exact gradients: one oracle for the tests, the book and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributions as td
from torch import Tensor

from gradlab.distributions import Logistic, TruncatedNormal, has_finite_support
from gradlab.estimator import Cost, Estimator
from gradlab.exact import Enumerate
from gradlab.quadrature import Quadrature

__all__ = ["PROBLEMS", "Problem", "problem"]

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    r"""A cost, a distribution, and the exact value of :math:`E_q[f]` as a differentiable function.

    Attributes:
        name: what :func:`problem` and the command line call it.
        summary: one line, with the formula.
        params: q's parameters, in float64.
        make_q: ``params -> q``, for any leading dims.
        cost: ``(z, t) -> cost``; t is f's own parameter.
        t: the value of f's own parameter.
        expectation: ``(params, t) -> E_q[f]`` in closed form; by default the oracle
            (:class:`Enumerate` or :class:`Quadrature`) computes it.
        breakpoints: where f has kinks or steps.
        panels: resolution of the quadrature; an oscillating cost on a heavy tail needs many.
        smooth: whether f is locally absolutely continuous, so that pathwise estimators apply.
    """

    name: str
    summary: str
    params: Params
    make_q: Callable[[Params], td.Distribution]
    cost: Callable[[Tensor, Tensor], Tensor]
    t: Tensor
    expectation: Callable[[Params, Tensor], Tensor] | None = None
    breakpoints: tuple[float, ...] = ()
    panels: int = 128
    smooth: bool = True

    def q(self, params: Params | None = None) -> td.Distribution:
        """Return q at ``params``, by default at the problem's own."""
        return self.make_q(self.params if params is None else params)

    def f(self, z: Tensor) -> Tensor:
        """Return the cost of z, ``[*L, *B, *E] -> [*L, *B]``."""
        return self.cost(z, self.t)

    def f_at(self, t: Tensor) -> Cost:
        """Return the cost with its own parameter set to t."""
        return lambda z: self.cost(z, t)

    def oracle(self) -> Estimator:
        """Return the estimator that computes the expectation without noise."""
        return Enumerate() if has_finite_support(self.q()) else Quadrature(self.breakpoints, self.panels)

    def value(self, params: Params, t: Tensor) -> Tensor:
        """Return the exact :math:`E_q[f]`, differentiable."""
        if self.expectation is not None:
            return self.expectation(params, t)
        oracle, q = self.oracle(), self.make_q(params)
        return oracle.estimate(q, self.f_at(t), oracle.draw(q))

    def exact(self) -> tuple[Params, Tensor]:
        """Return the exact gradients, of q's parameters and of t."""
        params = {k: p.clone().requires_grad_() for k, p in self.params.items()}
        t = self.t.clone().requires_grad_()
        grads = torch.autograd.grad(self.value(params, t), [*params.values(), t], materialize_grads=True)
        return dict(zip(params, grads[:-1], strict=True)), grads[-1]


def problem(name: str) -> Problem:
    """Return the problem of that name.

    >>> problem("normal_square").exact()[0]["loc"].item()
    1.4
    """
    if name not in PROBLEMS:
        raise KeyError(f"problem: found {name!r}, expected one of {', '.join(PROBLEMS)}.")
    return PROBLEMS[name]


def _t(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def _params(**values: float | list[float] | list[list[float]]) -> Params:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}


def _bernoulli(p: Params) -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=p["logits"]), 1)


def _normal(p: Params) -> td.Distribution:
    return td.Normal(p["loc"], p["scale"])


def _gamma(p: Params) -> td.Distribution:
    return td.Gamma(p["concentration"], p["rate"])


def _mixture(p: Params) -> td.Distribution:
    return td.MixtureSameFamily(td.Categorical(logits=p["logits"]), td.Normal(p["loc"], p["scale"]))


def _planar_mixture(p: Params) -> td.Distribution:
    parts = td.Independent(td.Normal(p["loc"], p["scale"]), 1)
    return td.MixtureSameFamily(td.Categorical(logits=p["logits"]), parts)


def _dirichlet_moments(p: Params, t: Tensor) -> Tensor:
    a = p["concentration"]
    s = a.sum(-1)
    second = (a[..., 0] * (a[..., 0] + 1) + a[..., 1] * a[..., 2]) / (s * (s + 1))
    return second - 2 * t * a[..., 0] / s + t * t


def _cos_of_normals(p: Params, t: Tensor) -> Tensor:
    return torch.cos(t * p["loc"]) * (-((t * p["scale"]) ** 2) / 2).exp()


_WEIGHTS = torch.linspace(-1, 1, 20, dtype=torch.float64)
_TABLE = torch.tensor([1.0, 2.5, -0.7], dtype=torch.float64)
_RAMP = torch.linspace(-1, 2, 10, dtype=torch.float64)
_MATRIX = torch.tensor(
    [[0.2, -0.6, 1.1], [0.5, 0.4, -0.9], [-0.3, 0.8, 0.1], [1.0, -0.2, 0.3], [0.0, 0.7, -0.5]], dtype=torch.float64
)

_GRID = torch.cos(torch.arange(50, dtype=torch.float64).reshape(5, 10))


def _grid_moments(p: Params, t: Tensor) -> Tensor:
    probs, w = p["logits"].softmax(-1), _GRID.to(t)
    mean = (probs * w).sum(-1)
    return (mean.sum(-1) - t) ** 2 + ((probs * w**2).sum(-1) - mean**2).sum(-1)


_LIST = [
    Problem(
        "bernoulli_toy",
        "(z - t)^2, z ~ Bernoulli, t = 0.45: the toy of the REBAR paper",
        _params(logits=1.5),
        lambda p: td.Bernoulli(logits=p["logits"]),
        lambda z, t: (z - t) ** 2,
        _t(0.45),
    ),
    Problem(
        "bernoulli_toy_499",
        "(z - t)^2, z ~ Bernoulli, t = 0.499: the signal nearly vanishes",
        _params(logits=1.5),
        lambda p: td.Bernoulli(logits=p["logits"]),
        lambda z, t: (z - t) ** 2,
        _t(0.499),
    ),
    Problem(
        "bernoulli_3",
        "(sum z - t)^2 cos(z1 z2 + z3), three Bernoullis that do not separate",
        _params(logits=[0.3, -0.5, 1.1]),
        _bernoulli,
        lambda z, t: (z.sum(-1) - t) ** 2 * torch.cos(z[..., 0] * z[..., 1] + z[..., 2]),
        _t(1.2),
    ),
    Problem(
        "bernoulli_20",
        "(w.z - t)^2, twenty Bernoullis",
        _params(logits=torch.linspace(-1.5, 2, 20).tolist()),
        _bernoulli,
        lambda z, t: ((z * _WEIGHTS.to(z)).sum(-1) - t) ** 2,
        _t(0.8),
        lambda p, t: (
            ((p["logits"].sigmoid() * _WEIGHTS.to(t)).sum(-1) - t) ** 2
            + (_WEIGHTS.to(t) ** 2 * p["logits"].sigmoid() * (-p["logits"]).sigmoid()).sum(-1)
        ),
    ),
    Problem(
        "categorical_3",
        "t + table[z], z ~ Categorical with 3 values",
        _params(logits=[0.2, -0.4, 0.9]),
        lambda p: td.Categorical(logits=p["logits"]),
        lambda z, t: t * _TABLE.to(z.device)[z],
        _t(1.0),
    ),
    Problem(
        "onehot_3",
        "exp(-t w.z) + (w.z)^3, one-hot z with 3 values",
        _params(logits=[0.2, -0.4, 0.9]),
        lambda p: td.OneHotCategorical(logits=p["logits"]),
        lambda z, t: _exp_and_cube((z * _TABLE.to(z)).sum(-1), t),
        _t(0.7),
    ),
    Problem(
        "onehot_10",
        "(w.z - t)^2, one-hot z with 10 values",
        _params(logits=torch.linspace(1, -1, 10).tolist()),
        lambda p: td.OneHotCategorical(logits=p["logits"]),
        lambda z, t: ((z * _RAMP.to(z)).sum(-1) - t) ** 2,
        _t(0.3),
    ),
    Problem(
        "onehot_5x3",
        "sin(sum W.z) + t (sum W.z)^2, five one-hot latents with 3 values",
        _params(logits=[[0.2, -0.4, 0.9], [0.0, 0.5, -0.5], [1.0, 0.0, 0.3], [-0.7, 0.1, 0.2], [0.4, 0.4, -1.0]]),
        lambda p: td.Independent(td.OneHotCategorical(logits=p["logits"]), 1),
        lambda z, t: _sine_and_square((z * _MATRIX.to(z)).sum((-1, -2)), t),
        _t(0.5),
    ),
    Problem(
        "onehot_5x10",
        "(sum W.z - t)^2, five one-hot latents with 10 values",
        _params(logits=[[math.sin(3 * i + k) for k in range(10)] for i in range(5)]),
        lambda p: td.Independent(td.OneHotCategorical(logits=p["logits"]), 1),
        lambda z, t: ((z * _GRID.to(z)).sum((-1, -2)) - t) ** 2,
        _t(0.5),
        _grid_moments,
    ),
    Problem(
        "binomial_square",
        "(z - t)^2, z ~ Binomial(7)",
        _params(logits=-0.6),
        lambda p: td.Binomial(7, logits=p["logits"]),
        lambda z, t: (z - t) ** 2,
        _t(2.0),
    ),
    Problem(
        "poisson_exp",
        "exp(-t z), z ~ Poisson",
        _params(rate=2.3),
        lambda p: td.Poisson(p["rate"]),
        lambda z, t: (-t * z).exp(),
        _t(0.5),
        lambda p, t: (p["rate"] * (-t).expm1()).exp(),
    ),
    Problem(
        "geometric_exp",
        "exp(-t z), z ~ Geometric",
        _params(probs=0.6),
        lambda p: td.Geometric(p["probs"]),
        lambda z, t: (-t * z).exp(),
        _t(0.4),
        lambda p, t: p["probs"] / (1 - (1 - p["probs"]) * (-t).exp()),
    ),
    Problem(
        "normal_square",
        "z^2 + t, z ~ Normal: source 004's example, t is its constant c",
        _params(loc=0.7, scale=1.3),
        _normal,
        lambda z, t: z**2 + t,
        _t(1.0),
        lambda p, t: p["loc"] ** 2 + p["scale"] ** 2 + t,
    ),
    Problem(
        "normal_cos",
        "cos(t z), z ~ Normal, t = 10: the pathwise gradient is the noisy one",
        _params(loc=0.3, scale=1.0),
        _normal,
        lambda z, t: torch.cos(t * z),
        _t(10.0),
        _cos_of_normals,
    ),
    Problem(
        "normal_step",
        "t 1[z > 0], z ~ Normal: the pathwise gradient is zero, hence wrong",
        _params(loc=0.3, scale=1.0),
        _normal,
        lambda z, t: t * (z > 0).to(z),
        _t(2.0),
        breakpoints=(0.0,),
        smooth=False,
    ),
    Problem(
        "normal_relu",
        "(relu(z) - t)^2, z ~ Normal: a kink, harmless to first order",
        _params(loc=0.2, scale=0.9),
        _normal,
        lambda z, t: (z.relu() - t) ** 2,
        _t(1.0),
        breakpoints=(0.0,),
    ),
    Problem(
        "normals_3",
        "cos(t sum z), three Normals",
        _params(loc=[0.2, -0.1, 0.4], scale=[0.5, 0.7, 0.3]),
        lambda p: td.Independent(td.Normal(p["loc"], p["scale"]), 1),
        lambda z, t: torch.cos(t * z.sum(-1)),
        _t(1.5),
        lambda p, t: torch.cos(t * p["loc"].sum(-1)) * (-(t**2) * (p["scale"] ** 2).sum(-1) / 2).exp(),
    ),
    Problem(
        "laplace_cos",
        "cos(t z), z ~ Laplace",
        _params(loc=0.4, scale=1.3),
        lambda p: td.Laplace(p["loc"], p["scale"]),
        lambda z, t: torch.cos(t * z),
        _t(2.0),
        lambda p, t: torch.cos(t * p["loc"]) / (1 + (t * p["scale"]) ** 2),
    ),
    Problem(
        "logistic_square",
        "(z - t)^2, z ~ Logistic",
        _params(loc=0.2, scale=0.8),
        lambda p: Logistic(p["loc"], p["scale"]),
        lambda z, t: (z - t) ** 2,
        _t(0.5),
        lambda p, t: (p["loc"] - t) ** 2 + (torch.pi * p["scale"]) ** 2 / 3,
    ),
    Problem(
        "cauchy_cos",
        "t cos(1.4 z), z ~ Cauchy: no moments at all, and pathwise gradients without variance",
        _params(loc=0.2, scale=0.7),
        lambda p: td.Cauchy(p["loc"], p["scale"]),
        lambda z, t: t * torch.cos(1.4 * z),
        _t(0.8),
        lambda p, t: t * torch.cos(1.4 * p["loc"]) * (-1.4 * p["scale"]).exp(),
    ),
    Problem(
        "exponential_square",
        "(z - t)^2, z ~ Exponential",
        _params(rate=1.4),
        lambda p: td.Exponential(p["rate"]),
        lambda z, t: (z - t) ** 2,
        _t(0.5),
        lambda p, t: 2 / p["rate"] ** 2 - 2 * t / p["rate"] + t * t,
    ),
    Problem(
        "weibull_cos",
        "cos(t z), z ~ Weibull with shape 1.6",
        _params(scale=0.9),
        lambda p: td.Weibull(p["scale"], torch.as_tensor(1.6).to(p["scale"])),
        lambda z, t: torch.cos(t * z),
        _t(1.5),
    ),
    Problem(
        "uniform_square",
        "(z - t)^2, z ~ Uniform(low, high): the support moves, so the score function fails",
        _params(low=-0.3, high=1.4),
        lambda p: td.Uniform(p["low"], p["high"]),
        lambda z, t: (z - t) ** 2,
        _t(0.25),
    ),
    Problem(
        "student_cos",
        "cos(t z), z ~ Student-t",
        _params(df=4.5, loc=0.3, scale=0.8),
        lambda p: td.StudentT(p["df"], p["loc"], p["scale"]),
        lambda z, t: torch.cos(t * z),
        _t(1.4),
        panels=2048,
    ),
    Problem(
        "truncated_square",
        "(z - t)^2, z ~ Normal truncated to (-1, 2)",
        _params(loc=0.5, scale=1.2),
        lambda p: TruncatedNormal(p["loc"], p["scale"], -1.0, 2.0),
        lambda z, t: (z - t) ** 2,
        _t(0.25),
    ),
    Problem(
        "gamma_square",
        "(z - t)^2, z ~ Gamma: toy 1 of source 003",
        _params(concentration=1.7, rate=1.1),
        _gamma,
        lambda z, t: (z - t) ** 2,
        _t(0.49),
        lambda p, t: p["concentration"] / p["rate"] ** 2 + (p["concentration"] / p["rate"] - t) ** 2,
    ),
    Problem(
        "gamma_exp",
        "exp(-t z), z ~ Gamma: toy 2 of source 003",
        _params(concentration=2.0, rate=1.0),
        _gamma,
        lambda z, t: (-t * z).exp(),
        _t(0.49),
        lambda p, t: (1 + t / p["rate"]) ** (-p["concentration"]),
    ),
    Problem(
        "gamma_rate",
        "(z - t)^2, z ~ Gamma with shape 1.7: only the rate is a parameter",
        _params(rate=1.1),
        lambda p: td.Gamma(torch.full_like(p["rate"], 1.7), p["rate"]),
        lambda z, t: (z - t) ** 2,
        _t(0.49),
        lambda p, t: 1.7 / p["rate"] ** 2 + (1.7 / p["rate"] - t) ** 2,
    ),
    Problem(
        "gamma_small",
        "log(t + z), z ~ Gamma with shape 0.3",
        _params(concentration=0.3, rate=0.8),
        _gamma,
        lambda z, t: (t + z).log(),
        _t(0.5),
    ),
    Problem(
        "beta_square",
        "(z - t)^2, z ~ Beta",
        _params(concentration1=0.7, concentration0=1.6),
        lambda p: td.Beta(p["concentration1"], p["concentration0"]),
        lambda z, t: (z - t) ** 2,
        _t(0.2),
    ),
    Problem(
        "dirichlet_quadratic",
        "(z1 - t)^2 + z2 z3, z ~ Dirichlet",
        _params(concentration=[0.6, 1.5, 2.2]),
        lambda p: td.Dirichlet(p["concentration"]),
        lambda z, t: (z[..., 0] - t) ** 2 + z[..., 1] * z[..., 2],
        _t(0.4),
        _dirichlet_moments,
    ),
    Problem(
        "von_mises_cos",
        "cos(z - t), z ~ von Mises",
        _params(loc=0.5, concentration=2.2),
        lambda p: td.VonMises(p["loc"], p["concentration"]),
        lambda z, t: torch.cos(z - t),
        _t(-0.3),
        lambda p, t: (
            torch.special.i1e(p["concentration"]) / torch.special.i0e(p["concentration"]) * torch.cos(p["loc"] - t)
        ),
    ),
    Problem(
        "mixture_cos",
        "cos(t z), z ~ a mixture of three Normals",
        _params(logits=[0.2, -0.5, 0.4], loc=[-1.0, 1.0, 2.5], scale=[0.5, 0.8, 0.3]),
        _mixture,
        lambda z, t: torch.cos(t * z),
        _t(1.1),
        lambda p, t: (p["logits"].softmax(-1) * _cos_of_normals(p, t[..., None])).sum(-1),
    ),
    Problem(
        "mixture_plane",
        "cos(t (z1 + z2)), z ~ a mixture of two planar Normals",
        _params(logits=[0.3, -0.2], loc=[[-1.0, 0.5], [1.0, -0.4]], scale=[[0.5, 0.7], [0.8, 0.4]]),
        _planar_mixture,
        lambda z, t: torch.cos(t * z.sum(-1)),
        _t(0.9),
        lambda p, t: (
            p["logits"].softmax(-1)
            * torch.cos(t[..., None] * p["loc"].sum(-1))
            * (-(t[..., None] ** 2) * (p["scale"] ** 2).sum(-1) / 2).exp()
        ).sum(-1),
    ),
]


def _exp_and_cube(x: Tensor, t: Tensor) -> Tensor:
    return (-t * x).exp() + x**3


def _sine_and_square(x: Tensor, t: Tensor) -> Tensor:
    return x.sin() + t * x**2


PROBLEMS: dict[str, Problem] = {p.name: p for p in _LIST}
"""Every problem, by name."""
