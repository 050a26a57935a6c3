"""The memory of exact flips, and what the structure of the cost saves.

1. The peak of a training step with all flips exact above that of the floor, in megabytes, as torch's profiler (on a
   GPU: its allocator) counts them; J in chunks.
2. All flips of a categorical decoder as an ``AfterLinear`` / the same cost as a plain function: time and memory.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import gradlab as gl
from benchmarks.harness import number, peak, race, ratio, run
from benchmarks.networks import BATCH, PIXELS, Autoencoder, images, law, steps
from benchmarks.peers import backward_of

GOALS = {"L": 30.0, "L1": None, "J": 20.0}
FEW, LATENTS, CATEGORIES = 20, 20, 10


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Measure the steps, then the flips alone."""
    x = images(args.device)[:BATCH]
    for name, goal in GOALS.items():
        if goal is not None or not args.gate:
            yield megabytes(name, x, goal)
    if args.gate:
        return
    for name, tail in {"linear decoder": [], "two hidden layers": [256, 512]}.items():
        for chunk_size in (None, 8):
            yield structured(name, tail, chunk_size, args)


def megabytes(name: str, x: Tensor, goal: float | None) -> dict:
    """Return the peak of a step with exact flips above that of the floor."""
    m = Autoencoder(name).to(x.device)
    estimator = gl.LocalExpectation(chunk_size=4 if name == "J" else None)
    calls = steps(m, {"floor": backward_of(m.floor), "exact": backward_of(m.elbo(estimator))}, x)
    for call in calls.values():
        call()  # Adam's state stays
    value = peak(calls["exact"], x.device) - peak(calls["floor"], x.device)
    return number(f"{name}: megabytes of exact flips above the floor", value, goal)


def structured(name: str, tail: list[int], chunk_size: int | None, args: argparse.Namespace) -> dict:
    """Compare one backward through the two ways of writing the same cost."""
    plain, after = costs(tail, args.device)
    logits = torch.randn(FEW, LATENTS, CATEGORIES, device=args.device, requires_grad=True)
    estimator = gl.LocalExpectation(1, chunk_size)
    q = law(logits, CATEGORIES)
    noise = estimator.draw(q)

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(estimator.estimate(q, f, noise).sum(), logits, retain_graph=True)[0]

    calls = {"AfterLinear": lambda: gradient(after), "generic": lambda: gradient(plain)}
    ours, theirs = (call() for call in calls.values())
    times = race(calls, args.rounds, args.device)
    return ratio(
        f"flips alone, AfterLinear / generic, {name}, chunk_size={chunk_size}",
        times,
        "AfterLinear",
        "generic",
        megabytes=[peak(call, args.device) for call in calls.values()],
        difference=((ours - theirs).abs().max() / theirs.abs().max()).item(),
    )


def costs(tail: list[int], device: str) -> tuple[Callable[[Tensor], Tensor], gl.AfterLinear]:
    """Return the negative log likelihood of a binary image, written plainly and as an AfterLinear."""
    widths = [LATENTS * CATEGORIES, *tail, PIXELS]
    layers = [nn.Linear(a, b, device=device) for a, b in itertools.pairwise(widths)]
    image = (torch.rand(FEW, PIXELS, device=device) < 0.3).float()

    def after(h: Tensor) -> Tensor:
        for layer in layers[1:]:
            h = layer(h.relu())
        return -law(h, 0).log_prob(image)

    return lambda z: after(layers[0](z.flatten(-2))), gl.AfterLinear(layers[0], after)


if __name__ == "__main__":
    run(lines, __doc__)
