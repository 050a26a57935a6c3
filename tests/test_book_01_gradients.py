"""What chapter 01 claims beyond the package: without noise wherever there is a formula."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, Uniform

import gradlab

BOOK = Path(__file__).resolve().parent.parent / "book"
MU, SIGMA = 0.7, 1.3
GRID = torch.linspace(-40, 40, 16001, dtype=torch.float64)
COSTS = {"square": torch.square, "cos": torch.cos, "relu": torch.relu, "sigmoid": torch.sigmoid}
costs = pytest.mark.parametrize("f", COSTS.values(), ids=COSTS.keys())


def leaves(*values):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def integral(values):
    """Over the grid; exact to rounding for smooth integrands that vanish at its ends."""
    return values.sum() * (GRID[1] - GRID[0])


def density(z=GRID, mu=MU, sigma=SIGMA):
    return torch.exp(-(((z - mu) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))


def exact(f):
    """The derivatives of E f for mu and sigma."""
    mu, sigma = leaves(MU, SIGMA)
    return torch.autograd.grad(gradlab.Quadrature([0.0])(Normal(mu, sigma), f), (mu, sigma))


def test_vae_term():
    p = torch.tensor([0.1, 0.9], dtype=torch.float64)
    (chance,) = leaves(0.5)
    mean = gradlab.Enumerate()(Bernoulli(chance), lambda z: p[z.long()])
    log = gradlab.Enumerate()(Bernoulli(chance), lambda z: p[z.long()].log())
    assert math.isclose(mean.log().item(), -0.693147180559945)
    assert math.isclose(log.item(), -1.203972804325936)
    assert torch.autograd.grad(mean, chance)[0] > 0  # as a loss it would unlearn


@pytest.mark.parametrize("values", [(0.7, 1.3, 1.0), (-2.0, 0.3, 0.5), (0.0, 2.0, -1.0)])
def test_leibniz(values):
    def loss(mu, sigma, w):
        return gradlab.Quadrature()(Normal(mu, sigma), lambda z: w * z**2)

    parameters = leaves(*values)
    right = torch.autograd.grad(loss(*parameters), parameters)
    mu, sigma, w = values
    for i, formula in enumerate((2 * w * mu, 2 * w * sigma, mu**2 + sigma**2)):
        h = 1e-4 * torch.eye(3, dtype=torch.float64)[i]
        point = torch.tensor(values, dtype=torch.float64)
        with torch.no_grad():
            left = (loss(*(point + h)) - loss(*(point - h))) / 2e-4
        assert abs(left - formula) < 1e-8
        assert abs(right[i] - formula) < 1e-10


def test_the_weight_is_no_density():
    assert abs(integral(density() * (GRID - MU) / SIGMA**2)) < 1e-12


def test_w():
    """A plain mean of samples has the gradient of f's own parameter, and none for those of q."""
    mu, w = leaves(MU, 1.0)
    torch.manual_seed(0)
    z = Normal(mu, SIGMA).sample((100,))
    slopes = torch.autograd.grad((w * z**2).mean(), (mu, w), allow_unused=True)
    assert slopes[0] is None
    torch.testing.assert_close(slopes[1], (z**2).mean())


@pytest.mark.parametrize("h", [0.3, 0.1, 0.01])
def test_finite_differences(h):
    second = sum(integral(GRID**4 * density(mu=m)) - integral(GRID**2 * density(mu=m)) ** 2 for m in (MU + h, MU - h))
    formula = sum(2 * SIGMA**4 + 4 * m**2 * SIGMA**2 for m in (MU + h, MU - h))
    assert math.isclose(second, formula, rel_tol=1e-10)
    shared = ((GRID + h) ** 2 - (GRID - h) ** 2) / (2 * h)  # z = mu + sigma noise, moved by h
    assert math.isclose(integral((shared - 2 * MU) ** 2 * density()), 4 * SIGMA**2, rel_tol=1e-10)
    # the bias of a cubic cost is h^2 L''' / 6 = h^2, exactly
    cubic = sum(sign * integral(GRID**3 * density(mu=MU + sign * h)) for sign in (1, -1)) / (2 * h)
    assert math.isclose(cubic - 3 * (MU**2 + SIGMA**2), h**2, abs_tol=1e-10)


@costs
def test_four_ways(f):
    """Score, importance, both branches of Rayleigh and of Maxwell, and path, all by quadrature."""
    d_mu, d_sigma = exact(f)
    u, values = (GRID - MU) / SIGMA, f(GRID)
    tol = 1e-4 if f is torch.relu else 1e-10  # a grid does not see a kink
    assert abs(integral(values * density() * u / SIGMA) - d_mu) < tol
    v = GRID[GRID > 0]
    rayleigh = v / SIGMA**2 * torch.exp(-((v / SIGMA) ** 2) / 2)
    branches = ((f(MU + v) - f(MU - v)) * rayleigh).sum() * (GRID[1] - GRID[0]) / (SIGMA * math.sqrt(2 * math.pi))
    assert abs(branches - d_mu) < max(tol, 1e-6)
    maxwell = u**2 * density()
    assert abs(integral(maxwell) - 1) < 1e-12
    assert abs((integral(values * maxwell) - integral(values * density())) / SIGMA - d_sigma) < tol
    z = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(z).sum(), z)
    assert abs(integral(slope * density()) - d_mu) < max(tol, 5e-3 * (f is torch.relu))
    assert abs(integral(slope * u * density()) - d_sigma) < max(tol, 5e-3 * (f is torch.relu))


def test_importance_needs_the_whole_support():
    half = GRID > 0
    missing = integral(torch.where(half, GRID**2 * density() * (GRID - MU) / SIGMA**2, 0.0))
    assert abs(missing - 1.8841) < 1e-4


def test_variances():
    mean = 2 * MU
    score = GRID**2 * (GRID - MU) / SIGMA**2
    variance = integral(score**2 * density()) - mean**2
    assert math.isclose(variance, MU**4 / SIGMA**2 + 14 * MU**2 + 15 * SIGMA**2, rel_tol=1e-10)
    assert math.isclose(integral(4 * GRID**2 * density()) - mean**2, 4 * SIGMA**2, rel_tol=1e-10)
    v = GRID[GRID > 0]
    rayleigh = v / SIGMA**2 * torch.exp(-((v / SIGMA) ** 2) / 2)
    branch = 4 * MU * v / (SIGMA * math.sqrt(2 * math.pi))
    variance = (branch**2 * rayleigh).sum() * (GRID[1] - GRID[0]) - mean**2
    assert math.isclose(variance, 4 * MU**2 * (4 - math.pi) / math.pi, rel_tol=1e-8)
    weight = (score * density()) ** 2 / density(mu=0.0, sigma=3.0)
    assert math.isclose(integral(weight) - mean**2, 12.4462, rel_tol=1e-5)


@pytest.mark.parametrize("estimator", [gradlab.ScoreFunction(3), gradlab.Reparameterization(3)])
def test_both_gradients(estimator):
    """The mean over the noise is a sum over Gauss-Hermite nodes: exact, because everything is a polynomial."""
    mu, sigma, w = leaves(MU, SIGMA, 1.0)
    t, p = gauss_hermite(20)
    q = Normal(mu.expand(len(t)), sigma.expand(len(t)))
    noise = (mu + sigma * t).expand(3, -1)
    if isinstance(estimator, gradlab.ScoreFunction):
        noise = noise.detach()
    loss = (p * estimator.estimate(q, lambda z: w * z**2, noise)).sum()
    found = torch.stack([loss, *torch.autograd.grad(loss, (mu, sigma, w))])
    torch.testing.assert_close(found, found.new_tensor([2.18, 1.4, 2.6, 2.18]), rtol=0, atol=1e-10)


def gauss_hermite(n):
    """Nodes and weights for the standard normal law."""
    t, p = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(t), torch.tensor(p / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("c", [0.25, 0.5, 0.75, 2.25])
def test_step_sizes(c):
    t = torch.arange(1, 200_001, dtype=torch.float64)
    root = math.pi * math.sqrt(c)
    assert abs((1 - c / t**2).prod() - math.sin(root) / root) < 1e-5
    if c < 1:
        T = len(t)
        gamma = math.exp(math.lgamma(T + 1 - c) - math.lgamma(1 - c) - math.lgamma(T + 1))
        assert math.isclose((1 - c / t).prod(), gamma, rel_tol=1e-6)


def test_a_bias_moves_the_limit():
    """With gradients x + b the distance to -b shrinks as the distance to 0 does without a bias."""
    x, pure, b = 1.0, 1.0, 0.3
    for t in range(1, 2001):
        x, pure = x - 0.5 / t * (x + b), pure - 0.5 / t * pure
    assert math.isclose(x, -b + (1 + b) * pure, rel_tol=1e-12)


def test_count():
    """A Poisson sum, cut where it is below rounding, against the closed form."""
    (rate,) = leaves(2.3)
    k = torch.arange(80, dtype=torch.float64)
    law = torch.distributions.Poisson(rate)
    found = torch.autograd.grad((law.log_prob(k).exp() * (-k / 2).exp()).sum(), rate)[0]
    a = math.exp(-0.5) - 1
    assert math.isclose(found, a * math.exp(2.3 * a), rel_tol=1e-12)


def test_no_domination():
    (high,) = leaves(2.0)
    whole = gradlab.Quadrature()(Uniform(torch.zeros((), dtype=torch.float64), high), torch.square)
    assert abs(torch.autograd.grad(whole, high)[0] - 4 / 3) < 1e-10
    with pytest.raises(TypeError, match="support"):
        gradlab.ScoreFunction()(Uniform(0.0, high), torch.square)
    # smooth in w for every z, and still not dominated at w = 0
    for value, slope in ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0)):
        (w,) = leaves(value)
        law = torch.distributions.Exponential(torch.ones((), dtype=torch.float64))
        loss = gradlab.Quadrature()(law, lambda z, w=w: w**3 * ((1 - w**2) * z).exp())
        assert abs(torch.autograd.grad(loss, w)[0] - slope) < 1e-8


SVG = "{http://www.w3.org/2000/svg}"


def test_the_map_links_to_every_chapter_that_exists():
    """When a planned chapter appears, its dashed box must become a link."""
    root = ET.parse(BOOK / "images" / "map.svg").getroot()
    linked = [a.get("href").removesuffix(".html") for a in root.iter(f"{SVG}a")]
    planned = [g.get("data-chapter") for g in root.iter(f"{SVG}g") if g.get("class") == "planned"]
    chapters = {path.stem for path in BOOK.glob("[0-9][0-9]_*.ipynb")}
    assert set(linked) <= chapters, set(linked) - chapters
    numbers = {stem[:2] for stem in chapters}
    assert not numbers & set(planned), "a chapter exists, but its box in book/images/map.svg is dashed"


def test_the_map_is_accessible_and_has_one_style():
    text = (BOOK / "images" / "map.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)
    names = root.get("aria-labelledby").split()
    assert {e.get("id") for e in root if e.tag in (f"{SVG}title", f"{SVG}desc")} == set(names)
    assert "currentColor" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
