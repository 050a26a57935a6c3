"""Run benchmarks, each in a process of its own, and say which goals are met.

python -m benchmarks                       all, with other libraries; write book/data/speed_cpu.json
python -m benchmarks steps gamma           some; the file keeps the other lines
python -m benchmarks --device cuda         on a GPU; write book/data/speed_cuda.json
python -m benchmarks --gate                what has a goal, and nothing written: fails beyond 1.15 x the goal
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import GATE, processor, verdict
from gradlab.experiments import results

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("steps", "variance", "memory", "overhead", "laplace", "gamma", "pathwise", "training")
PEERS = ("pyro-ppl", "storchastic", "reinmax")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--gate", action="store_true", help="measure what has a goal; fail where a goal is far")
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(SCRIPTS):
        parser.error(f"found {', '.join(sorted(unknown))}, expected some of {', '.join(SCRIPTS)}")
    found = {name: measure(name, args) for name in args.scripts or SCRIPTS}
    failed = [line["ratio"] for lines in found.values() for line in lines if verdict(line) == "failed"]
    if not args.gate:
        store(found, args.device)
        return 0
    for name in failed:
        print(f"failed, beyond {GATE} x its goal: {name}", file=sys.stderr)
    return int(bool(failed))


def measure(script: str, args: argparse.Namespace) -> list[dict]:
    """Run one script and print its lines."""
    command = [sys.executable, "-m", f"benchmarks.{script}", f"--rounds={args.rounds}", f"--device={args.device}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    lines = []
    with subprocess.Popen(
        command + ["--gate"] * args.gate, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    ) as run:
        assert run.stdout
        for text in run.stdout:
            line = json.loads(text)
            lines.append(line)
            print(f"{script:9s} {line['ratio']:70s} {shown(line)}", flush=True)
    if run.returncode:
        raise SystemExit(f"benchmarks.{script}: failed with status {run.returncode}")
    return lines


def shown(line: dict) -> str:
    """Return the result of one line, its goal and the verdict."""
    value = f"{line['value']:8.4g}" if "value" in line else f"{line['median']:8.3f} (minima {line['minima']:.3f})"
    goal = "" if line["goal"] is None else f"  goal {line['goal']:g}"
    return f"{value}{goal}  {verdict(line)}"


def store(found: dict[str, list[dict]], device: str) -> None:
    """Write the lines with the place where they were measured; scripts that were not run keep theirs."""
    kind = torch.device(device).type
    path = ROOT / "book" / "data" / f"speed_{kind}.json"
    torch.set_num_threads(1)  # as in every script
    where = results.provenance(f"python -m benchmarks --device {kind}", device)
    where["versions"] |= {name: version(name) for name in PEERS}
    if kind == "cpu":
        where["processor"] = processor()
    old = (results.read(path) or {"scripts": {}})["scripts"]
    judged = {name: [line | {"verdict": verdict(line)} for line in lines] for name, lines in found.items()}
    new = old | {name: {"where": where, "lines": lines} for name, lines in judged.items()}
    results.write(path, {"scripts": {name: new[name] for name in SCRIPTS if name in new}})
    print(f"{path.relative_to(ROOT)}: written")


def version(name: str) -> str | None:
    """Return the version of a library; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
