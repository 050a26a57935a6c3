"""Why not just sum? Over the whole support, over one coordinate at a time, or over its heaviest part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from gradlab.baselines import Baseline, as_baseline
from gradlab.densities import unchecked_log_prob
from gradlab.distributions import has_finite_support, number_of_factors, support, support_size
from gradlab.estimator import AfterLinear, Cost, Estimator, Traits
from gradlab.flips import check_chunk_size, probabilities, replace_all, values_of
from gradlab.gumbel import gumbel
from gradlab.samplers import quick_sample
from gradlab.surrogate import attach, magic_box

__all__ = ["Enumerate", "LocalExpectation", "SumAndSample", "UnorderedSet"]


class Enumerate(Estimator):
    r"""The exact expectation over a finite support, value by value.

    .. math:: E_q[f] = \sum_v q_\theta(v)\,f(v)

    The event dims are enumerated jointly (an ``Independent`` of d factors with K values has K**d); the batch
    dims are problems of their own, K values each. A cost that is a sum over coordinates needs no joint
    enumeration: leave the coordinates in the batch, and K points do.

    Reference:
        source 001's first question, "Why not just sum over all discrete values?".

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> value = Enumerate()(q, lambda z: z.prod(-1))
    >>> torch.allclose(value, logits.sigmoid().prod())
    True
    """

    traits = Traits(
        serves="distributions with a finite support (at most 2**20 joint values)",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="K (jointly K^d)",
        second_order=True,
        transforms=True,
        reference="the definition",
    )

    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_finite_support(q)

    def evaluations(self, q: Distribution) -> int:
        return support_size(q)

    def draw(self, q: Distribution) -> Tensor:
        return support(q)

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return (q.log_prob(noise).exp() * f(noise)).sum(0)

    def extra_repr(self) -> str:
        return ""


class LocalExpectation(Estimator):
    r"""The local expectation gradient: sum over the values of one factor, sample the others.

    .. math:: \nabla E_q[f] = \sum_{j=1}^d E_{z_{-j}}\Big[\sum_{k=1}^K \nabla\pi_{jk}\,f(z_{-j}, k)\Big]

    Exact for one factor, and for a cost that is a sum over factors. For a parameter of one factor, its variance never
    exceeds that of the score function with as many samples. f is evaluated without a graph, except at the samples, and
    not at all beyond them under ``torch.no_grad()``. A cost that begins with a linear layer says so as a
    :class:`gradlab.AfterLinear`, that of binary data as a :class:`gradlab.BernoulliAfterLinear`, for cheaper flips.

    Args:
        num_samples: S.
        chunk_size: replacements a call of f, to bound memory; by default one call evaluates all d(K - 1). On a CPU a
            few at a time, which stay in its cache, take half the time.

    Reference:
        `Local Expectation Gradients for Black Box Variational Inference <https://arxiv.org/abs/1503.01494>`_, Titsias
        and Lázaro-Gredilla, 2015; equations 16 and 17 of source 003.

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> LocalExpectation()(q, lambda z: (3 * z).sum(-1)).backward()
    >>> p = logits.sigmoid()
    >>> torch.allclose(logits.grad, 3 * p * (1 - p))
    True
    """

    traits = Traits(
        serves="distributions whose factors have a finite support (Bernoulli, categorical, binomial)",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S (1 + d (K - 1))",
        second_order=False,
        transforms=True,
        reference="Titsias and Lázaro-Gredilla (2015), https://arxiv.org/abs/1503.01494",
    )

    def __init__(self, num_samples: int = 1, chunk_size: int | None = None) -> None:
        super().__init__(num_samples)
        self.chunk_size = check_chunk_size(chunk_size)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_finite_support(q)

    def evaluations(self, q: Distribution) -> int:
        return self.num_samples * (1 + number_of_factors(q) * (len(values_of(q)) - 1))

    def draw(self, q: Distribution) -> Tensor:
        return quick_sample(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        before = f.before(noise) if isinstance(f, AfterLinear) else None
        cost = f(noise) if before is None else f.g(before)  # [S, *B]
        if not torch.is_grad_enabled():
            return cost.mean(0)
        table = replace_all(q, f, noise, cost, before, self.chunk_size)  # [S, *B, d, K]
        return attach(cost.mean(0), probabilities(q), table.mean(0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}"


class Split(NamedTuple):
    """The heaviest values of the support, and samples of the rest."""

    top: Tensor  # [M, *B, *E]
    rest: Tensor  # [S, *B, *E]


class SumAndSample(Estimator):
    r"""Sum the M most probable values, and sample the rest with the score function.

    .. math:: E_q[f] = \sum_{v\in C} q(v) f(v) + (1 - q(C))\,E_{q(\cdot\mid z\notin C)}[f]

    The more of q's mass the top values hold, the less is left to chance; with M the size of the support, nothing.

    Args:
        top: M, how many joint values are summed.
        num_samples: S, samples of the rest.
        baseline: a baseline for the samples of the rest.

    Reference:
        `Rao-Blackwellized Stochastic Gradients for Discrete Distributions <https://arxiv.org/abs/1810.04777>`_, Liu,
        Regier, Tripuraneni, Jordan and McAuliffe, 2019.

    >>> logits = torch.tensor([3.0, 0.0, 0.0], requires_grad=True)
    >>> q = torch.distributions.Categorical(logits=logits)
    >>> SumAndSample(top=3)(q, lambda z: 1.0 * z).isclose(3 * q.probs[1])
    tensor(True)
    """

    traits = Traits(
        serves="distributions with a finite support (at most 2**20 joint values)",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="M + S",
        second_order=True,
        transforms=True,
        reference="Liu et al. (2019), https://arxiv.org/abs/1810.04777",
    )

    def __init__(self, top: int = 1, num_samples: int = 1, baseline: Baseline | float | None = None) -> None:
        super().__init__(num_samples)
        if top < 1:
            raise ValueError(f"SumAndSample: found top={top}, expected at least 1; 0 is ScoreFunction.")
        self.top, self.baseline = top, as_baseline(baseline, num_samples)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_finite_support(q)

    def evaluations(self, q: Distribution) -> int:
        return min(self.top, support_size(q)) + self.num_samples

    def draw(self, q: Distribution) -> Split:
        values = support(q)  # [N, *B, *E]
        with torch.no_grad():
            log_p = q.log_prob(values).movedim(0, -1)  # [*B, N]
            top = log_p.topk(min(self.top, len(values)), -1).indices
            left = log_p.scatter(-1, top, torch.finfo(log_p.dtype).min)
            size = torch.Size([self.num_samples])
            rest = (left + gumbel(size + left.shape, left)).argmax(-1)  # [S, *B]
        return Split(_pick(values, top.movedim(-1, 0), q), _pick(values, rest, q))

    def estimate(self, q: Distribution, f: Cost, noise: Split, context: Tensor | None = None) -> Tensor:
        cost = f(torch.cat(noise))
        log_p = q.log_prob(torch.cat(noise))
        size = len(noise.top)
        p = log_p[:size].exp()
        left = 1 - p.sum(0)  # [*B]
        b = self.baseline(cost[size:].detach(), context)
        fixed = b.detach()
        rest = left.detach() * magic_box(log_p[size:]) * (cost[size:] - fixed) + left * fixed
        loss = (p * cost[:size]).sum(0) + rest.mean(0)
        return loss + self.baseline.training_loss(cost[size:].detach(), b) if b.requires_grad else loss

    def extra_repr(self) -> str:
        return f"top={self.top}, {super().extra_repr()}"


class UnorderedSet(Estimator):
    r"""Sample a set of S *different* values, and weigh each by its leave-one-out ratio.

    .. math:: \nabla E_q[f] = E_A\Big[\sum_{s\in A} q(s)\,R(A, s)\,(f(s) - b_s)\,\nabla\log q(s)\Big],\qquad
              R(A, s) = \frac{P(A\setminus s \mid s\text{ drawn first})}{P(A)}, \quad
              b_s = \sum_{t\in A} q(t)\,R(A\setminus s, t)\,f(t)

    No evaluation is spent twice on the same value; with S the size of the support, the sum is exact.

    Args:
        num_samples: S, from 2 to 10: the ratios cost of the order of 2^S S^3.

    Reference:
        `Estimating Gradients for Discrete Random Variables by Sampling without Replacement
        <https://arxiv.org/abs/2002.06043>`_, Kool, van Hoof and Welling, 2020.

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Categorical(logits=logits)
    >>> UnorderedSet(2)(q, lambda z: 1.0 * z).isclose(q.probs[1])
    tensor(True)
    """

    traits = Traits(
        serves="distributions with a finite support of at least S joint values (at most 2**20)",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Kool, van Hoof and Welling (2020), https://arxiv.org/abs/2002.06043",
    )

    def __init__(self, num_samples: int = 2) -> None:
        super().__init__(num_samples)
        if not 2 <= self.num_samples <= 10:
            raise ValueError(f"UnorderedSet: found num_samples={num_samples}, expected 2 to 10.")

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_finite_support(q)

    def draw(self, q: Distribution) -> Tensor:
        values = support(q)  # [N, *B, *E]
        if len(values) < self.num_samples:
            raise ValueError(
                f"UnorderedSet: found num_samples={self.num_samples} and a support of {len(values)} values, expected "
                "at least as many values. Use Enumerate, which is exact."
            )
        with torch.no_grad():
            log_p = q.log_prob(values).movedim(0, -1)  # [*B, N]
            index = (log_p + gumbel(log_p.shape, log_p)).topk(self.num_samples, -1).indices
        return _pick(values, index.movedim(-1, 0), q)

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        cost, log_p = f(noise), unchecked_log_prob(q, noise)  # [S, *B]
        with torch.no_grad():
            rest = (1 - log_p.exp().sum(0)).clamp_min(0.0).log()
            first, second = leave_one_out_ratios(log_p, rest)
            weight = (log_p + first).exp()  # [S, *B]
            b = ((log_p + second).exp() * cost.detach()).sum(1)  # [S, *B]
        return (weight * (magic_box(log_p) * (cost - b) + b)).sum(0)


def leave_one_out_ratios(log_p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\log R(A, s)` ``[S, *B]`` and :math:`\log R(A\setminus s, t)` ``[S, S, *B]``.

    Dynamic programming over the subsets of A, in log space, where every term is positive.

    Args:
        log_p: log probabilities of the S members of the set A, ``[S, *B]``.
        rest: log of the mass outside of A, ``[*B]``.
    """
    size = len(log_p)
    full = 2**size - 1
    outside = [torch.stack([rest, *(log_p[i] for i in _members(full & ~t))]).logsumexp(0) for t in range(full + 1)]

    def drawn(start: int) -> Tensor:
        """Log of the probability that the draws after those of the set ``start`` fill A, before any other value."""
        chance = {start: torch.zeros_like(rest)}
        for t in range(start + 1, full + 1):
            if t & start == start:
                steps = [(t & ~(1 << i), i) for i in _members(t & ~start)]
                chance[t] = torch.stack([chance[u] + log_p[i] - outside[u] for u, i in steps]).logsumexp(0)
        return chance[full]

    one = [drawn(1 << s) for s in range(size)]

    def after(s: int, t: int) -> Tensor:
        return torch.zeros_like(rest) if s == t else drawn(1 << s | 1 << t) - one[s]

    second = [torch.stack([after(s, t) for t in range(size)]) for s in range(size)]
    return torch.stack(one) - drawn(0), torch.stack(second)


def _members(subset: int) -> list[int]:
    """Return the positions of the bits that are set."""
    return [i for i in range(subset.bit_length()) if subset >> i & 1]


def _pick(values: Tensor, index: Tensor, q: Distribution) -> Tensor:
    """Return the values ``[N, *B, *E]`` at the indices ``[M, *B]``."""
    index = index.reshape(*index.shape, *(1 for _ in q.event_shape))
    return values.gather(0, index.expand(*index.shape[: 1 + len(q.batch_shape)], *q.event_shape))
