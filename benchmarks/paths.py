"""Cost per sample of every implicit path relative to a Normal rsample, and the share of degenerate draws.

Process CPU time of sampling and one backward, one thread, float32, rounds in alternating order: the median
over rounds of the ratio to the Normal of the same round. Run: ``python benchmarks/paths.py [samples] [rounds]``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributions as D

from gradlab.distributions import Logistic, TruncatedNormal
from gradlab.paths import implicit


def leaf(*values: float) -> Tensor:
    """A parameter, scalar or vector."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float32, requires_grad=True)


def mixture(family: Callable[..., D.Distribution], *shape: int) -> D.MixtureSameFamily:
    """Ten components; with ``shape``, each of that event shape."""
    loc, scale = torch.randn(10, *shape, requires_grad=True), torch.full((10, *shape), 0.7, requires_grad=True)
    component = D.Independent(family(loc, scale), len(shape))
    return D.MixtureSameFamily(D.Categorical(logits=torch.randn(10, requires_grad=True)), component)


def families() -> dict[str, tuple[D.Distribution, Callable]]:
    """Distribution and sampler; ``torch`` marks torch's own rsample."""
    rsample = D.Distribution.rsample
    own = {
        "Normal": D.Normal(leaf(0), leaf(1)),
        "Laplace": D.Laplace(leaf(0), leaf(1)),
        "Logistic": Logistic(leaf(0), leaf(1)),
        "Gamma(0.01)": D.Gamma(leaf(0.01), leaf(1)),
        "Gamma(1)": D.Gamma(leaf(1), leaf(1)),
        "Gamma(100)": D.Gamma(leaf(100), leaf(1)),
        "Beta(2, 3)": D.Beta(leaf(2), leaf(3)),
        "Dirichlet, K = 10": D.Dirichlet(leaf(*[0.5] * 10)),
        "StudentT(5)": D.StudentT(leaf(5), leaf(0), leaf(1)),
        "VonMises(3)": D.VonMises(leaf(0), leaf(3)),
        "TruncatedNormal": TruncatedNormal(leaf(0), leaf(1), leaf(-1), leaf(2)),
        "mixture of 10 Normals": mixture(D.Normal),
        "mixture of 10 Normals in R^8": mixture(D.Normal, 8),
    }
    torch_too = ("Normal", "Gamma(1)", "Gamma(100)", "Beta(2, 3)", "Dirichlet, K = 10", "StudentT(5)")
    theirs = {f"{name}, torch": (own[name], type(own[name]).rsample or rsample) for name in torch_too}
    return {name: (q, implicit) for name, q in own.items()} | theirs


def seconds(q: D.Distribution, sample: Callable, size: int) -> float:
    """CPU time of one sample and backward."""
    start = time.process_time()
    sample(q, torch.Size((size,))).sum().backward(retain_graph=True)
    return time.process_time() - start


def degenerate(q: D.Distribution, sample: Callable) -> float:
    """The share of draws on the edge of float32's range, or of uniform rows for a Dirichlet."""
    z = sample(q, torch.Size((20_000,))).detach()
    if isinstance(q, D.Dirichlet):
        return (z == z[:, :1]).all(-1).double().mean().item()
    return (z <= torch.finfo(z.dtype).tiny).double().mean().item()


def main(size: int = 100_000, rounds: int = 9) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = families()
    times: dict[str, list[float]] = {name: [] for name in table}
    for i in range(rounds + 1):
        for name in list(table)[:: 1 if i % 2 else -1]:
            q, sample = table[name]
            count = size // 10 if q.event_shape else size
            times[name].append(seconds(q, sample, count) / count)
    print(f"{'family':34s} {'ns / sample':>12s} {'x Normal':>9s}   ({size} samples, {rounds} rounds, rows for R^n)")
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found[1:], times["Normal, torch"][1:], strict=True))
        print(f"{name:34s} {statistics.median(found[1:]) * 1e9:12.1f} {ratio:9.2f}")
    print(f"\n{'degenerate float32 draws':34s} {'gradlab':>9s} {'torch':>9s}")
    for q in (
        *(D.Gamma(leaf(a), leaf(1)) for a in (1e-3, 1e-2, 5e-2)),
        *(D.Dirichlet(leaf(*[a] * 5)) for a in (1e-4, 1e-3)),
    ):
        label = f"{type(q).__name__}({q.concentration.flatten()[0].item():g})"
        print(f"{label:34s} {degenerate(q, implicit):9.2%} {degenerate(q, type(q).rsample):9.2%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
