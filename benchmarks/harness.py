"""How every benchmark measures: alternating rounds in one process, ratios within a round, goals beside results."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

GATE = 1.15  # what fails a check, as a multiple of the goal
NOISY = 0.08  # how far the median and the ratio of the minima may differ

P = ParamSpec("P")
R = TypeVar("R")
Times = dict[str, list[float]]
"""Seconds a call, by name and round."""


def race(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15, device: torch.device | str = "cpu", cell: float = 0.03
) -> Times:
    """Time the calls against each other: each round runs all of them, in an order that the next one turns around.

    Args:
        calls: what to time, by name.
        rounds: how often.
        device: on a CPU the clock is the time of the process, on a GPU that of the wall, synchronised.
        cell: a call is repeated within a round until it takes so many seconds.
    """
    device = torch.device(device)
    repeats = {name: math.ceil(cell / max(_warm(call, device), 1e-7)) for name, call in calls.items()}
    times: Times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            for name in list(calls)[:: -1 if r % 2 else 1]:
                times[name].append(_clock(calls[name], device, repeats[name]))
    finally:
        gc.enable()
    return times


def _warm(call: Callable[[], object], device: torch.device) -> float:
    return min(_clock(call, device) for _ in range(3))


def _clock(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    gpu = device.type == "cuda"
    now = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize(device)
    start = now()
    for _ in range(repeats):
        call()
    if gpu:
        torch.cuda.synchronize(device)
    return (now() - start) / repeats


def steps(
    parameters: Iterable[Tensor], gradients: Mapping[str, Callable[[], object]], adam: bool = True
) -> dict[str, Callable[[], None]]:
    """Return training steps at a point that stays: a gradient, and Adam with a rate of 0.

    All share one Adam: where its numbers lie in memory would else make one step 10 % slower than the same step again.
    """
    optimizer = torch.optim.Adam(parameters, lr=0.0)

    def one(gradient: Callable[[], object]) -> None:
        optimizer.zero_grad()
        gradient()
        if adam:
            optimizer.step()

    return {name: functools.partial(one, gradient) for name, gradient in gradients.items()}


def ratio(name: str, times: Times, ours: str, theirs: str, goal: float | None = None, **more: object) -> dict:
    """Return one line: the median over the rounds of ours / theirs, its quartiles, and the ratio of the minima.

    A ``limit`` among the additions is what a gate allows in place of 1.15 x the goal, where the goal is out of reach.
    """
    found = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, median, high = statistics.quantiles(found, n=4)
    minima = min(times[ours]) / min(times[theirs])
    return {
        "ratio": name,
        "goal": goal,
        "median": median,
        "minima": minima,
        "quartiles": [low, high],
        "rounds": len(found),
        "noisy": abs(median / minima - 1) > NOISY,
        "milliseconds": 1e3 * statistics.median(times[ours]),
        **more,
    }


def number(name: str, value: float, goal: float | None = None, **more: object) -> dict:
    """Return one line for what is measured without a clock: a variance, a peak of memory, an error."""
    return {"ratio": name, "goal": goal, "value": value, "noisy": False, **more}


def steady(measure: Callable[[], list[dict]]) -> list[dict]:
    """Return the lines of ``measure``, measured a second time where one is noisy or failed."""
    lines = measure()
    return measure() if any(verdict(line) in ("noisy", "failed") for line in lines) else lines


def verdict(line: Mapping) -> str:
    """Return "met", "missed" (the goal), "failed" (the gate's limit too), or "" where no goal is set.

    Where median and minima of a noisy line would be judged differently, it is "noisy" instead.
    """
    if line["goal"] is None:
        return ""
    if "value" in line or not line["noisy"]:
        return _judge(line, line.get("value", line.get("median")))
    median, minima = (_judge(line, line[key]) for key in ("median", "minima"))
    return median if median == minima else "noisy"


def _judge(line: Mapping, value: float) -> str:
    goal = line["goal"]
    limit = line.get("limit", goal + (GATE - 1) * abs(goal))  # a difference may have a goal below 0
    return "met" if value <= goal else "missed" if value <= limit else "failed"


def peak(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the megabytes that torch holds at most during the call, above those before it."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = largest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest / 2**20


def installed(*names: str) -> bool:
    """Whether the libraries to compare with are here; else say what is left out."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)}: not installed, left out (pip install -e '.[bench]')", file=sys.stderr)
    return not missing


def validated(call: Callable[P, R]) -> Callable[P, R]:
    """Return the call with torch's validation of distributions, which is off elsewhere."""

    @functools.wraps(call)
    def one(*args: P.args, **kwargs: P.kwargs) -> R:
        Distribution.set_default_validate_args(True)
        try:
            return call(*args, **kwargs)
        finally:
            Distribution.set_default_validate_args(False)

    return one


def run(lines: Callable[[argparse.Namespace], Iterator[dict]], doc: str | None) -> None:
    """Run the command line of a script: print its lines as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--gate", action="store_true", help="measure what has a goal, and no other library")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Distribution.set_default_validate_args(False)  # as a compiler and other libraries do once they are loaded
    for line in lines(args):
        show(line)


def show(line: Mapping) -> None:
    """Print a line as JSON."""
    print(json.dumps({key: _short(value) for key, value in line.items()}), flush=True)


def _short(value: object) -> object:
    """Return numbers with four digits."""
    if isinstance(value, list):
        return [_short(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
