"""The negative ELBO: every estimator and every treatment of the KL against the exact gradient; nesting; EM."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributions as td
from cases import Critic
from test_exact import logistic_nodes
from torch import Tensor, nn

import gradlab as gl
from gradlab.densities import freeze, log_density, path_log_density
from gradlab.distributions import support
from gradlab.rebar import Coupled

X = 0.7
WEIGHT = torch.tensor([1.1, -0.6], dtype=torch.float64)
BITS = torch.tensor([0.4, -0.7, -0.2, 0.5, 0.3], dtype=torch.float64)  # guide, guide, prior, prior, shift
MODES = ["auto", "sample", "total"]


def bits(p: Tensor, estimator: gl.Estimator, **kwargs: object) -> gl.NegativeELBO:
    """Two bits behind one number; ``p [*B, 5]`` are the parameters of guide, prior and likelihood."""
    return gl.NegativeELBO(
        lambda x: td.Independent(td.Bernoulli(logits=p[..., :2]), 1),
        lambda: td.Independent(td.Bernoulli(logits=p[..., 2:4]), 1),
        lambda z: td.Normal(p[..., 4] + z @ WEIGHT, 0.8),
        estimator,
        **kwargs,
    )


def data(p: Tensor) -> Tensor:
    return torch.full(p.shape[:-1], X)


def exact_bits(p: Tensor, weight: float = 1.0) -> Tensor:
    """The same loss, written out over the four values."""
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    log_q, log_prior = (td.Bernoulli(logits=a).log_prob(z).sum(-1) for a in (p[:2], p[2:4]))
    log_x = td.Normal(p[4] + z @ WEIGHT, 0.8).log_prob(torch.tensor(X))
    return log_q.exp() @ (weight * (log_q - log_prior) - log_x)


def gradient(loss: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    return torch.autograd.grad(loss(p), p)[0]


def outcomes(count: int) -> tuple[Tensor, Tensor]:
    """All joint outcomes of S pairs of bits, ``[S, N, 2]``, and their probabilities."""
    q = td.Independent(td.Bernoulli(logits=BITS[:2]), 1)
    values = support(q)
    index = torch.cartesian_prod(*(torch.arange(4) for _ in range(count))).reshape(-1, count)
    return values[index].transpose(0, 1), q.log_prob(values).exp()[index].prod(1)


def per_outcome(estimator: gl.Estimator, p: Tensor = BITS, **kwargs: object) -> tuple[Tensor, Tensor]:
    """The gradient for every outcome of the samples, ``[N, 5]``, and the probabilities of the outcomes."""
    noise, weights = outcomes(estimator.num_samples)
    estimator.draw = lambda q: noise
    many = p.expand(len(weights), 5).clone().requires_grad_()
    return torch.autograd.grad(bits(many, estimator, **kwargs)(data(many)).sum(), many)[0], weights


ENUMERATED = {
    "score": lambda: gl.ScoreFunction(),
    "leave-one-out": lambda: gl.ScoreFunction(2, gl.LeaveOneOut()),
    "muprop": lambda: gl.MuProp(),
    "local expectation": lambda: gl.LocalExpectation(),
    "double": lambda: gl.DoubleControlVariate(2),
}


@pytest.mark.parametrize("kl", MODES)
@pytest.mark.parametrize("key", ENUMERATED)
def test_discrete_gradients_are_exact(key: str, kl: str) -> None:
    """In the mean over every outcome of the noise."""
    grads, weights = per_outcome(ENUMERATED[key](), kl=kl, kl_weight=0.7)
    exact = gradient(lambda p: exact_bits(p, 0.7), BITS)
    torch.testing.assert_close(weights @ grads, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kl", ["sample", "total"])
def test_rebar_is_exact(kl: str) -> None:
    """One bit, whose two logistic noises are integrated; log q is relaxed with the rest of the cost."""
    p = torch.tensor([0.4, -0.2, 0.3])
    (x, m), (y, w) = logistic_nodes(-0.4), logistic_nodes(0.0)
    grid, weights = torch.cartesian_prod(x, y), torch.cartesian_prod(m, w).prod(1)
    noise, fresh = grid[:, 0][None], grid[:, 1][None]
    estimator = gl.REBAR(1, 0.6, 0.8)
    estimator.draw = lambda q: Coupled((0.4 + noise > 0).to(noise), noise, fresh)

    def loss(p: Tensor, estimator: gl.Estimator) -> Tensor:
        guide, prior = td.Bernoulli(logits=p[..., 0]), td.Bernoulli(logits=p[..., 1])
        elbo = gl.NegativeELBO(lambda x: guide, prior, lambda z: td.Normal(p[..., 2] + z, 0.8), estimator, kl=kl)
        return elbo(data(p))

    many = p.expand(len(weights), 3).clone().requires_grad_()
    (grads,) = torch.autograd.grad(loss(many, estimator).sum(), many)
    torch.testing.assert_close(weights @ grads, gradient(lambda p: loss(p, gl.Enumerate()), p), rtol=1e-8, atol=1e-10)


DRAWN = {
    **ENUMERATED,
    "rebar": lambda: gl.REBAR(2),
    "relax": lambda: gl.RELAX(Critic(1)),
    "arm": lambda: gl.ARM(),
    "disarm": lambda: gl.DisARM(),
    "measure-valued": lambda: gl.MeasureValued(),
    "sum and sample": lambda: gl.SumAndSample(1),
    "unordered set": lambda: gl.UnorderedSet(2),
    "stochastic backprop": lambda: gl.StochasticBackprop(),
    "enumerate": lambda: gl.Enumerate(),
}


def assert_mean(grads: Tensor, exact: Tensor) -> None:
    error = grads.std(0) / len(grads) ** 0.5
    gap = (grads.mean(0) - exact).abs()
    assert ((gap < 6 * error) | (gap < 1e-10)).all(), (gap / error).tolist()
    assert (error < 0.1 * exact.abs().max()).all()


@pytest.mark.parametrize("kl", ["sample", "total"])
@pytest.mark.parametrize("key", DRAWN)
def test_every_discrete_estimator(key: str, kl: str) -> None:
    grads = gl.replicate(lambda p: bits(p, DRAWN[key](), kl=kl)(data(p)), BITS, 10_000)
    assert_mean(grads, gradient(exact_bits, BITS))


@pytest.mark.parametrize("kl", MODES)
@pytest.mark.parametrize("make", [lambda: gl.REBAR(2), lambda: gl.MuProp(), lambda: gl.ScoreFunction(2)])
def test_one_hot(make: Callable[[], gl.Estimator], kl: str) -> None:
    """Between the corners of the simplex, torch's log_prob is a step; here it is linear."""
    score = torch.tensor([0.5, -1.0, 2.0])

    def loss(p: Tensor, estimator: gl.Estimator) -> Tensor:
        prior = td.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))
        guide = td.OneHotCategorical(logits=p)
        return gl.NegativeELBO(lambda x: guide, prior, lambda z: td.Normal(z @ score, 1.0), estimator, kl=kl)(data(p))

    point = torch.tensor([0.3, -0.5, 0.8])
    exact = gradient(lambda p: loss(p, gl.Enumerate()), point)
    assert_mean(gl.replicate(lambda p: loss(p, make()), point, 20_000), exact)


# ------------------------------------------------------------------------------------ continuous guides

LINE = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)  # loc, log scale, shift


def line(p: Tensor, estimator: gl.Estimator, **kwargs: object) -> gl.NegativeELBO:
    """A normal guide, and a mixture as prior: torch has no KL of the two."""
    means = torch.tensor([-1.0, 1.5])
    prior = td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Normal(means, 1.0))
    guide = td.Normal(p[..., 0], p[..., 1].exp())
    return gl.NegativeELBO(lambda x: guide, prior, lambda z: td.Normal(p[..., 2] + z.sin(), 1.0), estimator, **kwargs)


def normal_nodes() -> tuple[Tensor, Tensor]:
    x, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    return x, w / w.sum()


@pytest.mark.parametrize("kl", MODES)
def test_reparameterization_is_exact(kl: str) -> None:
    x, w = normal_nodes()
    exact = gradient(lambda p: line(p, gl.Quadrature(), kl="total")(torch.tensor(X)), LINE)
    many = LINE.expand(len(w), 3).clone().requires_grad_()
    estimator = gl.Reparameterization(sampler=lambda q, size: (q.loc + q.scale * x)[None])
    (grads,) = torch.autograd.grad(line(many, estimator, kl=kl)(data(many)).sum(), many)
    torch.testing.assert_close(w @ grads, exact, rtol=1e-9, atol=1e-9)


CONTINUOUS = {
    "score": lambda: gl.ScoreFunction(2, gl.LeaveOneOut()),
    "muprop": lambda: gl.MuProp(),
    "implicit": lambda: gl.ImplicitReparameterization(),
    "g-rep": lambda: gl.GeneralizedReparameterization(),
    "lax": lambda: gl.LAX(Critic()),
    "measure-valued": lambda: gl.MeasureValued(),
    "stochastic backprop": lambda: gl.StochasticBackprop(),
    "stochastic backprop, first order": lambda: gl.StochasticBackprop(order=1),
}


@pytest.mark.parametrize("kl", ["sample", "total"])
@pytest.mark.parametrize("key", CONTINUOUS)
def test_every_continuous_estimator(key: str, kl: str) -> None:
    exact = gradient(lambda p: line(p, gl.Quadrature())(torch.tensor(X)), LINE)
    assert_mean(gl.replicate(lambda p: line(p, CONTINUOUS[key](), kl=kl)(data(p)), LINE, 20_000), exact)


def test_a_taylor_series_of_the_kl() -> None:
    """For a normal guide the series ends after the second derivative, so that it is exact."""

    def value(p: Tensor, estimator: gl.Estimator, kl: str) -> Tensor:
        guide = td.Normal(p[..., 0], p[..., 1].exp())
        parts = (lambda x: guide, td.Normal(0.2, 1.3), lambda z: td.Normal(z.sin(), 1.0))
        return gl.NegativeELBO(*parts, estimator, kl=kl)(data(p))

    exact = gradient(lambda p: value(p, gl.Quadrature(), "auto"), LINE[:2])
    series = gl.StochasticBackprop(form="series", order=3)
    for kl in ("sample", "total"):
        assert_mean(gl.replicate(lambda p, kl=kl: value(p, series, kl), LINE[:2], 20_000), exact)


def test_poisson_by_stochastic_backprop() -> None:
    """A support without end, summed far enough."""

    def loss(p: Tensor, estimator: gl.Estimator, kl: str = "sample") -> Tensor:
        guide = td.Poisson(p[..., 0].exp())
        return gl.NegativeELBO(lambda x: guide, td.Poisson(2.0), lambda z: td.Normal(z.sqrt(), 1.0), estimator, kl=kl)(
            data(p)
        )

    def exact(p: Tensor) -> Tensor:
        z = torch.arange(80.0)
        log_q = td.Poisson(p[0].exp()).log_prob(z)
        cost = log_q - td.Poisson(2.0).log_prob(z) - td.Normal(z.sqrt(), 1.0).log_prob(torch.tensor(X))
        return log_q.exp() @ cost

    point = torch.tensor([0.6])
    for kl in MODES:
        grads = gl.replicate(lambda p, kl=kl: loss(p, gl.StochasticBackprop(), kl), point, 20_000)
        assert_mean(grads, gradient(exact, point))


def uniform_elbo(p: Tensor) -> Tensor:
    guide = td.Uniform(torch.zeros_like(p), p.exp())
    x, w = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(40))
    estimator = gl.Reparameterization(sampler=lambda q, size: (q.low + (q.high - q.low) * (x + 1) / 2)[None])
    elbo = gl.NegativeELBO(lambda x: guide, td.Normal(0.0, 1.0), lambda z: td.Normal(z, 1.0), estimator, kl="sample")
    return (w / 2) @ elbo(torch.full(p.shape, X))


def test_a_moving_support_keeps_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the score of U(0, e^p) is -1 and not 0: without it, that is what the gradient would miss."""
    point = torch.tensor(0.3)
    size = point.exp()
    # E[-log p(x|z)] = E(z - X)^2 / 2 = (s^2/3 - s X + X^2) / 2, E[-log p(z)] = s^2/6, E[log q] = -p
    exact = -1 + (2 * size**2 / 3 - size * X) / 2 + size**2 / 3

    def found() -> Tensor:
        return gradient(lambda p: uniform_elbo(p.expand(40)), point)

    torch.testing.assert_close(found(), exact, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr("gradlab.svi.has_moving_support", lambda q: False)
    torch.testing.assert_close(found(), exact + 1, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------ values and identities


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_value(weight: float) -> None:
    for kl in MODES:
        loss = bits(BITS.clone().requires_grad_(), gl.Enumerate(), kl=kl, kl_weight=weight)
        torch.testing.assert_close(loss(torch.tensor(X)).detach(), exact_bits(BITS, weight))


PAIRS = {
    "normal": lambda t: (td.Normal(t, 0.7), td.Normal(0.2, 1.3)),
    "gamma": lambda t: (td.Gamma(1 + t.exp(), 1.4), td.Gamma(2.2, 0.9)),
    "gamma in exponential": lambda t: (td.Gamma(1 + t.exp(), 1.4), td.Exponential(0.9)),
    "beta": lambda t: (td.Beta(1 + t.exp(), 1.4), td.Beta(2.2, 1.9)),
    "gumbel": lambda t: (td.Gumbel(t, 0.7), td.Gumbel(0.2, 1.3)),
    "normal in a mixture": lambda t: (
        td.Normal(t, 0.7),
        td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Normal(torch.tensor([0.0, 1.0]), 1.0)),
    ),
    "bernoulli": lambda t: (td.Bernoulli(logits=t), td.Bernoulli(0.2)),
    "binomial": lambda t: (td.Binomial(5, logits=t), td.Binomial(5, torch.tensor(0.2))),
    "categorical": lambda t: (
        td.Categorical(logits=torch.stack([t, -t, 2 * t], -1)),
        td.Categorical(torch.tensor([0.2, 0.3, 0.5])),
    ),
}


@pytest.mark.parametrize("key", PAIRS)
def test_the_analytic_kl_is_the_sampled_one(key: str) -> None:
    """Value and gradient, with the expectation enumerated or integrated."""
    found = {}
    for kl in MODES:
        t = torch.tensor(0.4, requires_grad=True)
        q, prior = PAIRS[key](t)
        estimator = gl.Enumerate() if gl.Enumerate.supports(q) else gl.Quadrature()
        loss = gl.NegativeELBO(lambda x, q=q: q, prior, lambda z: td.Normal(torch.tanh(z), 1.0), estimator, kl=kl)
        value = loss(torch.tensor(X))
        found[kl] = torch.stack([value.detach(), torch.autograd.grad(value, t)[0]])
    torch.testing.assert_close(found["sample"], found["auto"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found["total"], found["auto"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kl", ["sample", "total"])
def test_second_derivatives_are_right(kl: str) -> None:
    """The score that is left out of the first derivative is there in the second."""
    exact = torch.autograd.functional.hessian(exact_bits, BITS)
    found = torch.autograd.functional.hessian(lambda p: bits(p, gl.Enumerate(), kl=kl)(torch.tensor(X)), BITS)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    noise, weights = outcomes(1)
    estimator = gl.ScoreFunction()
    estimator.draw = lambda q: noise

    def mean(p: Tensor) -> Tensor:
        many = p.expand(len(weights), 5)
        return weights @ bits(many, estimator, kl=kl)(data(many))

    torch.testing.assert_close(torch.autograd.functional.hessian(mean, BITS), exact, rtol=1e-10, atol=1e-10)


def test_second_derivatives_along_a_path() -> None:
    x, w = normal_nodes()
    estimator = gl.Reparameterization(sampler=lambda q, size: (q.loc + q.scale * x)[None])
    hessians = [
        torch.autograd.functional.hessian(
            lambda p, kl=kl: w @ line(p.expand(len(w), 3), estimator, kl=kl)(torch.full((len(w),), X)), LINE
        )
        for kl in ("sample", "total")
    ]
    torch.testing.assert_close(*hessians, rtol=1e-8, atol=1e-8)


def test_torch_func() -> None:
    found = torch.func.grad(lambda p: line(p, gl.Quadrature(), kl="sample")(torch.tensor(X)))(LINE)
    torch.testing.assert_close(found, gradient(lambda p: line(p, gl.Quadrature())(torch.tensor(X)), LINE))


def test_vmap_of_gradients() -> None:
    """Below vmap torch's own checks and some of its KLs look at values: the sampled KL does not."""
    points = torch.stack([BITS, -BITS, 2 * BITS])
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(False)
    try:
        loss = torch.func.grad(lambda p: bits(p, gl.Enumerate(), kl="sample")(torch.tensor(X)))
        found = torch.func.vmap(loss, randomness="different")(points)
    finally:
        td.Distribution.set_default_validate_args(before)
    torch.testing.assert_close(found, torch.stack([gradient(exact_bits, p) for p in points]))


# ------------------------------------------------------------------------------------ no noise at the posterior


def conjugate(kl: str) -> Tensor:
    """The gradient for every one of 20 problems whose guide is the posterior N(x / 2, 1 / 2)."""
    p = torch.tensor([X / 2, math.log(0.5) / 2]).expand(20, 2).clone().requires_grad_()
    guide = td.Normal(p[:, 0], p[:, 1].exp())
    estimator = gl.Reparameterization()
    loss = gl.NegativeELBO(lambda x: guide, td.Normal(0.0, 1.0), lambda z: td.Normal(z, 1.0), estimator, kl=kl)
    return torch.autograd.grad(loss(data(p)).sum(), p)[0]


def test_sticking_the_landing() -> None:
    assert conjugate("sample").abs().max() < 1e-12
    assert conjugate("total").abs().max() > 0.1
    assert conjugate("auto").abs().max() > 0.1  # the exact KL leaves the noise of the likelihood


@pytest.mark.parametrize("key", ["leave-one-out", "local expectation"])
def test_discrete_estimators_land_too(key: str) -> None:
    """Where the guide is the posterior the cost is constant, and these see only its differences."""
    p = BITS.clone()
    p[4] = 0.0
    joint = torch.tensor([0.0, 1.0])
    likelihood = lambda z: td.Normal(0.8 * z[..., 0], 1.0)  # noqa: E731
    log_odds = (
        p[2]
        + likelihood(joint[1:, None]).log_prob(torch.tensor(X))
        - likelihood(joint[:1, None]).log_prob(torch.tensor(X))
    )
    noise, _ = outcomes(2)
    found = {}
    for kl in ("sample", "total"):
        estimator = ENUMERATED[key]()
        estimator.draw = lambda q, s=estimator.num_samples: noise[:s]
        logits = torch.cat([log_odds, p[3:4]]).expand(noise.shape[1], 2).clone().requires_grad_()
        guide = td.Independent(td.Bernoulli(logits=logits), 1)
        prior = td.Independent(td.Bernoulli(logits=p[2:4]), 1)
        loss = gl.NegativeELBO(lambda x, q=guide: q, prior, likelihood, estimator, kl=kl)
        found[kl] = torch.autograd.grad(loss(data(logits)).sum(), logits)[0].abs().max()
    assert found["sample"] < 1e-12
    assert found["total"] > 0.1


def test_mutants_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """log q without its dependence on z misleads a path, and as torch's step between the corners a relaxation."""
    monkeypatch.setattr("gradlab.svi.path_log_density", lambda q, z: q.log_prob(z).detach())
    with pytest.raises(AssertionError):
        test_reparameterization_is_exact("sample")
    monkeypatch.setattr("gradlab.svi.path_log_density", lambda q, z: q.log_prob(torch.eye(3)[z.argmax(-1)]))
    with pytest.raises(AssertionError):
        test_one_hot(lambda: gl.REBAR(2), "sample")


def test_freeze_takes_every_graph() -> None:
    t = torch.tensor(0.4, requires_grad=True)
    flow = td.TransformedDistribution(
        td.Normal(t, t.exp()), [td.AffineTransform(t, t.exp(), cache_size=1), td.SigmoidTransform(cache_size=1)]
    )
    mixture = td.MixtureSameFamily(td.Categorical(logits=torch.stack([t, -t])), td.Normal(torch.stack([t, -t]), 1.0))
    for q in (flow, mixture, td.Beta(t, t), td.Independent(td.Normal(t.expand(2), 1.0), 1), td.Bernoulli(probs=t)):
        z = q.rsample() if q.has_rsample else q.sample()
        frozen = freeze(q)
        assert not frozen.log_prob(z.detach()).requires_grad
        torch.testing.assert_close(frozen.log_prob(z), q.log_prob(z))
    z = flow.rsample()
    other = z.detach().requires_grad_()
    expected = (
        torch.autograd.grad(freeze(flow).log_prob(other), other)[0] * torch.autograd.grad(z, t, torch.ones(()), True)[0]
    )
    (found,) = torch.autograd.grad(freeze(flow).log_prob(z), t)
    torch.testing.assert_close(found, expected)


def test_relaxed_log_densities_agree_at_the_corners() -> None:
    q = td.OneHotCategorical(logits=torch.tensor([0.3, -0.4, 1.0]))
    torch.testing.assert_close(log_density(q, torch.eye(3)), q.log_prob(torch.eye(3)))
    torch.testing.assert_close(path_log_density(q, torch.eye(3)), q.log_prob(torch.eye(3)))
    with pytest.raises(ValueError, match="support"):
        log_density(td.Exponential(1.0), torch.tensor(-1.0))


# ------------------------------------------------------------------------------------ several layers

POINT = torch.tensor([0.4, -0.3, 0.2, 0.6, -0.5, 0.8], dtype=torch.float64)
MIX = torch.tensor([[0.8, -0.4], [0.3, 0.9]], dtype=torch.float64)


def bernoulli(logits: Tensor) -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=logits), 1)


def deep(p: Tensor, first: gl.Estimator, second: gl.Estimator) -> Tensor:
    """x below z1 below z2, all of bits: a sigmoid belief network of two layers."""
    above = gl.NegativeELBO(
        lambda z1: bernoulli(p[..., 2:4] + z1 @ MIX),
        lambda: bernoulli(p[..., 4:6]),
        lambda z2: bernoulli(z2 @ MIX.T + p[..., :2]),
        second,
    )
    loss = gl.NegativeELBO(lambda x: bernoulli(p[..., :2]), above, lambda z1: td.Normal(z1 @ WEIGHT, 1.0), first)
    return loss(data(p))


def exact_deep(p: Tensor) -> Tensor:
    """The same, over the 16 joint values."""
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    z1, z2 = z[:, :2], z[:, 2:]
    log_q = bernoulli(p[:2]).log_prob(z1) + bernoulli(p[2:4] + z1 @ MIX).log_prob(z2)
    log_p = bernoulli(p[4:6]).log_prob(z2) + bernoulli(z2 @ MIX.T + p[:2]).log_prob(z1)
    return log_q.exp() @ (log_q - log_p - td.Normal(z1 @ WEIGHT, 1.0).log_prob(torch.tensor(X)))


def test_two_layers_are_exact_when_enumerated() -> None:
    found = deep(POINT.clone().requires_grad_(), gl.Enumerate(), gl.Enumerate())
    torch.testing.assert_close(found.detach(), exact_deep(POINT))
    found = gradient(lambda p: deep(p, gl.Enumerate(), gl.Enumerate()), POINT)
    torch.testing.assert_close(found, gradient(exact_deep, POINT), rtol=1e-10, atol=1e-10)


LAYERS = ["score", "leave-one-out", "rebar", "disarm", "local expectation", "muprop", "stochastic backprop"]


@pytest.mark.parametrize("first", LAYERS)
@pytest.mark.parametrize("second", ["leave-one-out", "rebar", "local expectation"])
def test_two_layers_each_with_its_own_estimator(first: str, second: str) -> None:
    grads = gl.replicate(lambda p: deep(p, DRAWN[first](), DRAWN[second]()), POINT, 10_000)
    assert_mean(grads, gradient(exact_deep, POINT))


# ------------------------------------------------------------------------------------ as a module


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> td.Distribution:
        return bernoulli(self.linear(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, z: Tensor) -> td.Distribution:
        return bernoulli(self.linear(z))


def test_is_a_module_with_the_parameters_of_all_parts() -> None:
    baseline = gl.Learned(nn.Linear(3, 1))
    loss = gl.NegativeELBO(Encoder(), bernoulli(torch.zeros(2)), Decoder(), gl.ScoreFunction(2, baseline))
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == {"guide", "likelihood", "estimator"}
    x = torch.ones(5, 3)
    value = loss(x, context=x)
    assert value.shape == (5,)
    value.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert "kl='auto'" in repr(loss)
    with torch.no_grad():
        assert not loss(x, context=x).requires_grad


def test_errors_say_what_to_do() -> None:
    x, logits = torch.ones(5, 3), torch.zeros(5, 2, requires_grad=True)
    guide, prior, score = bernoulli(logits), bernoulli(torch.zeros(2)), gl.ScoreFunction()
    with pytest.raises(ValueError, match="kl='exact', expected one of 'auto'"):
        gl.NegativeELBO(Encoder(), prior, Decoder(), score, kl="exact")
    with pytest.raises(TypeError, match="expected an Estimator"):
        gl.NegativeELBO(Encoder(), prior, Decoder(), nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"guide\(x\): found Tensor"):
        gl.NegativeELBO(lambda x: logits, prior, Decoder(), score)(x)
    with pytest.raises(TypeError, match=r"likelihood\(z\): found Tensor"):
        gl.NegativeELBO(lambda x: guide, prior, lambda z: z, score)(x)
    with pytest.raises(ValueError, match="Independent"):
        gl.NegativeELBO(lambda x: guide, prior, lambda z: td.Bernoulli(torch.full((*z.shape[:-1], 3), 0.5)), score)(x)
    for wrong in (bernoulli(torch.zeros(4, 2)), td.Bernoulli(torch.full((2,), 0.5)), bernoulli(torch.zeros(3))):
        with pytest.raises(ValueError, match="equal event shapes"):
            gl.NegativeELBO(lambda x: guide, wrong, Decoder(), score)(x)
    for wrong in (
        td.Normal(torch.zeros(5, 2), 1.0),
        td.Poisson(torch.ones(5, 2)),
        td.Binomial(3, torch.ones(5, 2) / 2),
    ):
        q = td.Independent(wrong, 1)
        with pytest.raises(ValueError, match="the same values"):
            gl.NegativeELBO(lambda x, q=q: q, prior, Decoder(), score)(x)
    counts = td.Independent(td.Poisson(logits.exp()), 1)
    with pytest.raises(ValueError, match="the same values"):
        gl.NegativeELBO(lambda x: counts, td.Independent(td.Gamma(torch.ones(2), 1.0), 1), Decoder(), score)(x)
    joint = td.Independent(td.Categorical(torch.ones(2, 2)), 1)
    with pytest.raises(TypeError, match="Use kl='auto'"):
        gl.NegativeELBO(lambda x: guide, joint, Decoder(), score, kl="analytic")(x)
    with pytest.raises(ValueError, match="support"):
        gl.NegativeELBO(lambda x: guide, prior, Decoder(), score)(255 * x)
    above = gl.NegativeELBO(Encoder(), prior, Decoder(), score)
    with pytest.raises(TypeError, match="several layers"):
        gl.NegativeELBO(Encoder(), above, Decoder(), score, kl="analytic")


# ------------------------------------------------------------------------------------ EM

POINTS = torch.tensor([-3, -2.5, -2, 2, 2.5, 3, 9, 9.5, 10.0], dtype=torch.float64)


def clusters(means: Tensor) -> tuple[td.Distribution, Callable[[Tensor], td.Distribution]]:
    return td.Categorical(torch.ones(3)), lambda z: td.Normal(means[z], 1.0)


def best_means(z: Tensor, r: Tensor) -> Tensor:
    return torch.stack([(r * POINTS * (z == k)).sum() / (r * (z == k)).sum() for k in range(3)])


@pytest.mark.parametrize(
    ("start", "end"),
    [((-2.5, 2.5, 9.5), -18.9079), ((9.0, 9.5, 10.0), -35.5785), ((1.0, 1.0, 1.0), -118.0204)],
)
def test_em_is_monotone_and_ends_at_a_stationary_point(start: tuple[float, ...], end: float) -> None:
    means, found = gl.expectation_maximization(clusters, best_means, POINTS, torch.tensor(start))
    assert (found.diff() >= -1e-12).all()
    assert found[-1].item() == pytest.approx(end, abs=1e-4)
    slope = gradient(lambda m: (td.Normal(m, 1.0).log_prob(POINTS[:, None]) - math.log(3)).logsumexp(-1).sum(), means)
    assert slope.abs().max() < 1e-4


def test_em_stops_when_asked_and_refuses_a_step_that_loses() -> None:
    start = torch.tensor([9.0, 9.5, 10.0])
    _, found = gl.expectation_maximization(clusters, best_means, POINTS, start, num_steps=3)
    assert len(found) == 4
    with pytest.raises(ValueError, match="maximize must return the maximum"):
        gl.expectation_maximization(clusters, lambda z, r: best_means(z, r) + 3, POINTS, torch.tensor([-2.5, 2.5, 9.5]))
