"""Variational inference: the negative ELBO as a module, and exact EM for finite latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from gradlab.bernoulli import BernoulliAfterLinear
from gradlab.densities import (
    distribution_of,
    exact_kl,
    log_density,
    log_density_at,
    log_likelihood_at,
    path_log_density,
)
from gradlab.distributions import factor, has_moving_support, is_discrete, support
from gradlab.estimator import AfterLinear, Estimator, apply_linear, check_linear, describe
from gradlab.gumbel import is_relaxable

__all__ = [
    "BernoulliLikelihood",
    "ExpectationMaximization",
    "LikelihoodAfterLinear",
    "NegativeELBO",
    "expectation_maximization",
]

MODES = ("auto", "analytic", "sample", "total")


class LikelihoodAfterLinear(nn.Module):
    r"""A likelihood that begins with a linear layer, :math:`p(x\mid z) = p(x \mid g(W z + b))`.

    Where the KL is exact, :class:`NegativeELBO` hands its estimator a :class:`gradlab.AfterLinear`, so that one that
    changes a coordinate of z at a time, such as :class:`gradlab.LocalExpectation`, updates Wz instead of computing it
    anew. The loss is that of the same likelihood written as a plain module.

    Args:
        linear: the layer, of the flattened event dims of z.
        tail: a module, ``h [*L, *B, H] -> p(x | z)`` with batch dims ``[*L, *B]``.

    >>> from torch.distributions import Normal
    >>> likelihood = LikelihoodAfterLinear(nn.Linear(6, 4), lambda h: Normal(h.tanh().sum(-1), 1.0))
    >>> likelihood(torch.ones(5, 2, 3)).batch_shape  # z of two factors
    torch.Size([5])
    """

    def __init__(self, linear: nn.Linear, tail: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        check_linear(linear, type(self).__name__)
        self.linear, self.tail = linear, tail

    def forward(self, z: Tensor) -> Distribution:
        return self.tail(apply_linear(self.linear, z))

    def cost(self, x: Tensor, log_p: Callable[..., Tensor] = log_likelihood_at) -> AfterLinear:
        r"""Return :math:`-\log p(x\mid z)` as a cost of z; ``log_p`` says how x is looked at."""
        return AfterLinear(self.linear, lambda h: -log_p(self.tail, x, h, h.shape[:-1]))


class BernoulliLikelihood(LikelihoodAfterLinear):
    r"""Binary data whose logits are a linear layer of z, :math:`x_p \sim \mathrm{Bernoulli}(\sigma(W z + b)_p)`.

    The decoder of a sigmoid belief network, or of a VAE without hidden layers. :class:`NegativeELBO` makes a
    :class:`gradlab.BernoulliAfterLinear` of it, whose flips cost a fraction.

    Args:
        linear: the layer, of the flattened event dims of z.

    >>> likelihood = BernoulliLikelihood(nn.Linear(6, 784))
    >>> likelihood(torch.ones(5, 2, 3)).event_shape
    torch.Size([784])
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, lambda h: Independent(Bernoulli(logits=h), 1))

    def cost(self, x: Tensor, log_p: Callable[..., Tensor] = log_likelihood_at) -> AfterLinear:
        return BernoulliAfterLinear(self.linear, x)


class NegativeELBO(nn.Module):
    r"""The negative evidence lower bound of each x; minimise it to fit guide, prior and likelihood together.

    .. math:: \mathcal L(x) = E_{q(z|x)}[-\log p(x\mid z)] + w\,\mathrm{KL}(q(z\mid x)\,\|\,p(z)) \ge -\log p(x)
              \quad\text{for } w = 1

    The KL is exact where torch registers one. Else it is sampled in the cost,

    .. math:: f(z) = -\log p(x\mid z) + w\,(\log q(z\mid x) - \log p(z)),

    and the first derivative of :math:`\log q` follows z only: its derivative by the parameters at a fixed z has mean
    zero under every estimator, and would be noise. With a pathwise estimator this is *sticking the landing*, the
    gradient whose variance vanishes where q is the posterior; with leave-one-out and local expectation the variance
    vanishes there too.

    Some of torch's exact KLs look at values, which ``torch.func.vmap`` forbids: use "sample" there.

    Several stochastic layers nest: the prior may itself be a ``NegativeELBO``, which treats z as its x.

    Args:
        guide: a module, ``x -> q(z | x)`` with batch dims ``*B`` and event dims ``*E``.
        prior: a distribution of event dims ``*E``, or a module that returns one, ``prior()``; or the
            ``NegativeELBO`` of the layers above, whose guide and likelihood are then called with ``z [*L, *B, *E]``.
        likelihood: a module, ``z [*L, *B, *E] -> p(x | z)`` with batch dims ``[*L, *B]`` for any leading dims ``*L``;
            a :class:`LikelihoodAfterLinear` makes the flips of a local expectation cheap.
        estimator: how the gradient of the expectation is estimated.
        kl: "auto"; "analytic" (an error where torch has none); "sample", in the cost although torch may have one; or
            "total", the same with the score left in (as it always is for a support that moves with q's parameters).
        kl_weight: w; an attribute that may change while training.

    Shapes:
        ``x`` is ``[*B, *X]``; the loss is ``[*B]``. For a sum over N data points take ``N * loss.mean()``. A z that
        all N data share, with a guide that ignores x, has ``kl_weight=1 / N``.

    Reference:
        `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_, Kingma and Welling, 2014;
        `Sticking the Landing <https://arxiv.org/abs/1703.09194>`_, Roeder, Wu and Duvenaud, 2017.

    >>> from gradlab.exact import Enumerate
    >>> from torch.distributions import Bernoulli, Normal
    >>> logit = torch.zeros(1, requires_grad=True)
    >>> elbo = NegativeELBO(lambda x: Bernoulli(logits=logit), Bernoulli(0.5), lambda z: Normal(2 * z, 1), Enumerate())
    >>> x = torch.tensor([1.0])  # as likely from either z, so that the prior is the posterior
    >>> torch.allclose(elbo(x), -Normal(0.0, 1.0).log_prob(x))
    True

    Two layers, each with its own estimator::

        above = NegativeELBO(guide_2, prior, likelihood_2, ScoreFunction(4, LeaveOneOut()))  # q(z2 | z1), p(z1 | z2)
        loss = NegativeELBO(guide_1, above, likelihood_1, DisARM())  # q(z1 | x), p(x | z1)
    """

    def __init__(
        self,
        guide: Callable[[Tensor], Distribution],
        prior: Distribution | Callable[[], Distribution] | NegativeELBO,
        likelihood: Callable[[Tensor], Distribution],
        estimator: Estimator,
        kl: Literal["auto", "analytic", "sample", "total"] = "auto",
        kl_weight: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if kl not in MODES:
            raise ValueError(f"NegativeELBO: found kl={kl!r}, expected one of {', '.join(map(repr, MODES))}.")
        if not isinstance(estimator, Estimator):
            raise TypeError(f"NegativeELBO: found estimator of type {type(estimator).__name__}, expected an Estimator.")
        if kl == "analytic" and isinstance(prior, NegativeELBO):
            raise TypeError("NegativeELBO: found kl='analytic' with a prior of several layers, expected kl='auto'.")
        self.guide, self.prior, self.likelihood, self.estimator = guide, prior, likelihood, estimator
        self.kl, self.kl_weight = kl, kl_weight

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the loss, ``[*B]``.

        Args:
            x: the data, ``[*B, *X]``.
            context: what a learned baseline or critic may look at, ``[*B, *C]``; x itself, say.
        """
        return self._loss(x, context, log_likelihood_at)

    def _loss(self, x: Tensor, context: Tensor | None, log_p: Callable[..., Tensor]) -> Tensor:
        q = distribution_of(self.guide, "guide(x)", x)
        prior = self.prior if isinstance(self.prior, NegativeELBO) else distribution_of(self.prior, "prior()")
        kl = self._analytic_kl(q, prior)
        log_q = log_density if self.kl == "total" or has_moving_support(q) else path_log_density

        def cost(z: Tensor) -> Tensor:
            return -log_p(self.likelihood, x, z, z.shape[: z.ndim - len(q.event_shape)])

        def with_kl(z: Tensor) -> Tensor:
            return cost(z) + self.kl_weight * (log_q(q, z) - log_prior(prior, z))

        if kl is None:
            return self.estimator(q, with_kl, context)
        structured = isinstance(self.likelihood, LikelihoodAfterLinear)
        loss = self.estimator(q, self.likelihood.cost(x, log_p) if structured else cost, context)
        return loss + self.kl_weight * kl

    def _analytic_kl(self, q: Distribution, prior: Distribution | NegativeELBO) -> Tensor | None:
        """Return the exact KL ``[*B]``; None where it has to be, or shall be, sampled."""
        if isinstance(prior, NegativeELBO):
            return None
        check_prior(prior, q)
        if self.kl in ("sample", "total"):
            return None
        try:
            return exact_kl(q, prior)
        except NotImplementedError:
            if self.kl == "auto":
                return None
            raise TypeError(
                f"NegativeELBO: found no analytic KL of {describe(q)} and {describe(prior)}, expected one that torch "
                "registers (both Independent of the same dims, say). Use kl='auto'."
            ) from None

    def extra_repr(self) -> str:
        prior = f"prior={self.prior}, " if isinstance(self.prior, Distribution) else ""
        return f"{prior}kl={self.kl!r}, kl_weight={self.kl_weight}"


def check_prior(prior: Distribution, q: Distribution) -> None:
    """Raise unless one prior serves each problem of q, on the values that q takes."""
    lead = len(q.batch_shape) - len(prior.batch_shape)
    fits = lead >= 0 and all(n in (1, m) for n, m in zip(prior.batch_shape, q.batch_shape[lead:], strict=True))
    if not fits or prior.event_shape != q.event_shape:
        raise ValueError(
            f"prior: found {describe(prior)}, and {describe(q)} as guide, expected equal event shapes, and batch dims "
            "of the prior that broadcast to those of the guide. Wrap the dims of one z in "
            "torch.distributions.Independent, in both."
        )
    bits = is_relaxable(prior) and type(factor(prior).support) is not type(factor(q).support)
    if bits or is_discrete(prior) != is_discrete(q):
        raise ValueError(
            f"prior: found {describe(prior)}, and {describe(q)} as guide, expected two distributions over the same "
            "values: a density and a probability have no KL, nor has a count a place among zeros and ones."
        )


def log_prior(prior: Distribution | NegativeELBO, z: Tensor) -> Tensor:
    """Return log p(z), or the estimate of its lower bound by the layers above, ``[*L, *B]``."""
    if isinstance(prior, NegativeELBO):
        return -prior._loss(z, None, log_density_at)
    return log_density(prior, z)


class ExpectationMaximization(NamedTuple):
    """The end of an EM run."""

    parameters: Any
    log_likelihoods: Tensor
    """of the whole data, before each step and at the end, ``[steps + 1]``; they never fall"""


def expectation_maximization(
    model: Callable[[Any], tuple[Distribution, Callable[[Tensor], Distribution]]],
    maximize: Callable[[Tensor, Tensor], Any],
    x: Tensor,
    start: Any,
    num_steps: int = 1000,
    tolerance: float = 1e-12,
) -> ExpectationMaximization:
    r"""Exact EM by enumeration: the posterior of each data point, then the best parameters under it.

    .. math:: r_{vn} = p_\theta(z = v \mid x_n), \qquad
              \theta \leftarrow \arg\max_{\theta'} \sum_{n,v} r_{vn} \log p_{\theta'}(x_n, z = v)

    The likelihood never falls, and the end is a stationary point: a maximum, a lower one, or a saddle.

    Args:
        model: maps parameters to the prior of one z, with a finite support of V values, and the likelihood
            ``z [V, N, *E] -> p(x | z)`` with batch dims ``[V, N]``.
        maximize: the M-step, ``(values [V, N, *E], r [V, N]) -> parameters``.
        x: N data points, ``[N, *X]``.
        start: the first parameters.
        num_steps: at most.
        tolerance: stop when a step gains less than this, relative to the log-likelihood.

    Raises:
        ValueError: a step lost likelihood, so that ``maximize`` is not the M-step of ``model``.

    Reference:
        `Maximum Likelihood from Incomplete Data via the EM Algorithm
        <https://doi.org/10.1111/j.2517-6161.1977.tb01600.x>`_, Dempster, Laird and Rubin, 1977.

    >>> from torch.distributions import Categorical, Normal
    >>> x = torch.tensor([-1.0, -1.2, 1.0, 1.2])
    >>> model = lambda means: (Categorical(torch.ones(2)), lambda z: Normal(means[z], 0.1))
    >>> maximize = lambda z, r: torch.stack([(r * x * (z == k)).sum() / (r * (z == k)).sum() for k in range(2)])
    >>> means, _ = expectation_maximization(model, maximize, x, torch.tensor([-0.1, 0.1]))
    >>> torch.allclose(means, torch.tensor([-1.1, 1.1]))
    True
    """
    parameters, found = start, []
    with torch.no_grad():
        while True:
            values, log_joint = _enumerate_joint(*model(parameters), x)
            found.append(log_joint.logsumexp(0).sum())
            if len(found) > 1:
                gain, scale = found[-1] - found[-2], found[-1].abs().clamp_min(1.0)
                _check_gain(gain, scale, len(found) - 1)
                if gain <= tolerance * scale:
                    break
            if len(found) > num_steps:
                break
            parameters = maximize(values, log_joint.softmax(0))
    return ExpectationMaximization(parameters, torch.stack(found))


def _enumerate_joint(
    prior: Distribution, likelihood: Callable[[Tensor], Distribution], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values ``[V, N, *E]`` of z, and log p(x, z) ``[V, N]``."""
    prior = prior.expand(x.shape[:1])
    values = support(prior)
    return values, prior.log_prob(values) + log_likelihood_at(likelihood, x, values, values.shape[:2])


def _check_gain(gain: Tensor, scale: Tensor, step: int) -> None:
    if not gain >= -100 * torch.finfo(gain.dtype).eps * scale:
        raise ValueError(
            f"expectation_maximization: found a log-likelihood that changed by {gain.item():.4g} in step {step}, "
            "expected no fall. maximize must return the maximum, over the parameters of the model, of the sum of "
            "r log p(x, z)."
        )
