"""Binary data after a linear layer: flips by products are the flips of the plain cost, however large the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import gradlab as gl
from gradlab import bernoulli

pytestmark = pytest.mark.usefixtures("device")

LAWS: dict[str, tuple[Callable[[Tensor], td.Distribution], tuple[int, ...]]] = {
    "bits": (lambda p: td.Independent(td.Bernoulli(logits=p), 1), (6,)),
    "one-hots": (lambda p: td.Independent(td.OneHotCategorical(logits=p), 1), (3, 5)),
    "a table of bits": (lambda p: td.Independent(td.Bernoulli(logits=p), 2), (2, 3)),
    "one one-hot": (lambda p: td.OneHotCategorical(logits=p), (5,)),
    "one value": (lambda p: td.Independent(td.OneHotCategorical(logits=p), 1), (3, 1)),
}


def plain(linear: nn.Linear, x: Tensor, event_dims: int) -> gl.Cost:
    """The cost as a user would write it."""

    def f(z: Tensor) -> Tensor:
        h = linear(z.flatten(-event_dims))
        return -td.Independent(td.Bernoulli(logits=h), 1).log_prob(x)

    return f


def setting(law: str, batch: tuple[int, ...], pixels: int, scale: float = 1.0, shift: float = 0.0):
    """Return q of the logits, the logits, the layer and x."""
    make_q, event = LAWS[law]
    logits = torch.randn(*batch, *event, requires_grad=True)
    linear = nn.Linear(make_q(logits).event_shape.numel(), pixels)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.add_(shift * torch.randn(pixels))
    return make_q, logits, linear, (torch.rand(*batch, pixels) < 0.5).to(logits.dtype)


def gradients(loss: Tensor, logits: Tensor, linear: nn.Linear) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), [logits, *linear.parameters()])


def both(law: str, batch: tuple[int, ...], pixels: int, samples: int, scale: float, shift: float, dtype: torch.dtype):
    """Value and gradients from products, and in float64 from the plain cost; and the size of the costs."""
    make_q, logits, linear, x = setting(law, batch, pixels, scale, shift)
    q = make_q(logits)
    estimator = gl.LocalExpectation(samples)
    z = estimator.draw(q)
    low, layer = logits.detach().to(dtype).requires_grad_(), copy.deepcopy(linear).to(dtype)
    ours = estimator.estimate(make_q(low), gl.BernoulliAfterLinear(layer, x.to(dtype)), z.to(dtype))
    exact_logits = low.detach().double().requires_grad_()
    exact = layer.double() if dtype is torch.float64 else copy.deepcopy(layer).double()
    theirs = estimator.estimate(make_q(exact_logits), plain(exact, x, len(q.event_shape)), z)
    size = 1 + pixels * (1 + exact.weight.abs().max() * exact.in_features + exact.bias.abs().max()).item()
    return (ours, *gradients(ours, low, layer)), (theirs, *gradients(theirs, exact_logits, exact)), size


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1.0, 1e4), (40.0, 0.0), (1e4, 0.0), (1e4, 1e4), (0.0, 1e4)])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_flips_are_those_of_the_plain_cost(dtype: torch.dtype, law: str, scale: float, shift: float) -> None:
    ours, theirs, size = both(law, (4,), 23, 2, scale, shift, dtype)
    tolerance = 20 * torch.finfo(dtype).eps * size
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("law", ["bits", "one-hots"])
@pytest.mark.parametrize("pixels", [1, 14, 31])
def test_any_shape(law: str, batch: tuple[int, ...], pixels: int) -> None:
    ours, theirs, _ = both(law, batch, pixels, 3, 1.0, 3.0, torch.float64)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["bits", "one-hots"])
def test_both_ways_agree_and_products_serve_the_usual_weights(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the logits: their size is none of the products' business."""
    calls = []
    for name in ("_by_products", "_directly"):
        way = getattr(bernoulli, name)
        monkeypatch.setattr(bernoulli, name, lambda *a, w=way, n=name, **k: (calls.append(n), w(*a, **k))[1])

    def table(scale: float, shift: float) -> Tensor:
        torch.manual_seed(1)
        make_q, logits, linear, x = setting(law, (4,), 30, scale, shift)
        q = make_q(logits.float())
        return gl.LocalExpectation()(q, gl.BernoulliAfterLinear(linear.float(), x.float()))

    on_cpu = torch.get_default_device().type == "cpu"
    for scale, shift, expected in [(1.0, 0.0, "_by_products"), (4.0, 1e4, "_by_products"), (200.0, 0.0, "_directly")]:
        calls.clear()
        table(scale, shift)
        assert calls == [expected if on_cpu else "_directly"]
    rows, weight = 30 * torch.randn(5, 28), torch.randn(6, 2, 28)
    weight = torch.cat([weight[:, :1], -weight[:, :1]], 1) if law == "bits" else weight
    places = torch.randint(2, (5, 6))
    ways = [w(rows, weight, places, one_hot=law != "bits") for w in (bernoulli._by_products, bernoulli._directly)]
    torch.testing.assert_close(*ways, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["bits", "one-hots"])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["products", "directly"])
def test_chunks_change_nothing(law: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    make_q, logits, linear, x = setting(law, (7,), 23, scale)
    f, estimator = gl.BernoulliAfterLinear(linear, x), gl.LocalExpectation(2)
    z = estimator.draw(make_q(logits))
    found = []
    for numbers in (1, 2**9, 2**30):
        monkeypatch.setattr(bernoulli, "NUMBERS", {"cpu": numbers, "cuda": numbers})
        found.append(gradients(estimator.estimate(make_q(logits), f, z), logits, linear)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("law", ["bits", "one-hots"])
def test_compiles_to_one_graph(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds both ways and chooses between them at each call."""
    monkeypatch.setattr(td.Distribution, "_validate_args", False)
    make_q, logits, linear, x = setting(law, (3,), 15)
    estimator = gl.LocalExpectation()
    z = estimator.draw(make_q(logits))

    def loss(logits: Tensor, z: Tensor) -> Tensor:
        return estimator.estimate(make_q(logits), gl.BernoulliAfterLinear(linear, x), z)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 1e4):  # by products; directly
        with torch.no_grad():
            linear.weight.mul_(scale)
        ways = [gradients(call(logits, z), logits, linear) for call in (compiled, loss)]
        for got, expected in zip(*ways, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("law", ["bits", "one-hots"])
def test_works_under_torch_func(law: str) -> None:
    make_q, logits, linear, x = setting(law, (4,), 9)
    estimator = gl.LocalExpectation()
    z = estimator.draw(make_q(logits))[0]

    def loss(logits: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return estimator.estimate(make_q(logits), gl.BernoulliAfterLinear(linear, x), z[None])

    each = torch.func.vmap(torch.func.grad(loss))(logits.detach(), z, x)
    (expected,) = torch.autograd.grad(loss(logits, z, x).sum(), logits)
    torch.testing.assert_close(each, expected)
    one = torch.func.grad(loss)(logits.detach()[0], z[0], x[0])
    torch.testing.assert_close(one, expected[0])


ESTIMATORS = [
    gl.ScoreFunction(2, gl.LeaveOneOut()), gl.DisARM(), gl.REBAR(), gl.GumbelSoftmax(2), gl.ReinMax(), gl.Enumerate(),
    gl.MeasureValued(chunk_size=4), gl.StochasticBackprop(2), gl.MuProp(),
]  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_it_is_a_plain_cost_for_every_estimator(estimator: gl.Estimator) -> None:
    make_q, logits, linear, x = setting("bits", (4,), 9)
    noise = estimator.draw(make_q(logits))
    ways = []
    for f in (gl.BernoulliAfterLinear(linear, x), plain(linear, x, 1)):
        loss = estimator.estimate(make_q(logits), f, noise)
        ways.append((loss, *gradients(loss, logits, linear)))
    for got, expected in zip(*ways, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("law", [td.Binomial, td.Normal, td.Laplace], ids=lambda law: law.__name__)
def test_it_serves_latents_that_are_not_zero_or_one(law: type[td.Distribution]) -> None:
    def make_q(p: Tensor) -> td.Distribution:
        return td.Independent(td.Binomial(3, logits=p) if law is td.Binomial else law(p, 1.0), 1)

    _, logits, linear, x = setting("bits", (4,), 9)
    estimator = gl.LocalExpectation() if law is td.Binomial else gl.StochasticBackprop()
    noise = estimator.draw(make_q(logits))
    ways = []
    for f in (gl.BernoulliAfterLinear(linear, x), plain(linear, x, 1)):
        ways.append(gradients(estimator.estimate(make_q(logits), f, noise), logits, linear))
    for got, expected in zip(*ways, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_grey_pixel_costs_its_cross_entropy() -> None:
    make_q, logits, linear, _ = setting("bits", (4,), 9)
    grey = torch.rand(4, 9)
    f = gl.BernoulliAfterLinear(linear, grey)
    other = gl.AfterLinear(linear, lambda h: (nn.functional.softplus(h) - grey * h).sum(-1))
    estimator = gl.LocalExpectation()
    z = estimator.draw(make_q(logits))
    ways = [gradients(estimator.estimate(make_q(logits), c, z), logits, linear) for c in (f, other)]
    for got, expected in zip(*ways, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_cost_leaves_no_cycle_that_holds_the_data() -> None:
    import gc
    import weakref

    x = torch.ones(2, 3)
    gone = weakref.ref(x)
    gc.disable()
    try:
        f = gl.BernoulliAfterLinear(nn.Linear(2, 3), x)
        del f, x
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------ inside NegativeELBO


class Spy(gl.LocalExpectation):
    """Notes which kind of cost it is given."""

    def estimate(self, q, f, noise, context=None):
        self.seen = type(f)
        return super().estimate(q, f, noise, context)


def elbos(kl: str = "auto") -> list[tuple[gl.NegativeELBO, list[Tensor], Tensor]]:
    """The same model with a plain likelihood and with ones that say that they begin with a linear layer."""
    torch.manual_seed(3)
    guide, linear, deep = nn.Linear(9, 6), nn.Linear(6, 9), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 9))
    x = (torch.rand(5, 9) < 0.5).double()
    prior = td.Independent(td.Bernoulli(logits=torch.zeros(6)), 1)

    def pixels(h: Tensor) -> td.Distribution:
        return td.Independent(td.Bernoulli(logits=h), 1)

    likelihoods = [
        (lambda z: pixels(linear(z)), linear),
        (gl.BernoulliLikelihood(linear), linear),
        (gl.LikelihoodAfterLinear(linear, pixels), linear),
        (lambda z: pixels(deep(z)), deep),
        (gl.LikelihoodAfterLinear(deep[0], lambda h: pixels(deep[1:](h))), deep),
    ]
    return [
        (
            gl.NegativeELBO(lambda x: pixels(guide(x)), prior, p, Spy(2), kl=kl),
            [*guide.parameters(), *n.parameters()],
            x,
        )
        for p, n in likelihoods
    ]


@pytest.mark.parametrize("kl", ["analytic", "sample", "total"])
def test_the_elbo_of_a_likelihood_that_begins_with_a_linear_layer(kl: str) -> None:
    found, kinds = [], []
    for elbo, leaves, x in elbos(kl):
        torch.manual_seed(4)
        loss = elbo(x)
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        kinds.append(issubclass(elbo.estimator.seen, gl.AfterLinear))
    assert kinds == ([False, True, True, False, True] if kl == "analytic" else [False] * 5)
    for i, same in ((1, 0), (2, 0), (4, 3)):
        for got, expected in zip(found[i], found[same], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_bernoulli_likelihood_makes_products() -> None:
    elbo, _, x = elbos()[1]
    elbo(x)
    assert elbo.estimator.seen is gl.BernoulliAfterLinear
    assert {id(p) for p in elbo.parameters()} == {id(p) for p in elbo.likelihood.linear.parameters()}


def test_layers_above_take_it_too() -> None:
    """A sample of the layer below is the x of the layer above, also where it is relaxed."""
    torch.manual_seed(5)
    up, down, guide, first = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(9, 6), nn.Linear(6, 9)
    x = (torch.rand(5, 9) < 0.5).double()

    def bits(h: Tensor) -> td.Distribution:
        return td.Independent(td.Bernoulli(logits=h), 1)

    top = td.Independent(td.Bernoulli(logits=torch.zeros(4)), 1)
    leaves = [p for layer in (up, down, guide, first) for p in layer.parameters()]
    for below in (gl.LocalExpectation(), gl.GumbelSoftmax()):
        found = []
        for second, likelihood in (
            (lambda z: bits(down(z)), lambda z: bits(first(z))),
            (gl.BernoulliLikelihood(down), gl.BernoulliLikelihood(first)),
        ):
            torch.manual_seed(6)
            above = gl.NegativeELBO(lambda z: bits(up(z)), top, second, gl.LocalExpectation())
            loss = gl.NegativeELBO(lambda x: bits(guide(x)), above, likelihood, below)(x)
            found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_bad_input() -> None:
    linear, x = nn.Linear(3, 4), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"found x of shape \(2, 5\), expected \[\*B, 4\]"):
        gl.BernoulliAfterLinear(linear, x)
    with pytest.raises(TypeError, match="AfterLinear: found a layer of type Tanh"):
        gl.BernoulliAfterLinear(nn.Tanh(), x)
    with pytest.raises(TypeError, match="BernoulliLikelihood: found a layer of type Tanh"):
        gl.BernoulliLikelihood(nn.Tanh())
    q = td.Independent(td.Bernoulli(logits=torch.zeros(3, 3, requires_grad=True)), 1)
    with pytest.raises(ValueError, match=r"found x of shape \(2, 4\), expected the batch dims"):
        gl.LocalExpectation()(q, gl.BernoulliAfterLinear(linear, torch.zeros(2, 4)))
