"""The formulas of chapter 06, against quadrature through the package's own estimators."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Beta,
    Exponential,
    Gamma,
    Normal,
    Transform,
    constraints,
    identity_transform,
)

import gradlab
from gradlab.generalized import (
    inverse_marsaglia_tsang,
    log_accepted,
    marsaglia_tsang,
)

POINTS = [(0.7, 1.3, 1.0), (0.0, 0.4, 5.0), (-1.2, 2.5, 0.0), (3.0, 0.1, 2.0)]


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def hermite():
    x, w = np.polynomial.hermite_e.hermegauss(40)
    return torch.tensor(x), torch.tensor(w / w.sum())


def per_sample(estimator, make_q, f, params, z):
    """One gradient for each z: [P, N]."""
    p = [torch.as_tensor(v).expand(len(z)).clone().requires_grad_() for v in params]
    loss = estimator.estimate(make_q(*p), f, z[None])
    return torch.stack(torch.autograd.grad(loss.sum(), p, materialize_grads=True))


def moments(gradients, weights):
    mean = (weights * gradients).sum(-1)
    return mean, (weights * gradients**2).sum(-1) - mean**2


def nodes(q):
    """Nodes and probabilities that integrate over q."""
    n = gradlab.Quadrature().draw(q)
    weights = n.weight * q.log_prob(n.z).exp()
    keep = weights.isfinite() & (weights > 1e-30)
    return n.z[keep], weights[keep]


FIRST = gradlab.GeneralizedReparameterization(lambda q: AffineTransform(q.loc, 1.0))
SECOND = gradlab.GeneralizedReparameterization(lambda q: AffineTransform(q.loc - q.scale * q.loc, q.scale))
FULL = gradlab.GeneralizedReparameterization()


def formulas(m, s, c):
    return {
        "score": (
            (m**2 + c) ** 2 / s**2 + 15 * s**2 + 14 * m**2 + 6 * c,
            2 * (c + m**2) ** 2 / s**2 + 60 * m**2 + 74 * s**2 + 20 * c,
        ),
        "path": (4 * s**2, 4 * m**2 + 8 * s**2),
        "first": (
            4 * s**2,
            2 * c**2 / s**2 + c * (4 * m**2 / s**2 + 20) + 2 * m**4 / s**2 + 60 * m**2 + 74 * s**2,
        ),
        "second": (
            (m**2 + c) ** 2 + 2 * c * s**2 + 4 * c * s + 10 * m**2 * s**2 + 4 * m**2 * s
            + 7 * s**4 + 4 * s**3 + 4 * s**2,
            4 * m**2 + 8 * s**2,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_the_eight_variances(point):
    m, s, c = point
    x, w = hermite()
    estimators = {"score": gradlab.ScoreFunction(), "path": FULL, "first": FIRST, "second": SECOND}
    for name, estimator in estimators.items():
        mean, variance = moments(per_sample(estimator, Normal, lambda z: z**2 + c, (m, s), m + s * x), w)
        torch.testing.assert_close(mean, torch.tensor([2 * m, 2 * s]), rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(variance, torch.tensor(formulas(m, s, c)[name]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("point", POINTS)
def test_the_closed_forms_of_the_gradients(point):
    m, s, c = point
    x, _ = hermite()
    z = m + s * x

    def f(z):
        return z**2 + c

    score = torch.stack([x / s, (x**2 - 1) / s])
    expected = {
        gradlab.ScoreFunction(): f(z) * score,
        gradlab.ScoreFunction(baseline=c + m**2 + 3 * s**2): (f(z) - c - m**2 - 3 * s**2) * score,
        FULL: torch.stack([2 * z, 2 * x * z]),
        FIRST: torch.stack([2 * z, f(z) * score[1]]),
        SECOND: torch.stack([f(z) * x - 2 * z * (s - 1), 2 * x * z]),
    }
    for estimator, gradient in expected.items():
        torch.testing.assert_close(per_sample(estimator, Normal, f, (m, s), z), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("point", POINTS)
def test_the_printed_first_transformation_forgets_the_constant(point):
    m, s, c = point
    x, w = hermite()
    z = m + s * x
    mean, variance = moments(z**2 * (x**2 - 1) / s, w)  # as printed: without + c
    assert mean.item() == pytest.approx(2 * s, abs=1e-9)
    assert variance.item() == pytest.approx(2 * (m**4 + 30 * m**2 * s**2 + 37 * s**4) / s**2, rel=1e-9)
    assert (variance.item() == pytest.approx(formulas(m, s, c)["first"][1], rel=1e-6)) == (c == 0)


def test_the_second_transformation_is_no_free_lunch():
    limit = formulas(0.0, 1e-8, 5.0)["second"][0]
    assert limit == pytest.approx(25.0, rel=1e-6)
    for s in (0.3, 0.9, 1.1, 4.0):
        value = formulas(0.0, s, 0.0)
        gap = value["second"][0] - value["score"][0]
        assert gap == pytest.approx(s**2 * (7 * s + 11) * (s - 1), rel=1e-9)


def test_identity_is_score_and_whitening_is_path():
    eps = torch.randn(50)
    m, s = 0.7, 1.3

    def f(z):
        return (z**2 + 1).sin()

    z = m + s * eps
    identity = gradlab.GeneralizedReparameterization(lambda q: identity_transform)
    one = per_sample(identity, Normal, f, (m, s), z)
    two = per_sample(gradlab.ScoreFunction(), Normal, f, (m, s), z)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    mu, sigma = (torch.full_like(eps, v).requires_grad_() for v in (m, s))
    path = torch.autograd.grad(f(mu + sigma * eps).sum(), (mu, sigma))
    three = per_sample(FULL, Normal, f, (m, s), z)
    torch.testing.assert_close(three, torch.stack(path), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make_q", [Gamma, Beta])
def test_all_but_the_score_has_mean_zero(make_q):
    params = (1.7, 1.1)
    z, w = nodes(make_q(*map(torch.tensor, params)))

    def f(z):
        return (z - 0.49) ** 2

    g_rep = per_sample(FULL, make_q, f, params, z)
    score = per_sample(gradlab.ScoreFunction(), make_q, f, params, z)
    assert (w * (g_rep - score)).sum(-1).abs().max() < 1e-9
    assert (moments(g_rep, w)[1] < moments(score, w)[1]).all()


def test_a_reflection_needs_the_absolute_value():
    mirror = gradlab.GeneralizedReparameterization(lambda q: AffineTransform(q.loc, -q.scale))
    x, w = hermite()
    mean, variance = moments(per_sample(mirror, Normal, lambda z: z**2, (0.7, 1.3), 0.7 + 1.3 * x), w)
    torch.testing.assert_close(mean, torch.tensor([1.4, 2.6]))
    torch.testing.assert_close(variance, torch.tensor(formulas(0.7, 1.3, 0.0)["path"]))


def test_a_moving_boundary_costs_f_at_the_boundary():
    centred = gradlab.GeneralizedReparameterization(lambda q: AffineTransform(q.mean, 1.0))
    for rate in (0.5, 1.7):
        z, w = nodes(Exponential(torch.tensor(rate)))
        mean, _ = moments(per_sample(centred, Exponential, lambda z: (-z).exp(), (rate,), z), w)
        exact = 1 / (1 + rate) ** 2  # d/d rate of rate / (1 + rate)
        assert mean.item() == pytest.approx(exact + 1 / rate, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7, 8.0])
def test_the_accepted_noise(alpha):
    """The envelope holds for every shape above 1/3, and M is the inverse of the acceptance rate."""
    a = torch.tensor(alpha)
    d = alpha - 1 / 3
    M = math.sqrt(2 * math.pi) * d ** (alpha - 0.5) * math.exp(-d) / math.gamma(alpha)
    eps = torch.linspace(-math.sqrt(9 * d) + 1e-6, 9, 4001)
    v = (1 + eps / math.sqrt(9 * d)) ** 3
    log_a = eps**2 / 2 + d - d * v + d * v.log()
    assert log_a.max() <= 1e-12
    accepted = math.log(M) + Normal(0.0, 1.0).log_prob(eps) + log_a
    torch.testing.assert_close(log_accepted(eps, a), accepted, rtol=1e-9, atol=1e-9)
    z, w = nodes(Gamma(a, torch.tensor(1.0)))
    assert w.sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(marsaglia_tsang(inverse_marsaglia_tsang(z, a), a), z)
    if alpha == 1.7:
        assert pytest.approx(1.02319408051, abs=1e-11) == M


def split(alpha, boost=0):
    """g_rep and g_corr of d/d alpha E log z by quadrature over the accepted noise."""
    shape = torch.tensor(alpha + boost)
    z, w = nodes(Gamma(shape, torch.tensor(1.0)))
    eps = inverse_marsaglia_tsang(z, shape)
    a = shape.expand(len(z)).clone().requires_grad_()
    (path,) = torch.autograd.grad(marsaglia_tsang(eps, a).log().sum(), a)
    (score,) = torch.autograd.grad(log_accepted(eps, a).sum(), a)
    uniforms = sum(1 / (alpha + i) ** 2 for i in range(boost))
    return (w * path).sum().item() + uniforms, (w * score * z.log()).sum().item()


def test_the_two_terms_of_the_rejection_estimator():
    g_rep, g_corr = split(1.7)
    assert g_rep == pytest.approx(0.8266226737, abs=1e-8)
    assert g_corr == pytest.approx(-0.0333898435, abs=1e-8)
    corrections = []
    for boost in range(8):
        g_rep, g_corr = split(1.7, boost)
        exact = torch.polygamma(1, torch.tensor(1.7)).item()
        assert g_rep + g_corr == pytest.approx(exact, abs=1e-8)
        corrections.append(abs(g_corr))
    assert corrections == sorted(corrections, reverse=True)
    assert corrections[-1] < corrections[0] / 200


@pytest.mark.parametrize("name", ["gamma_square", "gamma_small", "beta_square", "dirichlet_quadratic"])
@pytest.mark.parametrize("boost", [1, 4])
def test_the_rejection_estimator_is_unbiased(name, boost):
    p = gradlab.problem(name)
    exact, _ = p.exact()
    estimator = gradlab.RejectionReparameterization(boost=boost)
    row = gradlab.compare({"rsvi": estimator}, p.make_q, p.f, p.params, exact, 20_000)["rsvi"]
    assert row.z < 5


@pytest.mark.parametrize(("make_q", "params"), [(Gamma, (0.5, 1.1)), (Gamma, (8.0, 1.1)), (Beta, (0.7, 1.6))])
def test_standardize_removes_two_moments(make_q, params):
    q = make_q(*map(torch.tensor, params))
    z, w = nodes(q)
    noise = gradlab.standardize(q).inv(z)
    assert (w * noise).sum().item() == pytest.approx(0, abs=1e-6)
    assert (w * noise**2).sum().item() == pytest.approx(1, abs=1e-6)


class MarsagliaTsang(Transform):
    domain, codomain, bijective = constraints.real, constraints.positive, True

    def __init__(self, q):
        super().__init__()
        self.d, self.rate = q.concentration - 1 / 3, q.rate

    def _call(self, eps):
        return self.d * (1 + eps / (9 * self.d).sqrt()) ** 3 / self.rate

    def _inverse(self, z):
        return (9 * self.d).sqrt() * ((self.rate * z / self.d) ** (1 / 3) - 1)

    def log_abs_det_jacobian(self, eps, z):
        return self.d.log() / 2 + 2 * (1 + eps / (9 * self.d).sqrt()).log() - self.rate.log()


def test_rejection_is_generalized():
    p = gradlab.problem("gamma_square")
    alpha, rate = (v.expand(500).clone().requires_grad_() for v in p.params.values())
    q = Gamma(alpha, rate)
    rsvi = gradlab.RejectionReparameterization(boost=0)
    noise = rsvi.draw(q)
    z = MarsagliaTsang(q)(noise.epsilon).detach()
    one = torch.autograd.grad(rsvi.estimate(q, p.f, noise).sum(), (alpha, rate))
    g_rep = gradlab.GeneralizedReparameterization(MarsagliaTsang)
    two = torch.autograd.grad(g_rep.estimate(q, p.f, z).sum(), (alpha, rate))
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_a_step_needs_the_score():
    z = 0.7 + 1.3 * torch.randn(20_000)
    g = per_sample(FIRST, Normal, lambda z: (z > 0).double() + 0 * z, (0.7, 1.3), z)
    exact = Normal(0.0, 1.0).log_prob(torch.tensor(0.7 / 1.3)).exp() / 1.3
    assert (g[0] == 0).all()
    error = g[1].std() / math.sqrt(20_000)
    assert abs(g[1].mean() + exact * 0.7 / 1.3) < 5 * error


def test_implicit_varies_less():
    for name in ("gamma_square", "gamma_small", "beta_square", "dirichlet_quadratic"):
        p = gradlab.problem(name)
        spread = []
        for e in (gradlab.ImplicitReparameterization(), gradlab.RejectionReparameterization()):
            g = gradlab.replicate(lambda q, e=e, p=p: e(p.make_q(q), p.f), p.params, 20_000)
            spread.append(sum(v.var(0).sum() for k, v in g.items() if k != "rate"))
        assert spread[0] < spread[1], name


def test_the_training_conclusions():
    """SGD on z^2 + c, c = 1: the constant stalls the score function, not the path, nor the printed G-REP 1."""
    rate, runs, c = 0.01, 50, 1.0
    m, s = torch.ones(2, 4, runs)
    history = []
    for _ in range(3000):
        x = torch.randn(runs)
        z, half = m + s * x, (x**2 - 1) / s
        cost = z**2 + c
        g_m = torch.stack([2 * z[0], cost[1] * x / s[1], 2 * z[2], cost[3] * x - 2 * z[3] * (s[3] - 1)])
        g_s = torch.stack([2 * x * z[0], cost[1] * half[1], z[2] ** 2 * half[2], 2 * x * z[3]])
        m, s = m - rate * g_m, s - rate * g_s
        history.append(m**2 + s**2)
    path, score, printed, second = torch.stack(history[-1000:]).movedim(0, -1).flatten(1).median(-1).values
    assert path < 1e-20
    assert printed < 1e-20
    assert 0.1 < score < 0.9
    assert 0.6 < second / (0.455 * rate * c**2 / (4 - 4 * rate)) < 1.6
