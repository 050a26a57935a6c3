"""The samplers of discrete variables: exact laws, stable in float32, usable alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import gradlab as gl
from gradlab.quadrature import gauss_legendre
from gradlab.samplers import quick_sample, sample

pytestmark = pytest.mark.usefixtures("device")

LOGITS = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64)
SAMPLERS = {
    "gumbel_softmax": gl.gumbel_softmax,
    "hard": lambda q, size: gl.gumbel_softmax(q, size, 0.5, hard=True),
    "straight_through": gl.straight_through,
    "gumbel_rao": gl.gumbel_rao,
    "reinmax": gl.reinmax,
}


def frequencies_fit(found: Tensor, p: Tensor) -> bool:
    """Whether the frequencies of one-hot rows are within five standard errors."""
    return bool(((found.mean(0) - p).abs() < 5 * (p * (1 - p) / len(found)).sqrt() + 1e-12).all())


@pytest.mark.parametrize("name", ["hard", "straight_through", "gumbel_rao", "reinmax"])
def test_hard_samples_have_the_right_law(name: str) -> None:
    logits = LOGITS.to(torch.get_default_device())
    size = torch.Size([40_000])
    z = SAMPLERS[name](td.OneHotCategorical(logits=logits), size)
    assert z.shape == (40_000, 4)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert frequencies_fit(z, logits.softmax(-1))
    assert frequencies_fit(SAMPLERS[name](td.Bernoulli(logits=logits), size), logits.sigmoid())


@pytest.mark.parametrize("temperature", [1e-6, 0.1, 1.0, 50.0])
def test_the_largest_coordinate_has_the_right_law_at_every_temperature(temperature: float) -> None:
    logits = LOGITS.to(torch.get_default_device())
    x = gl.gumbel_softmax(td.OneHotCategorical(logits=logits), torch.Size([40_000]), temperature)
    torch.testing.assert_close(x.sum(-1), torch.ones_like(x[:, 0]))
    assert frequencies_fit(torch.nn.functional.one_hot(x.argmax(-1), 4).double(), logits.softmax(-1))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("size", [2, 10, 100_000])
def test_float32_is_finite(name: str, scale: float, size: int) -> None:
    logits = (torch.linspace(-1, 1, size, dtype=torch.float32) * scale).requires_grad_()
    q = td.OneHotCategorical(logits=logits, validate_args=False)
    z = SAMPLERS[name](q, torch.Size([3]))
    assert z.dtype == torch.float32 and z.isfinite().all()
    (z * torch.linspace(0, 1, size, dtype=torch.float32)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0, 1e3])
def test_temperatures_are_finite(temperature: float) -> None:
    for make_q in (td.OneHotCategorical, td.Bernoulli):
        for sampler in (gl.gumbel_softmax, gl.gumbel_rao, gl.reinmax, gl.straight_through):
            logits = torch.tensor([1e4, -1e4, 3.0, 0.0], dtype=torch.float32, requires_grad=True)
            z = sampler(make_q(logits=logits), torch.Size([200]), temperature)
            (z**2).sum().backward()
            assert z.isfinite().all() and logits.grad.isfinite().all()


def test_conditional_gumbels_have_the_law_of_gumbels_given_the_winner() -> None:
    """Free noise with its own winner, and conditional noise given the same winners, agree in mean and variance."""
    logits = LOGITS.to(torch.get_default_device()).expand(200_000, 4)
    free, fresh = gl.gumbel(logits.shape, logits), gl.gumbel(logits.shape, logits)
    x = logits.log_softmax(-1) + free
    hard = torch.nn.functional.one_hot(x.argmax(-1), 4).double()
    noise = gl.conditional_gumbels(logits, hard, fresh)
    assert ((logits + noise).argmax(-1) == x.argmax(-1)).all()
    for k in range(4):
        mine, other = noise[hard[:, k] > 0], free[hard[:, k] > 0]
        error = ((mine.var(0) + other.var(0)) / len(mine)).sqrt()
        assert ((mine.mean(0) - other.mean(0)).abs() < 5 * error).all()
        assert (
            (mine.square().mean(0) - other.square().mean(0)).abs() < 5 * (2 * mine.square().var(0) / len(mine)).sqrt()
        ).all()


def test_gumbels_reach_far_into_their_tail() -> None:
    """Float32 noise made of float32 uniforms would repeat its largest values."""
    g = gl.gumbel(torch.Size([2_000_000]), torch.zeros((), dtype=torch.float32))
    largest = g.topk(50).values
    assert len(largest.unique()) == 50
    assert abs(g.double().mean().item() - 0.5772156649) < 5 * (math.pi / 6**0.5) / 2_000_000**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_hots_have_their_law(dtype: torch.dtype) -> None:
    """Chi-square over the joint values of two factors, at 200 000 draws: 14 degrees of freedom, p = 5e-8."""
    probs = torch.tensor([[0.5, 0.2, 1e-3, 0.099, 0.2], [0.1, 0.0, 0.3, 0.6, 0.0]], dtype=dtype)
    for q in (td.OneHotCategorical(probs=probs), td.OneHotCategorical(logits=probs.log())):
        z = quick_sample(td.Independent(q, 1), torch.Size([200_000]))
        assert z.dtype == dtype
        assert (z.sum(-1) == 1).all()
        joint = torch.einsum("si,sj->ij", z[:, 0].double(), z[:, 1].double())
        expected = 200_000 * probs[0].double()[:, None] * probs[1].double()
        assert (joint[expected == 0] == 0).all()
        chi2 = ((joint - expected) ** 2 / expected)[expected > 0].sum()
        assert chi2 < 62


@pytest.mark.parametrize("u", [0.0, 0.25, 1 - 2.0**-53])
def test_one_hots_of_probability_zero_are_never_drawn(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at the ends of the uniforms."""
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.full(*size, u, **how))
    inf = math.inf
    logits = torch.tensor(
        [[-inf, 0.0, -inf, -inf], [0.0, -inf, -inf, -inf], [-inf, -inf, -inf, 0.0], [-1e4, 0, 0, -1e4]]
    )
    for dtype in (torch.float32, torch.float64):
        q = td.OneHotCategorical(logits=logits.to(dtype))
        assert ((quick_sample(q) == 0) | (q.probs > 0)).all()
        assert (quick_sample(q).sum(-1) == 1).all()


def test_gumbel_top_k_samples_without_replacement() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = td.Categorical(probs=p.expand(200_000, 4))
    index = gl.gumbel_top_k(q, 2)
    assert index.shape == (200_000, 2)
    assert (index[:, 0] != index[:, 1]).all()
    for i in range(4):
        for j in range(4):
            if i != j:
                expected = (p[i] * p[j] / (1 - p[i])).item()
                found = ((index[:, 0] == i) & (index[:, 1] == j)).double().mean().item()
                assert abs(found - expected) < 5 * (expected * (1 - expected) / 200_000) ** 0.5


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0, 2.5])
def test_concrete_density(temperature: float) -> None:
    """It agrees with torch's, and integrates to one."""
    logits = torch.tensor([0.4, -0.3])
    t, w = (torch.as_tensor(a, device=logits.device) for a in gauss_legendre(400.0, 800, [0.0]))  # t = logit of x
    log_x = torch.stack([torch.nn.functional.logsigmoid(t), torch.nn.functional.logsigmoid(-t)], -1)
    density = (gl.concrete_log_prob(log_x, logits, temperature) + log_x.sum(-1)).exp()  # dx = x (1 - x) dt
    torch.testing.assert_close((density * w).sum(), torch.ones(()), rtol=1e-9, atol=1e-9)
    theirs = td.RelaxedOneHotCategorical(torch.tensor(temperature), logits=LOGITS.to(logits.device))
    x = theirs.sample(torch.Size([50])).clamp_min(1e-30)
    x = x / x.sum(-1, keepdim=True)
    ours = gl.concrete_log_prob(x.log(), LOGITS.to(logits.device), temperature)
    torch.testing.assert_close(ours, theirs.log_prob(x), rtol=1e-8, atol=1e-8)


def test_a_sampler_works_inside_a_network() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Unflatten(-1, (2, 3)))
    for sampler in SAMPLERS.values():
        net.zero_grad()
        z = sampler(td.OneHotCategorical(logits=net(torch.ones(7, 5))), torch.Size())
        (z**3).sum().backward()
        assert net[0].weight.grad.abs().sum() > 0


def test_schedules() -> None:
    assert [gl.constant_temperature(0.5)(s) for s in (0, 10)] == [0.5, 0.5]
    cooling = gl.exponential_annealing(2.0, 0.1, 0.5)
    assert cooling(0) == 2.0 and cooling(5) == pytest.approx(2 * math.exp(-0.5)) and cooling(1000) == 0.5
    slow = gl.inverse_time_annealing(2.0, 0.1, 0.5)
    assert slow(10) == pytest.approx(1.0) and slow(10**6) == 0.5
    estimator = gl.GumbelSoftmax(1, cooling(0))
    estimator.temperature = cooling(5)
    assert "1.213" in repr(estimator)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="found Categorical, expected a Bernoulli or a OneHotCategorical"):
        gl.gumbel_softmax(td.Categorical(logits=LOGITS))
    with pytest.raises(ValueError, match="found k=9, expected 1 to 4"):
        gl.gumbel_top_k(td.Categorical(logits=LOGITS), 9)
    with pytest.raises(TypeError, match="gumbel_top_k: found Normal"):
        gl.gumbel_top_k(td.Normal(0.0, 1.0), 1)
    with pytest.raises(ValueError, match="found temperature=0"):
        gl.GumbelSoftmax(temperature=0)
    with pytest.raises(ValueError, match="found temperature=-1"):
        gl.REBAR(temperature=-1)
    with pytest.raises(ValueError, match="expected start >= floor"):
        gl.exponential_annealing(0.1, 1.0, 0.5)
    with pytest.raises(ValueError, match="of 0, expected a positive number"):
        gl.softmax(LOGITS, 0)
    with pytest.raises(ValueError, match="found top=0"):
        gl.SumAndSample(0)
    with pytest.raises(ValueError, match="found num_samples=1, expected 2 to 10"):
        gl.UnorderedSet(1)
    q = td.Bernoulli(logits=torch.zeros((), requires_grad=True))
    with pytest.raises(ValueError, match="a support of 2 values"):
        gl.UnorderedSet(3)(q, lambda z: z)
    shape = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match="MeasureValued cannot serve Gamma"):
        gl.MeasureValued()(td.Gamma(shape, 1.0), lambda z: z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("by", ["logits", "probs"])
def test_bits_have_their_law(by: str, dtype: torch.dtype) -> None:
    """Frequencies within five standard errors; 0 and 1 exactly, also where torch clamps probs to eps."""
    probs = torch.tensor([0.0, 1.0, 0.5, 0.03, 0.97], dtype=dtype)
    q = td.Bernoulli(probs) if by == "probs" else td.Bernoulli(logits=torch.logit(probs))
    z = quick_sample(td.Independent(q, 1), torch.Size([200_000]))
    assert z.dtype == dtype
    assert ((z == 0) | (z == 1)).all()
    assert frequencies_fit(z.double(), q.probs.double())


def test_zeros_of_probs_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's logits of them are those of eps: a bit in 8 million, in float32."""
    p = torch.tensor([0.0, 1.0], dtype=torch.float32)
    for u in (0.0, 1e-12, 1 - 2.0**-53):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **how: torch.full(*size, u, **how))
        assert quick_sample(td.Bernoulli(p)).tolist() == [0.0, 1.0]
        assert quick_sample(td.OneHotCategorical(p)).tolist() == [0.0, 1.0]
    weights = []
    monkeypatch.setattr(torch, "multinomial", lambda p, n, replacement: weights.append(p) or p.argmax(-1, keepdim=True))
    assert sample(td.OneHotCategorical(p)).tolist() == [0.0, 1.0]
    assert weights[0].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("law", [td.Bernoulli, td.OneHotCategorical])
def test_samples_of_odd_shapes(law: type) -> None:
    td.Distribution.set_default_validate_args(False)  # torch cannot validate an empty batch
    for draw in (sample, quick_sample):
        assert draw(law(logits=torch.zeros(0, 3)), torch.Size([4])).shape == (4, 0, 3)
        assert draw(td.Independent(law(logits=torch.zeros(2, 3)), 0)).shape == (2, 3)
        expanded = law(logits=torch.zeros(3)).expand((2, 5, 3) if law is td.Bernoulli else (2, 5))
        assert draw(expanded, torch.Size([4, 1])).shape == (4, 1, 2, 5, 3)
        logits = torch.tensor([40.0, -40.0, -40.0], requires_grad=True)
        z = draw(law(logits=logits))
        assert z.tolist() == [1.0, 0.0, 0.0]
        assert not z.requires_grad
