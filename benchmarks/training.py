"""What a second of training buys: the ELBO after equal CPU time, from equal parameters, for two autoencoders.

L and J (``benchmarks/networks.py``) learn 1,500 binary images with Adam at 1e-3; every estimator has the same seconds
of process time (on a GPU: of the wall), compilation and evaluation apart, in ten turns. The ELBO in nats an image is
that of the hard latents, over the 297 images that were held out, with 50 samples each, and the mean of three seeds.
The lines are in nats, not ratios.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gradlab as gl
from benchmarks.harness import number, run
from benchmarks.networks import BATCH, Autoencoder, images
from benchmarks.steps import OURS

SECONDS, TURNS, SEEDS, HELD_OUT = 20.0, 10, 3, 297
RIVALS = ["Gumbel-softmax", "ReinMax", "leave-one-out S=2", "leave-one-out S=4"]
MODELS = {"L": "exact flips", "J": "adaptive M=2"}
GOALS = {"L": -1.0}
"""nats, of the best rival's ELBO minus ours"""


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Train both models."""
    if args.gate:
        return
    data = images(args.device)
    data = data[torch.randperm(len(data), device=data.device)]
    for name, ours in MODELS.items():
        runs = [train(name, [ours, *RIVALS], data[:-HELD_OUT], data[-HELD_OUT:], seed) for seed in range(SEEDS)]
        curves = {e: torch.tensor([run[e][0] for run in runs]) for e in runs[0]}  # [seeds, turns]
        for e, curve in curves.items():
            steps = sum(run[e][1] for run in runs) // SEEDS
            line = f"{name}: ELBO after {SECONDS:g} s, {e}"
            mean = curve.mean(0).tolist()
            yield number(line, mean[-1], error=standard_error(curve[:, -1]), steps=steps, curve=mean)
        best = max(RIVALS, key=lambda e: curves[e][:, -1].mean())
        gap = (curves[best] - curves[ours])[:, -1]
        line = f"{name}: ELBO of the best other ({best}) - that of {ours}"
        yield number(line, gap.mean().item(), GOALS.get(name), error=standard_error(gap))


def standard_error(x: Tensor) -> float:
    """Return the standard error of the mean over seeds."""
    return (x.std() / len(x) ** 0.5).item()


def train(name: str, chosen: list[str], data: Tensor, test: Tensor, seed: int) -> dict[str, tuple[list[float], int]]:
    """Return the ELBO after each turn, and the number of steps, of each estimator."""
    torch.manual_seed(seed)
    start = Autoencoder(name).to(data.device)
    models = {e: copy.deepcopy(start) for e in chosen}
    runs = {e: trainer(models[e], OURS[e]().to(data.device), e == "exact flips", data) for e in chosen}
    counts = dict.fromkeys(chosen, 0)
    now = time.perf_counter if data.is_cuda else time.process_time
    curves: dict[str, list[float]] = {e: [] for e in chosen}
    for turn in range(TURNS):
        for e in chosen[:: -1 if turn % 2 else 1]:
            end = now() + SECONDS / TURNS
            while now() < end:
                runs[e]()
                counts[e] += 1
            curves[e].append(elbo(models[e], test))
    return {e: (curves[e], counts[e]) for e in chosen}


def trainer(m: Autoencoder, estimator: gl.Estimator, compiled: bool, data: Tensor) -> Callable[[], None]:
    """Return a training step."""
    loss = m.elbo(estimator)
    call = torch.compile(loss, fullgraph=True) if compiled else loss
    adam = torch.optim.Adam([*m.parameters(), *estimator.parameters()], 1e-3, fused=True)
    if compiled:
        call(data[:BATCH]).mean().backward()

    def step() -> None:
        adam.zero_grad()
        call(data[torch.randint(len(data), (BATCH,), device=data.device)]).mean().backward()
        adam.step()

    return step


def elbo(m: Autoencoder, test: Tensor) -> float:
    """Return the mean ELBO of the test images, with samples of q."""
    with torch.no_grad():
        return -m.elbo(gl.ScoreFunction(50))(test).mean().item()


if __name__ == "__main__":
    run(lines, __doc__)
