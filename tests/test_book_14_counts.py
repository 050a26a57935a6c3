"""What chapter 14 claims: finite sums over cliques, rules for counts, and how much they vary, all by summation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

import gradlab as gl

F64 = torch.float64
K = torch.arange(120.0, dtype=F64)


def tensor(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def slope(make_q, theta: float, f, z=K) -> torch.Tensor:
    t = tensor(theta).requires_grad_()
    return torch.autograd.grad((make_q(t).log_prob(z).exp() * f(z)).sum(), t)[0]


def rule_mean(q, q_jump: float, terms, f, z=K) -> torch.Tensor:
    """The mean of sum w (f(z + u) - f(z)), over z and a geometric J from 1."""
    z, j = z[:, None], K + 1
    weight = q.log_prob(z).exp() * (1 - q_jump) * q_jump**K
    return sum(weight * w * (f(z + u) - f(z)) for w, u in terms(z, j)).sum()


def dispersed(m, r):
    m, r = torch.as_tensor(m, dtype=F64), torch.as_tensor(r, dtype=F64)
    return D.NegativeBinomial(r, probs=m / (m + r))


COSTS = [lambda z: 0.3**z, lambda z: torch.cos(2 * z), torch.square]


# ------------------------------------------------------------------------------------------------------ finite sums


def cliques():
    torch.manual_seed(3)
    sizes = (4, 2, 3)
    cost = torch.randn(sizes, dtype=F64)
    logits = [torch.randn(n, dtype=F64).requires_grad_() for n in sizes]
    return cost, logits, [a.softmax(-1) for a in logits]


def clique_rule(cost, probs, z, ref):
    total = tensor(0.0)
    for c, p in enumerate(probs):
        line = cost[tuple(slice(None) if b == c else z[b] for b in range(3))]
        total = total + p @ (line - line[ref[c]])
    return total


def grads(value, logits):
    return torch.cat(torch.autograd.grad(value, logits, retain_graph=True, materialize_grads=True))


def test_cliques():
    cost, logits, probs = cliques()
    joint = torch.einsum("a,b,c->abc", *probs)
    exact = grads((joint * cost).sum(), logits)
    values = torch.cartesian_prod(*(torch.arange(n) for n in cost.shape))
    first = None
    for ref in ((0, 0, 0), (3, 1, 2), (1, 0, 1)):
        rows = torch.stack([grads(clique_rule(cost, probs, z, ref), logits) for z in values])
        torch.testing.assert_close(joint.detach().flatten() @ rows, exact, atol=1e-12, rtol=0)
        first = rows if first is None else first
        torch.testing.assert_close(rows, first, atol=1e-12, rtol=0)
    # the same rule, applied to the single bits of a dependent pair, is wrong
    g = torch.einsum("abc,b,c->a", cost, probs[1].detach(), probs[2].detach()).view(2, 2)
    pair = probs[0].view(2, 2)
    single = grads(pair.sum(1) @ g @ pair.sum(0), logits)
    assert (single - exact)[:4].abs().max() > 1e-2


def test_fair():
    theta = torch.full((8, 3), 0.5, dtype=F64).requires_grad_()
    q = D.Independent(D.Bernoulli(theta), 1)
    corners = torch.cartesian_prod(*[tensor([0.0, 1.0])] * 3)

    def f(z):
        return torch.cos(z @ tensor([1.0, 2.0, 0.5])) * (1 + z.prod(-1))

    backprop, local = gl.StochasticBackprop(), gl.LocalExpectation()
    noise = backprop.draw(q)._replace(z=corners[None])
    (a,) = torch.autograd.grad(backprop.estimate(q, f, noise).sum(), theta)
    (b,) = torch.autograd.grad(local.estimate(q, f, corners[None]).sum(), theta)
    pi = torch.full((3,), 0.5, dtype=F64).requires_grad_()
    (exact,) = torch.autograd.grad(gl.Enumerate()(D.Independent(D.Bernoulli(pi), 1), f), pi)
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    torch.testing.assert_close(a.mean(0), exact, atol=1e-13, rtol=0)
    assert abs(0.5 + 0.5 * complex(math.cos(math.pi), math.sin(math.pi))) < 1e-15


def test_off_integers():
    omega = (torch.arange(4000, dtype=F64) + 0.5) / 4000 * 2 * math.pi - math.pi
    for v, overlap in ((1.0, 0.0), (0.5, 2 / math.pi)):
        assert abs(torch.cos(omega * v).mean() - overlap) < 1e-6
        assert abs(torch.sinc(tensor(v)) - overlap) < 1e-12


# ---------------------------------------------------------------------------------------------------- rules for counts

RULES = {
    "poisson": (D.Poisson, 2.0, 0.5, lambda z, j: [(1.0, 1)], K),
    "binomial": (lambda p: D.Binomial(6, p), 0.3, 0.5, lambda z, j: [(6 - z, 1), (-z, -1)], K[:7]),
    "geometric": (lambda q: D.Geometric(1 - q), 0.4, 0.4, lambda z, j: [(1 / 0.6, j)], K),
    "q": (lambda q: D.NegativeBinomial(3.0, q), 0.4, 0.4, lambda z, j: [(3 / 0.6, j)], K),
    "r": (lambda r: D.NegativeBinomial(r, tensor(0.4)), 3.0, 0.4, lambda z, j: [(2 / 3 / j, j)], K),
    "m": (lambda m: dispersed(m, 3.0), 2.0, 0.4, lambda z, j: [(1.0, j), (-1.0, j - 1)], K),
    "r, m": (lambda r: dispersed(2.0, r), 3.0, 0.4, lambda z, j: [(2 / 3 * (1 / j - 1), j), (2 / 3, j - 1)], K),
    "m, same": (lambda m: dispersed(m, 3.0), 2.0, 0.4, lambda z, j: [((z + 3) / 5, 1)], K),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    make_q, theta, q_jump, terms, z = RULES[name]
    for f in COSTS:
        mean = rule_mean(make_q(tensor(theta)), q_jump, terms, f, z)
        assert abs(mean - slope(make_q, theta, f, z)) < 1e-11


def test_mistakes():
    by_r = RULES["r, m"][0]
    wrong = rule_mean(by_r(tensor(3.0)), 0.4, RULES["r"][3], torch.square)
    assert abs(wrong - slope(by_r, 3.0, torch.square)) > 0.1  # dispersion at fixed mean is not r at fixed q


def test_zero_inflated():
    y, f = D.Poisson(tensor(2.0)).log_prob(K).exp(), torch.cos
    gate = slope(lambda p: D.Bernoulli(p), 0.3, lambda b: b * f(tensor(0.0)) + (1 - b) * (y @ f(K)), K[:2])
    assert abs(y @ (f(tensor(0.0)) - f(K)) - gate) < 1e-12


def test_skellam():
    a, b = K[:50, None], K[:50]
    pa = D.Poisson(tensor(2.0)).log_prob(K[:50]).exp()

    def mean(rate, f):
        return pa @ f(a - b) @ D.Poisson(rate).log_prob(b).exp()

    exact = torch.func.grad(mean)(tensor(1.3), torch.sin)
    assert abs(mean(tensor(1.3), lambda z: torch.sin(z - 1) - torch.sin(z)) - exact) < 1e-12


def test_package():
    rates = torch.full_like(K, 2.0).requires_grad_()
    estimator = gl.StochasticBackprop()
    noise = estimator.draw(D.Poisson(rates))._replace(z=K[None])
    (g,) = torch.autograd.grad(estimator.estimate(D.Poisson(rates), torch.sin, noise).sum(), rates)
    torch.testing.assert_close(g, torch.sin(K + 1) - torch.sin(K), atol=1e-13, rtol=0)


def test_edge():
    def f(z):
        return torch.log(7 - z)

    z, q = K[:7], D.Binomial(6, tensor(0.3)).log_prob(K[:7]).exp()
    assert not ((6 - z) * (f(z + 1) - f(z))).isfinite().all()
    up, down = (z + 1).clamp_max(6), (z - 1).clamp_min(0)
    mean = q @ ((6 - z) * (f(up) - f(z)) + z * (f(z) - f(down)))
    assert abs(mean - slope(lambda p: D.Binomial(6, p), 0.3, f, z)) < 1e-12


# ------------------------------------------------------------------------------------------------------------- noise


def test_charlier():
    rate, z = 2.0, K[:45]
    g = [torch.ones_like(z), z - rate]
    for n in range(1, 17):
        g.append(((z - n - rate) * g[-1] - rate * g[-2]) / (n + 1))
    n = K[:18]
    c_n = torch.stack(g) * (((n + 1).lgamma() - n * math.log(rate)) / 2).exp()[:, None]
    p = D.Poisson(tensor(rate)).log_prob(z).exp()
    torch.testing.assert_close((c_n * p) @ c_n.T, torch.eye(18, dtype=F64), atol=1e-8, rtol=0)
    c, step = (c_n * p) @ torch.sin(0.7 * z), torch.sin(0.7 * z + 0.7) - torch.sin(0.7 * z)
    assert abs(p @ step - c[1] / math.sqrt(rate)) < 1e-10
    assert abs(p @ step**2 - (p @ step) ** 2 - (n * c**2)[2:].sum() / rate) < 1e-10


def test_wave_weights():
    """|c_n|^2 of exp(i omega z) are Poisson probabilities of rate h."""
    rate, omega = 2.0, 0.8
    t = complex(math.cos(omega) - 1, math.sin(omega))
    h = rate * abs(t) ** 2
    assert abs(abs(math.e ** (rate * t)) ** 2 - math.exp(-h)) < 1e-12


def moments(rates, f):
    """Exact variances of the rule and of leave-one-out, for two Poisson factors, in the first rate."""
    z = K[:40]
    p = torch.outer(*(D.Poisson(tensor(r)).log_prob(z).exp() for r in rates))
    cost, step, s = f(z[:, None], z), f(z[:, None] + 1, z) - f(z[:, None], z), z[:, None] / rates[0] - 1
    mean, centred = (p * step).sum(), cost - (p * cost).sum()
    m22, m20, m02 = ((p * x).sum() for x in (centred**2 * s**2, centred**2, s**2 + 0 * cost))
    loo = m22 / 3 + m20 * m02 / 6 - mean**2 / 6  # S = 1 + d = 3
    return (p * (step - mean) ** 2).sum(), loo


def test_waves():
    """The formula for the variance of leave-one-out, against the package's estimator on all triples of samples."""
    rates = torch.full((2,), 0.05, dtype=F64)

    def f(z):
        return torch.cos(0.3 + 1.1 * z[..., 0] + 0.4 * z[..., 1])

    pairs = torch.cartesian_prod(K[:4], K[:4])
    p = D.Poisson(rates).log_prob(pairs).sum(-1).exp()
    index = torch.cartesian_prod(*[torch.arange(16)] * 3)
    weight = p[index].prod(-1)
    theta = rates.expand(len(index), 2).clone().requires_grad_()
    q = D.Independent(D.Poisson(theta), 1)
    estimator = gl.ScoreFunction(num_samples=3, baseline=gl.LeaveOneOut())
    (g,) = torch.autograd.grad(estimator.estimate(q, f, pairs[index].transpose(0, 1)).sum(), theta)
    mean = weight @ g[:, 0]
    variance = weight @ (g[:, 0] - mean) ** 2
    exact = moments((0.05, 0.05), lambda a, b: torch.cos(0.3 + 1.1 * a + 0.4 * b))[1]
    assert abs(variance - exact) < 1e-3 * exact  # counts above 3 are left out


def test_contest():
    def wave(sd):
        omega = sd / 2  # two factors of rate 2: the phase has the standard deviation sd
        return lambda a, b: torch.cos(math.pi / 4 + omega * (a + b - 4))

    smooth, rough = moments((2.0, 2.0), wave(0.3)), moments((2.0, 2.0), wave(3.0))
    assert 30 < smooth[1] / smooth[0] < 35
    assert 0.12 < rough[1] / rough[0] < 0.15


def test_one_point():
    """For f(z) = z the rule with two points has no noise, the rule with one that of its weight."""
    z = K
    p = dispersed(2.0, 3.0).log_prob(z).exp()
    weight = (z + 3) / 5
    assert abs(p @ weight - 1) < 1e-12
    assert abs(p @ weight**2 - 1 - (2 + 4 / 3) / 25) < 1e-12


def test_cost():
    for d, k in ((7, 2), (4, 5)):
        points = []

        def f(z, points=points, k=k):
            points.append(z.shape[: z.ndim - (1 if k == 2 else 2)].numel())
            return z.flatten(-1 if k == 2 else -2).sum(-1)

        if k == 2:
            q = D.Independent(D.Bernoulli(logits=torch.zeros(d, requires_grad=True)), 1)
        else:
            q = D.Independent(D.OneHotCategorical(logits=torch.zeros(d, k, requires_grad=True)), 1)
        gl.LocalExpectation()(q, f)
        assert sum(points) == 1 + d * (k - 1)


def test_struck():
    """One trial of the six struck out: the averaged rule has the same mean and a smaller second moment."""
    z, p = K[:7], D.Binomial(6, tensor(1 / 3)).log_prob(K[:7]).exp()
    for f in COSTS:
        up, down = f(z + 1) - f(z), f(z) - f((z - 1).clamp_min(0))
        averaged = (6 - z) * up + z * down
        struck = p @ ((1 - z / 6) * (6 * up) ** 2 + z / 6 * (6 * down) ** 2)
        assert abs(p @ averaged - slope(lambda t: D.Binomial(6, t), 1 / 3, f, z)) < 1e-12
        assert struck >= p @ averaged**2  # Rao and Blackwell: less variance for one sample, at twice the points


def test_package_cliques():
    """The package's gradient for each value of three cliques, against the theorem's."""
    cost, logits, probs = cliques()
    copies = [a.detach().expand(24, -1).clone().requires_grad_() for a in logits]
    q = gl.Cliques([[0, 1], [2], [3]], copies, sizes=[2, 2, 2, 3])
    z = q.enumerate_support()[:, 0]
    place = torch.block_diag(tensor([[2.0], [1.0]]), torch.ones(1, dtype=F64), torch.ones(1, dtype=F64))
    estimator = gl.StochasticBackprop()
    noise = estimator.draw(q)._replace(z=z[None])
    loss = estimator.estimate(q, lambda x: cost[(x @ place).long().unbind(-1)], noise)
    theirs = torch.cat(torch.autograd.grad(loss.sum(), copies), -1)
    index = (z @ place).long()
    ours = torch.stack([grads(clique_rule(cost, probs, i, (0, 0, 0)), logits) for i in index])
    torch.testing.assert_close(theirs, ours, atol=1e-12, rtol=0)


def test_package_laws():
    """Means of the package's rules: linear costs, for which the differences have no noise at all."""
    torch.manual_seed(4)
    m, a = tensor(2.0).requires_grad_(), tensor(0.4).requires_grad_()
    gl.StochasticBackprop()(gl.MeanNegativeBinomial(m, a), lambda z: z).backward()
    torch.testing.assert_close(torch.stack([m.grad, a.grad]), tensor([1.0, 0.0]), atol=1e-12, rtol=0)
    a.grad = None
    gl.StochasticBackprop()(gl.MeanNegativeBinomial(m.detach(), a), torch.square).backward()
    assert abs(a.grad - 4) < 1e-12  # the variance is m + a m^2
    p = tensor(0.3).requires_grad_()
    gl.StochasticBackprop()(D.Binomial(6, p), lambda z: z).backward()
    assert abs(p.grad - 6) < 1e-12
