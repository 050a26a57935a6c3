"""Multi-sample bounds: their values and gradients by enumeration of all K-tuples, and by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from test_svi import BITS, LINE, MIX, POINT, WEIGHT, X, bernoulli, bits, data, exact_bits, exact_deep, gradient
from torch import Tensor, nn

import gradlab as gl
from gradlab.distributions import support
from gradlab.multisample import leave_one_out_bounds, log_mean_exp

VALUES = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def model(p: Tensor) -> tuple:
    """Guide, prior and likelihood of two bits behind one number, as in the tests of the ELBO."""
    elbo = bits(p, gl.Enumerate())
    return elbo.guide, elbo.prior, elbo.likelihood


def tuples(num_samples: int) -> Tensor:
    """All K-tuples of values, as indices ``[4**K, K]``."""
    return torch.cartesian_prod(*(torch.arange(4) for _ in range(num_samples))).reshape(-1, num_samples)


def log_terms(p: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z) and log p(x, z) of the four values."""
    log_q = td.Bernoulli(logits=p[:2]).log_prob(VALUES).sum(-1)
    log_prior = td.Bernoulli(logits=p[2:4]).log_prob(VALUES).sum(-1)
    return log_q, log_prior + td.Normal(p[4] + VALUES @ WEIGHT, 0.8).log_prob(torch.tensor(X))


def exact_bound(p: Tensor, num_samples: int) -> Tensor:
    """The negative bound, written out over all K-tuples."""
    log_q, log_joint = log_terms(p)
    index = tuples(num_samples)
    return -(log_q[index].sum(1).exp() @ ((log_joint - log_q)[index].logsumexp(1) - math.log(num_samples)))


def per_tuple(loss: type, num_samples: int, patch: pytest.MonkeyPatch, p: Tensor = BITS) -> tuple[Tensor, Tensor]:
    """The gradient for each K-tuple that the guide may draw, ``[4**K, 5]``, and its probability."""
    index = tuples(num_samples)
    patch.setattr("gradlab.multisample.sample", lambda q, size: VALUES[index].transpose(0, 1))
    many = p.expand(len(index), 5).clone().requires_grad_()
    value = loss(*model(many), num_samples)(data(many))
    return torch.autograd.grad(value.sum(), many)[0], log_terms(p)[0].exp()[index].prod(1)


def test_one_sample_is_the_elbo() -> None:
    torch.testing.assert_close(exact_bound(BITS, 1), exact_bits(BITS))
    guide = td.Normal(LINE[:1].clone().requires_grad_(), 0.7)
    parts = (lambda x: guide, td.Normal(0.0, 1.0), lambda z: td.Normal(z.sin(), 1.0))
    found = []
    for loss in (gl.IWAE(*parts, 1), gl.NegativeELBO(*parts, gl.Reparameterization(), kl="total")):
        torch.manual_seed(3)
        value = loss(torch.tensor([X]))
        found.append([value, torch.autograd.grad(value, guide.loc)[0]])
    torch.testing.assert_close(*found)


def test_the_bound_tightens_with_more_samples() -> None:
    bounds = [exact_bound(BITS, k).item() for k in range(1, 7)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] - bounds[-1] > 0.05
    assert bounds[-1] > -log_terms(BITS)[1].logsumexp(0).item()


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_the_value_is_the_bound(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every loss, without a graph; of VIMCO with one too."""
    index = tuples(num_samples)
    weights = log_terms(BITS)[0].exp()[index].prod(1)
    monkeypatch.setattr("gradlab.multisample.sample", lambda q, size: VALUES[index].transpose(0, 1))
    many = BITS.expand(len(index), 5).clone().requires_grad_()
    for loss in (gl.IWAE, gl.DReG, gl.VIMCO)[: 2 if num_samples == 1 else 3]:
        with torch.no_grad():
            value = loss(*model(many), num_samples)(data(many))
        torch.testing.assert_close(weights @ value, exact_bound(BITS, num_samples))
    if num_samples > 1:
        value = gl.VIMCO(*model(many), num_samples)(data(many)).detach()
        torch.testing.assert_close(weights @ value, exact_bound(BITS, num_samples))


# ------------------------------------------------------------------------------------ VIMCO


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_vimco_is_exact(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grads, weights = per_tuple(gl.VIMCO, num_samples, monkeypatch)
    exact = gradient(lambda p: exact_bound(p, num_samples), BITS)
    torch.testing.assert_close(weights @ grads, exact, rtol=1e-11, atol=1e-11)


def test_second_derivatives_of_vimco(monkeypatch: pytest.MonkeyPatch) -> None:
    index = tuples(2)
    weights = log_terms(BITS)[0].exp()[index].prod(1)
    monkeypatch.setattr("gradlab.multisample.sample", lambda q, size: VALUES[index].transpose(0, 1))

    def mean(p: Tensor) -> Tensor:
        many = p.expand(len(index), 5)
        return weights @ gl.VIMCO(*model(many), 2)(data(many))

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(mean, BITS), hessian(lambda p: exact_bound(p, 2), BITS), rtol=1e-10, atol=1e-10)


def test_the_other_samples_as_baseline_reduce_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    grads, weights = per_tuple(gl.VIMCO, 3, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradlab.multisample.leave_one_out_bounds", torch.zeros_like)
        plain, _ = per_tuple(gl.VIMCO, 3, monkeypatch)
    torch.testing.assert_close(weights @ grads, weights @ plain)
    assert (weights @ grads**2)[:2].sum() < 0.6 * (weights @ plain**2)[:2].sum()


@pytest.mark.parametrize(
    "baseline",
    [lambda log_w: log_mean_exp(log_w).expand_as(log_w), lambda log_w: log_w],
    ids=["the bound itself, as in a bound made for paths", "a baseline that sees its sample"],
)
def test_mutants_of_vimco_die(baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradlab.multisample.leave_one_out_bounds", baseline)
    grads, weights = per_tuple(gl.VIMCO, 2, monkeypatch)
    exact = gradient(lambda p: exact_bound(p, 2), BITS)
    assert ((weights @ grads - exact)[:2].abs() > 0.01 * exact[:2].abs().max()).all()


def test_leave_one_out_bounds() -> None:
    """By hand; a weight of zero makes no NaN."""
    w = torch.tensor([1.0, 2.0, 8.0])
    by_hand = torch.tensor([4 + 2 + 8, 8**0.5 + 1 + 8, 2**0.5 + 1 + 2]).div(3).log()
    torch.testing.assert_close(leave_one_out_bounds(w.log()), by_hand)
    found = leave_one_out_bounds(torch.tensor([0.0, 2.0, 8.0]).log())
    torch.testing.assert_close(found, torch.tensor([14.0, 8.0, 2.0]).div(3).log())


# ------------------------------------------------------------------------------------ paths


def paths(loss: type, num_samples: int, p: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The gradient at each node of a product quadrature of the K noises, ``[nodes**K, 3]``, and the weights."""
    x, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    noise = torch.cartesian_prod(*[x] * num_samples).reshape(-1, num_samples)
    weights = torch.cartesian_prod(*[w / w.sum()] * num_samples).reshape(-1, num_samples).prod(1)
    many = p.expand(len(weights), 3).clone().requires_grad_()
    guide = td.Normal(many[:, 0], many[:, 1].exp())
    value = loss(
        lambda x: guide,
        lambda: td.Normal(many[:, 2], 1.3),
        lambda z: td.Normal(z.sin(), 1.0),
        num_samples,
        sampler=lambda q, size: q.loc + q.scale * noise.T,
    )(data(many))
    return torch.autograd.grad(value.sum(), many)[0], weights


@pytest.mark.parametrize(("num_samples", "nodes"), [(1, 80), (2, 80), (3, 50)])
def test_dreg_has_the_mean_of_iwae(num_samples: int, nodes: int) -> None:
    plain, weights = paths(gl.IWAE, num_samples, LINE, nodes)
    double, _ = paths(gl.DReG, num_samples, LINE, nodes)
    torch.testing.assert_close(weights @ double, weights @ plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(double[:, 2], plain[:, 2])  # the model's gradient is the same, sample by sample


def signal_to_noise(loss: type, num_samples: int, p: Tensor) -> float:
    """The mean over the guide's parameters of |mean| / standard deviation of the gradient."""

    def value(p: Tensor) -> Tensor:
        guide = td.Normal(p[:, 0], p[:, 1].exp())
        return loss(lambda x: guide, td.Normal(0.2, 1.3), lambda z: td.Normal(z.sin(), 1.0), num_samples)(data(p))

    grads = gl.replicate(value, p, 20_000)
    return (grads.mean(0).abs() / grads.std(0)).mean().item()


def test_signal_to_noise_falls_with_more_samples_and_grows_with_dreg() -> None:
    """As the root of K, one way and the other: 16 times the samples, a quarter or four times the ratio."""
    wide, narrow = torch.tensor([0.4, 0.5]), torch.tensor([0.4, -0.3])
    change = {loss: signal_to_noise(loss, 128, wide) / signal_to_noise(loss, 8, wide) for loss in (gl.IWAE, gl.DReG)}
    assert change[gl.IWAE] < 0.5, change
    assert 3 < change[gl.DReG] < 5, change
    assert signal_to_noise(gl.DReG, 128, narrow) < signal_to_noise(gl.DReG, 8, narrow)  # weights of infinite variance


def test_the_weights_of_dreg_are_squared() -> None:
    """With plain weights, sticking the landing in a bound of K > 1 samples, the guide's gradient is biased."""

    class Landing(gl.DReG):
        def loss(self, q, log_joint):
            from gradlab.densities import freeze

            z = self.sampler(q, torch.Size([self.num_samples]))
            return -log_mean_exp(log_joint(z) - freeze(q).log_prob(z))

    plain, weights = paths(gl.IWAE, 2, LINE, 40)
    biased, _ = paths(Landing, 2, LINE, 40)
    gap = (weights @ (biased - plain))[:2].abs()
    assert (gap > 0.1 * (weights @ plain)[:2].abs()).all()


def test_dreg_of_one_sample_sticks_the_landing() -> None:
    guide = td.Normal(torch.tensor([0.4, 1.0], requires_grad=True), 0.7)
    parts = (lambda x: guide, td.Normal(0.0, 1.0), lambda z: td.Normal(z.sin(), 1.0))
    found = []
    for loss in (gl.DReG(*parts, 1), gl.NegativeELBO(*parts, gl.Reparameterization(), kl="sample")):
        torch.manual_seed(3)
        value = loss(torch.tensor([X, 0.1]))
        found.append([value, torch.autograd.grad(value.sum(), guide.loc)[0]])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_dreg_has_no_noise_at_the_posterior(num_samples: int) -> None:
    found = {}
    for loss in (gl.DReG, gl.IWAE):
        loc = torch.full((50,), X / 2, requires_grad=True)
        value = loss(
            lambda x, loc=loc: td.Normal(loc, 0.5**0.5), td.Normal(0.0, 1.0), lambda z: td.Normal(z, 1.0), num_samples
        )(torch.full((50,), X))
        found[loss] = torch.autograd.grad(value.sum(), loc)[0].abs().max()
    assert found[gl.DReG] < 1e-12
    assert found[gl.IWAE] > 0.1


def test_event_dims_and_a_model_with_parameters() -> None:
    decoder = nn.Linear(3, 4)
    loc = torch.zeros(5, 3, requires_grad=True)
    for loss in (gl.IWAE, gl.DReG, gl.VIMCO):
        value = loss(
            lambda x: td.Independent(td.Normal(loc, 1.0), 1),
            td.Independent(td.Normal(torch.zeros(3), 1.0), 1),
            lambda z: td.Independent(td.Normal(decoder(z), 1.0), 1),
            6,
        )(torch.ones(5, 4))
        assert value.shape == (5,)
        grads = torch.autograd.grad(value.sum(), [loc, decoder.weight])
        assert all(g.abs().sum() > 0 for g in grads)
        with torch.no_grad():
            assert not decoder(loc).requires_grad


class Hidden(td.Transform):
    """A shift that keeps its parameter in a module, as flows do."""

    domain = codomain = td.constraints.real
    bijective = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def _call(self, x: Tensor) -> Tensor:
        return x + self.net.bias

    def _inverse(self, y: Tensor) -> Tensor:
        return y - self.net.bias

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_gradient_that_would_be_wrong_is_refused() -> None:
    x, logits = torch.full((5,), X), torch.zeros(5, 2, requires_grad=True)
    discrete = (lambda x: bernoulli(logits), bernoulli(torch.zeros(2)), lambda z: td.Normal(z.sum(-1), 1.0))
    for loss in (gl.IWAE, gl.DReG):
        with pytest.raises(TypeError, match="Use VIMCO"):
            loss(*discrete)(x)
        with torch.no_grad():  # the value needs no path
            assert loss(*discrete)(x).shape == (5,)
    moving = (
        lambda x: td.Uniform(-logits[:, 0].exp(), logits[:, 0].exp()),
        td.Normal(0.0, 1.0),
        lambda z: td.Normal(z, 1.0),
    )
    with pytest.raises(TypeError, match="Use IWAE"):
        gl.DReG(*moving)(x)
    with pytest.raises(TypeError, match="does not move"):
        gl.VIMCO(*moving)(x)
    flow = td.TransformedDistribution(td.Normal(torch.zeros(5), 1.0), [Hidden()])
    with pytest.raises(TypeError, match="hidden in modules"):
        gl.DReG(lambda x: flow, *moving[1:])(x)
    with pytest.raises(ValueError, match="at least 2"):
        gl.VIMCO(*discrete, num_samples=1)
    with pytest.raises(TypeError, match="several layers"):
        gl.VIMCO(discrete[0], gl.NegativeELBO(*discrete, gl.Enumerate()), discrete[2])


# ------------------------------------------------------------------------------------ log p(x)


def test_log_likelihood_holds_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks or at once, the same samples give the same estimate."""
    draws = bernoulli(BITS[:2]).sample((23, 4))
    sizes, start = [], [0]

    def next_draws(q: td.Distribution, size: torch.Size) -> Tensor:
        start[0] += size[0]
        return draws[start[0] - size[0] : start[0]]

    def likelihood(z: Tensor) -> td.Distribution:
        sizes.append(len(z))
        assert not torch.is_grad_enabled()
        return td.Normal(z @ WEIGHT, 0.8)

    monkeypatch.setattr("gradlab.multisample.sample", next_draws)
    guide, prior = bernoulli(BITS[:2].expand(4, 2)), bernoulli(BITS[2:4])
    x = torch.tensor([0.1, -0.5, 2.0, 0.7])
    found = []
    for chunk in (None, 5):
        start[0] = 0
        found.append(gl.log_likelihood(lambda x: guide, prior, likelihood, x, 23, chunk).bounds)
    assert sizes == [23, 5, 5, 5, 5, 3]
    torch.testing.assert_close(*found)
    log_w = prior.log_prob(draws) + td.Normal(draws @ WEIGHT, 0.8).log_prob(x) - guide.log_prob(draws)
    torch.testing.assert_close(found[0], log_w.exp().mean(0).log())


def test_log_likelihood_is_a_lower_bound_in_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the multi-sample bound, closer with K, and short of log p(x)."""
    for size in (1, 2, 3):
        index = tuples(size)
        weights = log_terms(BITS)[0].exp()[index].prod(1)
        monkeypatch.setattr(
            "gradlab.multisample.sample", lambda q, size, index=index: VALUES[index].transpose(0, 1).clone()
        )
        many = BITS.expand(len(index), 5)
        found = gl.log_likelihood(*model(many), data(many), size, None)
        torch.testing.assert_close(weights @ found.bounds, -exact_bound(BITS, size))


def test_log_likelihood_reports_its_error() -> None:
    many = BITS.expand(400, 5)
    found = gl.log_likelihood(*model(many), data(many), 50)
    exact = log_terms(BITS)[1].logsumexp(0).item()
    assert found.standard_error == pytest.approx(found.bounds.std().item() / 20)
    assert 0 < found.standard_error < 0.05
    assert -6 * found.standard_error - 0.02 < found.mean - exact < 6 * found.standard_error
    assert "400 points, 50 samples" in str(found)
    assert ">=" in str(found)
    assert math.isnan(gl.log_likelihood(*model(BITS[None]), torch.tensor([X]), 5).standard_error)
    with pytest.raises(ValueError, match="positive"):
        gl.log_likelihood(*model(BITS[None]), torch.tensor([X]), 0)
    with pytest.raises(ValueError, match="chunk_size"):
        gl.log_likelihood(*model(BITS[None]), torch.tensor([X]), 10, 0)


def test_log_likelihood_of_two_layers() -> None:
    """One sample of the second layer for each of the first: the weights are those of both."""
    p, count = POINT, 200
    above = gl.NegativeELBO(
        lambda z1: bernoulli(p[2:4] + z1 @ MIX),
        bernoulli(p[4:6]),
        lambda z2: bernoulli(z2 @ MIX.T + p[:2]),
        gl.ScoreFunction(),
        kl="sample",
    )
    guide = bernoulli(p[:2].expand(count, 2))
    x = torch.full((count,), X)
    found = gl.log_likelihood(lambda x: guide, above, lambda z1: td.Normal(z1 @ WEIGHT, 1.0), x, 2000)
    z = support(bernoulli(torch.zeros(4)))
    z1, z2 = z[:, :2], z[:, 2:]
    log_p = bernoulli(p[4:6]).log_prob(z2) + bernoulli(z2 @ MIX.T + p[:2]).log_prob(z1)
    exact = (log_p + td.Normal(z1 @ WEIGHT, 1.0).log_prob(torch.tensor(X))).logsumexp(0).item()
    assert found.mean == pytest.approx(exact, abs=6 * found.standard_error + 1e-3)
    assert found.standard_error < 0.005
    assert exact > -exact_deep(p).item() + 0.05
