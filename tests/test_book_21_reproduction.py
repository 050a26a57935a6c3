"""What chapter 21 claims: closed forms of both toys, the divergence, the fast rules, and what is stored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import distributions as D

import gradlab as gl
from gradlab.experiments import logistic, tables, toys
from gradlab.experiments.paper import PAPER
from gradlab.rules import log_mgf
from gradlab.special import log_gamma_grad
from gradlab.taylor import derivatives

ROOT = Path(__file__).resolve().parent.parent
EPS = 0.49
PLACES = [(1.0, 1.0), (0.5, 2.0), (5.0, 0.2), (2.0, 3.0)]


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


T = torch.linspace(-60, 6, 20_001, dtype=torch.float64)


def moments(k, scale, g):
    """The mean and the variance of g(z) for a gamma variable."""
    w = (k * T - T.exp() - math.lgamma(k)).exp() * (T[1] - T[0])
    value = g(scale * T.exp())
    mean = (w * value).sum()
    return mean, (w * value**2).sum() - mean**2


# ------------------------------------------------------------------------------------------------------------ toys


@pytest.mark.parametrize("k, scale", PLACES)
@pytest.mark.parametrize("loss, cost", [(toys.square_loss, toys.square), (toys.decay_loss, toys.decay)])
def test_loss(loss, cost, k, scale):
    assert loss(tensor(k), tensor(scale)) == pytest.approx(moments(k, scale, cost)[0].item(), abs=1e-8)


def printed_rule(sign, k, scale):
    theta = tensor([k, scale]).requires_grad_()
    q = D.Gamma(theta[0], 1 / theta[1])
    value = gl.magic_box(log_mgf(q, tensor(sign * EPS))) * (1 + EPS * scale) ** -k
    return torch.autograd.grad(value, theta)[0]


@pytest.mark.parametrize("k, scale", PLACES)
def test_sign(k, scale):
    theta = tensor([k, scale]).requires_grad_()
    exact = torch.autograd.grad(toys.decay_loss(*theta), theta)[0]
    torch.testing.assert_close(printed_rule(-1, k, scale), exact, rtol=1e-12, atol=1e-12)
    printed = printed_rule(1, k, scale)
    if EPS * scale < 1:
        assert (printed * exact < 0).all()


def test_printed_numbers():
    assert printed_rule(-1, 2.0, 1.0).tolist() == pytest.approx([-0.17962079, -0.29625608], abs=1e-8)
    assert printed_rule(1, 2.0, 1.0).tolist() == pytest.approx([0.3032947, 0.86553247], abs=1e-7)
    weight = -torch.log(tensor(1 - 3 * EPS) + 0j) * (1 + 3 * EPS) ** -2
    assert log_mgf(D.Gamma(tensor(2.0), tensor(1 / 3)), tensor(EPS)) == math.inf
    assert (weight.real.item(), weight.imag.item()) == pytest.approx((0.1238, -0.5149), abs=1e-4)


@pytest.mark.parametrize("k, scale", PLACES)
def test_variances(k, scale):
    """The closed forms of toy 1, and which of the two estimators has less variance."""

    def slope(z):
        return 2 * (z - EPS)

    by_k = moments(k, scale, lambda z: scale * slope(z) + scale**2)
    by_scale = moments(k, scale, lambda z: k * slope(z) + 2 * k * scale)
    theta = tensor([k, scale]).requires_grad_()
    exact = torch.autograd.grad(toys.square_loss(*theta), theta)[0]
    assert [by_k[0].item(), by_scale[0].item()] == pytest.approx(exact.tolist(), abs=1e-8)
    assert by_k[1].item() == pytest.approx(4 * k * scale**4, rel=1e-6)
    assert by_scale[1].item() == pytest.approx(4 * k**3 * scale**2, rel=1e-6)
    path = log_gamma_grad(tensor(k), T)
    mean, implicit = moments(k, scale, lambda z: slope(z) * z * path)
    assert mean.item() == pytest.approx(exact[0].item(), abs=1e-6)
    assert implicit > by_k[1]


@pytest.mark.parametrize("k, scale", PLACES)
def test_exact_rule_on_toy_1(k, scale):
    """The exact rule adds the variance of its jump: a gamma variable of shape 1 for k, and 2 for the scale."""
    for shape, weight, formula in (
        (1.0, scale, 4 * scale**4 * (k + 1 / 4)),
        (2.0, k, 4 * k**2 * scale**2 * (k + 1 / 2)),
    ):
        u = torch.linspace(-60, 6, 801, dtype=torch.float64)
        wz = (k * u - u.exp() - math.lgamma(k)).exp() * (u[1] - u[0])
        wv = (shape * u - u.exp() - math.lgamma(shape)).exp() * (u[1] - u[0])
        w, z, v = wz[:, None] * wv, scale * u.exp()[:, None], scale * u.exp()
        value = weight * (toys.square(z + v) - toys.square(z)) / v
        mean = (w * value).sum()
        assert ((w * value**2).sum() - mean**2).item() == pytest.approx(formula, rel=1e-4)


def test_trajectories_agree_in_mean():
    """The paper's rule for toy 1, equation 24, is the series of order 2, by hand."""
    theta = tensor([2.0, 1.0]).requires_grad_()
    torch.manual_seed(0)
    q = D.Gamma(theta[0].expand(5), (1 / theta[1]).expand(5))
    loss = gl.StochasticBackprop(form="series", order=2)(q, toys.square).sum()
    found = torch.autograd.grad(loss, theta)[0]
    torch.manual_seed(0)
    z = gl.StochasticBackprop(form="series", order=2).draw(q).z[0]
    k, scale = 2.0, 1.0
    expected = tensor([(scale * 2 * (z - EPS) + scale**2).sum(), (k * 2 * (z - EPS) + 2 * k * scale).sum()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("loc, scale", [(0.0, 1.0), (0.7, 0.3), (-2.0, 0.05), (1.3, 4.0)])
def test_divergence(loc, scale):
    p, q = D.Laplace(tensor(0.0), tensor(1.0)), D.Laplace(tensor(loc), tensor(scale))
    found = logistic.kl_to_standard(q.loc, q.scale)
    assert found.item() == pytest.approx(D.kl_divergence(q, p).item(), abs=1e-12)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    w = q.icdf(u)
    assert (q.log_prob(w) - p.log_prob(w)).mean().item() == pytest.approx(found.item(), abs=1e-4)


def test_even_derivatives():
    h = torch.linspace(-5, 5, 41, dtype=torch.float64)
    s = torch.sigmoid(h)
    powers = torch.stack([(s * (1 - s)) ** m for m in range(1, 9)])
    terms = derivatives(torch.nn.functional.logsigmoid, h, torch.ones_like(h), 16, taylor=True)
    for n, row in enumerate(logistic.even_derivatives(16) @ powers, 1):
        torch.testing.assert_close(row, terms[2 * n], rtol=1e-9, atol=1e-9)


def gradients(loss, q, theta):
    torch.manual_seed(1)
    return torch.autograd.grad(loss(q).sum(), theta)


@pytest.mark.parametrize("order", [2, 4, 8, 16, None])
def test_fast_rules(order):
    """The rules of the experiment are those of the package, for the same samples."""
    torch.manual_seed(0)
    rows = torch.randn(3, 7, 4, dtype=torch.float64)
    theta = [torch.randn(3, 4, dtype=torch.float64), 0.2 + torch.rand(3, 4, dtype=torch.float64)]
    q = D.Laplace(*(p.requires_grad_() for p in theta))
    fast = logistic.exact(5) if order is None else logistic.series(order, 5)
    form = {} if order is None else {"form": "series", "order": order}
    slow = logistic.plain(gl.StochasticBackprop(5, **form))
    if order is not None:  # Taylor arithmetic knows einsum, not the reshaping of a batch of weights
        slow = lambda q, rows: gl.StochasticBackprop(5, **form)(  # noqa: E731
            D.Independent(q, 1),
            lambda w: -torch.nn.functional.logsigmoid(torch.einsum("...nd,...d->...n", rows, w)).mean(-1),
        )
    for a, b in zip(*(gradients(lambda q, f=f: f(q, rows), q, theta) for f in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- what is stored


def stored(name):
    return json.loads((ROOT / "book" / "data" / f"{name}.json").read_text(encoding="utf-8"))


def curve(content, method, key, case=None):
    """The mean of the runs, at the checkpoints."""
    found = content["results"][method]
    return tensor((found[case] if case else found)[key]).mean(0)


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3", "variance"])
def test_stored(name):
    """What the book shows comes from the command, with the settings of the paper."""
    content = stored(name)
    assert content["command"].startswith(f"gradlab reproduce {name} --seeds 5")
    assert content["settings"]["runs"] == 5
    assert set(content["versions"]) == {"python", "torch", "gradlab"}


@pytest.mark.parametrize("dim", [1, 10, 100])
def test_figure_1(dim):
    """The series has the least loss and the least variance from the first steps on."""
    content = stored("figure1")
    for key in ("loss", "log_variance"):
        ours = curve(content, f"series, d={dim}", key)[1:]
        for other in ("score", "g-rep", "implicit", "stochastic backprop"):
            assert (ours < curve(content, f"{other}, d={dim}", key)[1:]).all()
    assert curve(content, f"series, d={dim}", "loss")[-1] == pytest.approx(0.145, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 10, 100])
def test_figure_2(dim):
    """The implicit path is ahead of the series, which is ahead of the exact rule; the printed rule climbs."""
    content = stored("figure2")
    end = {m: curve(content, f"{m}, d={dim}", "loss")[-1].item() for m in toys.methods("figure2")}
    assert end["implicit"] == pytest.approx(0.0016, abs=1e-4)
    assert end["series"] == pytest.approx(0.0025, abs=1e-4)
    assert end["stochastic backprop"] == pytest.approx(0.0029, abs=1e-4)
    assert end["series, as printed"] == pytest.approx(0.985, abs=1e-3)
    ours, score = (curve(content, f"{m}, d={dim}", "log_variance")[1:] for m in ("series", "score"))
    assert (ours < score).all()


@pytest.mark.parametrize("case", ["standard, b=1", "standard, b=0.1", "min-max, b=1", "min-max, b=0.1"])
def test_figure_3(case):
    content = stored("figure3")
    elbo, every, scales = (
        {m: curve(content, m, key, case)[1:] for m in content["results"]}
        for key in ("elbo", "log_variance", "log_variance_scale")
    )
    exact, path = "stochastic backprop", "reparameterization"
    assert ((elbo[exact] - elbo[path]) > -1e-3).all()
    assert (scales[path] - scales[exact] > 3.7).all()
    gain = (every[path] - every[exact]).mean()
    assert (0.7 < gain < 1.2) if case.endswith("b=1") else abs(gain) < 0.1
    ends = [elbo[m][-1] for m in (exact, "series, order 4", "series, order 8", "series, order 16")]
    gap = {"standard, b=1": 0.293, "standard, b=0.1": 0.007, "min-max, b=1": 0.243, "min-max, b=0.1": 0.0001}[case]
    assert (max(ends) - min(ends)).item() == pytest.approx(gap, abs=1e-3)
    assert elbo["KL not divided"][-1] < elbo[path][-1] - 0.3


def test_orders():
    """Order 8 is safe where b|x| is small."""
    content = stored("variance")["results"]
    assert stored("variance")["settings"]["scales"] == [0.02, 0.1, 0.3, 1.0]
    for place in ("standard, start", "standard, mode", "min-max, start", "min-max, mode"):
        exact, order8, path = (
            tensor(content[f"{m}, {place}"]["variance"])
            for m in ("stochastic backprop", "series, order 8", "reparameterization")
        )
        assert order8[0] < 2 * exact[0]
        assert (order8[3] > 1e6 * exact[3]) == place.startswith("standard")
        assert (path > 40 * exact).all()
        second = tensor(content[f"stochastic backprop, order 2, {place}"]["variance"]) / exact
        assert (second > 1).all() and second.max() < 2.3


def test_sizes_of_the_features():
    pytest.importorskip("sklearn")
    rows = {x: logistic.scaled_rows(x) for x in ("min-max", "standard")}
    assert [x.shape for x in rows.values()] == [(569, 30)] * 2
    sizes = [x.abs().mean().item() for x in rows.values()]
    assert sizes == pytest.approx([0.24, 0.75], abs=0.005)
    assert rows["standard"].abs().max().item() == pytest.approx(12.07, abs=0.01)


# ---------------------------------------------------------------------------------------------------------- tables


def test_printed():
    """What the paper's own numbers say, and do not."""
    rows = [row for (_, _), row in PAPER["table1"].items()]
    mean = [{k: v for k, (v, _) in row.items()} for row in rows]
    assert all(m["BSB (S=1)"] > max(m["REBAR"], m["RELAX"]) for m in mean)
    assert sum(m["BSB (S=10)"] < m["BSB (S=1)"] for m in mean) == 5
    assert mean[0]["BSB (S=1)"] - mean[0]["REBAR"] == pytest.approx(3.27)
    hots = [{k: v for k, (v, _) in row.items()} for row in PAPER["table2"].values()]
    assert max(hots[0], key=hots[0].get) == "CSB (S=5)"
    assert max(hots[2], key=hots[2].get) == "CSB (S=1)"
    assert all(m["CSB (S=1)"] > m["Gumbel-softmax"] for m in hots)
    times = [[v for v, _ in row.values()] for row in PAPER["table3"].values()]
    assert [round(t[1] / t[0], 2) for t in times] == [1.54, 1.77]


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_stored_tables(name):
    """Every cell is there, from five runs, by the command that the chapter names."""
    content = stored(f"{name}-digits")
    for model in tables.TABLES[name].models:
        found = content["models"][model]
        assert list(found) == [m.label for m in tables.TABLES[name].methods]
        for cell in found.values():
            assert len(cell["test"]) == 5
            assert cell["command"].startswith("gradlab reproduce table")
            assert cell["commit"]
            assert cell["device"].startswith("cpu")
    assert content["settings"]["epochs"] == (30 if name != "table3" else 3)


def bounds(content, model, method, equal=False):
    cell = content["models"][model][method]
    return tensor((cell["equal_time"] if equal else cell)["test"])


def leads(a, b):
    """By how much, and in standard errors."""
    gap = a.mean() - b.mean()
    return gap.item(), (gap / (a.var() / len(a) + b.var() / len(b)).sqrt()).item()


def test_tables():
    """The verdicts of chapter 21 on the tables."""
    bits, hots = stored("table1-digits"), stored("table2-digits")
    for model in tables.TABLES["table1"].models:
        for equal, low, high in ((False, 6.3, 8.7), (True, 5.7, 15.5)):
            for peer in ("REBAR", "RELAX"):
                gap, z = leads(bounds(bits, model, "BSB (S=1)", equal), bounds(bits, model, peer, equal))
                assert low < gap < high
                assert z > 3
        assert 1.4 < leads(bounds(bits, model, "BSB (S=10)"), bounds(bits, model, "BSB (S=1)"))[0] < 2.05
    gaps = {
        (model, equal): leads(bounds(hots, model, "CSB (S=1)", equal), bounds(hots, model, "Gumbel-softmax", equal))
        for model in tables.TABLES["table2"].models
        for equal in (False, True)
    }
    assert gaps["one-layer-categorical", False][0] == pytest.approx(-2.2, abs=0.05)
    assert gaps["one-layer-categorical", True][0] == pytest.approx(-6.8, abs=0.05)
    assert abs(gaps["categorical-vae", False][1]) < 3
    assert abs(gaps["categorical-vae", True][1]) < 3
    ratios = [
        row["CSB (S=1)"]["seconds_an_epoch"] / row["Gumbel-softmax"]["seconds_an_epoch"]
        for row in stored("table3-digits")["models"].values()
    ]
    assert min(ratios) > 2
