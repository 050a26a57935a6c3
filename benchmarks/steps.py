"""One training step of three autoencoders, by every estimator and other libraries, relative to a deterministic one.

Forward, backward and Adam on a batch of 100 binary images. The floor is the same network without noise: z is the mean
of the latents. L is 784-(20 x 10)-784 and linear, with 20 latents of 10 values; L1 is 784-200-784, linear, with bits;
J is 784-512-256-(20 x 10)-256-512-784 with ReLU. ``Distribution.set_default_validate_args(False)`` spares all but
torch.distributions the check of every q that is built; one line shows what it adds to ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

import gradlab as gl
from benchmarks import peers
from benchmarks.harness import Times, race, ratio, run, steady, validated
from benchmarks.networks import BATCH, Autoencoder, images, steps

OURS: dict[str, Callable[[], gl.Estimator]] = {
    "Gumbel-softmax": lambda: gl.GumbelSoftmax(temperature=0.5),
    "straight-through": gl.StraightThrough,
    "ReinMax": gl.ReinMax,
    "leave-one-out S=2": lambda: gl.ScoreFunction(2, gl.LeaveOneOut()),
    "leave-one-out S=4": lambda: gl.ScoreFunction(4, gl.LeaveOneOut()),
    "DisARM": gl.DisARM,
    "REBAR": gl.REBAR,
    "exact flips": gl.LocalExpectation,
    "Taylor M=1": lambda: gl.TaylorLocalExpectation(flips=1),
    "adaptive M=2": lambda: gl.AdaptiveLocalExpectation(flips=2),
    "adaptive M=5": lambda: gl.AdaptiveLocalExpectation(flips=5),
}
MODELS = {
    "L": ["Gumbel-softmax", "straight-through", "ReinMax", "leave-one-out S=2", "leave-one-out S=4", "REBAR",
          "exact flips"],
    "L1": ["Gumbel-softmax", "leave-one-out S=2", "DisARM", "REBAR", "exact flips", "Taylor M=1"],
    "J": ["Gumbel-softmax", "leave-one-out S=2", "leave-one-out S=4", "REBAR", "adaptive M=2", "adaptive M=5"],
}  # fmt: skip
GOALS = {
    ("L", "leave-one-out S=2"): 1.35,
    ("L", "exact flips"): 5.0,
    ("L", "exact flips, compiled"): 3.2,
    ("L1", "Taylor M=1"): 1.6,
    ("J", "adaptive M=2"): 1.35,
    ("J", "adaptive M=5"): 1.65,
}
COMPILED = {"L": ["exact flips"], "L1": ["exact flips", "Taylor M=1"]}
COPIES = 3
GUMBEL = 0.95
"""of our step with GumbelSoftmax / that with F.gumbel_softmax, on L"""


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Race the steps of each model."""
    x = images(args.device)[:BATCH]
    for name in MODELS:
        yield from steady(partial(measure, name, x, args))


def measure(name: str, x: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """Race the steps of one model, in several copies: where its numbers lie in memory makes some steps faster."""
    times: Times = {}
    for _ in range(COPIES):
        m = Autoencoder(name).to(x.device)
        calls: peers.Gradients = {"floor": peers.backward_of(m.floor)} | ours(name, m, args.gate)
        if m.guide.values and not args.gate:
            for library in (peers.by_hand, *peers.FOR_CATEGORIES):
                calls |= library(m)
        elif name == "L":
            calls |= peers.by_hand(m)
        for call, seconds in race(steps(m, calls, x), -(-args.rounds // COPIES), x.device).items():
            times.setdefault(call, []).extend(seconds)
    found = [
        ratio(f"{name}: {call} / floor", times, call, "floor", GOALS.get((name, call)))
        for call in times
        if call != "floor"
    ]
    if name == "L":
        found.append(ratio("L: Gumbel-softmax / F.gumbel_softmax", times, "Gumbel-softmax", "F.gumbel_softmax", GUMBEL))
    return found


def ours(name: str, m: Autoencoder, gate: bool) -> peers.Gradients:
    """Return the gradients of gradlab's estimators; those with a goal for a gate."""
    chosen = [e for e in MODELS[name] if not gate or (name, e) in GOALS or (name, e) == ("L", "Gumbel-softmax")]
    calls: peers.Gradients = {e: peers.backward_of(m.elbo(OURS[e]().to(m.device))) for e in chosen}
    for e in COMPILED.get(name, ()) if not gate or name == "L" else ():
        calls[f"{e}, compiled"] = peers.backward_of(torch.compile(m.elbo(OURS[e]()), fullgraph=True))
    if name == "L" and not gate:
        calls["Gumbel-softmax, q validated"] = validated(peers.backward_of(m.elbo(OURS["Gumbel-softmax"]())))
    return calls


if __name__ == "__main__":
    run(lines, __doc__)
