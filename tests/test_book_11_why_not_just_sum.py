"""What chapter 11 claims and no test of the package keeps: means and variances by enumeration, with no sampling."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl

PROBLEMS = ["bernoulli_3", "onehot_5x3"]


def by_value(estimator: gl.Estimator, p: gl.Problem) -> tuple[Tensor, Tensor]:
    """The probability of each value, and the gradient that it gives."""
    z = gl.Enumerate().draw(p.q())
    logits = p.params["logits"].expand(len(z), *p.params["logits"].shape).clone().requires_grad_()
    loss = estimator.estimate(p.make_q({"logits": logits}), p.f, z[None])
    return p.q().log_prob(z).exp(), torch.autograd.grad(loss.sum(), logits)[0].flatten(1)


def moments(weight: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    mean = weight @ grads
    return mean, (weight @ (grads - mean) ** 2).sum()


def exact(p: gl.Problem) -> Tensor:
    return p.exact()[0]["logits"].flatten()


def bits(logits: Tensor) -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=logits), 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_joint(name: str) -> None:
    """The sum of f times the gradient of q, value by value."""
    p = gl.problem(name)
    z = gl.Enumerate().draw(p.q())
    theta = p.params["logits"].clone().requires_grad_()
    q = p.make_q({"logits": theta}).log_prob(z).exp()
    rows = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0].flatten() for x in q])
    close(p.f(z) @ rows, exact(p))
    assert len(z) == gl.Enumerate().evaluations(p.q())


@pytest.mark.parametrize("name", PROBLEMS)
def test_local_is_unbiased(name: str) -> None:
    weight, grads = by_value(gl.LocalExpectation(), gl.problem(name))
    close(weight @ grads, exact(gl.problem(name)))


@pytest.mark.parametrize(("name", "count"), [("bernoulli_3", 4), ("onehot_5x3", 11), ("bernoulli_20", 21)])
def test_evaluations(name: str, count: int) -> None:
    p, points = gl.problem(name), []

    def f(z: Tensor) -> Tensor:
        points.append(z.numel() // p.q().event_shape.numel())
        return p.f(z)

    logits = p.params["logits"].clone().requires_grad_()
    gl.LocalExpectation()(p.make_q({"logits": logits}), f)
    assert sum(points) == count == gl.LocalExpectation().evaluations(p.q())


def test_reference_value() -> None:
    """With one z_-j the reference changes nothing; with one a term it changes the variance, and not the mean."""
    p = gl.problem("onehot_5x3")
    z, (weight, grads) = gl.Enumerate().draw(p.q()), by_value(gl.LocalExpectation(), p)
    pi, eye, spreads = p.params["logits"].softmax(-1), torch.eye(3, dtype=torch.float64), []
    for reference in range(3):
        shared, mean, spread = torch.zeros(len(z), 5, 3), torch.zeros(5, 3), 0.0
        for j, k in itertools.product(range(5), {0, 1, 2} - {reference}):
            a, b = z.clone(), z.clone()
            a[:, j], b[:, j] = eye[k], eye[reference]
            gap, slope = p.f(a) - p.f(b), pi[j, k] * (eye[k] - pi[j])
            shared[:, j] += gap[:, None] * slope
            mean[j] += (weight @ gap) * slope
            spread += slope @ slope * (weight @ gap**2 - (weight @ gap) ** 2)
        close(shared.flatten(1), grads)
        close(mean.flatten(), exact(p))
        spreads.append(float(spread))
    common = moments(weight, grads)[1].item()
    assert all(abs(x - common) > 0.01 for x in spreads)
    assert len({round(x, 3) for x in spreads}) == 3


@pytest.mark.parametrize("name", PROBLEMS)
def test_variance(name: str) -> None:
    """Each component varies at most as much as with the score function; for bits the interactions give the sum."""
    p = gl.problem(name)
    weight, ours = by_value(gl.LocalExpectation(), p)
    _, score = by_value(gl.ScoreFunction(), p)
    spread = lambda g: weight @ (g - weight @ g) ** 2  # noqa: E731
    assert (spread(ours) <= spread(score) + 1e-12).all()
    if name == "bernoulli_3":
        z, pi = gl.Enumerate().draw(p.q()), p.params["logits"].sigmoid()
        sigma = (pi * (1 - pi)).sqrt()
        psi, total = (z - pi) / sigma, torch.zeros(3)
        for size in (2, 3):
            for a in itertools.combinations(range(3), size):
                total[list(a)] += sigma[list(a)] ** 2 * (weight @ (p.f(z) * psi[:, a].prod(-1))) ** 2
        close(spread(ours), total)


def heavy_variance(p: gl.Problem, top: int, num_samples: int) -> Tensor:
    weight, grads = by_value(gl.ScoreFunction(), p)
    order = weight.argsort(descending=True)[top:]
    rest = weight[order].sum()
    return rest**2 * moments(weight[order] / rest, grads[order])[1] / num_samples


@pytest.mark.parametrize("top", [1, 4])
def test_sum_and_sample(top: int) -> None:
    """Each value of the rest in turn: mean and variance are those of the theorem."""
    p = gl.problem("bernoulli_3")
    z = gl.Enumerate().draw(p.q())
    weight = p.q().log_prob(z).exp()
    order = weight.argsort(descending=True)
    rest = z[order[top:]]
    logits = p.params["logits"].expand(len(rest), 3).clone().requires_grad_()
    draw = type(gl.SumAndSample(top).draw(p.q()))
    noise = draw(z[order[:top], None].expand(top, len(rest), 3), rest[None])
    loss = gl.SumAndSample(top).estimate(p.make_q({"logits": logits}), p.f, noise)
    mass = weight[order[top:]]
    mean, variance = moments(mass / mass.sum(), torch.autograd.grad(loss.sum(), logits)[0])
    close(mean, exact(p))
    close(variance, heavy_variance(p, top, 1))


@pytest.mark.parametrize(("name", "n"), [("bernoulli_3", 4), ("onehot_5x3", 11)])
def test_more_in_the_sum(name: str, n: int) -> None:
    """With one sample more it never hurts; with a fixed budget it can."""
    p = gl.problem(name)
    v = [heavy_variance(p, m, 1) for m in range(n)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(v))
    assert (heavy_variance(p, n // 2, n - n // 2) < heavy_variance(p, 0, n)) == (name == "bernoulli_3")


def set_moments(p: gl.Problem, size: int) -> tuple[Tensor, Tensor]:
    z = gl.Enumerate().draw(p.q())
    q = p.q().log_prob(z).exp()
    order = torch.tensor(list(itertools.permutations(range(len(z)), size)))
    mass = q[order]
    chance = (mass / (1 - mass.cumsum(-1) + mass)).prod(-1)
    logits = p.params["logits"].expand(len(order), -1).clone().requires_grad_()
    loss = gl.UnorderedSet(size).estimate(p.make_q({"logits": logits}), p.f, z[order].movedim(1, 0))
    return moments(chance, torch.autograd.grad(loss.sum(), logits)[0])


@pytest.mark.parametrize("size", [2, 4])
def test_unordered_set(size: int) -> None:
    """Over all orders of the draws the mean is exact; for two, the ratios are elementary."""
    p = gl.problem("bernoulli_3")
    close(set_moments(p, size)[0], exact(p))
    q, g = by_value(gl.ScoreFunction(), p)
    total, plain = 0.0, 0.0
    for a, b in itertools.combinations(range(8), 2):
        first, second = q[a] * q[b] / (1 - q[a]), q[b] * q[a] / (1 - q[b])
        total = total + first * g[a] + second * g[b]
        plain = plain + (first + second) * (g[a] + g[b]) / 2
    close(total, exact(p))
    assert (plain - exact(p)).abs().max() > 5e-3


def leave_one_out_variance(p: gl.Problem, n: int) -> Tensor:
    z, q = gl.Enumerate().draw(p.q()), p.q()
    w, f = q.log_prob(z).exp(), p.f(z)
    score = (z - q.mean).flatten(1)
    centred = (f - w @ f)[:, None] * score
    first = moments(w, centred)[1] / 4
    gap = (score[:, None] - score).square().sum(-1)
    second = w @ ((f[:, None] - f) ** 2 * gap / 4) @ w - ((w @ centred) ** 2).sum()
    return (4 * (n - 2) * first + 2 * second) / (n * (n - 1))


def test_equal_evaluations() -> None:
    """The local expectation beats leave-one-out on one problem and loses on the other; the formula is exact."""
    small, large = map(gl.problem, PROBLEMS)
    variance = {p.name: moments(*by_value(gl.LocalExpectation(), p))[1] for p in (small, large)}
    assert variance["bernoulli_3"] > leave_one_out_variance(small, 4)
    assert variance["onehot_5x3"] < leave_one_out_variance(large, 11) / 6
    z = gl.Enumerate().draw(small.q())
    noise = z[torch.tensor(list(itertools.product(range(8), repeat=3)))].movedim(1, 0)  # all triples
    logits = small.params["logits"].expand(512, 3).clone().requires_grad_()
    loss = gl.ScoreFunction(3, gl.LeaveOneOut()).estimate(small.make_q({"logits": logits}), small.f, noise)
    mean, spread = moments(small.q().log_prob(noise).sum(0).exp(), torch.autograd.grad(loss.sum(), logits)[0])
    close(mean, exact(small))
    close(spread, leave_one_out_variance(small, 3))


def test_after_linear() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 30).double()
    g = lambda h: h.tanh().square().sum(-1)  # noqa: E731
    logits = torch.linspace(-1, 1, 20).requires_grad_()
    q = bits(logits)
    z, leg = q.sample(), gl.LocalExpectation()
    plain, fast = (
        torch.autograd.grad(leg.estimate(q, f, z[None]), logits)[0]
        for f in (lambda z: g(layer(z)), gl.AfterLinear(layer, g))
    )
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_two_layers() -> None:
    """Nested it is unbiased; with the second layer frozen it is not."""
    weight = torch.tensor([[0.8, -0.4], [0.3, 0.9]])
    a, b = torch.tensor([0.4, -0.3], requires_grad=True), torch.tensor([0.2, 0.6], requires_grad=True)
    f = lambda h1, h2: (h1.sum(-1) - h2.prod(-1) + h2.sum(-1)) ** 2  # noqa: E731
    inner = lambda h1: gl.Enumerate()(bits(b + h1 @ weight), lambda h2: f(h1, h2))  # noqa: E731
    (right,) = torch.autograd.grad(gl.Enumerate()(bits(a), inner), a)
    pairs = gl.Enumerate().draw(bits(a))
    copies = a.detach().expand(4, 2).clone().requires_grad_()
    loss = gl.LocalExpectation().estimate(bits(copies), inner, pairs[None])
    (tower,) = torch.autograd.grad(loss.sum(), copies)
    close(bits(a.detach()).log_prob(pairs).exp() @ tower, right)
    h1, h2 = pairs.repeat_interleave(4, 0), pairs.repeat(4, 1)
    chance = (bits(a).log_prob(h1) + bits(b + h1 @ weight).log_prob(h2)).exp().detach()
    for j in range(2):
        on, off = h1.clone(), h1.clone()
        on[:, j], off[:, j] = 1.0, 0.0
        p = a[j].detach().sigmoid()
        assert (p * (1 - p) * chance @ (f(on, h2) - f(off, h2)) - right[j]).abs() > 0.01


def variance_at_half(estimator: gl.Estimator, f, d: int, shared: bool) -> float:
    z = gl.Enumerate().draw(bits(torch.zeros(d)))
    theta = torch.zeros(len(z), 1 if shared else d, requires_grad=True)
    loss = estimator.estimate(bits(theta + torch.zeros(d)), f, z[None])
    (grads,) = torch.autograd.grad(loss.sum(), theta)
    return moments(torch.full((len(z),), 1 / len(z)), grads)[1].item()


def test_failures() -> None:
    """A shared parameter, and a parity: the local expectation has no less variance than the score function."""
    score, leg = gl.ScoreFunction(), gl.LocalExpectation()
    unequal = lambda z: -2.0 * (z[..., 0] != z[..., 1])  # noqa: E731
    parity = lambda z: (2 * z - 1).prod(-1)  # noqa: E731
    assert variance_at_half(score, unequal, 2, True) == pytest.approx(0.0, abs=1e-12)
    assert variance_at_half(leg, unequal, 2, True) == pytest.approx(0.5)
    assert variance_at_half(leg, unequal, 2, False) < variance_at_half(score, unequal, 2, False) - 0.1
    assert variance_at_half(leg, parity, 6, False) == pytest.approx(1.5)
    assert variance_at_half(score, parity, 6, False) == pytest.approx(1.5)


def test_entropy() -> None:
    """The gradient of log q has mean zero, that of its square has not."""
    p = gl.problem("bernoulli_3")
    z, theta = gl.Enumerate().draw(p.q()), p.params["logits"].clone().requires_grad_()
    log_q = p.make_q({"logits": theta}).log_prob(z)
    weight = log_q.detach().exp()
    zero, other = (torch.autograd.grad(weight @ x, theta, retain_graph=True)[0] for x in (log_q, log_q**2))
    assert zero.abs().max() < 1e-12
    assert other.abs().max() > 0.1


def test_separable() -> None:
    """No noise without interactions; one interaction gives two logits the variance 1/64."""
    z, c = gl.Enumerate().draw(bits(torch.zeros(5))), torch.linspace(-1, 1, 5)
    for pair in (0.0, 1.0):
        theta = torch.zeros(32, 5, requires_grad=True)
        f = lambda z, k=pair: z.to(c) @ c + k * z[..., 0] * z[..., 1]  # noqa: E731
        (g,) = torch.autograd.grad(gl.LocalExpectation().estimate(bits(theta), f, z[None]).sum(), theta)
        close(g.var(0, correction=0), pair / 64 * torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))


def test_blocks() -> None:
    """Summing two bits together leaves less noise than one at a time; three together, none."""
    p = gl.problem("bernoulli_3")
    z = gl.Enumerate().draw(p.q())
    w, score = p.q().log_prob(z).exp(), z - p.q().mean

    def variance(blocks: list[list[int]]) -> float:
        grads = torch.zeros(8, 3)
        for block in blocks:
            rest = [j for j in range(3) if j not in block]
            mass = (z[:, None, rest] == z[:, rest]).all(-1) * w
            grads[:, block] = (mass / mass.sum(-1, keepdim=True) @ (p.f(z)[:, None] * score))[:, block]
        mean, spread = moments(w, grads)
        close(mean, exact(p))
        return spread.item()

    single = moments(*by_value(gl.LocalExpectation(), p))[1].item()
    assert variance([[0], [1], [2]]) == pytest.approx(single, abs=1e-10)
    assert variance([[0, 1], [2]]) < single
    assert variance([[0, 1, 2]]) == pytest.approx(0.0, abs=1e-12)


def test_missing_sum() -> None:
    """The derivative of the logarithm of the characteristic function is a sum over all factors."""
    omega = torch.tensor([0.5, 1.1, -0.7])

    def log_phi(shift: Tensor, factors: list[int]) -> Tensor:
        pi = (gl.problem("bernoulli_3").params["logits"] + shift).sigmoid()
        return (1 - pi + pi * torch.exp(1j * omega))[factors].prod().log().real

    whole, *parts = (torch.func.grad(log_phi)(torch.zeros(()), c) for c in ([0, 1, 2], [0], [1], [2]))
    close(sum(parts), whole)
    assert (parts[0] - whole).abs() > 0.01


def test_additive_share() -> None:
    """Interactions are half of the one cost and a fourteenth of the other."""
    shares = []
    for p in map(gl.problem, PROBLEMS):
        z = gl.Enumerate().draw(p.q())
        w, cost = p.q().log_prob(z).exp(), p.f(z)
        columns = torch.cat([torch.ones(len(z), 1), z.flatten(1)], 1)
        fit = torch.linalg.pinv(w.sqrt()[:, None] * columns) @ (w.sqrt() * cost)
        shares.append(((w @ (cost - columns @ fit) ** 2) / (w @ (cost - w @ cost) ** 2)).item())
    assert shares == pytest.approx([0.4735, 0.0705], abs=1e-3)


def decoder(d: int) -> tuple[Tensor, torch.nn.Linear, Tensor]:
    torch.manual_seed(5)
    linear = torch.nn.Linear(d, 6).requires_grad_(False)
    linear.weight.copy_(torch.randn(6, d))
    return torch.linspace(-1, 1, d), linear, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


def gamma(h: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(h) - x * h


def flips_and_guesses(theta: Tensor, linear: torch.nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """All values, the changes by their flips, and the first and second term of the guesses."""
    d = len(theta)
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * d)
    other = (z[:, None] - torch.eye(d)).abs()
    change = (gamma(linear(other), x) - gamma(linear(z), x)[:, None]).sum(-1)
    h = linear(z)
    first = (1 - 2 * z) * ((h.sigmoid() - x) @ linear.weight)
    return z, change, first, (h.sigmoid() * (-h).sigmoid()) @ linear.weight**2 / 2


def test_guess() -> None:
    """The remainder of the second order is below the bound by the third derivative; that of the first is not."""
    _, linear, _ = problem = decoder(5)
    _, change, first, second = flips_and_guesses(*problem)
    bound = linear.weight.abs().pow(3).sum(0) / (36 * 3**0.5)
    assert ((change - first - second).abs() <= bound).all()
    assert ((change - first).abs() > bound).any()
    h = torch.linspace(-9, 9, 100_001)
    assert (h.sigmoid() * (-h).sigmoid() * (1 - 2 * h.sigmoid())).abs().max() <= 1 / (6 * 3**0.5)


def test_affordable() -> None:
    """Over all values and selections: the mean, and the variance that the theorem gives."""
    theta, linear, x = problem = decoder(3)
    z, change, first, second = flips_and_guesses(*problem)
    p = theta.sigmoid()
    wish = p * (1 - p) * second
    rho = 0.9 * wish / wish.sum(-1, keepdim=True) + 0.1 / 3
    estimator = gl.TaylorLocalExpectation(flips=1)
    logits = theta.expand(24, 3).clone().requires_grad_()
    q = td.Independent(td.Bernoulli(logits=logits), 1)
    start = (rho.cumsum(-1) - rho / 2).reshape(1, -1)
    noise = estimator.draw(q)._replace(z=z.repeat_interleave(3, 0)[None], start=start)
    f = gl.AfterLinear(linear, lambda h: gamma(h, x).sum(-1), separable=True)
    (grads,) = torch.autograd.grad(estimator.estimate(q, f, noise).sum(), logits)
    w = td.Independent(td.Bernoulli(logits=theta), 1).log_prob(z).exp()
    v = (1 - 2 * z) * p * (1 - p)
    mean, variance = moments((w[:, None] * rho).flatten(), grads)
    right, local = moments(w, v * change)
    more = w @ ((v * (change - first - second)) ** 2 * (1 / rho - 1)).sum(-1)
    torch.testing.assert_close(mean, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, local + more, rtol=0, atol=1e-12)
    assert more > 1e-6
    assert ((w @ (v * (first + second))) - right).abs().max() > 1e-6
