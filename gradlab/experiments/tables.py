r"""Tables 1, 2 and 3 of source 003: their cells, the paper's numbers, and ours beside them.

The paper compares after equal *epochs*. A low-variance estimator that needs many evaluations of f pays more for each:
the second half of a table is after equal *time*, that of the fastest run's last epoch or any other that is asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gradlab.experiments import results
from gradlab.experiments.train import Experiment, train

__all__ = ["PAPER", "TABLES", "Table", "cells", "markdown", "reproduce"]


class Method(NamedTuple):
    """A column of a table."""

    estimator: str
    samples: int
    label: str
    printed: bool
    """whether the paper has it"""


BSB = [Method("local-expectation", s, f"BSB (S={s})", True) for s in (1, 5, 10)]
CSB = [Method("local-expectation", s, f"CSB (S={s})", True) for s in (1, 5, 10)]
LATER = [Method("score-loo", 2, "RLOO (S=2)", False), Method("score-loo", 4, "RLOO (S=4)", False)]


class Table(NamedTuple):
    """Models by methods."""

    models: tuple[str, ...]
    methods: tuple[Method, ...]


TABLES = {
    "table1": Table(
        ("one-layer-sbn", "two-layer-sbn", "bernoulli-vae"),
        (
            Method("rebar", 1, "REBAR", True),
            Method("relax", 1, "RELAX", True),
            *BSB,
            *LATER,
            Method("disarm", 1, "DisARM", False),
        ),
    ),
    "table2": Table(
        ("one-layer-categorical", "categorical-vae"),
        (
            Method("gumbel-softmax", 1, "Gumbel-softmax", True),
            *CSB,
            *LATER,
            Method("reinmax", 1, "ReinMax", False),
            Method("gumbel-rao", 1, "Gumbel-Rao", False),
        ),
    ),
    "table3": Table(
        ("one-layer-categorical", "categorical-vae"),
        (Method("gumbel-softmax", 1, "Gumbel-softmax", True), *CSB),
    ),
}
"""Those that the paper has, and beside them what came after."""

PAPER: dict[str, dict[tuple[str, str], dict[str, tuple[float, float | None]]]] = {
    "table1": {
        ("mnist", "one-layer-sbn"): {
            "REBAR": (-114.14, 0.44),
            "RELAX": (-114.55, 0.48),
            "BSB (S=1)": (-110.87, 0.2),
            "BSB (S=5)": (-110.70, 0.11),
            "BSB (S=10)": (-110.59, 0.08),
        },
        ("mnist", "two-layer-sbn"): {
            "REBAR": (-101.33, 0.04),
            "RELAX": (-101.09, 0.07),
            "BSB (S=1)": (-99.74, 0.3),
            "BSB (S=5)": (-100.44, 0.28),
            "BSB (S=10)": (-100.66, 0.21),
        },
        ("mnist", "bernoulli-vae"): {
            "REBAR": (-127.76, 0.84),
            "RELAX": (-128.06, 2.66),
            "BSB (S=1)": (-107.4, 1.47),
            "BSB (S=5)": (-108.46, 0.37),
            "BSB (S=10)": (-109.19, 1.31),
        },
        ("omniglot", "one-layer-sbn"): {
            "REBAR": (-123.66, 0.05),
            "RELAX": (-123.82, 0.17),
            "BSB (S=1)": (-113.53, 0.21),
            "BSB (S=5)": (-114.34, 0.16),
            "BSB (S=10)": (-114.37, 0.19),
        },
        ("omniglot", "two-layer-sbn"): {
            "REBAR": (-117.81, 0.17),
            "RELAX": (-117.89, 0.04),
            "BSB (S=1)": (-102.05, 0.19),
            "BSB (S=5)": (-102.16, 0.09),
            "BSB (S=10)": (-102.29, 0.14),
        },
        ("omniglot", "bernoulli-vae"): {
            "REBAR": (-136.83, 0.31),
            "RELAX": (-136.53, 0.32),
            "BSB (S=1)": (-126.94, 0.81),
            "BSB (S=5)": (-128.69, 0.34),
            "BSB (S=10)": (-129.48, 0.38),
        },
    },
    "table2": {
        ("mnist", "one-layer-categorical"): {
            "Gumbel-softmax": (-113.46, 0.59),
            "CSB (S=1)": (-107.48, 0.37),
            "CSB (S=5)": (-107.24, 0.31),
            "CSB (S=10)": (-107.33, 0.13),
        },
        ("mnist", "categorical-vae"): {
            "Gumbel-softmax": (-122.97, 5.68),
            "CSB (S=1)": (-103.49, 0.73),
            "CSB (S=5)": (-102.68, 0.63),
            "CSB (S=10)": (-101.78, 0.88),
        },
        ("omniglot", "one-layer-categorical"): {
            "Gumbel-softmax": (-125.76, 0.24),
            "CSB (S=1)": (-122.49, 0.80),
            "CSB (S=5)": (-122.98, 0.30),
            "CSB (S=10)": (-122.98, 0.21),
        },
        ("omniglot", "categorical-vae"): {
            "Gumbel-softmax": (-140.25, 1.99),
            "CSB (S=1)": (-130.20, 0.74),
            "CSB (S=5)": (-131.66, 0.84),
            "CSB (S=10)": (-131.63, 1.05),
        },
    },
    "table3": {
        ("mnist", "one-layer-categorical"): {
            "Gumbel-softmax": (4.11, None),
            "CSB (S=1)": (6.32, None),
            "CSB (S=5)": (10.93, None),
            "CSB (S=10)": (16.83, None),
        },
        ("mnist", "categorical-vae"): {
            "Gumbel-softmax": (4.13, None),
            "CSB (S=1)": (7.32, None),
            "CSB (S=5)": (13.29, None),
            "CSB (S=10)": (21.94, None),
        },
    },
}
"""Mean and standard deviation over five runs, in nats; in table 3, seconds an epoch on an RTX 2080 Ti.

The best of a row is not always the one that is printed in bold.
"""


def cells(table: str, base: Experiment) -> list[Experiment]:
    """Return the experiments of a table, on the data and with the settings of ``base``."""
    models, methods = TABLES[table]
    return [replace(base, model=m, estimator=e, samples=s) for m in models for e, s, *_ in methods]


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
    todo, began, spent = cells(table, base), time.monotonic(), 0
    for i, experiment in enumerate(todo):
        done = results.read(out / f"{experiment.name}.json")
        finished = done is not None and "test" in done
        left = f", about {(time.monotonic() - began) / spent * (len(todo) - i) / 60:.0f} min left" if spent else ""
        say(f"{table} {i + 1}/{len(todo)}: {experiment.name}{' (kept)' if finished else left}")
        train(experiment, out, device, command, progress)
        spent += not finished
    content = collect(table, base, out)
    results.write(out / f"{table}-{base.data}.json", content)
    return content


def collect(table: str, base: Experiment, out: Path) -> dict[str, Any]:
    """Return the table of what lies in a folder; a cell that is not done is left out."""
    found: dict[str, Any] = {}
    for experiment in cells(table, base):
        done = results.read(out / f"{experiment.name}.json")
        if done is None or "test" not in done:
            continue
        label = next(m.label for m in TABLES[table].methods if (m.estimator, m.samples) == key(experiment))
        seconds = done["epochs"]["train_seconds"]
        found.setdefault(experiment.model, {})[label] = {
            "test": done["test"],
            "seconds_an_epoch": round(statistics.median(_differences(seconds)), 4),
            "tests": done["tests"],
            "train": done["epochs"]["train"][-1],
            "log_variance": done["epochs"]["log_variance"][-1],
            **{name: done[name] for name in ("device", "versions", "threads", "commit", "command")},
        }
    settings = {k: v for k, v in vars(base).items() if k not in ("model", "estimator", "samples")}
    return {"table": table, "data": base.data, "settings": settings, "models": found}


def key(experiment: Experiment) -> tuple[str, int]:
    """Return what tells a column."""
    return experiment.estimator, experiment.samples


def _differences(seconds: Sequence[float]) -> Iterator[float]:
    return (b - a for a, b in zip([0.0, *seconds], seconds, strict=False))


def at_time(tests: dict[str, list], seconds: float) -> list[float] | None:
    """Return the last test bounds of the runs that took no more than so many seconds of training; None if none did."""
    fitting = [test for t, test in zip(tests["train_seconds"], tests["test"], strict=True) if t <= seconds]
    return fitting[-1] if fitting else None


def markdown(content: dict[str, Any], budget: float | None = None) -> str:
    """Return a table as Markdown: a line for each model and method, the paper's number beside ours.

    Args:
        content: what :func:`reproduce` returned.
        budget: seconds of training for the column of equal time; by default those of the whole training of the
            cheapest method of a model.
    """
    name, settings = content["table"], content["settings"]
    paper = PAPER[name]
    time_table = name == "table3"
    head = ["model", "method", "seconds an epoch"]
    if not time_table:
        head = ["model", "method", f"after {settings['epochs']} epochs", "after equal time", "seconds an epoch"]
    columns = [f"paper, {data}" for data in dict.fromkeys(data for data, _ in paper)]
    rows = [head + columns, ["---"] * (len(head) + len(columns))]
    for model, methods in content["models"].items():
        seconds = min(cell["tests"]["train_seconds"][-1] for cell in methods.values()) if budget is None else budget
        for label, cell in methods.items():
            row = [model, label]
            if not time_table:
                row += [_spread(cell["test"]), _spread(at_time(cell["tests"], seconds))]
            row.append(f"{cell['seconds_an_epoch']:.3g}")
            for data in dict.fromkeys(data for data, _ in paper):
                printed = paper[data, model].get(label)
                row.append("–" if printed is None else _printed(*printed))
            rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: Sequence[float] | None) -> str:
    """Return mean ± standard deviation over the runs."""
    if values is None:
        return "not yet"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _printed(mean: float, deviation: float | None) -> str:
    return f"{mean:g}" if deviation is None else f"{mean:.2f} ± {deviation:g}"
