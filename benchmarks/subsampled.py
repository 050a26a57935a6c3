"""Subsampled local expectation beside leave-one-out: step time and variance on two decoders.

python benchmarks/subsampled.py            one JSON line a ratio

L1 has 200 Bernoulli latents and a linear decoder, J is the categorical VAE 784-512-256-(20 x 10)-256-512-784; both
learn 8 x 8 digits scaled up to 28 x 28 binary images (synthetic ones where scikit-learn is missing) for a few hundred
steps before anything is measured. Steps, of a batch of 100 and with Adam, run in one process on one thread, in
alternating rounds, measured in process time; the floor is that of the same network as a deterministic autoencoder.
``median`` is the median over the rounds of step / floor, ``minima`` the ratio of the minima; where the two differ by
more than 8 % it says "noisy". Variance is that of the gradient of the encoder's logits, summed over the batch, at the
trained point, relative to leave-one-out with two samples; ``work`` is variance x (step time without Adam), relative to
the same.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical

import gradlab as gl

BATCH, PIXELS = 100, 784


class Model(nn.Module):
    """A discrete VAE with an analytic KL to the uniform law."""

    def __init__(self, hidden: list[int], values: int, latents: int) -> None:
        super().__init__()
        self.values, size = values, latents * max(values, 1)
        self.encoder, self.decoder = layers([PIXELS, *hidden, size]), layers([size, *hidden[::-1], PIXELS])

    def logits(self, x: Tensor) -> Tensor:
        logits = self.encoder(x)
        return logits.unflatten(-1, (-1, self.values)) if self.values else logits

    def q(self, logits: Tensor) -> Distribution:
        law = OneHotCategorical if self.values else Bernoulli
        return Independent(law(logits=logits, validate_args=False), 1, validate_args=False)

    def cost(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return -log p(x | z), as an AfterLinear."""
        first, tail = self.decoder[0], self.decoder[1:]
        if not len(tail):
            return gl.BernoulliAfterLinear(first, x)

        def g(h: Tensor) -> Tensor:
            y = tail(h)
            return F.softplus(y).sum(-1) - (y * x).sum(-1)

        return gl.AfterLinear(first, g)

    def kl(self, logits: Tensor) -> Tensor:
        if not self.values:
            p = torch.sigmoid(logits)
            return (p * logits - F.softplus(logits)).sum(-1)
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum((-1, -2))

    def loss(self, x: Tensor, estimator: gl.Estimator | None) -> Tensor:
        """Return the negative ELBO up to a constant, or for None that of the deterministic autoencoder."""
        logits = self.logits(x)
        f = self.cost(x)
        if estimator is None:
            z = logits.softmax(-1) if self.values else torch.sigmoid(logits)
            fit = f(z)
        else:
            fit = estimator(self.q(logits), f)
        return (fit + self.kl(logits)).mean()


def layers(widths: list[int]) -> nn.Sequential:
    """Return linear layers with ReLU between any two."""
    net: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        net += [nn.ReLU(), nn.Linear(a, b)]
    return nn.Sequential(*net[1:])


MODELS = {"L1": ([], 0, 200), "J": ([512, 256], 10, 20)}
SUBSAMPLED: dict[str, dict[str, Callable[[], gl.Estimator]]] = {
    "L1": {
        "taylor M=1": lambda: gl.TaylorLocalExpectation(flips=1),
        "taylor M=2": lambda: gl.TaylorLocalExpectation(flips=2),
        "adaptive M=2": lambda: gl.AdaptiveLocalExpectation(flips=2),
    },
    "J": {
        "adaptive M=1": lambda: gl.AdaptiveLocalExpectation(flips=1),
        "adaptive M=2": lambda: gl.AdaptiveLocalExpectation(flips=2),
        "adaptive M=5": lambda: gl.AdaptiveLocalExpectation(flips=5),
    },
}


GOALS = {
    ("L1", "taylor M=1"): {"step / floor": 1.6, "work": 0.012},
    ("J", "adaptive M=2"): {"step / floor": 1.35},
    ("J", "adaptive M=5"): {"step / floor": 1.65, "work": 0.06},
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    parser.add_argument("--steps", type=int, default=600, help="training steps before the measurement (default 600)")
    parser.add_argument("--replicates", type=int, default=200, help="gradients a variance (default 200)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        torch.manual_seed(0)
        for line in measure(name, args.rounds, args.steps, args.replicates):
            print(json.dumps(line), flush=True)


def measure(name: str, rounds: int, steps: int, replicates: int) -> list[dict[str, object]]:
    """Train a model, and measure every estimator at the end."""
    model, data = Model(*MODELS[name]), images()
    named = {key: make() for key, make in SUBSAMPLED[name].items()}
    learner = list(named.values())[-1]
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        step(model, data[torch.randint(len(data), (BATCH,))], learner, optimiser)
    x = data[:BATCH]
    estimators = {"floor": None, "leave-one-out S=2": gl.ScoreFunction(2, gl.LeaveOneOut()), **named}
    for estimator in named.values():  # the same table for every number of flips would be unfair to few
        if isinstance(estimator, gl.AdaptiveLocalExpectation) and estimator is not learner:
            for _ in range(steps // 3):
                model.loss(data[torch.randint(len(data), (BATCH,))], estimator).backward()
    times = race(model, x, estimators, rounds, True)
    alone = race(model, x, {k: e for k, e in estimators.items() if e}, rounds, False)
    exact = gl.LocalExpectation(chunk_size=20)
    variances = {k: variance(model, x, e.eval(), replicates) for k, e in estimators.items() if e}
    variances["exact"] = variance(model, x, exact, max(replicates // 10, 10))
    lines: list[dict[str, object]] = []
    for key in [k for k in estimators if k != "floor"]:
        ratio = summary(times[key], times["floor"])
        work = statistics.median(a / b for a, b in zip(alone[key], alone["leave-one-out S=2"], strict=True))
        relative = variances[key] / variances["leave-one-out S=2"]
        lines.append(
            {"model": name, "estimator": key, "step / floor": ratio, "variance / leave-one-out": round(relative, 4),
             "variance / exact": round(variances[key] / variances["exact"], 3), "time / leave-one-out": round(work, 3),
             "work": round(relative * work, 4), "goal": GOALS.get((name, key)), "rounds": rounds}
        )  # fmt: skip
    return lines


def step(model: Model, x: Tensor, estimator: gl.Estimator | None, optimiser: torch.optim.Optimizer | None) -> None:
    """One step, or its gradient only."""
    model.zero_grad(set_to_none=True)
    model.loss(x, estimator).backward()
    if optimiser is not None:
        optimiser.step()


def race(
    model: Model, x: Tensor, estimators: dict[str, gl.Estimator | None], rounds: int, adam: bool
) -> dict[str, list[float]]:
    """Return the process time of a step in each round, in turns of changing order."""
    optimiser = torch.optim.Adam(model.parameters(), 0.0) if adam else None  # the point stays
    times: dict[str, list[float]] = {k: [] for k in estimators}
    for e in estimators.values():
        step(model, x, e, optimiser)
    gc.disable()
    for r in range(rounds):
        for key in list(estimators)[:: 1 if r % 2 else -1]:
            start = time.process_time()
            for _ in range(3):
                step(model, x, estimators[key], optimiser)
            times[key].append(time.process_time() - start)
    gc.enable()
    return times


def summary(ours: list[float], theirs: list[float]) -> dict[str, object]:
    """The median of the ratios, and the ratio of the minima."""
    median, minima = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), min(ours) / min(theirs)
    return {"median": round(median, 3), "minima": round(minima, 3), "noisy": abs(median / minima - 1) > 0.08}


def variance(model: Model, x: Tensor, estimator: gl.Estimator, replicates: int) -> float:
    """The variance of the gradient of the logits, summed over all of them."""
    leaf, f = model.logits(x).detach().requires_grad_(), model.cost(x)
    total, square = torch.zeros_like(leaf, dtype=torch.float64), torch.zeros_like(leaf, dtype=torch.float64)
    for _ in range(replicates):
        (g,) = torch.autograd.grad(estimator(model.q(leaf), f).sum(), leaf)
        total += g
        square += g.double().square()
    mean = total / replicates
    return ((square / replicates - mean.square()).sum() * replicates / (replicates - 1)).item()


def images() -> Tensor:
    """Return binary images ``[N, 784]``."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        basis = torch.randn(12, PIXELS).cumsum(-1) / 8
        return (torch.randn(1500, 12) @ basis > 1).float()
    small = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1).flatten(1)
    return (torch.rand(large.shape) < torch.sigmoid(10 * (large - 0.5))).float()


if __name__ == "__main__":
    main()
