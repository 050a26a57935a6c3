"""`reproduce`: what it stores, that it goes on where it was cut off, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gradlab.experiments import figures, logistic, results, toys
from gradlab.experiments.figures import reproduce
from gradlab.experiments.plan import Job, Plan, seeded

STORED = Path(__file__).resolve().parent.parent / "book" / "data"
TINY = {"runs": 2, "steps": 3, "replicates": 3}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few dimensions, samples and scales."""
    monkeypatch.setattr(toys, "DIMS", (1, 2))
    monkeypatch.setattr(logistic, "SAMPLES", 2)
    monkeypatch.setattr(logistic, "SCALES", (0.1, 1.0))


def stored(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@contextmanager
def cut_off(monkeypatch, after):
    """Ctrl-C in the job after so many."""
    whole, calls = toys.train, []

    def train(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(toys, "train", train)
    with pytest.raises(KeyboardInterrupt):
        yield
    monkeypatch.setattr(toys, "train", whole)


# ------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name, methods", [("figure1", 5), ("figure2", 6)])
def test_toys(tmp_path, name, methods):
    found = reproduce(name, **TINY, out=tmp_path)
    assert found == stored(tmp_path, name)
    assert found["command"] == f"gradlab reproduce {name} --seeds 2 --steps 3 --replicates 3"
    assert found["checkpoints"] == [0, 1, 2, 3]
    assert len(found["results"]) == 2 * methods
    for curves in found["results"].values():
        for key in ("loss", "log_variance"):
            values = torch.tensor(curves[key])
            assert values.shape == (2, 4) and values.isfinite().all()
        start = (1 - toys.EPSILON) ** 2 + 1 if name == "figure1" else 1 / (1 + toys.EPSILON)
        assert torch.tensor(curves["loss"])[:, 0].tolist() == pytest.approx([start] * 2, rel=1e-4)


def test_logistic(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    chosen = {k: v for k, v in logistic.methods().items() if k in ("reparameterization", "series, order 4")}
    monkeypatch.setattr(logistic, "methods", lambda: chosen)
    found = reproduce("figure3", **TINY, out=tmp_path, command="as typed")
    assert found == stored(tmp_path, "figure3")
    assert found["command"] == "as typed"
    assert list(found["results"]) == list(chosen)
    for cases in found["results"].values():
        assert set(cases) == {"standard, b=1", "standard, b=0.1", "min-max, b=1", "min-max, b=0.1"}
        for curves in cases.values():
            values = {key: torch.tensor(value) for key, value in curves.items()}
            assert set(values) == {"elbo", "accuracy", "log_variance", "log_variance_scale"}
            assert all(x.shape == (2, 4) and x.isfinite().all() for x in values.values())
            assert (values["elbo"] < 0).all() and ((values["accuracy"] >= 0) & (values["accuracy"] <= 1)).all()


def test_variance(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(logistic, "mode", lambda scaling: torch.full((30,), -0.1, dtype=torch.float64))
    found = reproduce("variance", replicates=50, out=tmp_path)
    assert found == stored(tmp_path, "variance")
    assert len(found["results"]) == 8 * 4
    assert all(torch.tensor(v["variance"]).shape == (2,) for v in found["results"].values())
    for place in ("standard, start", "standard, mode", "min-max, start", "min-max, mode"):
        path, exact = (found["results"][f"{m}, {place}"] for m in ("reparameterization", "stochastic backprop"))
        assert all(p > 10 * e > 0 for p, e in zip(path["variance"], exact["variance"], strict=True))


def test_no_place_nearby_is_better_than_the_mode():
    pytest.importorskip("sklearn")
    rows = logistic.scaled_rows("min-max")
    w = logistic.mode("min-max")
    near = torch.cat([w[None], w + 0.1 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))])
    energy = len(rows) * logistic.cost_of(rows)(near) + near.abs().sum(-1)
    assert energy.argmin() == 0


def test_the_same_numbers_again(tmp_path):
    first, second = (reproduce("figure1", **TINY, out=tmp_path / folder) for folder in "ab")
    assert first == second


@pytest.fixture
def _own_globals():
    """Threads and the default dtype are as before after the test."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("_own_globals")
def test_nothing_global_is_touched(tmp_path):
    """Neither generator, default dtype nor threads; nor do they matter."""
    found = []
    for threads, dtype in ((1, torch.float64), (2, torch.float32)):
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.manual_seed(threads)
        before = torch.get_rng_state()
        found.append(reproduce("figure2", **TINY, out=tmp_path / str(threads)))
        assert torch.equal(torch.get_rng_state(), before)
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------- going on


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    whole = reproduce("figure2", **TINY, out=tmp_path / "whole")
    with cut_off(monkeypatch, after=3):
        reproduce("figure2", **TINY, out=tmp_path)
    kept = stored(tmp_path, "figure2")
    assert list(kept["results"]) == ["score, d=1", "score, d=2", "g-rep, d=1"]
    assert kept["settings"] == whole["settings"]
    capsys.readouterr()
    assert reproduce("figure2", **TINY, out=tmp_path) == whole
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"figure2: {method}: kept" for method in kept["results"]]
    assert len(lines) == 12 and "g-rep, d=2" in lines[3] and "8 to go, about 0:00:" in lines[3]
    assert "to go" not in lines[-1]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["figure2.json"]


def test_cut_off_in_the_first_method(tmp_path, monkeypatch):
    with cut_off(monkeypatch, after=0):
        reproduce("figure1", **TINY, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3", "variance"])
def test_what_the_book_shows_is_finished(tmp_path, monkeypatch, name):
    """With the defaults and the book's file there is nothing to do."""
    monkeypatch.undo()
    shutil.copy(STORED / f"{name}.json", tmp_path)
    monkeypatch.setattr(figures, "seeded", None)
    assert reproduce(name, out=tmp_path) == stored(STORED, name)
    assert (tmp_path / f"{name}.json").read_bytes() == (STORED / f"{name}.json").read_bytes()


def test_who_began_is_kept(tmp_path, monkeypatch):
    """A file that two versions made says so."""
    with cut_off(monkeypatch, after=1):
        reproduce("figure1", **TINY, out=tmp_path)
    old = stored(tmp_path, "figure1")
    results.write(tmp_path / "figure1.json", old | {"commit": "abc"})
    found = reproduce("figure1", **TINY, out=tmp_path)
    assert found == stored(tmp_path, "figure1")
    assert [e["commit"] for e in found["earlier"]] == ["abc"] and found["commit"] == old["commit"]
    assert set(found["earlier"][0]) == set(results.provenance("", "cpu"))


# -------------------------------------------------------------------------------------------------------- refusals


def test_other_settings_are_refused(tmp_path):
    reproduce("figure1", **TINY, out=tmp_path)
    before = (tmp_path / "figure1.json").read_bytes()
    with pytest.raises(ValueError, match=r"another experiment \(runs: found 2, expected 1\)\. Give another folder"):
        reproduce("figure1", **TINY | {"runs": 1}, out=tmp_path)
    with pytest.raises(ValueError, match=r"steps: found 3, expected 4000; replicates: found 3, expected 100"):
        reproduce("figure1", runs=2, out=tmp_path)
    assert (tmp_path / "figure1.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{torn", "[]", '{"microseconds": {}}'])
def test_foreign_files_are_refused(tmp_path, text):
    (tmp_path / "figure1.json").write_text(text)
    with pytest.raises(ValueError, match=r"figure1\.json .* [Mm]ove it away"):
        reproduce("figure1", **TINY, out=tmp_path)
    assert (tmp_path / "figure1.json").read_text() == text


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("figure4", {}, "found 'figure4', expected one of figure1, figure2, figure3, variance"),
        ("figure1", {"runs": 0}, "runs: found 0, expected 1 or more"),
        ("figure1", {"steps": -1}, "steps: found -1, expected 0 or more"),
        ("figure1", {"replicates": 1}, "replicates: found 1, expected 2 or more"),
        ("figure1", {"device": "abacus"}, "device: found 'abacus', expected"),
        ("variance", {}, "steps: found 3, expected none: variance trains nothing"),
    ],
)
def test_nonsense_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        reproduce(name, **TINY | changes, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        reproduce("figure1", **TINY, out=tmp_path / "file")


def test_jobs_have_names_and_seeds_of_their_own():
    plan = Plan(**TINY)
    for name, figure in figures.FIGURES.items():
        jobs = figure.jobs(plan)
        assert all(isinstance(job, Job) for job in jobs)
        assert len({job.name for job in jobs}) == len(jobs)
        if name != "variance":  # there, the places of a method have the same noise
            assert len({job.seed for job in jobs}) == len(jobs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_seeded_on_a_gpu():
    before = torch.cuda.get_rng_state()
    with seeded(3, "cuda"):
        first = torch.rand(4, device="cuda")
    with seeded(3, "cuda"):
        assert torch.equal(torch.rand(4, device="cuda"), first)
    assert torch.equal(torch.cuda.get_rng_state(), before)
