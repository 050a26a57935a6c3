"""Figure 3 of Echraibi et al. (2020), Bayesian logistic regression, and the variances behind it.

The posterior of the weights is approximated by Laplace laws. All runs of a method, in all cases, are one batch, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Gamma, Independent, Laplace

from gradlab.diagnostics import replicate
from gradlab.estimator import Estimator
from gradlab.experiments import data
from gradlab.experiments.plan import Job, Plan, seeded
from gradlab.experiments.results import rounded
from gradlab.pathwise import Reparameterization
from gradlab.score import ScoreFunction
from gradlab.stochastic_backprop import StochasticBackprop
from gradlab.surrogate import attach

__all__ = [
    "even_derivatives",
    "exact",
    "jobs",
    "kl_to_standard",
    "methods",
    "plain",
    "scaled_rows",
    "series",
    "settings",
    "train",
    "variance_jobs",
    "variance_methods",
    "variance_settings",
]

RATE = 1e-3
BATCH, SAMPLES = 64, 50
CASES = (("standard", 1.0), ("standard", 0.1), ("min-max", 1.0), ("min-max", 0.1))
SCALES = (0.02, 0.1, 0.3, 1.0)
PLACES = ("start", "mode")
SCALINGS = {"standard": "standardise", "min-max": "min-max"}
Cost = Callable[[Tensor], Tensor]
Loss = Callable[[Laplace, Tensor], Tensor]


def scaled_rows(scaling: str) -> Tensor:
    """Return y x for each row of the data, with labels y of -1 and 1 and features x scaled, ``[N, d]``."""
    x, y = data.breast_cancer(SCALINGS[scaling])
    return (2 * y - 1)[:, None] * x


def kl_to_standard(loc: Tensor, scale: Tensor) -> Tensor:
    """Equation 29, KL(Laplace(loc, scale) | Laplace(0, 1)) by coordinate."""
    return loc.abs() + scale * torch.exp(-loc.abs() / scale) - scale.log() - 1


def predictors(rows: Tensor, w: Tensor) -> Tensor:
    """Return the products of rows ``[*B, n, d]`` and weights ``[*L, *B, d]``, ``[*L, *B, n]``."""
    lead = w.shape[: w.ndim - rows.ndim + 1]
    flat = w.reshape(-1, *rows.shape[:-2], rows.shape[-1])
    return (rows @ flat.movedim(0, -1)).movedim(-1, 0).reshape(*lead, *rows.shape[:-1])


def cost_of(rows: Tensor) -> Cost:
    """The mean of -log sigmoid(y x'w) over rows y x, ``[*B, n, d]``; w is ``[*L, *B, d]``."""
    return lambda w: -F.logsigmoid(predictors(rows, w)).mean(-1)


def plain(estimator: Estimator) -> Loss:
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
            scale = torch.zeros_like(q.scale)
            for n, t in enumerate(terms):
                scale += 2 * q.scale ** (2 * n + 1) * torch.einsum("...n,...nd->...d", t, rows ** (2 * n + 2))
            slope = torch.einsum("...n,...nd->...d", (s - 1).mean(0), rows) / h.shape[-1]
        return attach(attach(-F.logsigmoid(h).mean((0, -1)), q.loc, slope), q.scale, scale)

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
        return attach(attach(-F.logsigmoid(h).mean((0, -1)), q.loc, slope), q.scale, scale)

    return loss


def methods() -> dict[str, Loss]:
    """Return the estimators of figure 3."""
    return {
        "score": plain(ScoreFunction(SAMPLES)),
        "reparameterization": plain(Reparameterization(SAMPLES)),
        "series, order 4": series(4),
        "series, order 8": series(8),
        "series, order 16": series(16),
        "stochastic backprop": exact(),
        "KL not divided": plain(Reparameterization(SAMPLES)),
    }


def train(name: str, loss: Loss, plan: Plan) -> dict[str, dict[str, list]]:
    """Train one method in all cases at once, and return its curves, by case and run."""
    rows = torch.stack([scaled_rows(scaling).expand(plan.runs, -1, -1) for scaling, _ in CASES]).to(plan.device)
    *_, count, dim = rows.shape  # [C, R, N, d]
    size = (len(CASES), plan.runs, dim)
    start = torch.tensor([b for _, b in CASES], dtype=torch.float64, device=plan.device).log()
    loc = torch.zeros(size, dtype=torch.float64, device=plan.device).requires_grad_()
    log_scale = start[:, None, None].expand(size).clone().requires_grad_()
    adam = torch.optim.Adam([loc, log_scale], lr=RATE)
    batches = torch.Generator().manual_seed(3)  # the same batches for every method
    divisor = 1 if name == "KL not divided" else count
    result: dict[str, list[Tensor]] = {"elbo": [], "accuracy": [], "log_variance": [], "log_variance_scale": []}
    checkpoints = set(plan.checkpoints)

    def gradient(batch: Tensor) -> tuple[Tensor, ...]:
        law = Laplace(loc, log_scale.exp(), validate_args=False)
        return torch.autograd.grad(loss(law, batch).sum(), [loc, log_scale])

    for step in range(plan.steps + 1):
        picked = torch.stack([torch.randperm(count, generator=batches)[:BATCH] for _ in range(plan.runs)])
        index = picked.to(plan.device)[None, :, :, None].expand(len(CASES), -1, -1, dim)
        batch = rows.gather(2, index)
        if step in checkpoints:
            elbo, accuracy = evaluate(loc.detach(), log_scale.detach().exp(), rows)
            found = [torch.stack(g) for g in zip(*(gradient(batch) for _ in range(plan.replicates)), strict=True)]
            both, one = (torch.cat(f, -1).var(0).mean(-1).log() for f in (found, found[1:]))
            for key, value in zip(result, (elbo, accuracy, both, one), strict=True):
                result[key].append(value)
        if step < plan.steps:
            kl = torch.autograd.grad(kl_to_standard(loc, log_scale.exp()).sum() / divisor, [loc, log_scale])
            loc.grad, log_scale.grad = (a + b for a, b in zip(gradient(batch), kl, strict=True))
            adam.step()
    curves = {key: torch.stack(values).permute(1, 2, 0) for key, values in result.items()}  # [C, R, checkpoints]
    return {f"{x}, b={b:g}": {k: rounded(v[i]) for k, v in curves.items()} for i, (x, b) in enumerate(CASES)}


@torch.no_grad()
def evaluate(loc: Tensor, scale: Tensor, rows: Tensor, num_samples: int = 100) -> tuple[Tensor, Tensor]:
    """Return ELBO / N and the accuracy of the mean weights, both on all rows, ``[C, R]``."""
    with seeded(7, loc.device):  # the same noise for every method and checkpoint
        noise = Laplace(torch.zeros_like(loc), torch.ones_like(loc)).sample((num_samples,))
    likelihood = -sum(cost_of(rows)(loc + scale * e) for e in noise) / num_samples
    right = predictors(rows, loc) > 0
    return likelihood - kl_to_standard(loc, scale).sum(-1) / rows.shape[-2], right.double().mean(-1)


def settings() -> dict[str, Any]:
    """Return what is fixed for figure 3."""
    return {"batch": BATCH, "samples": SAMPLES, "rate": RATE, "start": "loc = 0, scale = b", "intercept": False}


def jobs(plan: Plan) -> list[Job]:
    """Return what there is to do for figure 3: each method, in all cases at once."""
    return [
        Job(name, number, partial(train, name, loss, plan)) for number, (name, loss) in enumerate(methods().items())
    ]


# ------------------------------------------------------------------------------------- the variances behind figure 3


@cache
def mode(scaling: str, steps: int = 2000) -> Tensor:
    """Return the weights of largest posterior density, nearly, ``[d]``."""
    rows = scaled_rows(scaling)
    w = torch.zeros(rows.shape[-1], dtype=rows.dtype).requires_grad_()
    adam = torch.optim.Adam([w], lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        (len(rows) * cost_of(rows)(w) + w.abs().sum()).backward()
        adam.step()
    return w.detach()


def variance_methods() -> dict[str, Loss]:
    """Return estimators of one sample."""
    return {
        "score": plain(ScoreFunction()),
        "reparameterization": plain(Reparameterization()),
        "series, order 2": series(2, 1),
        "series, order 4": series(4, 1),
        "series, order 8": series(8, 1),
        "series, order 16": series(16, 1),
        "stochastic backprop": exact(1),
        "stochastic backprop, order 2": plain(StochasticBackprop(order=2)),
    }


def measure(loss: Loss, scaling: str, place: str, plan: Plan) -> dict[str, list]:
    """Return the variance of the derivative by the scales, of a sum over 64 rows, averaged over the weights."""
    all_rows = scaled_rows(scaling)
    rows = all_rows[torch.randperm(len(all_rows), generator=torch.Generator().manual_seed(3))[:BATCH]].to(plan.device)
    loc = mode(scaling).to(plan.device) if place == "mode" else torch.zeros_like(rows[0])

    def surrogate(b: Tensor) -> Tensor:
        return BATCH * loss(Laplace(loc.expand_as(b), b, validate_args=False), rows.expand(len(b), -1, -1))

    found = [replicate(surrogate, torch.full_like(loc, b), plan.replicates, 500).var(0).mean() for b in SCALES]
    return {"variance": rounded(torch.stack(found))}


def variance_settings() -> dict[str, Any]:
    """Return what is fixed for the variances."""
    return {"scales": list(SCALES), "rows": BATCH, "samples": 1}


def variance_jobs(plan: Plan) -> list[Job]:
    """Return what there is to do for the variances: each method, at the start (loc = 0) and at the posterior's mode."""
    return [
        Job(f"{name}, {scaling}, {place}", number, partial(measure, loss, scaling, place, plan))
        for number, (name, loss) in enumerate(variance_methods().items())
        for scaling in SCALINGS
        for place in PLACES
    ]
