"""Bayesian logistic regression with a Laplace posterior: the rule of stochastic backpropagation against the path.

scikit-learn's breast cancer data, 569 tumours with 30 standardised features; the posterior of the weights is a product
of Laplace laws, their prior Laplace(0, 1).

1. Variance, at the trained point: of the gradient by the scales b from 50 samples and a batch of 64, summed over the 30
   coordinates, relative to the path's.
2. Time of a step: a batch of 64, 50 samples, KL in closed form, backward, Adam. The floor is the same step without
   noise: the weights are the mean of their posterior.

The rule is ``StochasticBackprop(order=2)``, which sums the whole series of the paper; f is a ``BernoulliAfterLinear``.
What is compiled is the loss of a step, by ``torch.compile``; Adam never is. Pyro, without validation, estimates the KL
by samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Laplace

import gradlab as gl
from benchmarks.harness import installed, number, race, ratio, run, steady, steps
from gradlab.experiments.logistic import BATCH, SAMPLES, kl_to_standard, scaled_rows

Loss = Callable[[Tensor], Tensor]
RULE = "stochastic backprop"


class Regression(nn.Module):
    """The posterior and its negative ELBO, by several estimators, for the rows y x of a batch ``[64, 30]``."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.loc = nn.Parameter(torch.zeros_like(rows[0]))
        self.log_scale = nn.Parameter(torch.full_like(rows[0], -1.0))
        self.layer = nn.Linear(rows.shape[1], BATCH, bias=False, device=rows.device).requires_grad_(False)
        self.ones = rows.new_ones(BATCH)

    def batch(self) -> Tensor:
        """Return 64 rows, which are the first layer of the cost."""
        self.layer.weight.data = self.rows[torch.randperm(len(self.rows), device=self.rows.device)[:BATCH]]
        return self.layer.weight.data

    def negative_elbo(self, cost: Tensor) -> Tensor:
        """Add the KL to the cost of a batch."""
        kl = kl_to_standard(self.loc, self.log_scale.exp()).sum()
        return len(self.rows) / BATCH * cost + kl

    def floor(self, rows: Tensor) -> Tensor:
        """Return the loss at the mean of the posterior."""
        return self.negative_elbo(cost_of(self.loc, rows))

    def ours(self, estimator: gl.Estimator, rows: Tensor) -> Tensor:
        """Return the loss by an estimator of the package."""
        f = gl.BernoulliAfterLinear(self.layer, self.ones)
        return self.negative_elbo(estimator(posterior(self.loc, self.log_scale.exp()), f))

    def plain(self, rows: Tensor) -> Tensor:
        """Return the loss along the path, as one writes it by hand."""
        size = (SAMPLES, len(self.loc))
        e = self.loc.new_empty(size).exponential_() - self.loc.new_empty(size).exponential_()
        return self.negative_elbo(cost_of(self.loc + self.log_scale.exp() * e, rows).mean())

    def score(self, rows: Tensor) -> Tensor:
        """Return the loss by the score function with leave-one-out baselines, by hand."""
        scale = self.log_scale.exp()
        size = (SAMPLES, len(self.loc))
        e = self.loc.new_empty(size).exponential_() - self.loc.new_empty(size).exponential_()
        z = (self.loc + scale * e).detach()
        cost = cost_of(z, rows).detach()
        centred = (cost - cost.mean()) * SAMPLES / (SAMPLES - 1)
        log_q = -((z - self.loc).abs() / scale + self.log_scale).sum(-1)
        surrogate = (centred * log_q).mean()
        return self.negative_elbo(cost.mean() + surrogate - surrogate.detach())

    def distributions(self, rows: Tensor) -> Tensor:
        """Return the loss along the path, by torch.distributions with its validation."""
        z = posterior(self.loc, self.log_scale.exp(), True).rsample((SAMPLES,))
        log_p = Bernoulli(logits=z @ rows.T, validate_args=True).log_prob(self.ones)
        return self.negative_elbo(-log_p.sum(-1).mean())


def posterior(loc: Tensor, scale: Tensor, validate: bool = False) -> Independent:
    """Return the law of the weights."""
    return Independent(Laplace(loc, scale, validate_args=validate), 1, validate_args=validate)


def cost_of(w: Tensor, rows: Tensor) -> Tensor:
    """Return the negative log likelihood of a batch at weights ``[*L, 30]``, ``[*L]``."""
    return F.softplus(-(w @ rows.T)).sum(-1)


def pyro_loss(model: Regression) -> Loss:
    """Return the loss by Pyro, its particles vectorised."""
    import pyro
    import pyro.distributions as dist

    pyro.enable_validation(False)
    zeros, ones = torch.zeros_like(model.loc), torch.ones_like(model.loc)

    def joint(rows: Tensor) -> None:
        w = pyro.sample("w", dist.Laplace(zeros, ones).to_event(1))  # [50, 1, 30]
        with pyro.plate("rows", len(model.rows), subsample=model.ones, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=(w @ rows.T).squeeze(-2)), obs=model.ones)

    def guide(rows: Tensor) -> None:
        pyro.sample("w", dist.Laplace(model.loc, model.log_scale.exp()).to_event(1))

    elbo = pyro.infer.Trace_ELBO(num_particles=SAMPLES, vectorize_particles=True, max_plate_nesting=1)
    return lambda rows: elbo.differentiable_loss(joint, guide, rows)


def trained(rows: Tensor, steps: int = 1500) -> Regression:
    """Return the regression after training along the path."""
    model = Regression(rows)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        adam.zero_grad()
        model.plain(model.batch()).backward()
        adam.step()
    return model


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the lines: variances, then times."""
    model = trained(scaled_rows("standard").float().to(args.device))
    yield from variances(model, args.gate)
    yield from steady(lambda: list(times(model, args)))


def backward(model: Regression, loss: Loss) -> None:
    """Go backward from the loss on a new batch."""
    loss(model.batch()).backward()


def variances(model: Regression, gate: bool, replicates: int = 400) -> Iterator[dict]:
    """Compare the variances of the gradient by the scales, on one batch."""
    model.batch()
    f = gl.BernoulliAfterLinear(model.layer, model.ones)
    loc, scale = model.loc.detach(), model.log_scale.detach().exp()

    def variance(estimator: gl.Estimator) -> float:
        found = gl.replicate(lambda b: estimator(posterior(loc.expand_as(b), b), f), scale, replicates, 100)
        return found.var(0).sum().item()

    path, ours = variance(gl.Reparameterization(SAMPLES)), variance(gl.StochasticBackprop(SAMPLES, order=2))
    name = "Laplace, variance of the b-gradient, {} / path"
    yield number(name.format(RULE), ours / path, goal=0.1, scales=[scale.min().item(), scale.max().item()])
    if not gate:
        yield number(
            name.format("stochastic backprop of order 0"), variance(gl.StochasticBackprop(SAMPLES, order=0)) / path
        )
        yield number(name.format("score leave-one-out"), variance(gl.ScoreFunction(SAMPLES, gl.LeaveOneOut())) / path)


def times(model: Regression, args: argparse.Namespace) -> Iterator[dict]:
    """Compare the times of a step."""
    rule = partial(model.ours, gl.StochasticBackprop(SAMPLES, order=2))
    losses: dict[str, Loss] = {"floor": model.floor, f"{RULE}, compiled": torch.compile(rule, fullgraph=True)}
    if not args.gate:
        losses |= {
            "floor, compiled": torch.compile(model.floor, fullgraph=True),
            RULE: rule,
            "path of gradlab": partial(model.ours, gl.Reparameterization(SAMPLES)),
            "path in plain torch": model.plain,
            "path by torch.distributions": model.distributions,
            "score leave-one-out of gradlab": partial(model.ours, gl.ScoreFunction(SAMPLES, gl.LeaveOneOut())),
            "score leave-one-out in plain torch": model.score,
        }
        if installed("pyro"):
            losses["Pyro, Trace_ELBO"] = pyro_loss(model)
    gradients = {name: partial(backward, model, loss) for name, loss in losses.items()}
    found = race(steps(model.parameters(), gradients), args.rounds, args.device)
    for name in list(losses)[1:]:
        goal = 2.0 if name == f"{RULE}, compiled" else None
        yield ratio(f"Laplace, a step, {name} / floor", found, name, "floor", goal=goal)


if __name__ == "__main__":
    run(lines, __doc__)
