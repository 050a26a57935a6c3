"""What ``gradlab data``, ``train``, ``reproduce`` and ``report`` do."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from gradlab.experiments import figures, results, tables
from gradlab.experiments.files import VARIABLE, family, fetch, folder, mirrors, registry, state
from gradlab.experiments.train import DEFAULTS, Experiment, train

__all__ = ["EMBEDDED", "run"]

EMBEDDED = {
    "digits": "1797 x 64 counts of 0 to 16 (scikit-learn)",
    "breast_cancer": "569 x 30 measurements (scikit-learn)",
    "karate_club": "34 x 34 counts (networkx)",
    "randhie": "20190 visits to a doctor (statsmodels)",
}
"""The data that need no file."""


def run(args: argparse.Namespace) -> int:
    """Run one command; return the exit status: 0 well, 1 a corrupt file, 2 an error, 130 interrupted."""
    try:
        return {"data": _data, "train": _train, "reproduce": _reproduce, "report": _report}[args.command](args)
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gradlab: interrupted; nothing is lost. The same command goes on from here.", file=sys.stderr)
        return 130


def _data(args: argparse.Namespace) -> int:
    return {"list": _list, "fetch": lambda: _fetch(args.name), "verify": _verify}[args.action]()


def _list() -> int:
    print(f"folder: {folder()} (choose another by {VARIABLE})")
    lines = [(name, "embedded", "", summary) for name, summary in EMBEDDED.items()]
    lines += [(name, _where(name), f"{entry['bytes']:,}", entry["licence"]) for name, entry in registry().items()]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for name, where, size, words in lines:
        print(f"{name:<{widths[0]}}  {where:<{widths[1]}}  {size:>{widths[2]}}  {words}")
    return 0


def _where(name: str) -> str:
    """In the folder, at a mirror, or nowhere public."""
    if (folder() / name).is_file():
        return "here"
    return "to fetch" if mirrors(name) else "no mirror"


def _fetch(name: str) -> int:
    """Fetch what can be fetched; report the rest."""
    if name in EMBEDDED:
        print(f"{name} is embedded: there is nothing to fetch.")
        return 0
    failed, wanted = 0, family(name)
    for file in wanted:
        if len(wanted) > 1 and state(file) == "missing" and not mirrors(file):
            print(f"gradlab: {file} has no mirror: left out.", file=sys.stderr)
            continue
        try:
            print(fetch(file))
        except (OSError, ValueError) as error:
            failed += 1
            print(f"gradlab: {error}", file=sys.stderr)
    return 2 if failed else 0


def _verify() -> int:
    """One line for each file; a missing file is no fault."""
    states = {name: state(name) for name in registry()}
    for name, found in states.items():
        print(f"{found:<7}  {name}")
    found = list(states.values())
    print(f"{folder()}: {found.count('ok')} ok, {found.count('missing')} missing, {found.count('corrupt')} corrupt")
    if "corrupt" in found:
        print("A corrupt file is fetched again by `gradlab data fetch NAME`.", file=sys.stderr)
    return int("corrupt" in found)


def _train(args: argparse.Namespace) -> int:
    """Train one model, and say where the result is and how good."""
    experiment = _experiment(args, args.model, args.estimator, args.samples, tuple(args.seeds))
    out = Path(args.out)
    done = train(experiment, out, _device(args.device), _command(args), False if args.quiet else None)
    test, epochs = done["test"], done["epochs"]
    for seed, bound in zip(experiment.seeds, test, strict=True):
        print(f"seed {seed}: log p(x) >= {bound:.2f} nats a test image ({experiment.test_samples} samples)")
    print(f"{epochs['epoch'][-1]} epochs, {epochs['train_seconds'][-1]:.1f} s: {out / experiment.name}.json")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    """Repeat a figure or a table."""
    out, device, command = Path(args.out), _device(args.device), _command(args)
    if args.target in figures.FIGURES:
        figures.reproduce(
            args.target,
            runs=args.seeds,
            steps=args.steps,
            replicates=args.replicates,
            device=device,
            out=out,
            command=command,
        )
        print(out / f"{args.target}.json")
        return 0
    base = _experiment(args, "", "", 1, tuple(range(args.seeds)))
    say, progress = partial(print, flush=True), False if args.quiet else None
    print(tables.markdown(tables.reproduce(args.target, base, out, device, command, progress, say)))
    return 0


def _report(args: argparse.Namespace) -> int:
    """Print every table of a folder, and draw its figures."""
    out = Path(args.out)
    files = sorted(out.glob("table[123]-*.json"))
    if not files:
        raise FileNotFoundError(
            f"found no table in {out}, expected what `gradlab reproduce table1 --out {out}` writes."
        )
    for file in files:
        content = results.read(file)
        assert content is not None
        print(f"{content['table']}, {content['data']}\n\n{tables.markdown(content)}\n")
        print("\n".join(map(str, tables.draw(content, out))), end="\n\n")
    return 0


def _experiment(
    args: argparse.Namespace, model: str, estimator: str, samples: int, seeds: tuple[int, ...]
) -> Experiment:
    """What the options say, and the recipe of the data where they do not."""
    recipe = DEFAULTS[args.data]
    return Experiment(
        model,
        estimator,
        args.data,
        samples,
        args.epochs or recipe.epochs,
        seeds,
        args.batch_size or recipe.batch_size,
        recipe.rate if args.rate is None else args.rate,
        args.test_samples,
        args.tests,
        args.compile,
    )


def _device(name: str) -> str:
    """Return the name of a device that is there."""
    try:
        torch.empty((), device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: found {name!r} ({reason}), expected cpu, or cuda where torch sees a GPU.") from None
    return name


def _command(args: argparse.Namespace) -> str:
    """Return the command as it was typed."""
    return shlex.join(["gradlab", *args.argv])
