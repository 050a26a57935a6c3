"""What chapter 20 claims and no test of the package keeps: moments by enumeration, baselines, prices, the frontier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradlab as gl
from gradlab.cli import serves

BOOK = Path(__file__).resolve().parent.parent / "book"
Outcomes = tuple[Tensor, Tensor]
SMALL = ["bernoulli_toy_499", "bernoulli_3", "onehot_10", "onehot_5x3"]


def values(p: gl.Problem) -> Outcomes:
    z = gl.Enumerate().draw(p.q())
    return z[None], p.q().log_prob(z).exp()


def pairs(p: gl.Problem) -> Outcomes:
    (z,), w = values(p)
    i, j = torch.cartesian_prod(*[torch.arange(len(w))] * 2).T
    return z[torch.stack([i, j])], w[i] * w[j]


def target(p: gl.Problem) -> Tensor:
    return p.exact()[0]["logits"].flatten()


def moments(estimator: gl.Estimator, p: gl.Problem, outcomes: Callable[[gl.Problem], Outcomes] = values):
    """The norm of the bias and the summed variance, over all outcomes of the sample."""
    noise, weight = outcomes(p)
    logits = p.params["logits"]
    many = logits.expand(len(weight), *logits.shape).clone().requires_grad_()
    loss = estimator.estimate(p.make_q({"logits": many}), p.f, noise)
    grads = torch.autograd.grad(loss.sum(), many)[0].reshape(len(weight), -1)
    mean = weight @ grads
    return (mean - target(p)).norm(), (weight @ (grads - mean) ** 2).sum()


def parts(p: gl.Problem) -> tuple[float, Tensor, Tensor, Tensor]:
    """m, V_1, the variance v of f and the second moment G of the score."""
    (z,), w = values(p)
    m = (w @ p.f(z)).item()
    first, *sides = (moments(gl.ScoreFunction(1, m + k), p)[1] for k in (0, -1, 1))
    return m, first, w @ (p.f(z) - m) ** 2, sum(sides) / 2 - first


@pytest.mark.parametrize("name", SMALL)
def test_bias(name):
    p = gl.problem(name)
    quadratic = name in ("bernoulli_toy_499", "onehot_10")
    for estimator in (gl.ScoreFunction(), gl.LocalExpectation(), gl.MuProp()):
        assert moments(estimator, p)[0] < 1e-10
    assert (moments(gl.ReinMax(), p)[0] < 1e-10) == quadratic
    assert moments(gl.StraightThrough(), p)[0] > 0.03


def test_bias_of_reinmax_where_no_theorem_covers_it():
    assert math.isclose(moments(gl.ReinMax(), gl.problem("bernoulli_3"))[0], 0.0731, abs_tol=1e-4)
    assert math.isclose(moments(gl.ReinMax(), gl.problem("onehot_5x3"))[0], 0.0241, abs_tol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_baselines(name):
    """The prices of leave-one-out and of a moving average, from four moments."""
    p = gl.problem(name)
    m, first, v, second = parts(p)
    loo = moments(gl.ScoreFunction(2, gl.LeaveOneOut()), p, pairs)[1]
    assert torch.isclose(2 * loo, first + v * second + target(p).square().sum())
    sides = (moments(gl.ScoreFunction(1, m + k * (v / 19).sqrt().item()), p)[1] for k in (-1, 1))
    assert torch.isclose(sum(sides) / 2, first + v * second / 19)


def test_the_moving_average_spreads_as_the_theorem_says():
    p, average = gl.problem("bernoulli_3"), gl.MovingAverage()
    m, _, v, _ = parts(p)
    costs = p.f(p.q().sample((8000,)))
    seen = torch.stack([average(cost[None])[0] for cost in costs])[500:]
    # 7500 values with a correlation of 0.9**k are worth 395 independent ones: 7 percent on a variance, 4 of them
    assert math.isclose((seen - m).square().mean(), v / 19, rel_tol=0.3)
    assert math.isclose(seen.mean(), m, abs_tol=4 * math.sqrt(v / 7500))


def test_sampled():
    """The standard error of a variance, sqrt((m4 - V^2) / R), against the spread of many measured variances."""
    p = gl.problem("bernoulli_3")
    exact = moments(gl.ScoreFunction(), p)[1]
    grads = gl.replicate(lambda x: gl.ScoreFunction()(p.make_q(x), p.f), p.params, 200_000)["logits"]
    d = (grads - grads.mean(0)).square().sum(-1)
    error = ((d.square().mean() - d.mean() ** 2) / len(d)).sqrt()
    assert abs(d.mean() - exact) < 4 * error
    apart = d.reshape(400, 500).mean(1)
    assert math.isclose(apart.std() / math.sqrt(400), error, rel_tol=0.15)


def test_break_even():
    p = gl.problem("onehot_5x3")
    bias, variance = moments(gl.StraightThrough(), p)
    price = 11 * moments(gl.LocalExpectation(), p)[1]
    budget = (price - variance) / bias**2
    assert torch.isclose(bias**2 + variance / budget, price / budget)
    assert bias**2 + 2 * variance / budget < 2 * price / budget
    assert bias**2 + variance / (2 * budget) > price / (2 * budget)


def test_serves():
    bits, hot = gl.problem("bernoulli_3"), gl.problem("onehot_10")
    for cls in (gl.Reparameterization, gl.ImplicitReparameterization):
        assert not cls.supports(bits.q()) and not cls.supports(hot.q())
    assert serves(gl.ARM(), bits) and not serves(gl.ARM(), hot)
    assert not serves(gl.Enumerate(), gl.problem("bernoulli_20"))


@pytest.mark.parametrize(
    ("estimator", "count"), [(gl.MuProp(), 2), (gl.REBAR(), 3), (gl.MeasureValued(), 7), (gl.LocalExpectation(), 4)]
)
def test_evaluations(estimator, count):
    p = gl.problem("bernoulli_3")
    q, seen = p.q({"logits": p.params["logits"].clone().requires_grad_()}), []

    def f(z: Tensor) -> Tensor:
        seen.append(z.numel() // 3)
        return p.f(z)

    estimator.estimate(q, f, estimator.draw(q)).backward()
    assert sum(seen) == estimator.evaluations(q) == count
    assert gl.compare({"it": estimator}, p.make_q, p.f, p.params, replicates=2)["it"].evaluations == count


def test_frontier():
    """MuProp lies on the frontier of one problem, and far from that of another."""
    for name, better in (("onehot_5x3", True), ("onehot_10", False)):
        p = gl.problem(name)
        _, first, v, second = parts(p)
        average = first + v * second / 19
        assert (moments(gl.MuProp(), p)[1] < average) == better
    for name in ("bernoulli_3", "bernoulli_toy_499"):  # on bits, two estimators are one
        p = gl.problem(name)
        q = p.make_q({"logits": (x := p.params["logits"]).expand(8, *x.shape).clone().requires_grad_()})
        noise = gl.MeasureValued().draw(q)
        leaf = q.base_dist.logits if name == "bernoulli_3" else q.logits
        grads = [
            torch.autograd.grad(e.estimate(q, p.f, n).sum(), leaf)[0]
            for e, n in ((gl.MeasureValued(), noise), (gl.LocalExpectation(), noise.z))
        ]
        torch.testing.assert_close(*grads)


def test_flips():
    """Each advice fails on a problem: prices by enumeration."""
    score, muprop, local, average, loo = {}, {}, {}, {}, {}
    for name in SMALL:
        p = gl.problem(name)
        _, first, v, second = parts(p)
        score[name], muprop[name] = (moments(e, p)[1] for e in (gl.ScoreFunction(), gl.MuProp()))
        local[name] = gl.LocalExpectation().evaluations(p.q()) * moments(gl.LocalExpectation(), p)[1]
        average[name], loo[name] = first + v * second / 19, first + v * second + target(p).square().sum()
    assert all(average[name] < loo[name] for name in SMALL)
    p = gl.problem("bernoulli_3")
    _, first, v, second = parts(p)
    pair = 2 * disarm(p)
    double = {n: 2 * moments(gl.DoubleControlVariate(2), gl.problem(n), pairs)[1] for n in SMALL}
    assert double["bernoulli_3"] < pair and [n for n in SMALL if double[n] > loo[n]] == ["bernoulli_toy_499"]
    assert first + (v * second + target(p).square().sum()) / 3 < pair < loo["bernoulli_3"]
    assert average["onehot_10"] < score["onehot_10"] and average["bernoulli_3"] > score["bernoulli_3"]
    assert muprop["onehot_5x3"] < 0.1 * score["onehot_5x3"] and muprop["bernoulli_3"] > score["bernoulli_3"]
    assert local["onehot_5x3"] < 2 * muprop["onehot_5x3"] and local["bernoulli_3"] > score["bernoulli_3"]


def disarm(p: gl.Problem) -> Tensor:
    """The variance of DisARM on three bits: its gradient is constant between the cuts p and 1 - p of each uniform."""
    probs = p.params["logits"].sigmoid()
    cuts = torch.stack([0 * probs, torch.minimum(probs, 1 - probs), torch.maximum(probs, 1 - probs), 0 * probs + 1])
    index = torch.cartesian_prod(*[torch.arange(3)] * 3)
    u, width = ((cuts[1:] + cuts[:-1]) / 2).gather(0, index), cuts.diff(dim=0).gather(0, index).prod(-1)
    many = p.params["logits"].expand(27, 3).clone().requires_grad_()
    (grads,) = torch.autograd.grad(gl.DisARM().estimate(p.make_q({"logits": many}), p.f, u[None]).sum(), many)
    torch.testing.assert_close(width @ grads, target(p))
    return (width @ (grads - target(p)) ** 2).sum()


def test_header():
    unbiased = {gl.ScoreFunction: True, gl.Reparameterization: True, gl.GumbelSoftmax: False, gl.REBAR: True}
    assert all(cls.traits.unbiased == value for cls, value in unbiased.items())
    assert gl.REBAR.traits.needs_gradient and not gl.RELAX.traits.needs_gradient
    assert gl.GumbelSoftmax.traits.relaxes and not gl.ScoreFunction.traits.relaxes


def test_speed():
    """The stored lines carry the chapter's claims about networks, and say where they were measured."""
    scripts = json.loads((BOOK / "data" / "speed_cpu.json").read_text(encoding="utf-8"))["scripts"]
    lines = {line["ratio"]: line for part in scripts.values() for line in part["lines"]}
    assert all(part["where"]["versions"]["torch"] and part["where"]["threads"] == 1 for part in scripts.values())
    assert all(line["rounds"] >= 15 for line in lines.values() if "rounds" in line)
    assert lines["L1: work, Taylor M=1 / leave-one-out S=2"]["value"] < 0.012
    assert lines["J: work, adaptive M=5 / leave-one-out S=2"]["value"] < 0.06
    assert lines["L: exact flips, compiled / floor"]["median"] < 3.2
    assert not any(line["verdict"] == "failed" for line in lines.values())
    for model, ours in (("L", "exact flips"), ("J", "adaptive M=2")):
        head = f"{model}: ELBO after 20 s, "
        curves = {name.removeprefix(head): x["curve"] for name, x in lines.items() if name.startswith(head)}
        biased = [curves[e] for e in ("Gumbel-softmax", "ReinMax")]
        assert len(curves) == 5
        assert max(x[2] for x in biased) > curves[ours][2], "after 6 seconds a biased one leads"
        assert curves[ours][-1] == max(x[-1] for x in curves.values()), "after 20 seconds none does"


def test_the_times_are_those_of_the_chapter():
    """Every problem and every estimator that serves it has a time, with its provenance."""
    result = json.loads((BOOK / "data" / "which_cpu.json").read_text(encoding="utf-8"))
    assert result["device"] == "cpu" and result["name"] and result["torch"] and result["rounds"] >= 5
    assert set(result["microseconds"]) == {*SMALL, "bernoulli_20"}
    served = {name: len(times) for name, times in result["microseconds"].items()}
    assert served == {"bernoulli_toy_499": 17, "bernoulli_3": 17, "bernoulli_20": 14, "onehot_10": 15, "onehot_5x3": 15}
    assert all(t > 0 for times in result["microseconds"].values() for t in times.values())
