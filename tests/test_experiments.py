"""Training the paper's models: all runs as one, exact resume, tables, and the command."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode

import gradlab as gl
from gradlab.cli import MODELS, TRAINABLE, main
from gradlab.experiments import models, results, tables
from gradlab.experiments.paper import PAPER
from gradlab.experiments.train import (
    DATA,
    DEFAULTS,
    Experiment,
    Images,
    Pixels,
    Runs,
    Shuffle,
    _build,
    bound,
    load,
    train,
)

TINY = models.Sizes(bits=4, hidden=5, factors=2, values=3, wide=(6, 5))
PIXELS = 6
MEAN = torch.linspace(0.2, 0.8, PIXELS, dtype=torch.float64)
DATA_TYPE = pytest.mark.usefixtures("float32")  # of images


@pytest.fixture
def float32() -> Iterator[None]:
    """Images are float32, and so are the models that the command trains."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def tiny(model: str, estimator: str, seeds: list[int], samples: int = 2) -> Runs:
    """A model small enough to enumerate."""
    return Runs(models.build(model, MEAN, 1, models.make_estimator(estimator, samples), seeds, TINY), len(seeds))


def pictures(runs: int, rows: int = 7) -> Tensor:
    return torch.bernoulli(torch.full((runs, rows, PIXELS), 0.5), generator=torch.Generator().manual_seed(1))


class Noise(TorchDispatchMode):
    """Records what random operations return, or plays one run of a recording."""

    def __init__(self, tape: list[Tensor], run: int | None = None) -> None:
        super().__init__()
        self.tape, self.run, self.at = tape, run, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return out
        if self.run is None:
            self.tape.append(out.clone())
            return out
        both = self.tape[self.at]
        self.at += 1
        assert both.ndim == out.ndim, (both.shape, out.shape)
        (dim,) = (i for i, (n, m) in enumerate(zip(both.shape, out.shape, strict=True)) if n != m)
        return out.copy_(both.narrow(dim, self.run * out.shape[dim], out.shape[dim]))  # runs come first in a dim


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimator", [*TRAINABLE])
def test_a_run_among_others_is_the_run_alone(model: str, estimator: str) -> None:
    """Three steps of Adam with the same noise end at the same parameters, learned control variates included."""
    x, tape = pictures(3), []
    together = tiny(model, estimator, [5, 6, 7])
    with Noise(tape):
        descend(together, x)
    for run, seed in enumerate([5, 6, 7]):
        alone = tiny(model, estimator, [seed])
        with Noise(tape, run):
            descend(alone, x[run : run + 1])
        for (name, p), own in zip(together.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p[run : run + 1], own, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(together.total[run : run + 1], alone.total)


def descend(runs: Runs, x: Tensor) -> None:
    adam = torch.optim.Adam([p for p in runs.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        runs(x).mean().backward()
        adam.step()


def test_a_plain_mean_would_be_noticed() -> None:
    """Mutant: without the factor R each run has a third of its gradient."""
    together, x = tiny("one-layer-sbn", "local-expectation", [0, 1, 2]), pictures(3)
    torch.manual_seed(0)
    together(x).mean().backward()
    right = together.elbo.prior.logits.grad.clone()
    together.zero_grad()
    torch.manual_seed(0)
    together.elbo(x).mean().backward()
    torch.testing.assert_close(3 * together.elbo.prior.logits.grad, right)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["gumbel-softmax", "local-expectation", "rebar", "relax"])
def test_more_runs_need_no_more_operations(estimator: str) -> None:
    """What makes five seeds cheap on a GPU: a step launches as many kernels as for one."""
    calls = []
    for seeds in ([0], [0, 1, 2, 3, 4]):
        runs = tiny("bernoulli-vae", estimator, seeds)
        with Count() as count:
            runs(pictures(len(seeds))).mean().backward()
        calls.append(count.calls)
    assert calls[1] <= calls[0] * 1.05, calls


def test_the_starts_differ_by_seed_only() -> None:
    both = tiny("categorical-vae", "relax", [3, 4])
    again = tiny("categorical-vae", "relax", [4, 9])
    for (name, p), q in zip(both.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p[1], q[0]), name
    weight = both.elbo.guide.net[1].weight
    assert not torch.equal(weight[0], weight[1])


def test_the_order_of_the_data_is_that_of_the_seed() -> None:
    one, two = Shuffle(20, 6, (7,)), Shuffle(20, 6, (3, 7))
    assert len(one) == 3
    for epoch in range(2):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        for a, b in zip(one, two, strict=True):
            assert a.shape == (1, 6)
            assert torch.equal(a[0], b[1])
            assert not torch.equal(b[0], b[1])
    seen = torch.cat(list(one), 1)[0]
    assert len(seen.unique()) == 18


def test_binarisation_is_that_of_the_seed() -> None:
    x, index = torch.full((5, 40), 0.5), torch.tensor([[0, 1], [2, 3]])
    both, alone = Pixels(x, (1, 2), dynamic=True), Pixels(x, (2,), dynamic=True)
    for _ in range(2):
        assert torch.equal(both[index][1:], alone[index[1:]])
    assert not torch.equal(both[index], both[index])
    assert torch.equal(Pixels(x, (1, 2), dynamic=False)[index], x[index])


@pytest.mark.parametrize("model", MODELS)
def test_the_bound_is_below_and_close_to_log_p(model: str) -> None:
    """Against log p(x) by enumeration over all latents of a tiny model."""
    runs = tiny(model, "local-expectation", [0, 1])
    x = pictures(1, 9)[0]
    found = bound(runs.elbo, x, 2, Experiment(model, "local-expectation", test_samples=3000))
    expected = exact_log_likelihood(runs.elbo, x)
    assert (found - expected).abs().max() < 0.03, (found, expected)
    elbo = bound(runs.elbo, x.repeat(600, 1), 2, Experiment(model, "local-expectation", test_samples=1))
    assert (elbo < expected + 0.01).all()
    assert (elbo < found).all()


def exact_log_likelihood(elbo: gl.NegativeELBO, x: Tensor) -> Tensor:
    """The mean over x of log sum_z p(x | z) p(z), by run, with both layers enumerated."""
    prior = elbo.prior.prior if isinstance(elbo.prior, gl.NegativeELBO) else elbo.prior
    p = prior()
    top = gl.distributions.support(p)  # [V, R, 1, *E]
    log_p = p.log_prob(top)
    with torch.no_grad():
        if isinstance(elbo.prior, gl.NegativeELBO):
            middle = gl.distributions.support(elbo.guide(x.expand(2, *x.shape)))[:, :, :1]  # [V, R, 1, d]
            given = elbo.prior.likelihood(top)  # [V, R, 1]
            log_p = (given.log_prob(middle[:, None]) + log_p).logsumexp(1)
            top = middle
        log_x = elbo.likelihood(top).log_prob(x.expand(2, *x.shape))  # [V, R, N]
    return (log_x + log_p).logsumexp(0).mean(1).double()


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_that_of_the_exact_bound(model: str) -> None:
    """The local expectation of every model is unbiased for the ELBO: |z| < 5 against enumeration."""
    x = pictures(1, 1)
    rows = x.expand(1, 4000, PIXELS)
    exact = models.build(model, MEAN, 1, lambda *_: gl.Enumerate(), [0], TINY)
    exact(x).sum().backward()
    runs = models.build(model, MEAN, 1, models.make_estimator("local-expectation", 1), [0], TINY)
    torch.manual_seed(0)
    bias = next(m for m in reversed(list(runs.guide.modules())) if isinstance(m, models.Affine)).bias
    wanted = next(m for m in reversed(list(exact.guide.modules())) if isinstance(m, models.Affine)).bias.grad
    gradients = []
    for _ in range(10):
        (g,) = torch.autograd.grad(runs(rows).mean(), bias)
        gradients.append(g)
    found = torch.stack(gradients)
    z = (found.mean(0) - wanted) / (found.std(0) / 10**0.5 + 1e-7)
    assert z.abs().max() < 10, z  # Student with 9 degrees of freedom


EXPERIMENT = Experiment("one-layer-sbn", "rebar", epochs=4, seeds=(0, 1), tests=2, test_samples=5, batch_size=200)


def silent(experiment: Experiment, out: Path, **kwargs: Any) -> dict[str, Any]:
    return train(experiment, out, progress=False, **kwargs)


def numbers(done: dict[str, Any]) -> Any:
    """What a result says, without times."""
    return done["epochs"]["train"], done["epochs"]["log_variance"], done["tests"]["test"], done["settings"]


@DATA_TYPE
def test_a_result_says_how_it_came_about(tmp_path: Path) -> None:
    done = silent(EXPERIMENT, tmp_path, command="gradlab train ...")
    stored = json.loads((tmp_path / f"{EXPERIMENT.name}.json").read_text())
    assert stored == json.loads(json.dumps(done))
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["command"] == "gradlab train ..."
    assert stored["device"].startswith("cpu")
    assert stored["tests"]["epoch"] == [2, 4]
    assert len(stored["test"]) == 2
    assert stored["epochs"]["train"][-1][0] > stored["epochs"]["train"][0][0]
    assert silent(EXPERIMENT, tmp_path) == stored  # nothing is trained twice


@DATA_TYPE
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of an epoch, the same call ends with the same numbers."""
    whole = silent(EXPERIMENT, tmp_path / "whole")
    count, forward = 0, Runs.forward

    def interrupted(self: Runs, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 18:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(Runs, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        silent(EXPERIMENT, tmp_path / "cut")
    assert count == 18
    assert "test" not in json.loads((tmp_path / "cut" / f"{EXPERIMENT.name}.json").read_text())
    monkeypatch.setattr(Runs, "forward", forward)
    assert numbers(silent(EXPERIMENT, tmp_path / "cut")) == numbers(whole)


def test_training_in_double_precision(tmp_path: Path) -> None:
    """The default dtype of torch, which a notebook may have set, is that of the model."""
    done = silent(replace(EXPERIMENT, epochs=1), tmp_path)
    state = torch.load(tmp_path / f"{EXPERIMENT.name}.pt", weights_only=True)["model"]
    assert state["elbo.prior.logits"].dtype == torch.float64
    assert done["epochs"]["train"][0][0] < 0


def test_another_experiment_is_not_overwritten(tmp_path: Path) -> None:
    silent(replace(EXPERIMENT, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"another experiment \(epochs: found 1, expected 4\).*--out"):
        silent(EXPERIMENT, tmp_path)


@DATA_TYPE
def test_compiled_is_the_same_mathematics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and run by the kernels of eager mode: the same numbers to rounding."""
    experiment = replace(EXPERIMENT, estimator="gumbel-softmax", epochs=2)
    eager = silent(experiment, tmp_path / "eager")
    compiled = []

    def compile_eagerly(self: Runs, **how: Any) -> None:
        compiled.append(how)
        nn.Module.compile(self, backend="aot_eager")

    monkeypatch.setattr(Runs, "compile", compile_eagerly)
    traced = silent(replace(experiment, compiled=True), tmp_path / "traced")
    assert compiled == [{"mode": None}]
    assert Distribution._validate_args  # torch.compile would leave it off
    torch.testing.assert_close(torch.tensor(traced["epochs"]["train"]), torch.tensor(eager["epochs"]["train"]))
    base = replace(EXPERIMENT, estimator="disarm", compiled=True)
    assert [e.compiled for e in tables.cells("table1", base)][:3] == [False, False, True]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="epochs: found 0"):
        replace(EXPERIMENT, epochs=0)
    with pytest.raises(ValueError, match="seeds"):
        replace(EXPERIMENT, seeds=(1, 1))
    with pytest.raises(ValueError, match="compiled: found the estimator rebar"):
        replace(EXPERIMENT, compiled=True)
    with pytest.raises(ValueError, match="model: found 'x', expected one of one-layer-sbn"):
        models.build("x", MEAN, 1, models.make_estimator("rebar", 1), [0])
    with pytest.raises(ValueError, match="estimator: found 'x'"):
        models.make_estimator("x", 1)
    with pytest.raises(ValueError, match="data: found 'x', expected one of digits"):
        load("x")


def test_the_second_layer_draws_one_sample_for_each_of_the_first() -> None:
    """Else S samples would cost S squared."""
    images = Images(pictures(1)[0], pictures(1)[0], 1, False)
    for name, samples, above in (("local-expectation", 5, 1), ("score-loo", 4, 2), ("rebar", 3, 1)):
        experiment = Experiment("two-layer-sbn", name, samples=samples)
        elbo = _build(experiment, images, None).elbo
        assert (elbo.estimator.num_samples, elbo.prior.estimator.num_samples) == (samples, above)


def test_names_agree() -> None:
    """The command lists them without importing the experiments."""
    assert models.MODELS == MODELS
    assert models.TRAINABLE == TRAINABLE
    assert set(DATA) == set(DEFAULTS)
    labels = {t: {label for columns in rows.values() for label in columns} for t, rows in PAPER.items()}
    assert all(labels[t] <= {m.label for m in table.methods} for t, table in tables.TABLES.items())
    assert {model for rows in PAPER.values() for _, model in rows} <= set(MODELS)


@DATA_TYPE
def test_counts_have_a_binomial_likelihood() -> None:
    images = load("digits")
    assert images.levels == 16
    elbo = models.build("one-layer-sbn", images.train.mean(0), 16, models.make_estimator("disarm", 1), [0], TINY)
    p = elbo.likelihood(torch.zeros(1, 3, 4))
    assert p.log_prob(images.train[None, :3]).shape == (1, 3)
    assert p.mean.max() <= 16


def reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits, few of them."""
    x = load("digits")
    monkeypatch.setitem(DATA, "digits", lambda: Images(x.train[:60], x.test[:20], 16, False))


@DATA_TYPE
def test_a_table_is_resumable_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced(monkeypatch)
    base = Experiment("", "", epochs=2, seeds=(0, 1), tests=2, test_samples=2, batch_size=20)
    said: list[str] = []
    content = tables.reproduce("table2", base, tmp_path, progress=False, say=said.append)
    assert sum("2 epochs" in line for line in said) == 16
    assert set(content["models"]) == {"one-layer-categorical", "categorical-vae"}
    assert json.loads((tmp_path / "table2-digits.json").read_text())["models"].keys() == content["models"].keys()
    again: list[str] = []
    tables.reproduce("table2", base, tmp_path, progress=False, say=again.append)
    assert all("(kept)" in line for line in again)
    for cell in content["models"]["categorical-vae"].values():
        assert cell["equal_time"] is None or cell["equal_time"]["epoch"] >= 1
    assert any(
        cell["equal_time"]["epoch"] > 2 for cell in content["models"]["categorical-vae"].values() if cell["equal_time"]
    )
    text = tables.markdown(content)
    assert text.count("\n") == 17
    assert "-103.49 ± 0.73" in text
    assert "paper, omniglot" in text


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "gradlab reproduce table1" in capsys.readouterr().err
    curves = {"train": [-3.0, -2.0], "log_variance": [None, -5.0]}
    equal = {"seconds": 1.0, "epoch": 9, "test": [-1.5, -1.7]}
    cell = {"test": [-2.0, -2.5], "seconds_an_epoch": 0.5, "equal_time": equal, "curves": curves}
    content = {
        "table": "table1",
        "data": "mnist",
        "settings": {"epochs": 2},
        "models": {"bernoulli-vae": {"REBAR": cell}},
    }
    results.write(tmp_path / "table1-mnist.json", content)
    assert main(["report", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| bernoulli-vae | REBAR | -2.25 ± 0.35 | -1.60 ± 0.14 | 9 | 0.5 | -127.76 ± 0.84 |" in out
    assert (tmp_path / "table1-mnist-bernoulli-vae.png").stat().st_size > 1000


COMMAND = [sys.executable, "-m", "gradlab"]


def test_the_categorical_vae_reaches_its_bound_within_a_minute(tmp_path: Path) -> None:
    """The command of the README, with its defaults, on one core: the test images are worth -126 nats at least."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*COMMAND, "train", "--model", "categorical-vae", "--data", "digits", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    found = re.search(r"log p\(x\) >= (-[\d.]+) nats", done.stdout)
    assert found is not None
    assert float(found[1]) > -126, done.stdout
    assert seconds < 60, seconds


@DATA_TYPE
def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    options = [
        "--model",
        "one-layer-sbn",
        "--estimator",
        "disarm",
        "--epochs",
        "40",
        "--tests",
        "1",
        "--test-samples",
        "5",
    ]
    command = [*COMMAND, "train", *options, "--out", str(tmp_path / "cut")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "digits-one-layer-sbn-disarm-1.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 300)
    run.send_signal(signal.SIGINT)
    _, words = run.communicate(timeout=60)
    assert run.returncode == 130, words
    assert "The same command goes on" in words
    assert main(["train", *options, "--out", str(tmp_path / "cut")]) == 0
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    cut, whole = (results.read(tmp_path / f / "digits-one-layer-sbn-disarm-1.json") for f in ("cut", "whole"))
    assert cut is not None
    assert whole is not None
    assert numbers(cut) == numbers(whole)


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@DATA_TYPE
def test_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train", "--model", "one-layer-sbn", "--out", str(tmp_path)]
    assert main([*options, "--device", "nowhere"]) == 2
    assert "device: found 'nowhere'" in capsys.readouterr().err
    assert main([*options, "--rate", "1e39", "--epochs", "3", "--estimator", "disarm"]) == 2
    assert "found NaN or infinity" in capsys.readouterr().err


@DATA_TYPE
def test_mnist_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command on MNIST, from the data folder."""
    if not (Path(os.environ.get("GRADLAB_DATA", "/nonexistent")) / "mnist").is_dir():
        pytest.skip("GRADLAB_DATA names no folder with mnist")
    options = [
        "--model",
        "one-layer-categorical",
        "--estimator",
        "gumbel-softmax",
        "--data",
        "mnist",
        "--rate",
        "0.001",
    ]
    assert main(["train", *options, "--epochs", "1", "--test-samples", "2", "--out", str(tmp_path)]) == 0
    found = re.search(r"log p\(x\) >= (-[\d.]+) nats", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > -190
