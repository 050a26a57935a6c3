"""The gradient by the shape of a gamma variable: stochastic backpropagation against implicit reparameterisation.

1. Variance of one sample's k-gradient of the toy costs of the paper, f(z) = (z - 0.49)² and f(z) = exp(-0.49 z), at
   four settings of the shape k and the scale mu, relative to the implicit gradient's: the worst of the four. The rule
   is that of ``StochasticBackprop()``, which sums the whole series.
2. Time at shape 1, of 100,000 float32 samples, on the same f: first what an f has to be given, that is a draw and the
   point on its jump where f' is taken, against torch's draw and its dz/dk; then the whole gradient of toy 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Gamma

import gradlab as gl
from benchmarks.harness import number, race, ratio, run, steady
from gradlab.experiments.toys import decay, square

SETTINGS = ((1.0, 1.0), (0.1, 1.0), (5.0, 0.5), (2.0, 4.0))
SAMPLES = 100_000
Cost = Callable[[Tensor], Tensor]


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the lines: variances, then times."""
    yield worst("toy 1", square, args.device, goal=0.5)
    if not args.gate:
        yield worst("toy 2", decay, args.device)
    yield from steady(lambda: list(times(args)))


def worst(toy: str, f: Cost, device: str, goal: float | None = None) -> dict:
    """Compare the variances of the k-gradient at all settings."""
    estimators = {"ours": gl.StochasticBackprop(), "implicit": gl.ImplicitReparameterization()}
    found = [{name: variance(e, f, *setting, device) for name, e in estimators.items()} for setting in SETTINGS]
    ratios = [v["ours"] / v["implicit"] for v in found]
    return number(
        f"gamma, variance of the k-gradient, stochastic backprop / implicit, {toy}, worst of {len(SETTINGS)}",
        max(ratios),
        goal,
        **{f"k={k:g}, mu={mu:g}": [r, *v.values()] for (k, mu), r, v in zip(SETTINGS, ratios, found, strict=True)},
    )


def variance(estimator: gl.Estimator, f: Cost, k: float, mu: float, device: str, replicates: int = 1_000_000) -> float:
    """Return the variance of one sample's gradient by k, in float64."""
    shape, rate = (torch.tensor(x, dtype=torch.float64, device=device) for x in (k, 1 / mu))

    def loss(k: Tensor) -> Tensor:
        return estimator(Gamma(k, rate.expand_as(k), validate_args=False), f)

    return gl.replicate(loss, shape, replicates, 20_000).var().item()


def times(args: argparse.Namespace) -> Iterator[dict]:
    """Compare the times at shape 1."""
    k, one = torch.ones((), device=args.device, requires_grad=True), torch.ones((), device=args.device)
    first, exact = gl.StochasticBackprop(SAMPLES, order=1), gl.StochasticBackprop(SAMPLES)

    def law() -> Gamma:
        return Gamma(k, one, validate_args=False)

    def jump() -> Tensor:
        noise = first.draw(law())
        u, v = noise.jumps["concentration", 1]
        return torch.addcmul(noise.z, u, v)  # z + UV, at rate 1

    def path() -> Tensor:
        z = law().rsample((SAMPLES,))
        return torch.autograd.grad(z.sum(), k)[0]

    def gradient(estimator: gl.Estimator) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(estimator(law(), square), k)

    calls: dict[str, Callable[[], object]] = {"jump": jump, "path": path}
    if not args.gate:
        calls |= {
            "order 1": gradient(first),
            "order 0": gradient(exact),
            "gradlab": gradient(gl.ImplicitReparameterization(SAMPLES)),
            "torch": lambda: torch.autograd.grad(square(law().rsample((SAMPLES,))).mean(), k),
        }
    found = race(calls, args.rounds, args.device)
    yield ratio("gamma, draw and derivative / implicit of torch, shape 1", found, "jump", "path", goal=0.85)
    if not args.gate:
        name = "gamma, gradient of toy 1, {} / implicit of torch, shape 1"
        yield ratio(name.format("stochastic backprop of order 1"), found, "order 1", "torch")
        yield ratio(name.format("stochastic backprop of order 0"), found, "order 0", "torch")
        yield ratio(name.format("implicit of gradlab, in log space and float64"), found, "gradlab", "torch")


if __name__ == "__main__":
    run(lines, __doc__)
