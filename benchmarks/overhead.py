"""What a call costs beyond its arithmetic: toy problems beside hand-written torch, and ``gradlab.fit`` beside a loop.

1. A training step (call, backward, Adam) of E[(z - .49)^2] with one parameter: the work is a few microseconds, what is
   timed is the library. "Validated" is torch's default, which checks the parameters of every q that is built; it is
   switched off in the other lines, as Pyro and ``torch.compile`` do.
2. An epoch of ``gradlab.fit``, with its log and its check of every step for NaN, beside the same loop written by hand,
   with equal parameters at the end: a Bernoulli VAE, 784-256-200.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

import gradlab as gl
from benchmarks.harness import installed, race, ratio, run, steady, steps, validated
from benchmarks.networks import PIXELS

TARGET = {"goal": 1.15, "limit": 1.6}
"""Out of reach where q is a torch distribution, which alone costs as much (the lines of torch.distributions)."""
HIDDEN, LATENTS, STEPS = 256, 200, 10
Losses = dict[str, Callable[[], object]]


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Measure the toys, then fit."""
    for samples in (1, 2, 1000):
        yield from steady(partial(toy, f"Bernoulli, S={samples}", *score(samples, args), args))
    yield from steady(partial(toy, "Normal, S=1", *path(args), args))
    if not args.gate:
        for batch in (64, 128):
            yield fitted(batch, args)


def toy(name: str, theta: Tensor, losses: Losses, args: argparse.Namespace) -> list[dict]:
    """Compare the steps."""
    gradients = {key: partial(backward, loss) for key, loss in losses.items()}
    times = race(steps([theta], gradients), args.rounds, args.device)
    return [
        ratio(f"{name}: {key} / by hand", times, key, "by hand", **(TARGET if key == "gradlab" else {}))
        for key in losses
        if key != "by hand"
    ]


def backward(loss: Callable[[], object]) -> None:
    """Go backward from a loss; a library may have done so itself."""
    value = loss()
    if isinstance(value, Tensor):
        value.backward()


def cost(z: Tensor) -> Tensor:
    """The cost of the toys."""
    return (z - 0.49).square()


def score(samples: int, args: argparse.Namespace) -> tuple[Tensor, Losses]:
    """The score function of a bit, with the other samples as baseline where there are any."""
    theta = torch.zeros((), device=args.device, requires_grad=True)
    estimator = gl.ScoreFunction(samples, gl.LeaveOneOut() if samples > 1 else None)

    def weigh(z: Tensor, log_q: Tensor) -> Tensor:
        c = cost(z)
        baseline = (c.sum() - c) / (samples - 1) if samples > 1 else 0.0
        return ((c - baseline) * log_q).mean()

    def by_hand() -> Tensor:
        z = torch.bernoulli(theta.detach().sigmoid().expand(samples))
        return weigh(z, -F.binary_cross_entropy_with_logits(theta.expand(samples), z, reduction="none"))

    def distributions() -> Tensor:
        q = Bernoulli(logits=theta)
        z = q.sample((samples,))
        return weigh(z, q.log_prob(z))

    losses: Losses = {
        "by hand": by_hand,
        "gradlab": lambda: estimator(Bernoulli(logits=theta), cost),
    }
    if args.gate:
        return theta, losses
    losses |= {
        "gradlab, validated": validated(losses["gradlab"]),
        "torch.distributions": distributions,
        "torch.distributions, validated": validated(distributions),
    }
    return theta, losses | pyro(theta, samples) | storchastic(theta, samples)


def pyro(theta: Tensor, samples: int) -> Losses:
    """Pyro's score function of the same cost."""
    if not installed("pyro"):
        return {}
    import pyro as p
    from pyro.infer import Trace_ELBO

    def model() -> None:
        p.factor("cost", -cost(p.sample("z", p.distributions.Bernoulli(0.5).mask(False))))

    def guide() -> None:
        p.sample("z", p.distributions.Bernoulli(logits=p.param("theta", lambda: theta)).mask(True))

    elbo = Trace_ELBO(num_particles=samples, vectorize_particles=samples > 1, max_plate_nesting=0)
    p.clear_param_store()
    return {"pyro, Trace_ELBO": lambda: elbo.differentiable_loss(model, guide)}


def storchastic(theta: Tensor, samples: int) -> Losses:
    """Storchastic's score function."""
    if not installed("storch"):
        return {}
    import storch

    baseline = "batch_average" if samples > 1 else "none"
    method = storch.method.ScoreFunction("z", n_samples=samples, baseline_factory=baseline)

    def gradient() -> None:
        storch.reset()
        storch.add_cost(storch.deterministic(cost)(method(Bernoulli(logits=theta))), "cost")
        storch.backward()

    return {"storchastic": gradient}


def path(args: argparse.Namespace) -> tuple[Tensor, Losses]:
    """The reparameterised mean of a Normal."""
    theta = torch.zeros((), device=args.device, requires_grad=True)
    estimator = gl.Reparameterization()
    losses: Losses = {
        "by hand": lambda: cost(theta + torch.randn(1, device=theta.device)).mean(),
        "gradlab": lambda: estimator(Normal(theta, 1.0), cost),
    }
    if not args.gate:
        losses["gradlab, validated"] = validated(losses["gradlab"])
        losses["torch.distributions"] = lambda: cost(Normal(theta, 1.0).rsample((1,))).mean()
        losses["torch.distributions, validated"] = validated(losses["torch.distributions"])
    return theta, losses


class Objective(nn.Module):
    """The negative ELBO of a Bernoulli VAE, with leave-one-out score functions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))
        self.estimator = gl.ScoreFunction(2, gl.LeaveOneOut())

    def forward(self, x: Tensor) -> Tensor:
        q = Independent(Bernoulli(logits=self.encoder(x)), 1)
        prior = Independent(Bernoulli(logits=torch.zeros(LATENTS, device=x.device)), 1)

        def cost(z: Tensor) -> Tensor:
            pixels = Independent(Bernoulli(logits=self.decoder(z)), 1)
            return q.log_prob(z) - prior.log_prob(z) - pixels.log_prob(x)

        return self.estimator(q, cost)


def fitted(batch: int, args: argparse.Namespace) -> dict:
    """Compare an epoch of the two loops; both draw the same numbers."""
    torch.manual_seed(0)
    images = (torch.rand(batch * STEPS, PIXELS) < 0.3).float()
    ours = Objective().to(args.device)
    theirs = copy.deepcopy(ours)
    adams = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    loader = DataLoader(TensorDataset(images), batch)

    def by_hand() -> None:
        torch.manual_seed(1)
        for (x,) in loader:
            adams[1].zero_grad(set_to_none=True)
            theirs(x.to(args.device, non_blocking=True)).mean().backward()
            adams[1].step()

    with tempfile.TemporaryDirectory() as folder:

        def fit() -> None:
            torch.manual_seed(1)
            gl.fit(ours, loader, adams[0], epochs=1, log=Path(folder) / "log.jsonl")

        times = race({"fit": fit, "by hand": by_hand}, 2 * args.rounds, args.device)
    same = all(map(torch.equal, ours.parameters(), theirs.parameters()))
    return ratio(f"gradlab.fit / by hand, batch {batch}", times, "fit", "by hand", same=same)


if __name__ == "__main__":
    run(lines, __doc__)
