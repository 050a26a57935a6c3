"""How benchmarks measure and judge, on made-up clocks and lines: no test here depends on the speed of a machine."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import ROOT
from torch.distributions import Distribution

from benchmarks import __main__ as command
from benchmarks import harness


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until a test moves it."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    return now


def line(value: float, goal: float | None = 1.0, **more: object) -> dict:
    return harness.number("a ratio", value, goal, **more)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (line(0.9), "met"),
        (line(1.0), "met"),
        (line(1.01), "missed"),
        (line(1.149), "missed"),
        (line(1.16), "failed"),
        (line(1.5, limit=1.6), "missed"),  # a limit replaces 1.15 x the goal
        (line(1.7, limit=1.6), "failed"),
        (line(-2.0, -1.0), "met"),
        (line(-0.9, -1.0), "missed"),
        (line(-0.8, -1.0), "failed"),
        (line(9.0, None), ""),
        (line(9.0, None) | {"noisy": True}, ""),
        ({"goal": 1.0, "noisy": True, "median": 0.9, "minima": 1.1}, "noisy"),
        ({"goal": 1.0, "noisy": True, "median": 0.7, "minima": 0.9}, "met"),
        ({"goal": 1.0, "noisy": True, "median": 1.2, "minima": 1.4}, "failed"),
        ({"goal": 1.0, "noisy": False, "median": 0.9, "minima": 2.0}, "met"),
    ],
)
def test_the_verdict(found: dict, expected: str) -> None:
    assert harness.verdict(found) == expected


def test_a_ratio_is_the_median_within_rounds() -> None:
    times = {"ours": [0.002, 0.009, 0.004, 0.006, 0.010], "theirs": [0.001, 0.003, 0.004, 0.002, 0.010]}
    found = harness.ratio("name", times, "ours", "theirs", 1.5, limit=3.0)  # 2, 3, 1, 3, 1
    assert found["median"] == pytest.approx(2.0)
    assert found["minima"] == pytest.approx(2.0)
    assert found["quartiles"] == pytest.approx([1.0, 3.0])
    assert found["milliseconds"] == pytest.approx(6.0)
    assert not found["noisy"]
    assert (found["ratio"], found["goal"], found["limit"], found["rounds"]) == ("name", 1.5, 3.0, 5)


@pytest.mark.parametrize(("fastest", "noisy"), [(0.93, False), (0.92, True), (1.08, False), (1.10, True)])
def test_a_ratio_is_noisy_where_median_and_minima_differ(fastest: float, noisy: bool) -> None:
    """Median 1; the ratio of the minima is that of the one fast round of theirs."""
    times = {"ours": [1.0, 2.0, 3.0, 4.0, fastest], "theirs": [1.0, 2.0, 3.0, 4.0, 1.0]}
    if fastest > 1:
        times = {"ours": [fastest, 2.0, 3.0, 4.0, 5.0], "theirs": [1.0, 2.0, 3.0, 4.0, 5.0]}
    found = harness.ratio("name", times, "ours", "theirs")
    assert found["median"] == pytest.approx(1.0)
    assert found["minima"] == pytest.approx(fastest)
    assert found["noisy"] is noisy


@pytest.mark.parametrize(
    ("lines", "calls"),
    [
        ([line(1.0), line(1.1)], 1),
        ([line(9.0, None) | {"noisy": True}], 1),  # without a goal nothing is judged
        ([line(1.0), line(2.0)], 2),
        ([line(1.0), {"goal": 1.0, "noisy": True, "median": 0.9, "minima": 1.1}], 2),
    ],
)
def test_what_is_noisy_or_failed_is_measured_twice(lines: list[dict], calls: int) -> None:
    found = []
    assert harness.steady(lambda: found.append(1) or [*lines, line(len(found), None)])[-1]["value"] == calls
    assert len(found) == calls


def test_a_race_alternates_within_a_round(clock: list[float]) -> None:
    ran = []

    def call(name: str, seconds: float):
        def one() -> None:
            assert gc.isenabled() == (len(ran) < 6)
            ran.append(name)
            clock[0] += seconds

        return one

    times = harness.race({"a": call("a", 0.25), "b": call("b", 1.0)}, rounds=3, cell=0.5)
    assert times == {"a": [0.25] * 3, "b": [1.0] * 3}
    assert "".join(ran) == "aaabbb" + "aab" + "baa" + "aab"  # three to warm up; a twice, to fill a cell
    assert gc.isenabled()
    assert Distribution._validate_args == __debug__


def test_a_race_that_fails_leaves_the_collector_on(clock: list[float]) -> None:
    def call() -> None:
        clock[0] += 1.0
        if not gc.isenabled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harness.race({"a": call})
    assert gc.isenabled()


def test_the_peak_counts_what_is_held_at_once() -> None:
    def both() -> None:
        held = torch.zeros(2**18, dtype=torch.float32)  # 1 MB
        assert len([held, torch.zeros(2**18, dtype=torch.float32)]) == 2

    def in_turns() -> None:
        for _ in range(3):
            torch.zeros(2**18, dtype=torch.float32)

    before = torch.zeros(2**20)
    assert harness.peak(both) == pytest.approx(2.0, abs=0.01)
    assert harness.peak(in_turns) == pytest.approx(1.0, abs=0.01)
    assert harness.peak(lambda: before.add_(1)) == pytest.approx(0.0, abs=0.01)


def test_lines_are_json_of_four_digits(capsys: pytest.CaptureFixture[str]) -> None:
    harness.show(line(1.23456789, None, quartiles=[0.000123456, 2], device="x"))
    found = json.loads(capsys.readouterr().out)
    assert found == line(1.235, None, quartiles=[0.0001235, 2], device="x")


def test_a_library_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.installed("torch", "json")
    assert not harness.installed("torch", "no_such_library")
    assert capsys.readouterr().err.startswith("no_such_library: not installed")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return command.main()


def test_unknown_scripts_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "steps", "nonsense")
    assert stop.value.code == 2
    assert "found nonsense, expected some of steps, variance" in capsys.readouterr().err


def test_every_script_is_there() -> None:
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in command.SCRIPTS)


def test_a_script_that_fails_stops_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.nonsense: failed with status 1"):
        command.measure("nonsense", argparse.Namespace(rounds=1, device="cpu", gate=False))
    assert "No module named benchmarks.nonsense" in capfd.readouterr().err


@pytest.mark.parametrize(("value", "status"), [(1.1, 0), (1.2, 1)])
def test_the_gate_fails_beyond_its_limit(
    value: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(command, "measure", lambda name, args: asked.append(name) or [line(value), line(1.0)])
    monkeypatch.setattr(command, "store", lambda *_: pytest.fail("a gate writes nothing"))
    assert run(monkeypatch, "--gate", "gamma") == status
    assert asked == ["gamma"]
    assert ("failed, beyond 1.15 x its goal: a ratio" in capsys.readouterr().err) == bool(status)


@pytest.mark.usefixtures("threads")
def test_scripts_that_were_not_run_keep_their_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "book" / "data" / "speed_cpu.json"
    path.parent.mkdir(parents=True)
    kept = {"where": {"command": "before"}, "lines": [line(7.0)]}
    old = {"training": kept, "steps": kept, "gamma": kept, "of the past": kept}
    path.write_text(json.dumps({"scripts": old}))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "measure", lambda name, args: [line(1.1)])
    assert run(monkeypatch, "gamma") == 0
    found = json.loads(path.read_text())["scripts"]
    assert list(found) == ["steps", "gamma", "training"]
    assert found["steps"] == found["training"] == kept
    assert found["gamma"]["lines"] == [line(1.1) | {"verdict": "missed"}]
    assert found["gamma"]["where"]["threads"] == 1
    assert set(command.PEERS) < set(found["gamma"]["where"]["versions"])


@pytest.mark.usefixtures("threads")
def test_the_first_lines_are_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    command.store({"memory": [line(0.5)]}, "cpu")
    found = json.loads((tmp_path / "book" / "data" / "speed_cpu.json").read_text())
    assert list(found["scripts"]) == ["memory"]
