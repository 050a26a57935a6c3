"""AfterLinear beside the generic path: time, memory and agreement of all flips of a categorical VAE's decoder.

python benchmarks/flips.py            one JSON line a ratio

Both run in one process on one thread, in alternating rounds, measured in process time; the ratio is the median over the
rounds of AfterLinear / generic, beside the ratio of the minima. Where the two differ by more than 8 % it says "noisy".
Memory is the peak of what the flips allocate, as torch's profiler counts it.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, OneHotCategorical

import gradlab as gl

BATCH, LATENTS, CATEGORIES, PIXELS = 20, 20, 10, 784


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, tail in {"linear decoder": [], "two hidden layers": [256, 512]}.items():
        for chunk_size in (None, 8):
            print(json.dumps(measure(name, tail, chunk_size, rounds)), flush=True)


def measure(name: str, tail: list[int], chunk_size: int | None, rounds: int) -> dict[str, object]:
    """Compare one backward through the two ways of writing the same cost."""
    plain, structured = costs(tail)
    logits = torch.randn(BATCH, LATENTS, CATEGORIES, requires_grad=True)
    estimator = gl.LocalExpectation(1, chunk_size)
    noise = estimator.draw(Independent(OneHotCategorical(logits=logits), 1))

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        q = Independent(OneHotCategorical(logits=logits), 1)
        (grad,) = torch.autograd.grad(estimator.estimate(q, f, noise).sum(), logits)
        return grad

    ours, generic = [lambda: gradient(structured), lambda: gradient(plain)]
    gap = ((ours() - generic()).abs().max() / generic().abs().max()).item()
    memory = [peak(ours), peak(generic)]
    times: list[list[float]] = [[], []]
    gc.disable()
    for r in range(rounds):
        for i in (0, 1) if r % 2 else (1, 0):
            times[i].append(clock((ours, generic)[i]))
    gc.enable()
    median = statistics.median(a / b for a, b in zip(*times, strict=True))
    minima = min(times[0]) / min(times[1])
    return {
        "ratio": f"AfterLinear / generic, {name}, chunk_size={chunk_size}",
        "median": round(median, 3),
        "minima": round(minima, 3),
        "noisy": abs(median / minima - 1) > 0.08,
        "megabytes": [round(m / 2**20, 1) for m in memory],
        "largest relative difference": gap,
        "rounds": rounds,
    }


def costs(tail: list[int]) -> tuple[Callable[[Tensor], Tensor], gl.AfterLinear]:
    """Return the negative log likelihood of a binary image, written plainly and as an AfterLinear."""
    widths = [LATENTS * CATEGORIES, *tail, PIXELS]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    image = (torch.rand(BATCH, PIXELS) < 0.3).float()

    def after(h: Tensor) -> Tensor:
        for layer in layers[1:]:
            h = layer(h.relu())
        return -Bernoulli(logits=h, validate_args=False).log_prob(image).sum(-1)

    return lambda z: after(layers[0](z.flatten(-2))), gl.AfterLinear(layers[0], after)


def clock(call: Callable[[], object]) -> float:
    """Return the process time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def peak(call: Callable[[], object]) -> float:
    """Return the largest number of bytes that torch holds during the call, above those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = largest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


if __name__ == "__main__":
    main()
