"""What a gradient is worth: the variance of the encoder's gradient, alone and times what it costs.

L, L1 and J (``benchmarks/networks.py``) learn binary images for a few hundred steps first. Then the variance of the
gradient of the logits, summed over a fixed batch, is that of many gradients; "work" is variance x time of forward and
backward. Both are relative to leave-one-out with two samples. Learned control variates and tables have learned as long
as the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import gradlab as gl
from benchmarks.harness import number, race, ratio, run
from benchmarks.networks import BATCH, Autoencoder, images, steps, train
from benchmarks.peers import backward_of
from benchmarks.steps import OURS

REFERENCE = "leave-one-out S=2"
MODELS = {
    "L": [REFERENCE, "leave-one-out S=4", "REBAR", "exact flips"],
    "L1": [REFERENCE, "leave-one-out S=4", "DisARM", "REBAR", "exact flips", "Taylor M=1"],
    "J": [REFERENCE, "leave-one-out S=4", "REBAR", "adaptive M=2", "adaptive M=5"],
}
GOALS = {("L1", "Taylor M=1"): 0.012, ("J", "adaptive M=5"): 0.06}
STEPS, REPLICATES = 600, 200


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Measure each model."""
    data = images(args.device)
    for name, chosen in MODELS.items():
        if not args.gate:
            yield from measure(name, data, chosen, args.rounds)
        elif gated := [e for e in chosen if (name, e) in GOALS]:
            yield from measure(name, data, [REFERENCE, *gated], args.rounds)


def measure(name: str, data: torch.Tensor, chosen: list[str], rounds: int) -> Iterator[dict]:
    """Compare the variances of some estimators on one model."""
    torch.manual_seed(0)
    m = Autoencoder(name).to(data.device)
    estimators = {e: OURS[e]().to(m.device) for e in chosen}
    train(m, data, OURS[chosen[-1]]().to(m.device), STEPS)
    x = data[:BATCH]
    for estimator in estimators.values():
        learn(m, data, estimator)
    losses = {e: backward_of(m.elbo(estimator)) for e, estimator in estimators.items()}
    times = race(steps(m, losses, x, adam=False), rounds, x.device)
    reference = variance(m, x, estimators[REFERENCE])
    for e in chosen[1:]:
        relative = variance(m, x, estimators[e].eval()) / reference
        cost = ratio("time", times, e, REFERENCE)["median"]
        goal = GOALS.get((name, e))
        yield number(f"{name}: work, {e} / {REFERENCE}", relative * cost, goal, variance=relative, time=cost)


def learn(m: Autoencoder, data: torch.Tensor, estimator: gl.Estimator) -> None:
    """Let an estimator learn its own parameters or table, where it has any; the model stays."""
    parameters = list(estimator.parameters())
    if not parameters and not isinstance(estimator, gl.AdaptiveLocalExpectation):
        return
    adam = torch.optim.Adam(parameters, 1e-2) if parameters else None
    loss = m.elbo(estimator)
    for _ in range(STEPS):
        estimator.zero_grad()
        loss(data[torch.randint(len(data), (BATCH,), device=data.device)]).mean().backward()
        if adam:
            adam.step()


def variance(m: Autoencoder, x: torch.Tensor, estimator: gl.Estimator) -> float:
    """Return the variance of the gradient of the logits, summed over the batch."""
    logits = m.guide.logits(x).detach().requires_grad_()
    f = m.likelihood().cost(x)
    total, square = torch.zeros_like(logits, dtype=torch.float64), torch.zeros_like(logits, dtype=torch.float64)
    for _ in range(REPLICATES):
        (g,) = torch.autograd.grad(estimator(m.law(logits), f).sum(), logits)
        total += g
        square += g.double().square()
    mean = total / REPLICATES
    return ((square / REPLICATES - mean.square()).sum() * REPLICATES / (REPLICATES - 1)).item()


if __name__ == "__main__":
    run(lines, __doc__)
