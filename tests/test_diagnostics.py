"""replicate and compare: independent gradients, honest tables."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import gradlab as gl

LOGITS = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)


def make_q(logits: Tensor) -> td.Distribution:
    return td.Independent(td.Bernoulli(logits=logits), 1)


def f(z: Tensor) -> Tensor:
    return (z.sum(-1) - 1.2) ** 2


def table(**kwargs: object) -> gl.Comparison:
    chosen = {"score": gl.ScoreFunction(4), "loo": gl.ScoreFunction(4, gl.LeaveOneOut()), "sum": gl.Enumerate()}
    return gl.compare(chosen, make_q, f, LOGITS.to(torch.get_default_device()), **{"replicates": 4000, **kwargs})


def test_replicates_are_independent_and_right() -> None:
    params = {"loc": torch.tensor(0.7), "scale": torch.tensor(1.3)}
    grads = gl.replicate(lambda p: gl.Reparameterization(1)(td.Normal(**p), torch.square), params, 50_000)
    assert grads["loc"].shape == (50_000,)
    assert not grads["loc"].requires_grad
    for key, exact, variance in (("loc", 1.4, 4 * 1.3**2), ("scale", 2.6, 4 * 0.7**2 + 8 * 1.3**2)):
        g = grads[key]
        assert abs(g.mean() - exact) < 5 * (variance / len(g)) ** 0.5
        assert abs(g.var() / variance - 1) < 0.1
    assert abs(torch.corrcoef(torch.stack([grads["loc"][:-1], grads["loc"][1:]]))[0, 1]) < 0.03


@pytest.mark.parametrize("chunk", [None, 7, 100, 1000])
def test_chunks_cover_all(chunk: int | None) -> None:
    grads = gl.replicate(lambda p: p**2, torch.tensor([1.0, 2.0]), 100, chunk)
    assert grads.shape == (100, 2)
    torch.testing.assert_close(grads, torch.tensor([2.0, 4.0]).expand(100, 2))


def test_compare_finds_the_exact_gradient_and_no_bias() -> None:
    result = table()
    problem_grad = torch.autograd.grad(
        gl.Enumerate()(make_q(x := LOGITS.to(torch.get_default_device()).requires_grad_()), f), x
    )[0]
    torch.testing.assert_close(torch.tensor(result.exact), problem_grad)
    assert result["loo"].variance < result["score"].variance
    assert all(row.z < 5 for row in result.rows)
    assert result["sum"].variance < 1e-25
    assert result["sum"].evaluations == 8
    assert result["score"].cost == pytest.approx(result["score"].variance * result["score"].microseconds)


def test_compare_shows_a_bias() -> None:
    result = table(exact=torch.tensor([1.0, 1.0, 1.0]))
    assert result["loo"].z > 10
    assert result["loo"].bias > 0.5


def test_compare_without_an_exact_gradient() -> None:
    result = gl.compare(
        {"path": gl.Reparameterization()}, lambda p: td.Normal(p, 1.0), torch.sin, torch.tensor(0.3), replicates=50
    )
    assert result["path"].bias is None
    assert result["path"].z is None
    assert " - " in str(result)


def test_the_table_in_all_its_forms() -> None:
    result = table(replicates=100)
    text, page = str(result), result._repr_html_()
    assert text.splitlines()[0] == "100 replicates"
    assert text.splitlines()[1].split()[:2] == ["estimator", "bias"]
    assert page.count("<tr>") == 4
    assert "<caption>100 replicates</caption>" in page
    assert json.loads(json.dumps(result.to_dict()))["rows"][2]["name"] == "sum"
    with pytest.raises(KeyError, match="expected one of"):
        result["nope"]


def test_names_are_escaped_in_html() -> None:
    result = gl.compare({"<b>": gl.Enumerate()}, make_q, f, LOGITS.to(torch.get_default_device()), replicates=2)
    assert "&lt;b&gt;" in result._repr_html_()


def test_plot() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    axes = table(replicates=100).plot()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["score", "loo", "sum"]
    plt.close("all")


def test_learned_baselines_get_their_context() -> None:
    context = torch.ones(3, 2)
    result = gl.compare(
        {"learned": gl.ScoreFunction(2, gl.Learned(nn.Linear(2, 1)))},
        lambda p: td.Bernoulli(logits=p), lambda z: z, torch.zeros(3), replicates=50, context=context,
    )  # fmt: skip
    assert result["learned"].z < 6


@pytest.mark.parametrize("replicates", [0, 1])
def test_too_few_replicates(replicates: int) -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        table(replicates=replicates)
    with pytest.raises(ValueError, match="expected a positive int"):
        gl.replicate(lambda p: p, torch.ones(1), 0)


def test_nan_gradients_are_no_clean_bill_of_health() -> None:
    result = gl.compare(
        {"nan": gl.Reparameterization()},
        lambda p: td.Normal(p, 1.0), lambda z: (z * 0).abs().sqrt() + z, torch.tensor(0.3), exact=1.0, replicates=50,
    )  # fmt: skip
    assert not result["nan"].z < 4


def test_exact_gradients_are_matched_by_name() -> None:
    result = gl.compare(
        {"path": gl.Reparameterization()},
        lambda p: td.Normal(p["loc"], p["scale"]), torch.square,
        {"loc": torch.tensor(0.7), "scale": torch.tensor(1.3)}, exact={"scale": 2.6, "loc": 1.4}, replicates=2000,
    )  # fmt: skip
    assert result["path"].z < 5


def test_compare_leaves_the_estimator_alone_and_warms_up_its_average() -> None:
    problem = gl.problem("normal_square")
    estimator = gl.ScoreFunction(1, gl.MovingAverage())
    result = gl.compare({"average": estimator}, problem.make_q, problem.f, problem.params, replicates=4000)
    assert estimator.baseline.weight == 0
    plain = gl.compare({"score": gl.ScoreFunction(1)}, problem.make_q, problem.f, problem.params, replicates=4000)
    assert result["average"].variance < plain["score"].variance


def test_evaluations_are_those_of_a_gradient() -> None:
    """Measure-valued derivatives evaluate f for parameters that want a gradient only."""
    problem = gl.problem("bernoulli_3")
    table = gl.compare({"mvd": gl.MeasureValued()}, problem.make_q, problem.f, problem.params, replicates=10)
    assert table["mvd"].evaluations == 7
