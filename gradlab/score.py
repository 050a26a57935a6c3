"""The score-function family: no derivative of f is needed, so it serves every q with a density."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from gradlab.baselines import Baseline, as_baseline, weighted
from gradlab.densities import unchecked_log_prob
from gradlab.distributions import has_log_prob, has_mean, has_moving_support, scores
from gradlab.estimator import Cost, Estimator, Traits, checked, value_and_slope
from gradlab.samplers import sample
from gradlab.surrogate import magic_box, zero

__all__ = ["ControlVariate", "MuProp", "ScoreFunction"]


class _Score(Estimator):
    """Draws detached samples ``[S, *B, *E]``; serves every q with a density and a support that stays."""

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_log_prob(q) and not has_moving_support(q)

    def draw(self, q: Distribution) -> Tensor:
        return sample(q, torch.Size([self.num_samples]))


class ScoreFunction(_Score):
    r"""The score-function estimator, REINFORCE.

    .. math:: \nabla E_q[f] = E_q[(f(z) - b)\,\nabla\log q(z)] + E_q[\nabla f(z)]

    Args:
        num_samples: S.
        baseline: b; a number, or one of :class:`LeaveOneOut`, :class:`MovingAverage`, :class:`Learned`.

    Reference:
        `Simple statistical gradient-following algorithms for connectionist reinforcement learning
        <https://doi.org/10.1007/BF00992696>`_, Williams, 1992.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> loss = ScoreFunction(num_samples=4, baseline=1.5)(q, lambda z: z.sum(-1))
    >>> loss.backward()
    >>> logits.grad.shape
    torch.Size([3])
    """

    traits = Traits(
        serves="every distribution with a log_prob whose support does not depend on its parameters",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Williams (1992), https://doi.org/10.1007/BF00992696",
    )

    def __init__(self, num_samples: int = 1, baseline: Baseline | float | None = None) -> None:
        super().__init__(num_samples)
        self.baseline = as_baseline(baseline, num_samples)

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        cost = f(noise)  # [S, *B]
        return weighted(unchecked_log_prob(q, noise), cost, self.baseline, context)


class ControlVariate(_Score):
    r"""The score-function estimator with a control variate :math:`\zeta` of known mean.

    .. math:: \nabla E_q[f] = E_q[(f(z) - a\,\zeta(z))\,\nabla\log q(z)] + a\,\nabla E_q[\zeta]

    Any function may be subtracted, also one that depends on the sample, if its mean is added back. The best
    coefficient is :math:`a^* = \mathrm{Cov}/\mathrm{Var}`, which multiplies the variance by :math:`1-\rho^2`.

    Args:
        zeta: ``z [*L, *B, *E] -> [*L, *B]``, any function of the sample.
        mean: ``q -> [*B]``, :math:`E_q[\zeta]`, differentiable in q's parameters.
        coefficient: a; a number, a Tensor that broadcasts to ``[*B]``, or ``"optimal"``: :math:`a^*`
            of the gradient, summed over q's parameters, estimated for each sample from the *other* samples, so
            that the estimate stays unbiased (three samples at least).
        num_samples: S.

    Reference:
        `Variance Reduction Techniques for Gradient Estimates in Reinforcement Learning
        <https://jmlr.org/papers/v5/greensmith04a.html>`_, Greensmith, Bartlett and Baxter, 2004.

    >>> loc = torch.tensor(0.7, requires_grad=True)
    >>> q = torch.distributions.Normal(loc, 1.3)
    >>> cv = ControlVariate(zeta=lambda z: z, mean=lambda q: q.mean)
    >>> cv(q, lambda z: z).backward()  # zeta = f: nothing is left to estimate
    >>> round(loc.grad.item(), 6)
    1.0
    """

    traits = Traits(
        serves="every distribution with a log_prob whose support does not depend on its parameters",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Greensmith, Bartlett and Baxter (2004), https://jmlr.org/papers/v5/greensmith04a.html",
    )

    def __init__(
        self,
        zeta: Cost,
        mean: Callable[[Distribution], Tensor],
        coefficient: float | Tensor | str = 1.0,
        num_samples: int = 1,
    ) -> None:
        super().__init__(num_samples)
        if isinstance(coefficient, str) and coefficient != "optimal":
            raise ValueError(f"ControlVariate: found coefficient={coefficient!r}, expected a number or 'optimal'.")
        if coefficient == "optimal" and num_samples < 3:
            raise ValueError(
                f"ControlVariate: found num_samples={num_samples} with coefficient='optimal', expected at least 3: "
                "each sample's coefficient is estimated from the others."
            )
        self.zeta, self.mean = zeta, mean
        if isinstance(coefficient, Tensor):
            self.register_buffer("coefficient", coefficient)
        else:
            self.coefficient = coefficient

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        cost, zeta = f(noise), checked(self.zeta, q)(noise)  # [S, *B]
        fixed = self.coefficient
        a = optimal_coefficient(scores(q, noise), cost, zeta) if isinstance(fixed, str) else fixed
        return (magic_box(unchecked_log_prob(q, noise)) * (cost - a * zeta) + a * self._mean(q)).mean(0)

    def _mean(self, q: Distribution) -> Tensor:
        mean = self.mean(q)
        if mean.shape != q.batch_shape:
            raise ValueError(
                f"ControlVariate: found a mean of zeta of shape {tuple(mean.shape)}, expected {tuple(q.batch_shape)}, "
                "one number a problem. Sum it over the event dims, as zeta is."
            )
        return mean

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coefficient={self.coefficient}"


class MuProp(_Score):
    r"""The first-order Taylor expansion of f around the mean of q as control variate.

    .. math::
        \zeta(z) = f(\bar z) + f'(\bar z)^\top (z - \bar z), \qquad
        \nabla E_q[\zeta] = f'(\bar z)^\top \nabla E_q[z], \qquad \bar z = E_q[z]

    Exact and noise-free when f is linear. f must be differentiable at the mean, which for discrete q lies off the
    support.

    Args:
        num_samples: S; f is evaluated at S + 1 points.
        baseline: a baseline for the residual :math:`f - \zeta`.

    Reference:
        `MuProp: Unbiased Backpropagation for Stochastic Neural Networks <https://arxiv.org/abs/1511.05176>`_,
        Gu, Levine, Sutskever and Mnih, 2016.

    >>> logits = torch.tensor([0.3, -0.2], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> MuProp()(q, lambda z: z.sum(-1)).backward()
    >>> p = logits.sigmoid()
    >>> torch.allclose(logits.grad, p * (1 - p))
    True
    """

    traits = Traits(
        serves="every such distribution with a mean in the space of its samples (OneHotCategorical, not Categorical)",
        unbiased=True,
        needs_gradient=True,
        relaxes=True,
        evaluations="S + 1",
        second_order=True,
        transforms=True,
        reference="Gu et al. (2016), https://arxiv.org/abs/1511.05176",
    )

    def __init__(self, num_samples: int = 1, baseline: Baseline | float | None = None) -> None:
        super().__init__(num_samples)
        self.baseline = as_baseline(baseline, num_samples)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return super().supports(q) and has_mean(q)

    def evaluations(self, q: Distribution) -> int:
        return self.num_samples + 1

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        center = q.mean.detach()
        cost, (slope,) = value_and_slope(f, torch.cat([noise, center[None]]), slice(-1, None))  # [S + 1, *B], [*B, *E]
        dims = tuple(range(-len(q.event_shape), 0))
        taylor = cost[-1].detach() + _dot(slope, noise - center, dims)
        residual = cost[:-1] - taylor
        loss = weighted(unchecked_log_prob(q, noise), residual, self.baseline, context)
        return loss + taylor.mean(0) + _dot(slope, zero(q.mean), dims)


def optimal_coefficient(score: Tensor, cost: Tensor, zeta: Tensor) -> Tensor:
    r"""Return :math:`a^*_s`, estimated for sample s from all the others, ``[S, *B]``.

    .. math:: a^* = \sum_p \mathrm{Cov}(f\,\partial_p\log q,\ \zeta\,\partial_p\log q)
              \Big/ \sum_p \mathrm{Var}(\zeta\,\partial_p\log q)

    Args:
        score: :math:`\nabla\log q`, ``[S, *B, P]``.
        cost: ``[S, *B]``.
        zeta: ``[S, *B]``.
    """
    g, h = (_center_others(score * x.detach()[..., None]) for x in (cost, zeta))
    covariance, variance = ((g * h).sum((1, -1)), (h * h).sum((1, -1)))
    return torch.where(variance > 0, covariance / variance.clamp_min(torch.finfo(h.dtype).tiny), 0.0)


def _center_others(x: Tensor) -> Tensor:
    """Return, for each s, every ``x_t - mean of all but x_s``, and zero for t = s: ``[S, S, *B, P]``.

    Nothing of sample s enters row s, not even by rounding: equal costs would otherwise divide noise by noise.
    """
    others = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    mean = (others @ x.flatten(1)).reshape(x.shape) / (len(x) - 1)
    gap = x - mean[:, None]
    gap = torch.where(gap.abs() > 16 * torch.finfo(x.dtype).eps * x.abs(), gap, 0.0)
    return gap * others.reshape(*others.shape, *(1 for _ in x.shape[1:]))


def _dot(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (a * b).sum(dims) if dims else a * b
