"""What the hot path writes out itself equals what it stands for, and is right where torch is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.baselines import as_baseline, weighted
from gradlab.densities import exact_kl, unchecked_log_prob
from gradlab.gumbel import SHORT, softmax

LAWS = {
    "bits": lambda x: td.Bernoulli(logits=x),
    "bits by probs": lambda x: td.Bernoulli(x.sigmoid()),
    "one-hots": lambda x: td.OneHotCategorical(logits=x),
    "one-hots by probs": lambda x: td.OneHotCategorical(x.softmax(-1)),
}
Law = Callable[[Tensor], td.Distribution]
kinds = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
INF = math.inf


def leaf(*size: int) -> Tensor:
    return torch.randn(*size).requires_grad_()


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The first derivatives of the sum, and those of the sum of their squares."""
    first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
    return *(g.detach() for g in first), *second


@pytest.mark.parametrize("of_p", [0, 1], ids=["p by logits", "p by probs"])
@pytest.mark.parametrize("of_q", [0, 1], ids=["q by logits", "q by probs"])
@pytest.mark.parametrize("family", [["bits", "bits by probs"], ["one-hots", "one-hots by probs"]], ids=lambda x: x[0])
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_the_kl_is_that_of_torch(family: list[str], of_q: int, of_p: int, dims: int) -> None:
    x, y = leaf(5, 2, 3, 4), leaf(5, 2, 3, 4)
    q, p = (td.Independent(LAWS[family[n]](t), dims) for n, t in ((of_q, x), (of_p, y)))
    found, expected = exact_kl(q, p), td.kl_divergence(q, p)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, x, y), gradients(expected, x, y))


def test_the_kl_of_other_laws_is_that_of_torch() -> None:
    q, p = td.Independent(td.Normal(leaf(4, 3), 1.0), 1), td.Independent(td.Normal(leaf(3), 2.0), 1)
    torch.testing.assert_close(exact_kl(q, p), td.kl_divergence(q, p.expand((4,))))
    with pytest.raises(NotImplementedError):
        exact_kl(td.Independent(td.Cauchy(leaf(3), 1.0), 1), p)
    with pytest.raises(NotImplementedError):
        exact_kl(td.Independent(td.Bernoulli(logits=leaf(4, 3)), 1), td.Independent(td.Bernoulli(logits=leaf(4, 3)), 2))


@kinds
def test_the_prior_broadcasts(law: Law) -> None:
    td.Distribution.set_default_validate_args(False)  # torch cannot validate an empty batch
    q, p = td.Independent(law(leaf(5, 2, 4)), 1), td.Independent(law(leaf(2, 4)), 1)
    torch.testing.assert_close(exact_kl(q, p), td.kl_divergence(q, p.expand(q.batch_shape)))
    empty = td.Independent(law(torch.zeros(0, 2, 4)), 1)
    assert exact_kl(empty, p).shape == empty.batch_shape


EDGES = [-800.0, -95.0, -40.0, -17.0, -3.0, -0.01, 0.0, 0.5, 17.0, 40.0, 95.0, 800.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kl_of_bits_is_right_however_large_their_logits(dtype: torch.dtype) -> None:
    """Where torch returns infinity, 0 and negative numbers: here a few roundings of the logits."""
    a, b = (t.flatten() for t in torch.meshgrid(*2 * [torch.tensor(EDGES, dtype=dtype)], indexing="ij"))
    x = a.clone().requires_grad_()
    found = exact_kl(td.Bernoulli(logits=x), td.Bernoulli(logits=b))
    with mpmath.workdps(800):
        pairs = [(mpmath.mpf(s), mpmath.mpf(t)) for s, t in zip(a.tolist(), b.tolist(), strict=True)]
        value = torch.tensor([float(kl_of_bits(s, t)) for s, t in pairs], dtype=torch.float64)
        slope = torch.tensor([float(sigma(s) * sigma(-s) * (s - t)) for s, t in pairs], dtype=torch.float64)
    rounding = torch.finfo(dtype).eps * (1 + a.abs() + b.abs())
    assert ((found - value).abs() < 2 * rounding).all()
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert ((grad - slope).abs() < 2 * rounding).all()


def sigma(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def kl_of_bits(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
    return sum(sigma(s) * mpmath.log(sigma(s) / sigma(t)) for s, t in ((a, b), (-a, -b)))


ZEROS = {
    "bits": [-INF, INF, -2e4, 2e4, 0.0],
    "bits by probs": [0.0, 1.0, 0.0, 1.0, 0.5],
    "one-hots": [-INF, 0.0, -INF, -2e4],
    "one-hots by probs": [0.0, 1.0, 0.0, 0.0],
}
UNIFORM = {"bits": [0.0] * 5, "one-hots": [0.0] * 4}


def made(kind: str, x: Tensor) -> td.Distribution:
    law = td.Bernoulli if "bits" in kind else td.OneHotCategorical
    return law(probs=x) if "probs" in kind else law(logits=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("by", ["logits", "probs"])
@pytest.mark.parametrize("kind", ZEROS)
def test_gradients_are_finite_where_q_has_zeros(kind: str, by: str, dtype: torch.dtype) -> None:
    x = torch.tensor(ZEROS[kind], dtype=dtype, requires_grad=True)
    family = kind.removesuffix(" by probs")
    y = made(family, torch.tensor(UNIFORM[family], dtype=dtype))
    y = (y.logits if by == "logits" else y.probs).detach().requires_grad_()
    kl = exact_kl(made(kind, x), made(f"{family} by {by}", y))
    expected = torch.tensor([math.log(2)] * 4 + [0.0] if family == "bits" else math.log(4), dtype=dtype)
    eps = torch.finfo(dtype).eps * (1000 if dtype in (torch.float32, torch.float64) else 2)
    torch.testing.assert_close(kl, expected, atol=eps, rtol=eps)
    assert all(g.isfinite().all() for g in torch.autograd.grad(kl.sum(), (x, y)))


@pytest.mark.parametrize("kind", ZEROS)
def test_zeros_of_both_count_nothing_and_those_of_the_prior_alone_are_infinite(kind: str) -> None:
    x, y = (torch.tensor(ZEROS[kind], requires_grad=True) for _ in range(2))
    kl = exact_kl(made(kind, x), made(kind, y))
    torch.testing.assert_close(kl, torch.zeros_like(kl))
    assert all(g.isfinite().all() for g in torch.autograd.grad(kl.sum(), (x, y)))
    family = kind.removesuffix(" by probs")
    beyond = exact_kl(made(family, torch.tensor(UNIFORM[family])), made(kind, y))
    assert (beyond[:2] > 1e300).all() if beyond.ndim else beyond == INF  # bits by logits stop at the largest number


@kinds
def test_the_density_of_samples_is_that_of_torch(law: Law) -> None:
    for dims in (0, 1, 2):
        x = leaf(3, 2, 4)
        q = td.Independent(law(x), dims)
        for z in (q.sample((7,)), q.sample(), q.sample((2, 5))):
            found, expected = unchecked_log_prob(q, z), q.log_prob(z)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradients(found, x), gradients(expected, x))


def test_the_density_of_other_samples_is_that_of_torch() -> None:
    x = leaf(3, 2)
    flow = td.TransformedDistribution(td.Normal(x, 1.0), [td.ExpTransform()])
    mixture = td.MixtureSameFamily(td.Categorical(logits=x), td.Normal(x, 1.0))
    for q in (td.Independent(flow, 1), mixture, td.Gamma(x.exp(), 1.0), td.Independent(td.Independent(flow, 1), 1)):
        z = q.sample((5,))
        torch.testing.assert_close(unchecked_log_prob(q, z), q.log_prob(z))


@pytest.mark.parametrize("size", [1, 2, SHORT - 1, SHORT])
@pytest.mark.parametrize("wrap", ["plain", "vmap", "compile"])
def test_the_softmax_is_that_of_torch(size: int, wrap: str) -> None:
    x = leaf(5, size)
    change = {"plain": lambda f: f, "vmap": torch.func.vmap, "compile": compiled}[wrap]
    found, expected = change(softmax)(x), torch.softmax(x, -1)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(5, size)
    if wrap == "compile":  # which refuses second derivatives
        found, expected = (torch.autograd.grad((weight * y).sum(), x) for y in (found, expected))
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(gradients(weight * found, x), gradients(weight * expected, x))


def compiled(f: Callable) -> Callable:
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def test_the_softmax_of_extremes_is_that_of_torch() -> None:
    x = torch.tensor([[0.0, -INF, 1.0], [1e4, -1e4, 0.0], [1e300, -1e300, 1.5e308], [-INF, -INF, 3.0]]).requires_grad_()
    weight = torch.randn(3)
    found, expected = softmax(x), torch.softmax(x, -1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((weight * y).sum(), x)[0] for y in (found, expected)), atol=1e-15, rtol=1e-12
    )
    assert softmax(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("transform", [compiled, torch.func.vmap], ids=["compile", "vmap"])
@kinds
def test_transforms_agree(law: Law, transform: Callable) -> None:
    td.Distribution.set_default_validate_args(False)  # which looks at values
    x = torch.randn(3, 2, 4)

    def both(x: Tensor) -> Tensor:
        q, p = td.Independent(law(x), 1), td.Independent(law(torch.linspace(-1, 1, 4).expand(2, 4)), 1)
        z = torch.zeros_like(x)
        z[..., 1] = 1.0
        return exact_kl(q, p) + unchecked_log_prob(q, z)

    found, expected = transform(both)(x), both(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("baseline", [None, 2.5, gl.LeaveOneOut()], ids=repr)
def test_the_weighted_mean_equals_its_formula(baseline: gl.Baseline | float | None) -> None:
    log_prob, cost = leaf(3, 5), leaf(3, 5)
    b = as_baseline(baseline, 3)
    found = weighted(log_prob.sin(), cost.exp() * log_prob.cos(), b, None)
    costs = cost.exp() * log_prob.cos()
    fixed = b(costs.detach()).detach()
    expected = (gl.magic_box(log_prob.sin()) * (costs - fixed) + fixed).mean(0)
    assert torch.equal(found, costs.mean(0))  # to the last digit, whatever the baseline
    torch.testing.assert_close(gradients(found, log_prob, cost), gradients(expected, log_prob, cost))


def test_the_weighted_mean_trains_its_baseline() -> None:
    net = torch.nn.Linear(2, 1)
    context, cost = torch.randn(5, 2), torch.randn(3, 5)
    loss = weighted(leaf(3, 5), cost, gl.Learned(net), context)
    assert torch.equal(loss, cost.mean(0))
    found = torch.autograd.grad(loss.sum(), list(net.parameters()))
    error = (cost - net(context).squeeze(-1)).square().mean(0).sum()
    torch.testing.assert_close(found, torch.autograd.grad(error, list(net.parameters())))
