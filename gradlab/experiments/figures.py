"""Figures 1, 2 and 3 of Echraibi et al. (2020), and the variances behind figure 3, as chapter 21 shows them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradlab.experiments import logistic, results, toys
from gradlab.experiments.plan import Job, Plan, seeded
from gradlab.experiments.train import check_settings

__all__ = ["FIGURES", "Figure", "reproduce"]


class Figure(NamedTuple):
    """An experiment, and how much of it is run by default."""

    jobs: Callable[[Plan], list[Job]]
    settings: Callable[[], dict[str, Any]]
    steps: int
    replicates: int


FIGURES = {
    "figure1": Figure(partial(toys.jobs, "figure1"), toys.settings, 4000, 100),
    "figure2": Figure(partial(toys.jobs, "figure2"), toys.settings, 4000, 100),
    "figure3": Figure(logistic.jobs, logistic.settings, 2000, 20),
    "variance": Figure(logistic.variance_jobs, logistic.variance_settings, 0, 4000),
}


def reproduce(
    name: str,
    *,
    runs: int = 5,
    steps: int | None = None,
    replicates: int | None = None,
    device: str = "cpu",
    out: Path,
    command: str = "",
) -> dict[str, Any]:
    """Run an experiment, and return its results; they lie in ``out`` as JSON.

    A method that is finished is kept: a call that was cut off goes on with the next one. A line is printed for each.

    Args:
        name: one of :data:`FIGURES`.
        runs: independent runs, five in the paper.
        steps: of Adam; by default 4000, and 2000 for figure 3. ``variance`` trains nothing and has neither.
        replicates: gradients for one variance, by default 100, 20 for figure 3, and 4000 for ``variance``.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        out: the folder of the file.
        command: what the user typed, to be stored; by default the command that would do the same.

    Raises:
        ValueError: the name or a number makes no sense, or ``out`` holds the same experiment with other settings.
        KeyboardInterrupt: on Ctrl-C; the method at hand is lost, the others are kept.
    """
    if name not in FIGURES:
        raise ValueError(f"reproduce: found {name!r}, expected one of {', '.join(FIGURES)}.")
    figure, path = FIGURES[name], out / f"{name}.json"
    if steps and not figure.steps:
        raise ValueError(f"steps: found {steps}, expected none: {name} trains nothing.")
    plan = Plan(
        runs,
        figure.steps if steps is None else steps,
        figure.replicates if replicates is None else replicates,
        device,
    )
    settings = figure.settings() | dataclasses.asdict(plan)
    found = results.read(path)
    if found is not None:
        check_settings(found.get("settings"), settings, path)
    with one_thread():
        made = results.provenance(command or _command(name, plan), device)
        empty = {"settings": settings, "checkpoints": plan.checkpoints, "results": {}}
        return _run(figure.jobs(plan), device, path, found or empty, made)


def _command(name: str, plan: Plan) -> str:
    """Return a command for the same results."""
    command = f"gradlab reproduce {name} --seeds {plan.runs} --steps {plan.steps}"
    if plan.replicates != FIGURES[name].replicates:
        command += f" --replicates {plan.replicates}"
    return command + (f" --device {plan.device}" if plan.device != "cpu" else "")


def _run(jobs: list[Job], device: str, path: Path, content: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Do what is not done; the file is written after each job."""
    missing = [job for job in jobs if job.name not in content["results"]]
    for job in jobs:
        if job not in missing:
            print(f"{path.stem}: {job.name}: kept", flush=True)
    if not missing:
        return content
    content = _signed(content, made)
    start = time.perf_counter()
    for number, job in enumerate(missing, 1):
        began = time.perf_counter()
        with seeded(job.seed, device):
            content["results"][job.name] = job.run()
        results.write(path, content)
        now = time.perf_counter()
        left = timedelta(seconds=round((now - start) / number * (len(missing) - number)))
        rest = f"; {len(missing) - number} to go, about {left}" if number < len(missing) else ""
        print(f"{path.stem}: {job.name}: {now - began:.1f} s{rest}", flush=True)
    return content


def _signed(content: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Put in front how this call came about; if another one began the file, how that one did is kept."""
    before = {key: content[key] for key in made if key in content}
    earlier = content.get("earlier", []) + [before] * bool(before and before != made)
    rest = {key: value for key, value in content.items() if key not in made and key != "earlier"}
    return made | ({"earlier": earlier} if earlier else {}) | rest


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the order of a sum not depend on the machine: one thread within, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
