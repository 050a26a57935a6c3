"""The exact rules against closed forms: 100 000 gradients of one parameter, within five standard errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl

pytestmark = pytest.mark.usefixtures("device")

REPLICATES = 100_000


def const(*values: float) -> Tensor:
    """Return a scalar or a vector of the default type and device."""
    return torch.tensor(values[0] if len(values) == 1 else values)


class Case(NamedTuple):
    """A gradient that is known: of E f under ``make(theta)``, by the component ``at`` of theta."""

    name: str
    make: Callable[[Tensor], td.Distribution]
    theta: tuple[float, ...]
    f: Callable[[Tensor], Tensor]
    exact: float
    at: int = 0


def normal_full(x: Tensor) -> td.Distribution:
    """A bivariate normal with L = [[1, 0], [x, 0.8]]."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    factor = torch.stack([torch.stack([one, zero], -1), torch.stack([x, 0.8 * one], -1)], -2)
    return td.MultivariateNormal(const(0.2, 0.1), scale_tril=factor)


def mixture(x: Tensor) -> td.Distribution:
    loc = torch.stack([x, torch.ones_like(x)], -1)
    weights = td.Categorical(probs=const(0.3, 0.7).expand_as(loc))
    return td.MixtureSameFamily(weights, td.Normal(loc, const(0.5, 0.8)))


CASES = [
    Case("normal loc, square", lambda x: td.Normal(x, 1.3), (0.7,), lambda z: z**2, 1.4),
    Case("normal loc, fourth power", lambda x: td.Normal(x, 1.3), (0.7,), lambda z: z**4, 15.568),
    Case("normal loc, exp", lambda x: td.Normal(x, 1.3), (0.7,), torch.exp, 4.687971627022013),
    Case("normal loc, cos", lambda x: td.Normal(x, 1.3), (0.7,), lambda z: torch.cos(2 * z), -0.06710411015001048),
    Case("normal loc, relu", lambda x: td.Normal(x, 1.3), (0.7,), torch.relu, 0.704870774342614),
    Case("normal variance, abs", lambda x: td.Normal(0.0, x.sqrt()), (1.0,), torch.abs, 0.3989422804014327),
    Case(
        "normal Cholesky, exp",
        normal_full,
        (0.4,),
        lambda z: torch.exp(0.5 * z[..., 0] - 0.6 * z[..., 1]),
        -0.18845438858733268,
    ),
    Case("gamma scale, square", lambda x: td.Gamma(1.7, 1 / x), (0.9,), lambda z: (z - 0.49) ** 2, 6.596),
    Case("gamma scale, exp", lambda x: td.Gamma(1.7, 1 / x), (0.9,), lambda z: (-0.49 * z).exp(), -0.31063633471704577),
    Case("gamma scale, log", lambda x: td.Gamma(1.7, 1 / x), (0.9,), torch.log, 1.1111111111111112),
    Case("gamma scale, sin", lambda x: td.Gamma(1.7, 1 / x), (0.9,), lambda z: torch.sin(1.6 * z), -0.5125833185969367),
    Case("gamma shape, kink", lambda x: td.Gamma(x, 1.0), (2.0,), lambda z: (z - 1).abs(), 0.712842526227311),
    Case("chi-squared, exp", lambda x: td.Chi2(x), (3.4,), lambda z: torch.exp(-0.49 * z), -0.10693539061807017),
    Case("beta, square", lambda x: td.Beta(x, 1.6), (0.7,), lambda z: z**2, 0.20052735639606237),
    Case("beta, log", lambda x: td.Beta(x, 1.6), (0.7,), torch.log, 2.2915116980293524),
    Case("beta, cos", lambda x: td.Beta(x, 1.6), (0.7,), lambda z: torch.cos(5 * z), -0.8572251897011695),
    Case("Dirichlet, square", td.Dirichlet, (0.6, 1.5, 2.2), lambda z: z[..., 0] ** 2, -0.017744093436822574, 1),
    Case("Dirichlet, log", td.Dirichlet, (0.6, 1.5, 2.2), lambda z: z[..., 0].log(), 3.3745354936159333, 0),
    Case("Dirichlet, entropy", td.Dirichlet, (0.6, 1.5, 2.2), lambda z: (z * z.log()).sum(-1), -0.23847518660362874, 0),
    Case("Laplace scale, cos", lambda x: td.Laplace(0.4, x), (1.3,), lambda z: torch.cos(2 * z), -0.12032611358158612),
    Case("Laplace scale, fourth power", lambda x: td.Laplace(0.4, x), (1.3,), lambda z: z**4, 215.904),
    Case("Laplace loc, exp", lambda x: td.Laplace(x, 1.3), (0.4,), lambda z: torch.exp(0.5 * z), 1.0574915655066406),
    Case("Laplace scale, abs", lambda x: td.Laplace(0.4, x), (1.3,), torch.abs, 0.9613388592352797),
    Case(
        "Laplace scale, log sigmoid",
        lambda x: td.Laplace(0.0, x),
        (1.0,),
        torch.nn.functional.logsigmoid,
        -0.3224670334241132,
    ),
    Case("Bernoulli", lambda x: td.Bernoulli(logits=x), (1.5,), lambda z: (z - 0.45) ** 2, 0.014914645207033285),
    Case("Bernoulli, 0.499", lambda x: td.Bernoulli(logits=x), (1.5,), lambda z: (z - 0.499) ** 2, 0.00029829290414),
    Case(
        "three Bernoullis",
        lambda x: td.Independent(td.Bernoulli(logits=x), 1),
        (0.3, -0.5, 1.1),
        lambda z: (z.sum(-1) - 1.2) ** 2 * torch.cos(z[..., 0] * z[..., 1] + z[..., 2]),
        -0.17191598066279914,
        1,
    ),
    Case(
        "categorical",
        lambda x: td.Categorical(logits=x),
        (0.2, -0.4, 0.9),
        lambda z: const(1.0, 2.5, -0.7)[z.long()],
        -0.5483769882470257,
        2,
    ),
    Case("Poisson, exp", td.Poisson, (2.3,), lambda z: torch.exp(-0.5 * z), -0.15917809452752463),
    Case("Poisson, kink", td.Poisson, (2.3,), lambda z: (z - 3).abs(), -0.1920776518641364),
    Case("binomial, square", lambda x: td.Binomial(7, x), (0.35,), lambda z: z**2, 36.4),
    Case(
        "negative binomial count, exp",
        lambda x: td.NegativeBinomial(x, const(0.55)),
        (1.8,),
        lambda z: torch.exp(-0.5 * z),
        -0.1936693170962708,
    ),
    Case(
        "negative binomial count, square",
        lambda x: td.NegativeBinomial(x, const(0.55)),
        (1.8,),
        lambda z: z**2,
        8.093827160493827,
    ),
    Case("geometric, square", lambda x: td.Geometric(1 - x), (0.55,), lambda z: z**2, 29.080932784636488),
    Case("beta-binomial, square", lambda x: gl.BetaBinomial(7, x, const(1.6)), (0.7,), torch.square, 10.53935123706562),
    Case("von Mises loc, cos", lambda x: td.VonMises(x, 2.2), (0.5,), torch.cos, -0.3490361332254423),
    Case("Student df, cos", lambda x: td.StudentT(x), (4.5,), lambda z: torch.cos(1.4 * z), 0.008283492510480618),
    Case("Cauchy scale, cos", lambda x: td.Cauchy(0.0, x), (0.7,), lambda z: torch.cos(1.4 * z), -0.5254355383919593),
    Case(
        "inverse Gaussian shape, exp",
        lambda x: gl.InverseGaussian(const(1.3), x),
        (2.1,),
        lambda z: torch.exp(-0.49 * z),
        -0.018983128389073678,
    ),
    Case("uniform high, square", lambda x: td.Uniform(-0.3, x), (1.4,), lambda z: z**2, 0.8333333333333334),
    Case("mixture loc, cos", mixture, (-1.0,), lambda z: torch.cos(1.1 * z), 0.2528166451379374),
    Case("logistic scale", lambda x: gl.Logistic(torch.zeros_like(x), x), (0.8,), torch.square, 5.26378901391433),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_closed_form(case: Case) -> None:
    torch.manual_seed(8)
    g = gl.replicate(lambda x: gl.StochasticBackprop()(case.make(x), case.f), const(*case.theta), REPLICATES)
    g = g[:, case.at] if g.ndim > 1 else g
    error = g.std() / len(g) ** 0.5
    assert abs(g.mean() - case.exact) <= 5 * error + 1e-12, ((g.mean() - case.exact) / error).item()
