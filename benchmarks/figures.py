"""The experiments of chapter 21: figures 1, 2 and 3 of Echraibi et al. (2020), and the variances behind figure 3.

python benchmarks/figures.py                    all of them, into book/data/figure1.json ...
python benchmarks/figures.py figure2            one of them
python benchmarks/figures.py figure3 --runs 5 --steps 2000 --device cpu

All runs of a method are one batch. A method that is finished is kept: a second call with the same settings goes on
where the first one stopped. Float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Gamma, Independent, Laplace

import gradlab as gl
from gradlab.rules import log_mgf

DATA = Path(__file__).resolve().parent.parent / "book" / "data"
EPSILON = 0.49
RATE = 1e-3
DIMS = (1, 10, 100)
BATCH, SAMPLES = 64, 50
CASES = (("standard", 1.0), ("standard", 0.1), ("min-max", 1.0), ("min-max", 0.1))
POINTS = 20  # checkpoints after the first
STEPS = {"figure1": 4000, "figure2": 4000, "figure3": 2000, "variance": 0}
REPLICATES = {"figure1": 100, "figure2": 100, "figure3": 20, "variance": 4000}
Loss = Callable[..., Tensor]

# -------------------------------------------------------------------------------------------------- figures 1 and 2


def square(z: Tensor) -> Tensor:
    """The cost of toy problem 1, by coordinate."""
    return (z - EPSILON).square()


def decay(z: Tensor) -> Tensor:
    """The cost of toy problem 2, by coordinate."""
    return torch.exp(-EPSILON * z)


def square_loss(k: Tensor, scale: Tensor) -> Tensor:
    """The exact loss of toy problem 1, by coordinate."""
    return k * scale**2 + (k * scale - EPSILON) ** 2


def decay_loss(k: Tensor, scale: Tensor) -> Tensor:
    """The exact loss of toy problem 2, by coordinate."""
    return (1 + EPSILON * scale) ** -k


def jointly(estimator: gl.Estimator, f: Loss) -> Loss:
    """The estimator sees one sample of d coordinates and the sum of their costs."""
    return lambda q: estimator(Independent(q, 1), lambda z: f(z).sum(-1))


def apart(estimator: gl.Estimator, f: Loss) -> Loss:
    """The cost is a sum over coordinates: each is a problem of its own."""
    return lambda q: estimator(q, f).sum(-1)


def exponential(sign: int) -> Loss:
    """Equation 25, a closed form for the exponential cost; the paper prints it with sign = +1."""

    def loss(q: Distribution) -> Tensor:
        weight = gl.magic_box(log_mgf(q, torch.as_tensor(sign * EPSILON).to(q.rate)))
        return (weight * decay(q.sample())).sum(-1)

    return loss


def toy_methods(figure: str) -> dict[str, Loss]:
    """The estimators of figure 1 or 2, one sample each."""
    f = square if figure == "figure1" else decay
    paper = {"series": apart(gl.StochasticBackprop(form="series", order=2), f)}
    if figure == "figure2":
        paper = {"series": exponential(-1), "series, as printed": exponential(+1)}
    return {
        "score": jointly(gl.ScoreFunction(), f),
        "g-rep": jointly(gl.GeneralizedReparameterization(), f),
        "implicit": apart(gl.ImplicitReparameterization(), f),
        **paper,
        "stochastic backprop": apart(gl.StochasticBackprop(), f),
    }


def train_toy(figure: str, loss: Loss, dim: int, args: argparse.Namespace) -> dict[str, list]:
    """Train one method on one dimension, and return its loss and log-variance at the checkpoints, by run."""
    exact = square_loss if figure == "figure1" else decay_loss
    raw = torch.zeros(2, args.runs, dim, dtype=torch.float64, device=args.device).requires_grad_()
    adam = torch.optim.Adam([raw], lr=RATE)
    result: dict[str, list] = {"loss": [], "log_variance": []}
    checkpoints = set(steps_of(args))

    def law(x: Tensor) -> Gamma:
        k, scale = x.exp().unbind(-3)
        return Gamma(k, 1 / scale, validate_args=False)

    for step in range(args.steps + 1):
        if step in checkpoints:
            result["loss"].append(exact(*raw.detach().exp()).mean(-1))
            gradient = gl.replicate(lambda x: loss(law(x)), raw.detach(), args.replicates)
            result["log_variance"].append(gradient.var(0).mean((0, 2)).log())
        if step < args.steps:
            adam.zero_grad()
            loss(law(raw)).sum().backward()
            adam.step()
    return {name: by_run(values) for name, values in result.items()}


def toy(figure: str, args: argparse.Namespace) -> None:
    """Figures 1 and 2."""
    settings = {"epsilon": EPSILON, "dims": list(DIMS), "samples": 1, "rate": RATE, "start": "k = scale = 1"}
    store = Store(figure, args, settings)
    for number, (name, loss) in enumerate(toy_methods(figure).items()):
        for dim in DIMS:
            seed = 1000 * number + dim
            store.add(f"{name}, d={dim}", seed, lambda loss=loss, dim=dim: train_toy(figure, loss, dim, args))


# -------------------------------------------------------------------------------------------------------- figure 3


def breast_cancer() -> tuple[dict[str, Tensor], Tensor]:
    """Return the features, by scaling, ``[N, d]``, and the labels -1 and 1, ``[N]``."""
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.as_tensor(a).double() for a in load_breast_cancer(return_X_y=True))
    low, high = x.amin(0), x.amax(0)
    return {"standard": (x - x.mean(0)) / x.std(0, False), "min-max": (x - low) / (high - low)}, 2 * y - 1


def kl_to_standard(loc: Tensor, scale: Tensor) -> Tensor:
    """Equation 29, KL(Laplace(loc, scale) | Laplace(0, 1)) by coordinate."""
    return loc.abs() + scale * torch.exp(-loc.abs() / scale) - scale.log() - 1


def predictors(rows: Tensor, w: Tensor) -> Tensor:
    """Return the products of rows ``[*B, n, d]`` and weights ``[*L, *B, d]``, ``[*L, *B, n]``."""
    lead = w.shape[: w.ndim - rows.ndim + 1]
    flat = w.reshape(-1, *rows.shape[:-2], rows.shape[-1])
    return (rows @ flat.movedim(0, -1)).movedim(-1, 0).reshape(*lead, *rows.shape[:-1])


def cost_of(rows: Tensor) -> Loss:
    """The mean of -log sigmoid(y x'w) over rows y x, ``[*B, n, d]``; w is ``[*L, *B, d]``."""
    return lambda w: -F.logsigmoid(predictors(rows, w)).mean(-1)


def plain(estimator: gl.Estimator) -> Loss:
    """An estimator of the package, as it is."""
    return lambda q, rows: estimator(Independent(q, 1), cost_of(rows))


def even_derivatives(order: int) -> Tensor:
    r"""Return c with :math:`\partial_h^{2n}\log\sigma(h) = \sum_m c_{nm} u^m`, where u = sigmoid(h) sigmoid(-h).

    With :math:`u'^2 = u^2 - 4u^3` and :math:`u'' = u - 6u^2`, the second derivative of :math:`u^m` is
    :math:`m^2 u^m - 2m(2m+1) u^{m+1}`.
    """
    terms = max(order // 2, 1)
    c = torch.zeros(terms + 1, terms + 2, dtype=torch.float64)
    c[1, 1] = -1.0
    for n in range(1, terms):
        for m in range(1, n + 1):
            c[n + 1, m] += m**2 * c[n, m]
            c[n + 1, m + 1] -= 2 * m * (2 * m + 1) * c[n, m]
    return c[1:, 1:-1]


def series(order: int, num_samples: int = SAMPLES) -> Loss:
    """Equation 18 up to a derivative of f, for a cost of linear predictors.

    The same as gradlab.StochasticBackprop(form="series"), in less time.
    """
    table = even_derivatives(order)

    def loss(q: Laplace, rows: Tensor) -> Tensor:
        with torch.no_grad():
            h = predictors(rows, q.sample((num_samples,)))
            s = torch.sigmoid(h)
            u = s * (1 - s)
            powers = torch.stack([(u ** (m + 1)).mean(0) for m in range(len(table))])
            terms = -torch.einsum("nm,m...->n...", table.to(powers), powers) / h.shape[-1]
            scale = sum(
                2 * q.scale ** (2 * n + 1) * torch.einsum("...n,...nd->...d", t, rows ** (2 * n + 2))
                for n, t in enumerate(terms)
            )
            slope = torch.einsum("...n,...nd->...d", (s - 1).mean(0), rows) / h.shape[-1]
        return gl.attach(gl.attach(-F.logsigmoid(h).mean((0, -1)), q.loc, slope), q.scale, scale)

    return loss


def exact(num_samples: int = SAMPLES) -> Loss:
    r"""The summed series, 2b E[(f(z + G) + f(z - G) - 2f(z)) / G²], for a cost of linear predictors.

    Each jump moves the predictors only: f(h + x G) + f(h - x G) - 2f(h). The same as gradlab.StochasticBackprop(), in
    less time.
    """

    def loss(q: Laplace, rows: Tensor) -> Tensor:
        with torch.no_grad():
            h = predictors(rows, q.sample((num_samples,)))
            three = torch.full_like(q.loc, 3)
            jump = Gamma(three, torch.ones_like(three), validate_args=False).sample((num_samples,))
            bent = torch.zeros_like(q.loc)
            for center, v in zip(h[..., None], jump, strict=True):
                move = rows * (q.scale * v)[..., None, :]
                change = F.softplus(move - center) + F.softplus(-move - center) - 2 * F.softplus(-center)
                bent += change.mean(-2) / v**2
            slope = torch.einsum("...n,...nd->...d", (torch.sigmoid(h) - 1).mean(0), rows) / h.shape[-1]
            scale = 2 * bent / (num_samples * q.scale)
        return gl.attach(gl.attach(-F.logsigmoid(h).mean((0, -1)), q.loc, slope), q.scale, scale)

    return loss


def logistic_methods() -> dict[str, Loss]:
    """The estimators of figure 3."""
    return {
        "score": plain(gl.ScoreFunction(SAMPLES)),
        "reparameterization": plain(gl.Reparameterization(SAMPLES)),
        "series, order 4": series(4),
        "series, order 8": series(8),
        "series, order 16": series(16),
        "stochastic backprop": exact(),
        "KL not divided": plain(gl.Reparameterization(SAMPLES)),
    }


def train_logistic(name: str, loss: Loss, args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Train one method in all cases at once, and return its curves, by case and run."""
    scaled, y = breast_cancer()
    count = len(y)
    rows = torch.stack([(y[:, None] * scaled[case])[None].expand(args.runs, -1, -1) for case, _ in CASES])
    rows = rows.to(args.device)  # [C, R, N, d]
    size = (len(CASES), args.runs, rows.shape[-1])
    start = torch.tensor([b for _, b in CASES], dtype=torch.float64, device=args.device).log()
    loc = torch.zeros(size, dtype=torch.float64, device=args.device).requires_grad_()
    log_scale = start[:, None, None].expand(size).clone().requires_grad_()
    adam = torch.optim.Adam([loc, log_scale], lr=RATE)
    batches = torch.Generator().manual_seed(3)  # the same batches for every method
    divisor = 1 if name == "KL not divided" else count
    result: dict[str, list] = {"elbo": [], "accuracy": [], "log_variance": [], "log_variance_scale": []}
    checkpoints = set(steps_of(args))

    def gradient(batch: Tensor) -> tuple[Tensor, ...]:
        law = Laplace(loc, log_scale.exp(), validate_args=False)
        return torch.autograd.grad(loss(law, batch).sum(), [loc, log_scale])

    for step in range(args.steps + 1):
        picked = torch.stack([torch.randperm(count, generator=batches)[:BATCH] for _ in range(args.runs)])
        index = picked.to(args.device)[None, :, :, None].expand(len(CASES), -1, -1, rows.shape[-1])
        batch = rows.gather(2, index)
        if step in checkpoints:
            elbo, accuracy = evaluate(loc.detach(), log_scale.detach().exp(), rows)
            found = [torch.stack(g) for g in zip(*(gradient(batch) for _ in range(args.replicates)), strict=True)]
            both, one = (torch.cat(f, -1).var(0).mean(-1).log() for f in (found, found[1:]))
            for key, value in zip(result, (elbo, accuracy, both, one), strict=True):
                result[key].append(value)
        if step < args.steps:
            kl = torch.autograd.grad(kl_to_standard(loc, log_scale.exp()).sum() / divisor, [loc, log_scale])
            loc.grad, log_scale.grad = (a + b for a, b in zip(gradient(batch), kl, strict=True))
            adam.step()
    curves = {key: torch.stack(values).permute(1, 2, 0) for key, values in result.items()}  # [C, R, checkpoints]
    return {f"{x}, b={b:g}": {k: rounded(v[i]) for k, v in curves.items()} for i, (x, b) in enumerate(CASES)}


@torch.no_grad()
def evaluate(loc: Tensor, scale: Tensor, rows: Tensor, num_samples: int = 100) -> tuple[Tensor, Tensor]:
    """Return ELBO / N and the accuracy of the mean weights, both on all rows, ``[C, R]``."""
    state = torch.get_rng_state()
    torch.manual_seed(7)  # the same noise for every method and checkpoint
    noise = Laplace(torch.zeros_like(loc), torch.ones_like(loc)).sample((num_samples,))
    torch.set_rng_state(state)
    likelihood = -sum(cost_of(rows)(loc + scale * e) for e in noise) / num_samples
    right = predictors(rows, loc) > 0
    return likelihood - kl_to_standard(loc, scale).sum(-1) / rows.shape[-2], right.double().mean(-1)


# ------------------------------------------------------------------------------------- variances behind figure 3

SCALES = (0.02, 0.1, 0.3, 1.0)


def mode(rows: Tensor, steps: int = 2000) -> Tensor:
    """Return the weights of largest posterior density, nearly."""
    w = torch.zeros(rows.shape[-1], dtype=rows.dtype).requires_grad_()
    adam = torch.optim.Adam([w], lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        (len(rows) * cost_of(rows)(w) + w.abs().sum()).backward()
        adam.step()
    return w.detach()


def variance_methods() -> dict[str, Loss]:
    """Estimators of one sample."""
    return {
        "score": plain(gl.ScoreFunction()),
        "reparameterization": plain(gl.Reparameterization()),
        "series, order 2": series(2, 1),
        "series, order 4": series(4, 1),
        "series, order 8": series(8, 1),
        "series, order 16": series(16, 1),
        "stochastic backprop": exact(1),
        "stochastic backprop, order 2": plain(gl.StochasticBackprop(order=2)),
    }


def measure(loss: Loss, case: str, args: argparse.Namespace) -> dict[str, list]:
    """Return the variance of the derivative by the scales, of a sum over 64 rows, averaged over the weights."""
    scaled, y = breast_cancer()
    all_rows = (y[:, None] * scaled[case.split(",")[0]]).to(args.device)
    rows = all_rows[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))[:BATCH]]
    loc = mode(all_rows) if "mode" in case else torch.zeros_like(rows[0])
    result: dict[str, list] = {"variance": []}

    def surrogate(b: Tensor) -> Tensor:
        return BATCH * loss(Laplace(loc.expand_as(b), b, validate_args=False), rows.expand(len(b), -1, -1))

    for b in SCALES:
        found = gl.replicate(surrogate, torch.full_like(loc, b), args.replicates, 500)
        result["variance"].append(found.var(0).mean())
    return {key: rounded(torch.stack(value)) for key, value in result.items()}


def variance(args: argparse.Namespace) -> None:
    """The variance of the derivative by the scales, at the start (loc = 0) and at the mode of the posterior."""
    settings = {"scales": list(SCALES), "rows": BATCH, "samples": 1}
    store = Store("variance", args, settings)
    for number, (name, loss) in enumerate(variance_methods().items()):
        for case in ("standard, start", "standard, mode", "min-max, start", "min-max, mode"):
            store.add(f"{name}, {case}", number, lambda loss=loss, case=case: measure(loss, case, args))


def figure3(args: argparse.Namespace) -> None:
    """Bayesian logistic regression."""
    settings = {"batch": BATCH, "samples": SAMPLES, "rate": RATE, "start": "loc = 0, scale = b", "intercept": False}
    store = Store("figure3", args, settings)
    for number, (name, loss) in enumerate(logistic_methods().items()):
        store.add(name, number, lambda name=name, loss=loss: train_logistic(name, loss, args))


# ---------------------------------------------------------------------------------------------------------- storage


class Store:
    """A file of results that is never half written, and keeps what it has if the settings are the same."""

    def __init__(self, name: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
        self.path = Path(args.data) / f"{name}.json"
        settings |= {"runs": args.runs, "steps": args.steps, "replicates": args.replicates, "device": args.device}
        self.content: dict[str, Any] = {
            "command": f"python benchmarks/figures.py {name} --runs {args.runs} --steps {args.steps}",
            "settings": settings,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "gradlab": gl.__version__},
            "checkpoints": steps_of(args),
            "results": {},
        }
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if old.get("settings") == settings:
            self.content["results"] = old["results"]

    def add(self, name: str, seed: int, run: Callable[[], Any]) -> None:
        """Run one method, unless its result is there."""
        if name in self.content["results"]:
            print(f"{self.path.name}: {name}: kept", flush=True)
            return
        torch.manual_seed(seed)
        start = time.perf_counter()
        self.content["results"][name] = run()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        text = json.dumps(self.content, indent=1)
        text = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text)  # a list of numbers is a line
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        print(f"{self.path.name}: {name}: {time.perf_counter() - start:.1f} s", flush=True)


def steps_of(args: argparse.Namespace) -> list[int]:
    """Return the steps at which is measured: the first, the last, and some between."""
    return sorted({round(args.steps * i / POINTS) for i in range(POINTS + 1)})


def by_run(values: list[Tensor]) -> list:
    """Return ``[checkpoints, R]`` as numbers, a list for each run."""
    return rounded(torch.stack(values, -1))


def rounded(x: Tensor) -> list:
    """Return numbers of five digits; null for what is not finite."""

    def short(v: Any) -> Any:
        if isinstance(v, list):
            return [short(u) for u in v]
        return float(f"{v:.5g}") if math.isfinite(v) else None

    return short(x.tolist())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="*", help="figure1, figure2, figure3 or variance (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="independent runs (default 5, as in the paper)")
    parser.add_argument("--steps", type=int, help="steps of Adam (default 4000; 2000 for figure3)")
    parser.add_argument("--replicates", type=int, help="gradients for one variance (default 100; 20 for figure3; 4000)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--data", default=str(DATA), help="the folder of the results (default book/data)")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    steps, replicates = args.steps, args.replicates
    for name in args.figure or STEPS:
        if name not in STEPS:
            parser.error(f"figure: found {name!r}, expected one of {', '.join(STEPS)}")
        args.steps = STEPS[name] if steps is None else steps
        args.replicates = REPLICATES[name] if replicates is None else replicates
        {"figure3": figure3, "variance": variance}.get(name, lambda a, name=name: toy(name, a))(args)


if __name__ == "__main__":
    main()
