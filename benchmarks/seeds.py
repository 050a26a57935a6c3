"""A step of many runs trained as one batched model, beside the step of one run: the models of chapters 18 and 21.

python benchmarks/seeds.py                    one JSON line a ratio: digits, 5 seeds
python benchmarks/seeds.py --pixels 784 --device cuda --compile

Both steps alternate in one process and on one thread: forward, backward, Adam. The ratio is that of the medians over
the rounds, beside the ratio of the minima; where the two differ by more than 8 % the line says so. Below 2 for 5 seeds
is the goal; on a CPU it holds where a step is many small operations, and not where it is arithmetic.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch

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
            print(json.dumps(measure(model, estimator, samples, args)), flush=True)


def measure(model: str, estimator: str, samples: int, args: argparse.Namespace) -> dict[str, object]:
    """Compare the two steps."""
    device = torch.device(args.device)
    steps = [stepper(model, estimator, samples, runs, args, device) for runs in (1, args.seeds)]
    times: list[list[float]] = [[], []]
    gc.disable()
    for r in range(-3, args.rounds):  # three to warm up
        for i in (0, 1) if r % 2 else (1, 0):
            seconds = clock(steps[i], device)
            times[i] += [seconds] * (r >= 0)
    gc.enable()
    medians, minima = ([f(t) for t in times] for f in (statistics.median, min))
    median, minimum = (b / a for a, b in (medians, minima))
    return {
        "model": model,
        "estimator": f"{estimator} S={samples}",
        "seeds": args.seeds,
        "ratio": round(median, 3),
        "minima": round(minimum, 3),
        "noisy": abs(median / minimum - 1) > 0.08,
        "one_ms": round(1e3 * medians[0], 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, 1 thread",
        "torch": torch.__version__,
        "compiled": args.compile,
    }


def stepper(
    model: str, estimator: str, samples: int, runs: int, args: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    """Return a training step."""
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


def clock(step: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of a step: of the process on a CPU, of the wall on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter if device.type == "cuda" else time.process_time
    start = now()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / repeats


if __name__ == "__main__":
    main()
