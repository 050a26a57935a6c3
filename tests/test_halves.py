"""Measure-valued derivatives, exact in the noise: the law of each half, integrated and compared with samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats as st
import torch
import torch.distributions as td
from scipy.integrate import quad

from gradlab.coupled import RULES

pytestmark = pytest.mark.usefixtures("device")


class Point:
    """A point mass."""

    def __init__(self, at: float) -> None:
        self.at = at

    def expect(self, f: Any) -> float:
        return float(f(self.at))


class Mirrored:
    """A positive law with a random sign, around loc."""

    def __init__(self, law: Any, loc: float) -> None:
        self.law, self.loc = law, loc

    def expect(self, f: Any) -> float:
        return expect(self.law, lambda x: (f(self.loc + x) + f(self.loc - x)) / 2)

    def cdf(self, x: Any) -> Any:
        side = np.sign(x - self.loc)
        return 0.5 + side * self.law.cdf(np.abs(x - self.loc)) / 2


class Below:
    """loc minus a positive law."""

    def __init__(self, law: Any, loc: float) -> None:
        self.law, self.loc = law, loc

    def expect(self, f: Any) -> float:
        return expect(self.law, lambda x: f(self.loc - x))

    def cdf(self, x: Any) -> Any:
        return self.law.sf(self.loc - x)


def expect(law: Any, f: Any) -> float:
    if not isinstance(law, st._distn_infrastructure.rv_frozen):
        return law.expect(f)
    if isinstance(law.dist, st.rv_discrete):
        z = np.arange(law.support()[0], 400 if np.isinf(law.support()[1]) else law.support()[1] + 1)
        return float((law.pmf(z) * f(z)).sum())
    low, high = law.ppf(1e-18), law.isf(1e-18)
    return quad(lambda x: law.pdf(x) * f(x), low, high, epsabs=1e-13, epsrel=1e-13, limit=400)[0]


LAWS = {
    (td.Normal, "loc"): ((0.7, 1.3), st.rayleigh(0.7, 1.3), Below(st.rayleigh(0, 1.3), 0.7), st.norm),
    (td.Normal, "scale"): ((0.7, 1.3), Mirrored(st.maxwell(0, 1.3), 0.7), st.norm(0.7, 1.3), st.norm),
    (td.Laplace, "loc"): ((0.7, 1.3), st.expon(0.7, 1.3), Below(st.expon(0, 1.3), 0.7), st.laplace),
    (td.Laplace, "scale"): ((0.7, 1.3), Mirrored(st.gamma(2, 0, 1.3), 0.7), st.laplace(0.7, 1.3), st.laplace),
    (td.Exponential, "rate"): ((1.3,), st.expon(0, 1 / 1.3), st.gamma(2, 0, 1 / 1.3), lambda r: st.expon(0, 1 / r)),
    (td.Gamma, "rate"): (
        (2.3, 1.3),
        st.gamma(2.3, 0, 1 / 1.3),
        st.gamma(3.3, 0, 1 / 1.3),
        lambda a, r: st.gamma(a, 0, 1 / r),
    ),
    (td.Weibull, "scale"): (
        (1.3, 2.1),
        st.gengamma(2, 2.1, 0, 1.3),
        st.weibull_min(2.1, 0, 1.3),
        lambda s, k: st.weibull_min(k, 0, s),
    ),
    (td.Uniform, "low"): ((0.4, 2.0), st.uniform(0.4, 1.6), Point(0.4), lambda a, b: st.uniform(a, b - a)),
    (td.Uniform, "high"): ((0.4, 2.0), Point(2.0), st.uniform(0.4, 1.6), lambda a, b: st.uniform(a, b - a)),
    (td.Bernoulli, "probs"): ((0.3,), Point(1.0), Point(0.0), st.bernoulli),
    (td.Binomial, "probs"): ((5.0, 0.3), st.binom(4, 0.3, 1), st.binom(4, 0.3), st.binom),
    (td.Geometric, "probs"): ((0.3,), st.geom(0.3, -1), st.nbinom(2, 0.3, 1), lambda p: st.geom(p, -1)),
    (td.Poisson, "rate"): ((2.3,), st.poisson(2.3, 1), st.poisson(2.3), st.poisson),
}
"""By rule: the parameters of q, the laws of its halves (by scipy), and q itself."""


def f(x: Any) -> Any:
    return np.cos(1.7 * x) + 0.1 * x


def test_every_rule_is_here() -> None:
    assert set(LAWS) == {(q, name) for q, rules in RULES.items() for name in rules}


def halves(key: tuple[type[td.Distribution], str], size: int) -> Any:
    theta = [torch.tensor(x) for x in LAWS[key][0]]
    q = key[0](*theta[:-1], probs=theta[-1]) if key[0] in (td.Binomial, td.Bernoulli) else key[0](*theta)
    torch.manual_seed(4)
    return RULES[key[0]][key[1]](q, torch.Size([size]))


@pytest.mark.parametrize("key", LAWS, ids=lambda k: f"{k[0].__name__} {k[1]}")
def test_constant_and_halves_give_the_derivative(key: tuple[type[td.Distribution], str]) -> None:
    """c (E+ f - E- f), integrated, is the derivative of E f by a central difference of fourth order."""
    theta, plus, minus, law = LAWS[key]
    place = len(theta) - 1 if key[1] in ("probs", "rate", "high") or key == (td.Normal, "scale") else 0
    place = 1 if key == (td.Laplace, "scale") else place

    def mean(step: float) -> float:
        moved = list(theta)
        moved[place] += step
        return expect(law(*moved), f)

    h = 1e-3
    slope = (8 * (mean(h) - mean(-h)) - (mean(2 * h) - mean(-2 * h))) / (12 * h)
    constant = halves(key, 1).constant.item()
    assert constant * (expect(plus, f) - expect(minus, f)) == pytest.approx(slope, abs=1e-9)
    assert 1.05 * constant * (expect(plus, f) - expect(minus, f)) != pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("side", ["plus", "minus"])
@pytest.mark.parametrize("key", LAWS, ids=lambda k: f"{k[0].__name__} {k[1]}")
def test_samples_have_the_law_of_their_half(key: tuple[type[td.Distribution], str], side: str) -> None:
    law, size = LAWS[key][1 if side == "plus" else 2], 20_000
    z = getattr(halves(key, size), side).cpu().numpy()
    if isinstance(law, Point):
        assert (z == law.at).all()
    elif hasattr(law, "dist") and isinstance(law.dist, st.rv_discrete):
        values, counts = np.unique(z, return_counts=True)
        keep = size * law.pmf(values) > 5
        expected = np.append(law.pmf(values[keep]), 1 - law.pmf(values[keep]).sum()) * size
        found = np.append(counts[keep], size - counts[keep].sum())
        few = expected > 0.5
        chi = ((found - expected) ** 2 / expected)[few].sum()
        assert st.chi2.sf(chi, few.sum() - 1) > 1e-6
    else:
        assert st.kstest(z, law.cdf).pvalue > 1e-6
        assert st.kstest(z + 0.2, law.cdf).pvalue < 1e-6
