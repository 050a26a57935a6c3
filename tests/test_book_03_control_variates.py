"""What chapter 03 claims about control variates and baselines: quadrature and enumeration, no sampling."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

import gradlab

MU, SIGMA = 0.7, 1.3


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):  # formulas need no other device
        yield


def tensor(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def normal_mean(g, mu=MU, sigma=SIGMA):
    """E[g(z)] for a Normal, by quadrature."""
    with torch.no_grad():
        return gradlab.Quadrature()(Normal(tensor(mu), tensor(sigma)), g).item()


def score_mu(z, mu=MU, sigma=SIGMA):
    return (z - mu) / sigma**2


def score_sigma(z, mu=MU, sigma=SIGMA):
    return ((z - mu) ** 2 / sigma**2 - 1) / sigma


def normal_variance(g, **kwargs):
    mean = normal_mean(g, **kwargs)
    return normal_mean(lambda z: (g(z) - mean) ** 2, **kwargs)


def bernoullis(logits):
    return Independent(Bernoulli(logits=logits), 1)


def draws(q, num_samples):
    """All joint draws of S samples, ``[S, N, *E]``."""
    points = gradlab.Enumerate().draw(q)
    index = torch.cartesian_prod(*[torch.arange(len(points))] * num_samples)
    return points[index.reshape(-1, num_samples).T]


def exact_moments(estimator, make_q, f, params):
    """The exact mean and variance of an estimator's gradient."""
    noise = draws(make_q(params), estimator.num_samples)
    copies = params.expand(noise.shape[1], *params.shape).clone().requires_grad_()
    q = make_q(copies)
    grads = torch.autograd.grad(estimator.estimate(q, f, noise).sum(), copies)[0]
    weights = q.log_prob(noise).detach().sum(0).exp()
    weights = weights.reshape(*weights.shape, *(1 for _ in q.event_shape))
    mean = (weights * grads).sum(0)
    return mean, (weights * (grads - mean) ** 2).sum(0)


THREE = gradlab.problem("bernoulli_3")
LOGITS = THREE.params["logits"]
EXACT = THREE.exact()[0]["logits"]


@pytest.mark.parametrize("c", [0.0, 3.0, -10.0])
def test_constant_baseline(c):
    assert normal_mean(lambda z: (z**2 + 1 - c) * score_mu(z)) == pytest.approx(2 * MU, abs=1e-11)
    assert normal_mean(lambda z: (z**2 + 1 - c) * score_sigma(z)) == pytest.approx(2 * SIGMA, abs=1e-11)


def test_sample_dependent_baseline():
    def square(z):
        return (z - MU) ** 2

    assert normal_mean(lambda z: (z**2 - z) * score_mu(z)) == pytest.approx(2 * MU - 1, abs=1e-11)
    assert normal_mean(lambda z: (z**2 - square(z)) * score_mu(z)) == pytest.approx(2 * MU, abs=1e-11)
    assert normal_mean(lambda z: (z**2 - square(z)) * score_sigma(z)) == pytest.approx(0, abs=1e-11)


def test_best_coefficient():
    variance = normal_variance(lambda z: z**2 * score_mu(z))
    covariance = normal_mean(lambda z: (z**2 * score_mu(z) - 2 * MU) * score_mu(z))
    spread = normal_variance(score_mu)
    a, rho2 = covariance / spread, covariance**2 / spread / variance
    assert a == pytest.approx(MU**2 + 3 * SIGMA**2)
    assert rho2 == pytest.approx(0.5654, abs=5e-5)
    assert variance == pytest.approx(32.352, abs=5e-4)
    best = normal_variance(lambda z: (z**2 - a) * score_mu(z))
    assert best == pytest.approx((1 - rho2) * variance) == pytest.approx(14.06)
    for other in (a - 0.3, a + 0.3, 1.0):
        assert normal_variance(lambda z, b=other: (z**2 - b) * score_mu(z)) > best


@pytest.mark.parametrize("c", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("mu, sigma", [(0.7, 1.3), (0.0, 0.1), (-0.4, 0.01)])
def test_source_004_variances(mu, sigma, c):
    at = {"mu": mu, "sigma": sigma}

    def variance(b, score):
        return normal_variance(lambda z: (z**2 + c - b) * score(z, **at), **at)

    mean = mu**2 + sigma**2 + c
    assert variance(mean, score_mu) == pytest.approx(8 * mu**2 + 10 * sigma**2, rel=1e-6)
    assert variance(mean, score_sigma) == pytest.approx(40 * mu**2 + 56 * sigma**2, rel=1e-6)
    assert variance(c + mu**2 + 3 * sigma**2, score_mu) == pytest.approx(8 * mu**2 + 6 * sigma**2, rel=1e-6)
    assert variance(c + mu**2 + 5 * sigma**2, score_sigma) == pytest.approx(40 * mu**2 + 24 * sigma**2, rel=1e-6)


def test_stein():
    def stein(z):
        return z**2 * score_mu(z) - 2 * z

    assert normal_mean(stein) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_leave_one_out(num_samples):
    estimator = gradlab.ScoreFunction(num_samples, gradlab.LeaveOneOut())
    mean, variance = exact_moments(estimator, bernoullis, THREE.f, LOGITS)
    torch.testing.assert_close(mean, EXACT, rtol=0, atol=1e-14)

    points = draws(bernoullis(LOGITS), 1)[0]
    weights = bernoullis(LOGITS).log_prob(points).exp()[:, None]
    f = THREE.f(points)[:, None]
    f = f - (weights * f).sum(0)
    s = points - LOGITS.sigmoid()

    def average(x):
        return (weights * x).sum(0)

    m22, m11, m20, m02 = average(f**2 * s**2), average(f * s), average(f**2), average(s**2)
    known = m22 - m11**2
    price = (m20 * m02 + m11**2) / (num_samples - 1)
    torch.testing.assert_close(variance, (known + price) / num_samples, rtol=1e-12, atol=0)


def test_self_mean():
    class SelfMean(gradlab.Baseline):
        def forward(self, cost, context=None):
            return cost.mean(0).expand_as(cost)

    noise = draws(bernoullis(LOGITS), 3)
    copies = LOGITS.expand(noise.shape[1], 3).clone().requires_grad_()
    q = bernoullis(copies)
    whole, loo = (
        torch.autograd.grad(gradlab.ScoreFunction(3, b).estimate(q, THREE.f, noise).sum(), copies)[0]
        for b in (SelfMean(), gradlab.LeaveOneOut())
    )
    torch.testing.assert_close(whole, loo * 2 / 3, rtol=1e-12, atol=1e-14)


def test_group_deviation():
    z = draws(Bernoulli(logits=tensor(0.0)), 4)
    weights = z.new_full((16,), 1 / 16)

    def step(scale):
        f = scale * z
        gap, deviation = f - f.mean(0), f.std(0, correction=0)
        advantage = torch.where(deviation > 0, gap / deviation.clamp_min(1e-12), 0.0)
        return (weights * (advantage * (z - 0.5)).mean(0)).sum().item()

    spread = sum(math.comb(4, k) / 16 * math.sqrt(k / 4 * (1 - k / 4)) for k in range(5))
    assert step(10.0) == pytest.approx(spread)
    assert step(-1.0) == pytest.approx(-spread)
    assert step(10.0) + 2 * step(-1.0) < 0  # the exact gradient of the sum is (10 - 2) / 4 = 2


def test_one_coin():
    toy = gradlab.problem("bernoulli_toy")
    p, costs = toy.params["logits"].sigmoid(), toy.f(tensor(0.0, 1.0))
    best = ((1 - p) * costs[1] + p * costs[0]).item()
    mean, variance = exact_moments(
        gradlab.ScoreFunction(1, best), lambda x: Bernoulli(logits=x), toy.f, toy.params["logits"]
    )
    assert variance < 1e-30
    assert mean == pytest.approx(toy.exact()[0]["logits"].item())


class SameSamples(gradlab.ControlVariate):
    """The coefficient is fitted to the samples that it is applied to."""

    def estimate(self, q, f, noise, context=None):
        s = (noise - q.mean).detach()
        g, h = f(noise)[..., None] * s, self.zeta(noise)[..., None] * s
        g, h = g - g.mean(0), h - h.mean(0)
        variance = (h * h).sum((0, -1))
        self.coefficient = (g * h).sum((0, -1)) / variance.clamp_min(1e-12)
        return super().estimate(q, f, noise)


@pytest.mark.parametrize("num_samples", [3, 5])
def test_fitted_coefficient(num_samples):
    def f(z):
        return z.sum(-1) ** 2

    parts = (lambda z: z.sum(-1), lambda q: q.mean.sum(-1))
    logits = tensor(0.0, 0.0)
    others, _ = exact_moments(gradlab.ControlVariate(*parts, "optimal", num_samples), bernoullis, f, logits)
    same, _ = exact_moments(SameSamples(*parts, num_samples=num_samples), bernoullis, f, logits)
    torch.testing.assert_close(others, tensor(0.5, 0.5), rtol=0, atol=1e-14)
    assert (same - 0.5).abs().max() > 0.04


def test_muprop():
    def cost(amount):
        return lambda z: (z + amount * (torch.pi * z).sin() ** 2).sum(-1)

    exact = LOGITS.sigmoid() * (-LOGITS).sigmoid()
    linear, no_variance = exact_moments(gradlab.MuProp(), bernoullis, cost(0.0), LOGITS)
    wavy, variance = exact_moments(gradlab.MuProp(), bernoullis, cost(1.0), LOGITS)
    torch.testing.assert_close(linear, exact)
    torch.testing.assert_close(wavy, exact)
    assert no_variance.max() < 1e-30
    assert variance.min() > 0.1


def test_rao_blackwell():
    def local(z):
        return (z - 0.45) ** 2

    logits = tensor(-1.0, 0.0, 1.0, 2.0)
    joint, variance = exact_moments(gradlab.ScoreFunction(), bernoullis, lambda z: local(z).sum(-1), logits)
    split, less = exact_moments(gradlab.ScoreFunction(), lambda x: Bernoulli(logits=x), local, logits)
    torch.testing.assert_close(joint, split)
    assert (less < variance).all()


def test_learned_sign():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    net = torch.nn.Linear(1, 1, dtype=torch.float64)
    estimator = gradlab.ScoreFunction(2, gradlab.Learned(net))
    logits = tensor(0.1, -0.3, 0.2, 0.5, 0.0).requires_grad_()
    noise = estimator.draw(Bernoulli(logits=logits))
    grads = []
    for sign in (1, -1):
        loss = estimator.estimate(Bernoulli(logits=logits), lambda z: (z - 0.45) ** 2 + 3 * x[:, 0], noise, x)
        grads.append(torch.autograd.grad(sign * loss.sum(), [logits, *net.parameters()]))
    torch.testing.assert_close(grads[0][0], -grads[1][0])
    torch.testing.assert_close(grads[0][1:], grads[1][1:])


def test_moving_average():
    baseline = gradlab.MovingAverage(0.9)
    cost = torch.full((4,), 3.0, dtype=torch.float64)
    assert baseline(cost).tolist() == [0.0] * 4
    assert baseline.eval()(cost + 5).tolist() == pytest.approx([3.0] * 4)
    assert baseline(cost).tolist() == pytest.approx([3.0] * 4)
    assert set(baseline.state_dict()) == {"average", "weight"}


@pytest.mark.parametrize("num_samples", [3, 4])
def test_optimal_coefficient_with_ties(num_samples):
    """Where the other samples agree, their covariance is rounding noise, and must count as zero."""
    cv = gradlab.ControlVariate(lambda z: z.sum(-1), lambda q: q.mean.sum(-1), "optimal", num_samples)
    mean, _ = exact_moments(cv, bernoullis, THREE.f, LOGITS)
    torch.testing.assert_close(mean, EXACT, rtol=0, atol=1e-13)


def test_learned_context():
    """The variance formula of one coin, and what a baseline that knows the context saves."""
    x = torch.linspace(-1.5, 1.5, 32)[:, None]
    logits, offset = 0.5 * x[:, 0], 4 * torch.sin(3 * x[:, 0])
    p = logits.sigmoid()

    def cost(z):
        return (z - 0.45) ** 2 + offset

    def variance(b):
        high, low = cost(torch.ones(32)) - b, cost(torch.zeros(32)) - b
        return p * (1 - p) * (high * (1 - p) + low * p) ** 2

    _, enumerated = exact_moments(gradlab.ScoreFunction(), lambda x: Bernoulli(logits=x), cost, logits)
    torch.testing.assert_close(variance(0.0), enumerated)
    mean = (1 - p) * cost(torch.zeros(32)) + p * cost(torch.ones(32))
    assert variance(mean.mean()).mean() > variance(0.0).mean() / 2
    assert variance(mean).mean() < variance(0.0).mean() / 50


def test_mistakes():
    at = {"mu": 0.0, "sigma": SIGMA}
    alone = normal_variance(lambda z: z**2 * score_mu(z, **at), **at)
    mixed = normal_variance(lambda z: z**2 * score_mu(z, **at) - z**2, **at)
    assert mixed - alone == pytest.approx(2 * SIGMA**4)  # uncorrelated: the variances add

    class Critic(gradlab.Baseline):
        def forward(self, cost, context=None):
            return cost

    mean, _ = exact_moments(gradlab.ScoreFunction(1, Critic()), bernoullis, THREE.f, LOGITS)
    assert mean.abs().max() == 0
    with pytest.raises(ValueError, match="expected at least 2"):
        gradlab.ScoreFunction(1, gradlab.LeaveOneOut())
