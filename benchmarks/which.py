"""The times of chapter 20: microseconds for one gradient, for every discrete estimator on five problems.

python -m benchmarks.which                    write book/data/which_cpu.json
python -m benchmarks.which --device cuda      write book/data/which_cuda.json

Float64, one thread; time is amortised over a batch of gradients. Each number is the fastest of the rounds.
"""

import argparse
from pathlib import Path

import torch

import gradlab as gl
from benchmarks.harness import processor
from gradlab.cli import ESTIMATORS, serves
from gradlab.experiments import results

DATA = Path(__file__).resolve().parent.parent / "book" / "data"
PROBLEMS = ["bernoulli_toy_499", "bernoulli_3", "bernoulli_20", "onehot_10", "onehot_5x3"]
NAMES = {  # the chapter's names, and those of the command line
    "score": "score",
    "moving average": "score-average",
    "leave-one-out": "score-loo",
    "double control variate": "double-cv",
    "local expectation": "local-expectation",
    "sum and sample": "sum-and-sample",
    "unordered set": "unordered-set",
    "exact": "enumerate",
}
SAME = ["muprop", "rebar", "arm", "disarm", "measure-valued", "gumbel-softmax", "gumbel-rao", "straight-through"]
NAMES |= {name: name for name in [*SAME, "reinmax"]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--replicates", type=int, default=2000, help="gradients in a batch (default 2000)")
    parser.add_argument("--rounds", type=int, default=9, help="the fastest of so many counts (default 9)")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "replicates": args.replicates,
        "rounds": args.rounds,
        "microseconds": {name: measure(name, device, args.replicates, args.rounds) for name in PROBLEMS},
    }
    results.write(DATA / f"which_{device.type}.json", result)


def measure(name: str, device: torch.device, replicates: int, rounds: int) -> dict[str, float]:
    """Return microseconds for one gradient, by estimator."""
    problem = gl.problem(name)
    params = {k: p.to(device) for k, p in problem.params.items()}
    chosen = {name: ESTIMATORS[command](1) for name, command in NAMES.items()}
    chosen = {name: e.to(device) for name, e in chosen.items() if serves(e, problem)}
    exact = problem.exact()[0]
    tables = [gl.compare(chosen, problem.make_q, problem.f, params, exact, replicates) for _ in range(rounds)]
    fastest = {name: min(t[name].microseconds for t in tables) for name in chosen}
    return {name: float(f"{value:.3g}") for name, value in fastest.items()}


if __name__ == "__main__":
    main()
