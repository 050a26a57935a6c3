"""All flips of the latents of an autoencoder of binary images: a training step, and the flips alone.

python benchmarks/flips.py            one JSON line a ratio
python benchmarks/flips.py --eager    without torch.compile, whose first call takes a minute

1. A step (forward, backward, Adam) of the linear autoencoders 784-(20 x 10)-784 and 784-200-784 with every flip exact,
   divided by the step of the same network as a deterministic autoencoder, the floor; batch 100.
2. AfterLinear / generic: all flips of a categorical decoder, batch 20.

All run in one process on one thread, in alternating rounds, measured in process time; the ratio is the median over the
rounds, beside the ratio of the minima. Where the two differ by more than 8 % it says "noisy". Memory is the peak of
what is allocated, as torch's profiler counts it, of a step above that of the floor.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical

import gradlab as gl

BATCH, LATENTS, CATEGORIES, PIXELS = 20, 20, 10, 784


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    args = parser.parse_args()
    rounds = args.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Distribution.set_default_validate_args(False)
    for bits in (False, True):
        for line in steps(bits, not args.eager, rounds):
            print(json.dumps(line), flush=True)
    for name, tail in {"linear decoder": [], "two hidden layers": [256, 512]}.items():
        for chunk_size in (None, 8):
            print(json.dumps(measure(name, tail, chunk_size, rounds)), flush=True)


class Guide(nn.Module):
    """One linear layer to the logits of 20 latents of 10 values, or of 200 bits."""

    def __init__(self, bits: bool) -> None:
        super().__init__()
        self.linear, self.bits = nn.Linear(PIXELS, LATENTS * CATEGORIES), bits

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, with the values of one latent in the last dim."""
        return self.linear(x) if self.bits else self.linear(x).unflatten(-1, (LATENTS, CATEGORIES))

    def forward(self, x: Tensor) -> Distribution:
        return law(self.bits, self.logits(x))


def law(bits: bool, logits: Tensor) -> Distribution:
    """Return the distribution of the latents."""
    return Independent((Bernoulli if bits else OneHotCategorical)(logits=logits), 1)


class Floor(nn.Module):
    """The deterministic autoencoder: z is the mean of the latents; the same likelihood and KL."""

    def __init__(self, bits: bool) -> None:
        super().__init__()
        self.guide, self.linear = Guide(bits), nn.Linear(LATENTS * CATEGORIES, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.guide.logits(x)
        if self.guide.bits:
            z = logits.sigmoid()
            kl = (z * logits - F.softplus(logits)).sum(-1) + logits.shape[-1] * math.log(2)
        else:
            log_z = logits.log_softmax(-1)
            z = log_z.exp()
            kl = (z * (log_z + math.log(CATEGORIES))).sum((-2, -1))
            z = z.flatten(-2)
        return F.binary_cross_entropy_with_logits(self.linear(z), x, reduction="none").sum(-1) + kl


def exact(bits: bool) -> gl.NegativeELBO:
    """Return the autoencoder with every flip of every latent."""
    prior = law(bits, torch.zeros(LATENTS * CATEGORIES) if bits else torch.zeros(LATENTS, CATEGORIES))
    decoder = gl.BernoulliLikelihood(nn.Linear(LATENTS * CATEGORIES, PIXELS))
    return gl.NegativeELBO(Guide(bits), prior, decoder, gl.LocalExpectation())


def steps(bits: bool, compiled: bool, rounds: int) -> Iterator[dict[str, object]]:
    """Compare a step with exact flips, eager and compiled, with the step of the floor."""
    x = (torch.rand(100, PIXELS) < 0.3).float()

    def step(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters())

        def run() -> None:
            optimizer.zero_grad()
            loss(x).mean().backward()
            optimizer.step()

        run()
        run()
        return run

    models = {"floor": Floor(bits), "exact": exact(bits)}
    calls = {name: step(model, model) for name, model in models.items()}
    if compiled:
        model = exact(bits)
        calls["exact, compiled"] = step(model, torch.compile(model, fullgraph=True))
    memory = peak(calls["exact"]) - peak(calls["floor"])
    times = alternate(list(calls.values()), rounds)
    name = "200 bits" if bits else "20 one-hots of 10"
    for call, ours in list(zip(calls, times, strict=True))[1:]:
        line = {"ratio": f"step with exact flips / floor, {name}, {call}", **compare(ours, times[0])}
        yield {**line, "megabytes above the floor": round(memory / 2**20, 1)} if call == "exact" else line


def alternate(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the times of each call, in rounds whose order is turned around each time."""
    times: list[list[float]] = [[] for _ in calls]
    gc.disable()
    for r in range(rounds):
        for i in range(len(calls))[:: 1 if r % 2 else -1]:
            times[i].append(clock(calls[i]))
    gc.enable()
    return times


def compare(ours: list[float], theirs: list[float]) -> dict[str, object]:
    """Return the median ratio and the ratio of the minima."""
    median = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    minima = min(ours) / min(theirs)
    return {
        "median": round(median, 3),
        "minima": round(minima, 3),
        "noisy": abs(median / minima - 1) > 0.08,
        "rounds": len(ours),
    }


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
    return {
        "ratio": f"AfterLinear / generic, {name}, chunk_size={chunk_size}",
        **compare(*alternate([ours, generic], rounds)),
        "megabytes": [round(m / 2**20, 1) for m in memory],
        "largest relative difference": gap,
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
