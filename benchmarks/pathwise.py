"""Implicit paths: cost per sample, degenerate draws and accuracy, beside torch's own.

1. Time of a draw with its backward in float32, relative to torch's rsample of as many normals, and to that of the same
   law: 100,000 samples, or 10,000 vectors.
2. The same of a mixture of 10 normals, relative to Pyro's ``MixtureOfDiagNormals`` in one dimension.
3. The share of float32 draws that are no draws: a gamma variable of shape 1e-3 at the edge of the range, a row of a
   Dirichlet(1e-4) that is uniform.
4. The largest relative error of dz/dalpha of a gamma variable in float64, for alpha in [1e-3, 1e4] and the quantiles at
   u in [1e-6, 1 - 1e-6], against 40 digits of the power series of its cdf.
5. Time of the derivative of a von Mises sample by its concentration.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch import distributions as D

from benchmarks.harness import installed, number, race, ratio, run, steady
from gradlab import implicit, special
from gradlab.distributions import Logistic, TruncatedNormal
from gradlab.paths import draw, log_gamma

SAMPLES, ROWS = 100_000, 10_000
COMPONENTS = 10
ALPHAS = [1e-3, 1e-2, 0.03, 0.1, 0.3, 0.8, 1.5, 4.0, 7.9, 8.0, 8.5, 10.0, 20.0, 100.0, 1e3, 1e4]
UNIFORMS = [1e-6, 1e-3, 0.05, 0.3, 0.5, 0.75, 0.9, 0.97, 0.999, 1 - 1e-6]
Sampler = Callable[[D.Distribution, torch.Size], Tensor]


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the lines: what has a goal, then the times."""
    yield from degenerate(args.device)
    yield accuracy()
    if args.gate:
        return
    yield from steady(lambda: list(families(args)))
    yield from steady(lambda: list(von_mises(args)))
    if installed("pyro"):
        yield from steady(lambda: [mixtures(args)])


def rsample(q: D.Distribution, shape: torch.Size) -> Tensor:
    """Torch's own."""
    return q.rsample(shape)


# ------------------------------------------------------------------------------------------------------------- time


def laws(device: str) -> dict[str, D.Distribution]:
    """Return distributions with parameters that want a gradient."""

    def leaf(*values: float) -> Tensor:
        return torch.tensor(values if len(values) > 1 else values[0], device=device, requires_grad=True)

    def mixture(*event: int) -> D.Distribution:
        loc = torch.randn(COMPONENTS, *event, device=device, requires_grad=True)
        scale = torch.full((COMPONENTS, *event), 0.7, device=device, requires_grad=True)
        logits = torch.randn(COMPONENTS, device=device, requires_grad=True)
        return D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(D.Normal(loc, scale), len(event)))

    return {
        "Normal": D.Normal(leaf(0.0), leaf(1.0)),
        "Laplace": D.Laplace(leaf(0.0), leaf(1.0)),
        "Logistic": Logistic(leaf(0.0), leaf(1.0)),
        "Gamma(0.01)": D.Gamma(leaf(0.01), leaf(1.0)),
        "Gamma(1)": D.Gamma(leaf(1.0), leaf(1.0)),
        "Gamma(100)": D.Gamma(leaf(100.0), leaf(1.0)),
        "Beta(2, 3)": D.Beta(leaf(2.0), leaf(3.0)),
        "Dirichlet of 10": D.Dirichlet(leaf(*[0.5] * 10)),
        "StudentT(5)": D.StudentT(leaf(5.0), leaf(0.0), leaf(1.0)),
        "VonMises(3)": D.VonMises(leaf(0.0), leaf(3.0)),
        "TruncatedNormal": TruncatedNormal(leaf(0.0), leaf(1.0), leaf(-1.0), leaf(2.0)),
        "mixture of 10 normals": mixture(),
        "mixture of 10 normals in 8 dims": mixture(8),
    }


def back(q: D.Distribution, sampler: Sampler, size: int | None = None) -> Callable[[], None]:
    """Return a call that samples and goes back."""
    shape = torch.Size([size or count(q)])
    return lambda: sampler(q, shape).sum().backward(retain_graph=True)


def count(q: D.Distribution) -> int:
    """Return how many samples are drawn."""
    return ROWS if q.event_shape else SAMPLES


def families(args: argparse.Namespace) -> Iterator[dict]:
    """Compare every path with torch's Normal, and with torch's own where it has one."""
    table = laws(args.device)
    theirs = [name for name, q in table.items() if q.has_rsample and type(q).__module__.startswith("torch")]
    calls = {name: back(q, implicit) for name, q in table.items()}
    calls |= {f"torch, {name}": back(table[name], rsample) for name in theirs}
    calls |= {f"torch, {size}": back(table["Normal"], rsample, size) for size in (SAMPLES, ROWS)}
    times = race(calls, args.rounds, args.device)
    for name, q in table.items():
        each = {"nanoseconds a sample": 1e9 * min(times[name]) / count(q)}
        yield ratio(f"path of {name} / normal of torch", times, name, f"torch, {count(q)}", **each)
        if name in theirs:
            yield ratio(f"path of {name} / torch's own", times, name, f"torch, {name}")


def mixtures(args: argparse.Namespace) -> dict:
    """Compare the mixture of normals with Pyro's."""
    from pyro.distributions import MixtureOfDiagNormals

    q = laws(args.device)["mixture of 10 normals"]
    normals, logits = q.component_distribution.base_dist, q.mixture_distribution.logits
    theirs = MixtureOfDiagNormals(normals.loc[:, None], normals.scale[:, None], logits)
    shape = torch.Size([SAMPLES])
    calls = {
        "ours": back(q, implicit),
        "pyro": lambda: theirs.rsample(shape).sum().backward(retain_graph=True),
    }
    return ratio(
        "mixture of 10 normals, path / Pyro's", race(calls, args.rounds, args.device), "ours", "pyro", goal=0.08
    )


def von_mises(args: argparse.Namespace) -> Iterator[dict]:
    """Time dz/dkappa alone, beside the draw; torch has none."""
    compiled = torch.compile(special.von_mises_grad, fullgraph=True)
    for kappa in (0.3, 3.0, 30.0, 300.0):
        q = D.VonMises(torch.zeros((), device=args.device), torch.tensor(kappa, device=args.device))
        z, shape = q.sample((SAMPLES,)), torch.Size([SAMPLES])
        calls = {
            "derivative": partial(special.von_mises_grad, q.concentration, z),
            "derivative, compiled": partial(compiled, q.concentration, z),
            "draw": partial(q.sample, shape),
        }
        times = race(calls, args.rounds, args.device)
        for name in ("derivative", "derivative, compiled"):
            each = {"nanoseconds a sample": 1e9 * min(times[name]) / SAMPLES}
            yield ratio(f"von Mises, kappa {kappa:g}, {name} / torch's draw", times, name, "draw", **each)


# -------------------------------------------------------------------------------------------------- degenerate draws


def degenerate(device: str) -> Iterator[dict]:
    """Count the draws of two laws of tiny shapes that are no draws."""
    shape, info = torch.Size([SAMPLES]), torch.finfo(torch.float32)
    gamma = D.Gamma(torch.tensor(1e-3, device=device), torch.tensor(1.0, device=device))
    dirichlet = D.Dirichlet(torch.full((5,), 1e-4, device=device))

    def at_the_edge(log_z: Tensor) -> float:
        return share(~log_z.isfinite() | (log_z == torch.tensor(info.tiny).log()))

    def uniform(z: Tensor) -> float:
        return share((z == z[:, :1]).all(-1))

    yield number(
        "share of degenerate float32 draws, log of a gamma variable of shape 1e-3",
        at_the_edge(log_gamma(gamma.concentration, draw(gamma, shape)).float()),
        goal=0.0,
        torch=at_the_edge(gamma.rsample(shape).log()),
    )
    yield number(
        "share of degenerate float32 draws, Dirichlet(1e-4)",
        uniform(implicit(dirichlet, shape)),
        goal=0.0,
        torch=uniform(dirichlet.rsample(shape)),
    )


def share(found: Tensor) -> float:
    """Return how often it is true."""
    return found.double().mean().item()


# --------------------------------------------------------------------------------------------------------- accuracy


def accuracy() -> dict:
    """Return the largest relative error of dz/dalpha; torch's where float64 holds z."""
    points = [(alpha, log_quantile(alpha, u)) for alpha, u in itertools.product(ALPHAS, UNIFORMS)]
    exact = torch.tensor([log_derivative(*point) for point in points], dtype=torch.float64)
    alpha, log_z = torch.tensor(points, dtype=torch.float64).unbind(-1)
    z = log_z.exp()
    held = z > torch.finfo(z.dtype).tiny

    def error(found: Tensor) -> Tensor:
        return (found / exact - 1).abs()

    theirs = error(torch._standard_gamma_grad(alpha, z) / z)[held]
    return number(
        "gamma, largest relative error of dz/dalpha in float64",
        error(special.log_gamma_grad(alpha, log_z)).max().item(),
        goal=1e-6,
        points=len(points),
        torch=theirs.max().item(),
        torch_points=len(theirs),
    )


def log_quantile(alpha: float, u: float) -> float:
    """Return the log of a quantile of Gamma(alpha); where that underflows, the cdf is z^alpha / Gamma(alpha + 1)."""
    from scipy import stats

    if alpha < 0.05 and u < 0.9:
        return (math.log(u) + math.lgamma(alpha + 1)) / alpha
    return math.log(stats.gamma.ppf(u, alpha))


def log_derivative(alpha: float, log_z: float) -> float:
    r"""Return d log z / d alpha to 40 digits, :math:`\sum_n (\psi(\alpha+n+1) - \log z)\,z^n / (\alpha)_{n+1}`."""
    import mpmath as mp

    z = math.exp(log_z)
    with mp.workdps(40 + int(0.9 * max(z - alpha, 0))):  # above the centre the terms cancel
        a, x = mp.mpf(alpha), mp.exp(mp.mpf(log_z))
        psi, term, total, n = mp.digamma(a + 1), 1 / a, mp.mpf(0), 0
        while n <= z or abs(term) > abs(total) * mp.mpf(10) ** -40:
            total += term * (psi - log_z)
            n += 1
            term, psi = term * x / (a + n), psi + 1 / (a + n)
        return float(total)


if __name__ == "__main__":
    run(lines, __doc__)
