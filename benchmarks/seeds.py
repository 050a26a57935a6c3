"""A step of many runs trained as one batched model, beside the step of one run: the models of chapters 18 and 21.

python -m benchmarks.seeds                    one JSON line a ratio: digits, 5 seeds
python -m benchmarks.seeds --pixels 784 --device cuda --compile

A step is forward, backward and Adam. Below 2 for 5 seeds is the goal; on a CPU it holds where a step is many small
operations, and not where it is arithmetic.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.harness import race, ratio, show
from gradlab.experiments.models import LARGE, MODELS, SMALL, build, make_estimator
from gradlab.experiments.train import Runs

ESTIMATORS = (("gumbel-softmax", 1), ("score-loo", 2), ("rebar", 1), ("local-expectation", 1))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs (default 5)")
    parser.add_argument("--pixels", type=int, default=64, choices=(64, 784), help="64 (default): the models for digits")
    parser.add_argument("--batch-size", type=int, default=50, help="images a run (default 50)")
    parser.add_argument("--rounds", type=int, default=20, help="alternating rounds (default 20)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in MODELS:
        for estimator, samples in ESTIMATORS:
            show(measure(model, estimator, samples, args))


def measure(model: str, estimator: str, samples: int, args: argparse.Namespace) -> dict:
    """Compare the two steps."""
    steps = {key: stepper(model, estimator, samples, n, args) for key, n in (("one", 1), ("many", args.seeds))}
    name = f"{args.seeds} seeds / 1: {model}, {estimator} S={samples}, {args.pixels} pixels"
    return ratio(name, race(steps, args.rounds, args.device), "many", "one", compiled=args.compile)


def stepper(model: str, estimator: str, samples: int, runs: int, args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step."""
    device = torch.device(args.device)
    sizes, chunk = (SMALL if args.pixels == 64 else LARGE), (8 if device.type == "cpu" else None)
    make = make_estimator(estimator, samples, chunk)
    loss = Runs(build(model, torch.full((args.pixels,), 0.3), 1, make, range(runs), sizes), runs).to(device)
    if args.compile:
        loss.compile()
    adam = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-3, fused=True)
    x = (torch.rand(runs, args.batch_size, args.pixels, device=device) < 0.3).float()

    def step() -> None:
        adam.zero_grad()
        loss(x).mean().backward()
        adam.step()

    return step


if __name__ == "__main__":
    main()
