"""Multi-sample bounds: closer to log p(x) with more samples, each with the gradient that is right for its guide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from gradlab.densities import distribution_of, freeze, log_density, log_likelihood_at
from gradlab.distributions import has_log_prob, has_moving_support, is_discrete
from gradlab.estimator import Cost, Sampler, describe, value_and_slope
from gradlab.flips import check_chunk_size
from gradlab.samplers import rsample, sample
from gradlab.surrogate import attach, magic_box
from gradlab.svi import NegativeELBO, check_prior

__all__ = ["IWAE", "VIMCO", "DReG", "LogLikelihood", "log_likelihood"]


class _MultiSample(nn.Module, ABC):
    """A loss ``[*B]`` of x, from K samples of the guide.

    No :class:`Estimator`: the bound is no mean of a cost of one z, and its gradients treat guide and model differently.
    """

    min_samples = 1

    def __init__(
        self,
        guide: Callable[[Tensor], Distribution],
        prior: Distribution | Callable[[], Distribution],
        likelihood: Callable[[Tensor], Distribution],
        num_samples: int = 8,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_samples < self.min_samples:
            raise ValueError(f"{name}: found num_samples={num_samples}, expected at least {self.min_samples}.")
        if isinstance(prior, NegativeELBO):
            raise TypeError(
                f"{name}: found a prior of several layers, expected a distribution or a module that returns one: the "
                "gradient of a layer inside a log mean would be wrong. Use NegativeELBO."
            )
        self.guide, self.prior, self.likelihood, self.num_samples = guide, prior, likelihood, num_samples

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss ``[*B]`` of the data ``[*B, *X]``."""
        q, prior = distribution_of(self.guide, "guide(x)", x), distribution_of(self.prior, "prior()")
        check_prior(prior, q)
        if torch.is_grad_enabled():
            self.check(q)

        def log_joint(z: Tensor) -> Tensor:
            shape = z.shape[: z.ndim - len(q.event_shape)]
            return log_likelihood_at(self.likelihood, x, z, shape) + log_density(prior, z)

        if not torch.is_grad_enabled():
            z = sample(q, torch.Size([self.num_samples]))
            return -log_mean_exp(log_joint(z) - log_density(q, z))
        return self.loss(q, log_joint)

    @abstractmethod
    def check(self, q: Distribution) -> None:
        """Raise a TypeError where the gradient would be wrong."""

    @abstractmethod
    def loss(self, q: Distribution, log_joint: Cost) -> Tensor:
        r"""Return the surrogate ``[*B]``; ``log_joint`` is :math:`\log p(x, z)` of z ``[K, *B, *E]``."""

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}"


class IWAE(_MultiSample):
    r"""The importance-weighted bound, differentiated along the path of the samples.

    .. math:: \mathcal L_K = -E\Big[\log\frac1K\sum_{k=1}^K w_k\Big], \qquad
              w_k = \frac{p(x, z_k)}{q(z_k\mid x)}, \qquad
              -\log p(x) \le \mathcal L_{K+1} \le \mathcal L_K \le \mathcal L_1

    :math:`\mathcal L_1` is the negative ELBO. The guide's signal-to-noise ratio falls as :math:`K^{-1/2}`: see
    :class:`DReG`.

    Args:
        guide: a module, ``x -> q(z | x)``, with a path to its samples.
        prior: a distribution, or a module that returns one, ``prior()``.
        likelihood: a module, ``z [K, *B, *E] -> p(x | z)`` with batch dims ``[K, *B]``.
        num_samples: K.
        sampler: where the path comes from.

    Reference:
        `Importance Weighted Autoencoders <https://arxiv.org/abs/1509.00519>`_, Burda, Grosse and Salakhutdinov, 2016.

    >>> from torch.distributions import Normal
    >>> posterior = Normal(torch.tensor([0.5], requires_grad=True), 0.5**0.5)
    >>> loss = IWAE(lambda x: posterior, Normal(0.0, 1.0), lambda z: Normal(z, 1.0))(torch.tensor([1.0]))
    >>> torch.allclose(loss, -Normal(0.0, 2**0.5).log_prob(torch.tensor([1.0])))  # all weights are p(x)
    True
    """

    def __init__(self, guide, prior, likelihood, num_samples: int = 8, sampler: Sampler = rsample) -> None:
        super().__init__(guide, prior, likelihood, num_samples)
        self.sampler = sampler

    def check(self, q: Distribution) -> None:
        if is_discrete(q):
            raise TypeError(
                f"{type(self).__name__}: found {describe(q)}, expected a continuous guide: discrete samples have no "
                "path, and their gradient would be zero. Use VIMCO."
            )

    def loss(self, q: Distribution, log_joint: Cost) -> Tensor:
        z = self.sampler(q, torch.Size([self.num_samples]))
        return -log_mean_exp(log_joint(z) - log_density(q, z))


class DReG(IWAE):
    r"""The importance-weighted bound with the doubly reparameterized gradient for the guide.

    .. math:: \nabla_\varphi\mathcal L_K = -E\Big[\sum_k \tilde w_k^2\,
              \frac{\partial\log w_k}{\partial z_k}\nabla_\varphi z_k\Big], \qquad
              \tilde w_k = \frac{w_k}{\sum_j w_j}

    The mean is that of :class:`IWAE`, but where the weights have four finite moments (a guide no narrower than the
    posterior is enough) the signal-to-noise ratio of the guide's gradient *grows* as :math:`K^{1/2}`. Prior and
    likelihood have IWAE's gradient. With K = 1 it is sticking the landing, which is better near the posterior and need
    not be far from it. Second derivatives raise, and ``torch.compile`` cannot trace it.

    Args:
        guide: a module, ``x -> q(z | x)``, with a path to its samples and a support that does not move.
        prior: a distribution, or a module that returns one, ``prior()``.
        likelihood: a module, ``z [K, *B, *E] -> p(x | z)`` with batch dims ``[K, *B]``.
        num_samples: K.
        sampler: where the path comes from.

    Reference:
        `Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives <https://arxiv.org/abs/1810.04152>`_,
        Tucker, Lawson, Gu and Maddison, 2019.

    >>> from torch.distributions import Normal
    >>> loc = torch.tensor([0.5], requires_grad=True)
    >>> loss = DReG(lambda x: Normal(loc, 0.5**0.5), Normal(0.0, 1.0), lambda z: Normal(z, 1.0))
    >>> loss(torch.tensor([1.0])).backward()  # the guide is the posterior: no noise is left
    >>> loc.grad.abs().item() < 1e-6
    True
    """

    def check(self, q: Distribution) -> None:
        super().check(q)
        if has_moving_support(q):
            raise TypeError(f"DReG: found {describe(q)}, whose support moves with its parameters. Use IWAE.")

    def loss(self, q: Distribution, log_joint: Cost) -> Tensor:
        z, held = self.sampler(q, torch.Size([self.num_samples])), freeze(q)
        if log_density(held, z[:1].detach()).requires_grad:
            raise TypeError(
                f"DReG: found {describe(q)}, some of whose parameters are hidden in modules, expected a guide that "
                "holds its parameters as tensors. Use IWAE."
            )
        log_w, slope = value_and_slope(lambda z: log_joint(z) - log_density(held, z), z)  # [K, *B], [K, *B, *E]
        square = log_w.detach().softmax(0).square().reshape(*log_w.shape, *(1 for _ in q.event_shape))
        return attach(-log_mean_exp(log_w), z.movedim(0, -1), (-square * slope).movedim(0, -1))


class VIMCO(_MultiSample):
    r"""The importance-weighted bound with a score-function gradient, right for discrete guides.

    .. math:: \nabla\log\hat p + \sum_k (\log\hat p - \log\hat p_{-k})\,\nabla\log q(z_k\mid x), \qquad
              \hat p = \frac1K\sum_k w_k

    has the mean :math:`-\nabla\mathcal L_K`; in :math:`\hat p_{-k}` the geometric mean of the other weights stands for
    :math:`w_k`. The first term alone, which is all that a bound written for paths yields, is a wrong gradient of the
    guide, and none at all where log q is held.

    Args:
        guide: a module, ``x -> q(z | x)``, with a log_prob and a support that does not move.
        prior: a distribution, or a module that returns one, ``prior()``.
        likelihood: a module, ``z [K, *B, *E] -> p(x | z)`` with batch dims ``[K, *B]``.
        num_samples: K, at least 2.

    Reference:
        `Variational Inference for Monte Carlo Objectives <https://arxiv.org/abs/1602.06725>`_, Mnih and Rezende, 2016.

    >>> from torch.distributions import Bernoulli, Normal
    >>> logit = torch.zeros(1, requires_grad=True)
    >>> loss = VIMCO(lambda x: Bernoulli(logits=logit), Bernoulli(0.5), lambda z: Normal(2 * z, 1))
    >>> loss(torch.tensor([1.0])).backward()  # the guide is the posterior, and the score's mean over samples remains
    >>> logit.grad.isfinite().all()
    tensor(True)
    """

    min_samples = 2

    def check(self, q: Distribution) -> None:
        if not has_log_prob(q) or has_moving_support(q):
            raise TypeError(f"VIMCO: found {describe(q)}, expected a log_prob and a support that does not move.")

    def loss(self, q: Distribution, log_joint: Cost) -> Tensor:
        z = sample(q, torch.Size([self.num_samples]))
        log_q = log_density(q, z)
        log_w = log_joint(z) - log_q  # [K, *B]
        baseline = leave_one_out_bounds(log_w.detach())
        correction = ((magic_box(log_q) - 1) * baseline).sum(0)
        return -(magic_box(log_q.sum(0)) * log_mean_exp(log_w) - correction)


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Return the log of the mean weight, ``[K, *B] -> [*B]``."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def leave_one_out_bounds(log_w: Tensor) -> Tensor:
    """Return the bound with each weight in turn replaced by the geometric mean of the others, ``[K, *B]``."""
    size = len(log_w)
    own = torch.eye(size, dtype=torch.bool, device=log_w.device).reshape(size, size, *(1 for _ in log_w.shape[1:]))
    others = torch.where(own, 0.0, log_w[:, None]).sum(0) / (size - 1)  # [K, *B]
    return log_mean_exp(torch.where(own, others[None], log_w[:, None]))


class LogLikelihood(NamedTuple):
    """An importance-sampling estimate of log p(x), in expectation a lower bound.

    The standard error is that of a mean over points; it says nothing of the gap to log p(x), which falls with K.
    """

    bounds: Tensor
    """of each x, ``[*B]``"""
    num_samples: int
    """K"""

    @property
    def mean(self) -> float:
        """Return the mean over x: in expectation a lower bound of that of log p(x), closer with K."""
        return self.bounds.mean().item()

    @property
    def standard_error(self) -> float:
        """Return the standard error of the mean over x, samples included; nan for a single x."""
        return self.bounds.std().item() / self.bounds.numel() ** 0.5 if self.bounds.numel() > 1 else math.nan

    def __str__(self) -> str:
        return (
            f"log p(x) >= {self.mean:.4f} ± {self.standard_error:.4f} in expectation "
            f"({self.bounds.numel()} points, {self.num_samples} samples)"
        )


def log_likelihood(
    guide: Callable[[Tensor], Distribution],
    prior: Distribution | Callable[[], Distribution] | NegativeELBO,
    likelihood: Callable[[Tensor], Distribution],
    x: Tensor,
    num_samples: int = 1000,
    chunk_size: int | None = 100,
) -> LogLikelihood:
    r"""Estimate log p(x) by importance sampling from the guide, in bounded memory and without a graph.

    .. math:: \log\frac1K\sum_{k=1}^K \frac{p(x, z_k)}{q(z_k\mid x)}, \qquad
              E[\,\cdot\,] \le \log p(x)

    It is a lower bound in expectation, for every K. Put modules with dropout into eval mode first.

    Args:
        guide: ``x -> q(z | x)``.
        prior: a distribution, a module that returns one, or the :class:`NegativeELBO` of the layers above, of whose
            guides each sample takes one: the weights are those of all layers together.
        likelihood: ``z [*L, *B, *E] -> p(x | z)``.
        x: the data, ``[*B, *X]``.
        num_samples: K.
        chunk_size: samples of each x held at a time; None holds all.

    >>> from torch.distributions import Normal
    >>> x = torch.tensor([1.0, -0.4])
    >>> found = log_likelihood(lambda x: Normal(x / 2, 0.5**0.5), Normal(0.0, 1.0), lambda z: Normal(z, 1.0), x)
    >>> torch.allclose(found.bounds, Normal(0.0, 2**0.5).log_prob(x))  # the guide is the posterior
    True
    """
    if num_samples < 1:
        raise ValueError(f"log_likelihood: found num_samples={num_samples}, expected a positive int.")
    step = check_chunk_size(chunk_size) or num_samples
    with torch.no_grad():
        q = distribution_of(guide, "guide(x)", x)
        p = prior if isinstance(prior, NegativeELBO) else distribution_of(prior, "prior()")
        if isinstance(p, Distribution):
            check_prior(p, q)
        total = None
        for done in range(0, num_samples, step):
            z = sample(q, torch.Size([min(step, num_samples - done)]))
            log_w = log_likelihood_at(likelihood, x, z, z.shape[: 1 + len(q.batch_shape)])
            log_w = log_w + _log_prior(p, z) - log_density(q, z)
            new = log_w.logsumexp(0)
            total = new if total is None else torch.logaddexp(total, new)
    assert total is not None
    return LogLikelihood(total - math.log(num_samples), num_samples)


def _log_prior(prior: Distribution | NegativeELBO, z: Tensor) -> Tensor:
    """Return log p(z), or the log weight of one sample of each layer above, ``[K, *B]``."""
    if isinstance(prior, Distribution):
        return log_density(prior, z)
    q = distribution_of(prior.guide, "guide(z)", z)
    above = sample(q, torch.Size())
    p = prior.prior if isinstance(prior.prior, NegativeELBO) else distribution_of(prior.prior, "prior()")
    return log_likelihood_at(prior.likelihood, z, above, q.batch_shape) + _log_prior(p, above) - log_density(q, above)
