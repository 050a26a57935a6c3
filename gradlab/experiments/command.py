"""The command ``gradlab data``: list, fetch and verify files."""

from __future__ import annotations

import argparse
import sys

from gradlab.experiments.files import VARIABLE, family, fetch, folder, mirrors, registry, state

__all__ = ["EMBEDDED", "run"]

EMBEDDED = {
    "digits": "1797 x 64 counts of 0 to 16 (scikit-learn)",
    "breast_cancer": "569 x 30 measurements (scikit-learn)",
    "karate_club": "34 x 34 counts (networkx)",
    "randhie": "20190 visits to a doctor (statsmodels)",
}
"""The data that need no file."""


def run(args: argparse.Namespace) -> int:
    """Run one action; return the exit status: 0 well, 1 a corrupt file, 2 an error."""
    try:
        return {"list": _list, "fetch": lambda: _fetch(args.name), "verify": _verify}[args.action]()
    except (OSError, ValueError, ImportError) as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return 2


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
