r"""Tables 1, 2 and 3 of source 003: their cells, the paper's numbers, and ours beside them.

The paper compares after equal *epochs*. An estimator that evaluates f more often pays more for each: a table also
compares after equal *time*, that of the local expectation with one sample. Cheaper methods then get more epochs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gradlab.experiments import results
from gradlab.experiments.paper import PAPER
from gradlab.experiments.train import DOUBLE_BACKWARD, Experiment, train

__all__ = ["TABLES", "Table", "cells", "collect", "draw", "markdown", "reproduce"]


class Method(NamedTuple):
    """A column of a table."""

    estimator: str
    samples: int
    label: str


BSB = [Method("local-expectation", s, f"BSB (S={s})") for s in (1, 5, 10)]
CSB = [Method("local-expectation", s, f"CSB (S={s})") for s in (1, 5, 10)]
LATER = [Method("score-loo", 2, "RLOO (S=2)"), Method("score-loo", 4, "RLOO (S=4)")]


class Table(NamedTuple):
    """Models by methods."""

    models: tuple[str, ...]
    methods: tuple[Method, ...]


TABLES = {
    "table1": Table(
        ("one-layer-sbn", "two-layer-sbn", "bernoulli-vae"),
        (
            Method("rebar", 1, "REBAR"),
            Method("relax", 1, "RELAX"),
            *BSB,
            *LATER,
            Method("disarm", 1, "DisARM"),
        ),
    ),
    "table2": Table(
        ("one-layer-categorical", "categorical-vae"),
        (
            Method("gumbel-softmax", 1, "Gumbel-softmax"),
            *CSB,
            *LATER,
            Method("reinmax", 1, "ReinMax"),
            Method("gumbel-rao", 1, "Gumbel-Rao"),
        ),
    ),
    "table3": Table(
        ("one-layer-categorical", "categorical-vae"),
        (Method("gumbel-softmax", 1, "Gumbel-softmax"), *CSB),
    ),
}
"""Those that the paper has, and beside them what came after."""


def cells(table: str, base: Experiment) -> list[Experiment]:
    """Return the experiments of a table, on the data and with the settings of ``base``."""
    models, methods = TABLES[table]
    return [
        replace(base, model=model, estimator=name, samples=s, compiled=base.compiled and name not in DOUBLE_BACKWARD)
        for model in models
        for name, s, _ in methods
    ]


def reproduce(
    table: str,
    base: Experiment,
    out: Path,
    device: str = "cpu",
    command: str = "",
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train every cell that is not done, and write the table; one call after another goes on where the last stopped."""
    _train_all(cells(table, base), out, device, command, progress, say)
    _train_all(longer(table, base, out), out / LONGER, device, command, progress, say)
    content = collect(table, base, out)
    results.write(out / f"{table}-{base.data}.json", content)
    return content


LONGER = "equal-time"


def _train_all(
    todo: list[Experiment],
    out: Path,
    device: str,
    command: str,
    progress: bool | None,
    say: Callable[[str], None],
) -> None:
    """Train what is not done, and estimate how long the rest will take."""
    began, trained = time.monotonic(), 0
    for i, experiment in enumerate(todo):
        kept = finished(experiment, out) is not None
        mean = (time.monotonic() - began) / 60 / trained if trained else None
        left = "" if mean is None else f", about {mean * (len(todo) - i):.0f} min left"
        say(f"{out}: {i + 1}/{len(todo)} {experiment.name}, {experiment.epochs} epochs{' (kept)' if kept else left}")
        train(experiment, out, device, command, progress)
        trained += not kept


def finished(experiment: Experiment, out: Path) -> dict[str, Any] | None:
    """Return the result of an experiment, None if it is not done."""
    done = results.read(out / f"{experiment.name}.json")
    return done if done is not None and "test" in done else None


def seconds_of(done: dict[str, Any]) -> float:
    """Return how long the whole training took."""
    return done["epochs"]["train_seconds"][-1]


def longer(table: str, base: Experiment, out: Path) -> list[Experiment]:
    """Return the cells that took less time than the budget of their model, with the epochs that fit into it."""
    found = []
    for experiment in cells(table, base) if table != "table3" else []:
        done, budget = finished(experiment, out), budget_of(experiment, out)
        if done is not None and budget is not None:
            epochs = int(experiment.epochs * budget / seconds_of(done))
            found += [replace(experiment, epochs=epochs)] if epochs > experiment.epochs else []
    return found


def budget_of(experiment: Experiment, out: Path) -> float | None:
    """Return the seconds of the local expectation with one sample, for the same model."""
    done = finished(replace(experiment, estimator="local-expectation", samples=1), out)
    return None if done is None else seconds_of(done)


def collect(table: str, base: Experiment, out: Path) -> dict[str, Any]:
    """Return the table of what lies in a folder; a cell that is not done is left out."""
    found: dict[str, Any] = {}
    labels = {(m.estimator, m.samples): m.label for m in TABLES[table].methods}
    more = {(e.model, e.estimator, e.samples): e for e in longer(table, base, out)}
    for experiment in cells(table, base):
        if (done := finished(experiment, out)) is None:
            continue
        longest = more.get((experiment.model, experiment.estimator, experiment.samples))
        timed = finished(longest, out / LONGER) if longest else done
        found.setdefault(experiment.model, {})[labels[experiment.estimator, experiment.samples]] = {
            "test": done["test"],
            "seconds_an_epoch": round(statistics.median(_differences(done["epochs"]["train_seconds"])), 4),
            "equal_time": _at_time(timed, budget_of(experiment, out)),
            "curves": {k: [_mean(v) for v in done["epochs"][k]] for k in ("train", "log_variance")},
            "train": done["epochs"]["train"][-1],
            **{name: done[name] for name in ("device", "versions", "threads", "commit", "command")},
        }
    settings = {k: v for k, v in vars(base).items() if k not in ("model", "estimator", "samples")}
    return {"table": table, "data": base.data, "settings": settings, "models": found}


def _differences(seconds: Sequence[float]) -> Iterator[float]:
    return (b - a for a, b in zip([0.0, *seconds], seconds, strict=False))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(f"{statistics.mean(known):.5g}") if len(known) == len(values) else None


def _at_time(done: dict[str, Any] | None, seconds: float | None) -> dict[str, Any] | None:
    """Return the last test bounds of a training after so many seconds, 5 % more at most, and the best until then."""
    if done is None or seconds is None:
        return None
    tests = done["tests"]
    fitting = [i for i, t in enumerate(tests["train_seconds"]) if t <= 1.05 * seconds]
    if not fitting:
        return None
    best = max(fitting, key=lambda i: statistics.mean(tests["test"][i]))

    def at(i: int) -> dict[str, Any]:
        return {"epoch": tests["epoch"][i], "test": tests["test"][i]}

    return {"seconds": seconds, **at(fitting[-1]), "best": at(best)}


def markdown(content: dict[str, Any]) -> str:
    """Return a table as Markdown: a line for each model and method, the paper's numbers beside ours."""
    name, data = content["table"], content["data"].removeprefix("binarized-")
    paper = PAPER[name]
    printed = [d for d in dict.fromkeys(d for d, _ in paper) if data in (d, "digits")]
    ours = [f"after {content['settings']['epochs']} epochs", "after equal time", "(epochs)"] * (name != "table3")
    rows = [["model", "method", *ours, "seconds an epoch", *(f"paper, {d}" for d in printed)]]
    rows.append(["---"] * len(rows[0]))
    for model, methods in content["models"].items():
        for label, cell in methods.items():
            equal = cell["equal_time"]
            bounds = [_spread(cell["test"]), *((_spread(equal["test"]), str(equal["epoch"])) if equal else ("–", "–"))]
            numbers = [_printed(*paper[d, model].get(label, (None, None))) for d in printed]
            rows.append([model, label, *bounds[: len(ours)], f"{cell['seconds_an_epoch']:.3g}", *numbers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation over the runs."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _printed(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:g}" if deviation is None else f"{mean:.2f} ± {deviation:g}"


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the training bound and the log variance of the gradient by epochs, as figures 5 and 6, one file a model."""
    from matplotlib.figure import Figure

    files = []
    for model, methods in content["models"].items():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        panels = {"train": "training bound (nats)", "log_variance": "log variance of the gradient"}
        for axis, (curve, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for name, cell in methods.items():
                values = [float("nan") if v is None else v for v in cell["curves"][curve]]
                axis.plot(range(1, len(values) + 1), values, label=name)
            axis.set(xlabel="epoch", ylabel=label)
        figure.axes[0].legend(fontsize=7)
        files.append(folder / f"{content['table']}-{content['data']}-{model}.png")
        figure.savefig(files[-1], dpi=120)
    return files
