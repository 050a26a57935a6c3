"""The training steps of ``benchmarks/steps.py`` with other libraries: same network, same batch, same number of samples.

Each function returns gradients by name: called with x, they leave the gradient of the mean loss in the parameters.
Pyro estimates the KL by its samples; the others have it exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, OneHotCategorical, RelaxedOneHotCategorical, kl_divergence

from benchmarks.harness import installed, validated
from benchmarks.networks import Autoencoder

Gradients = dict[str, Callable[[Tensor], object]]

TEMPERATURE = 0.5


def backward_of(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Return the gradient of a loss ``x -> [B]``."""
    return lambda x: loss(x).mean().backward()


def by_hand(m: Autoencoder) -> Gradients:
    """Plain torch, as one writes it for the task at hand."""

    def gumbel_softmax(x: Tensor) -> Tensor:
        logits = m.guide.logits(x)
        return m.nll(x, F.gumbel_softmax(logits, TEMPERATURE)) + m.kl(logits)

    def leave_one_out(x: Tensor) -> Tensor:
        logits = m.guide.logits(x)
        log_p = logits.log_softmax(-1)
        index = torch.multinomial(log_p.exp().flatten(0, 1), 2, replacement=True).T.reshape(2, *logits.shape[:-1])
        nll = m.nll(x, F.one_hot(index, logits.shape[-1]).to(logits))
        log_q = log_p.expand(2, *log_p.shape).gather(-1, index[..., None]).sum((-2, -1))
        others = nll.detach().flip(0)
        return ((nll.detach() - others) * log_q + nll).mean(0) + m.kl(logits)

    found = {"F.gumbel_softmax": gumbel_softmax, "torch by hand, leave-one-out S=2": leave_one_out}
    return {name: backward_of(loss) for name, loss in found.items()}


def torch_distributions(m: Autoencoder) -> Gradients:
    """torch.distributions, as its documentation shows, with its validation."""

    def parts(x: Tensor) -> tuple[Tensor, Independent, Tensor]:
        logits = m.guide.logits(x)
        q = Independent(OneHotCategorical(logits=logits), 1)
        return logits, q, kl_divergence(q, Independent(OneHotCategorical(logits=torch.zeros_like(logits)), 1))

    def gumbel_softmax(x: Tensor) -> Tensor:
        logits, _, kl = parts(x)
        temperature = torch.tensor(TEMPERATURE, device=x.device)
        return m.nll(x, RelaxedOneHotCategorical(temperature, logits=logits).rsample()) + kl

    def leave_one_out(x: Tensor) -> Tensor:
        _, q, kl = parts(x)
        z = q.sample((2,))
        nll = m.nll(x, z)
        return ((nll - nll.flip(0)).detach() * q.log_prob(z) + nll).mean(0) + kl

    found = {"gumbel-softmax": gumbel_softmax, "leave-one-out S=2": leave_one_out}
    return {f"torch.distributions, {name}": validated(backward_of(loss)) for name, loss in found.items()}


def reinmax(m: Autoencoder) -> Gradients:
    """The library of ReinMax's authors."""
    if not installed("reinmax"):
        return {}
    from reinmax import reinmax as sample

    def loss(x: Tensor) -> Tensor:
        logits = m.guide.logits(x)
        z, _ = sample(logits, torch.ones((), device=x.device))
        return m.nll(x, z.view(logits.shape)) + m.kl(logits)

    return {"reinmax": backward_of(loss)}


def pyro(m: Autoencoder) -> Gradients:
    """Pyro: the score function with its dependency tracking, and a relaxed sample."""
    if not installed("pyro"):
        return {}
    import pyro as p
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO, TraceGraph_ELBO

    def model(x: Tensor, relaxed: bool) -> None:
        p.module("decoder", m.decoder)
        with p.plate("data", len(x)):
            logits = x.new_zeros(len(x), 20, 10)
            z = p.sample("z", law(logits, relaxed))
            p.sample("x", dist.Bernoulli(logits=m.decoder(z.flatten(-2))).to_event(1), obs=x)

    def guide(x: Tensor, relaxed: bool) -> None:
        p.module("guide", m.guide)
        with p.plate("data", len(x)):
            p.sample("z", law(m.guide.logits(x), relaxed))

    def law(logits: Tensor, soft: bool) -> dist.Distribution:
        if not soft:
            return dist.OneHotCategorical(logits=logits).to_event(1)
        temperature = torch.tensor(TEMPERATURE, device=logits.device)
        return dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits).to_event(1)

    pairs = TraceGraph_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    return {
        "pyro, relaxed straight-through": lambda x: Trace_ELBO().loss_and_grads(model, guide, x, True),
        "pyro, TraceGraph_ELBO S=2": lambda x: pairs.loss_and_grads(model, guide, x, False),
    }


def storchastic(m: Autoencoder) -> Gradients:
    """Storchastic: its score function with the other samples as baseline, and its Gumbel-softmax."""
    if not installed("storch"):
        return {}
    import storch
    from storch.method import GumbelSoftmax, ScoreFunction

    encode, kl = storch.deterministic(m.guide.logits), storch.deterministic(m.kl)

    def gradient(method: storch.method.Method) -> Callable[[Tensor], object]:
        def run(x: Tensor) -> object:
            storch.reset()
            q = OneHotCategorical(logits=encode(storch.denote_independent(x, 0, "data")))
            storch.add_cost(kl(q.logits), "kl")
            storch.add_cost(storch.deterministic(lambda z: m.nll(x, z))(method(q)), "nll")
            return storch.backward()

        return run

    return {
        "storchastic, Gumbel-softmax": gradient(GumbelSoftmax("z", n_samples=1)),
        "storchastic, leave-one-out S=2": gradient(ScoreFunction("z", n_samples=2, baseline_factory="batch_average")),
    }


FOR_CATEGORIES = (torch_distributions, reinmax, pyro, storchastic)
