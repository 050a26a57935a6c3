r"""Half a path: transforms that remove some of :math:`\theta` from the noise, and a score for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Beta,
    Cauchy,
    ComposeTransform,
    Dirichlet,
    Distribution,
    ExpTransform,
    Gamma,
    SigmoidTransform,
    Transform,
    constraints,
)

from gradlab.baselines import Baseline, as_baseline, weighted
from gradlab.densities import unchecked_log_prob
from gradlab.distributions import factor, has_log_prob, has_mean, has_moving_support, is_discrete
from gradlab.estimator import Cost, Estimator, Traits
from gradlab.paths import exp_inside
from gradlab.samplers import sample

__all__ = ["GeneralizedReparameterization", "RejectionReparameterization", "standardize"]


class GeneralizedReparameterization(Estimator):
    r"""The generalized reparameterization estimator, G-REP.

    With :math:`z = T_\theta(\epsilon)` and noise that still depends on :math:`\theta`,

    .. math::
        \nabla E_q[f] = E\big[\nabla_\theta f(T_\theta(\epsilon))\big]
                      + E\big[f(z)\,\nabla_\theta \log p_\theta(\epsilon)\big], \qquad
        \log p_\theta(\epsilon) = \log q_\theta(T_\theta(\epsilon)) + \log|\det \nabla_\epsilon T_\theta(\epsilon)|

    The identity transform gives the score function, a transform that whitens z completely the reparameterization
    estimator, and everything between interpolates. The range of :math:`\epsilon` must not move with
    :math:`\theta` (that of :math:`\epsilon = z - 1/\lambda` does for an exponential z): nothing can check it here, and
    the gradient would be biased.

    Args:
        transform: ``q -> torch.distributions.Transform``, built from q's parameters with their graph;
            the default :func:`standardize` removes the first two moments.
        num_samples: S.
        baseline: subtracted from f in the second term.

    Reference:
        `The Generalized Reparameterization Gradient <https://arxiv.org/abs/1610.02287>`_, Ruiz, Titsias and Blei,
        2016.

    >>> rate = torch.tensor(2.0, requires_grad=True)
    >>> q = torch.distributions.Gamma(3.0, rate)
    >>> loss = GeneralizedReparameterization(num_samples=4)(q, lambda z: z.log())
    >>> loss.backward()  # standardizing log z removes the rate completely: no noise is left
    >>> round(rate.grad.item(), 5)
    -0.5
    """

    traits = Traits(
        serves="continuous distributions with a log_prob and a transform (known for gamma, beta, location-scale)",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Ruiz, Titsias and Blei (2016), https://arxiv.org/abs/1610.02287",
    )

    def __init__(
        self,
        transform: Callable[[Distribution], Transform] | None = None,
        num_samples: int = 1,
        baseline: Baseline | float | None = None,
    ) -> None:
        super().__init__(num_samples)
        if transform is not None and not callable(transform):
            raise TypeError(
                f"GeneralizedReparameterization: found transform={transform!r}, expected a function of q. The "
                "number of samples is the keyword num_samples."
            )
        self.transform = standardize if transform is None else transform
        self.baseline = as_baseline(baseline, num_samples)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return not is_discrete(q) and has_log_prob(q) and not has_moving_support(q)

    def draw(self, q: Distribution) -> Tensor:
        return sample(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        transform = self.transform(q)
        epsilon = transform.inv(noise).detach()
        z = transform(epsilon)
        log_det = _sum_to(transform.log_abs_det_jacobian(epsilon, z), noise.ndim - len(q.event_shape))
        return weighted(unchecked_log_prob(q, z) + log_det, f(z), self.baseline, context)


class RejectionReparameterization(Estimator):
    r"""The estimator that differentiates an acceptance-rejection sampler, RSVI.

    The gamma sampler of Marsaglia and Tsang proposes
    :math:`h_\alpha(\epsilon) = (\alpha - \tfrac13)\,(1 + \epsilon/\sqrt{9\alpha - 3})^3` from normal noise; the
    *accepted* noise has density :math:`\pi_\alpha(\epsilon) = q_\alpha(h_\alpha(\epsilon))\,|h_\alpha'(\epsilon)|`,
    nearly normal, and

    .. math:: \nabla E_q[f] = E_\pi\big[\nabla_\alpha f(h_\alpha(\epsilon))\big]
                            + E_\pi\big[f(z)\,\nabla_\alpha\log\pi_\alpha(\epsilon)\big].

    Shape augmentation draws at :math:`\alpha + B` and comes back by
    :math:`z = h_{\alpha+B}(\epsilon)\prod_{i=1}^{B} u_i^{1/(\alpha+i-1)}`: the larger B, the smaller the second
    term. Beta and Dirichlet are normalised gammas.

    Args:
        num_samples: S.
        boost: B.
        baseline: subtracted from f in the second term.

    Raises:
        ValueError: ``boost=0`` and a concentration below 1, where the sampler is not used (the proposal itself
            needs 1/3).

    Reference:
        `Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms
        <https://arxiv.org/abs/1610.05683>`_, Naesseth, Ruiz, Linderman and Blei, 2017.

    >>> alpha = torch.tensor([1.7, 0.4], requires_grad=True)
    >>> q = torch.distributions.Gamma(alpha, 1.0)
    >>> RejectionReparameterization(num_samples=8)(q, lambda z: z).sum().backward()
    >>> alpha.grad.shape
    torch.Size([2])
    """

    traits = Traits(
        serves="gamma, chi-squared, beta and Dirichlet, and independent products of one of them",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Naesseth et al. (2017), https://arxiv.org/abs/1610.05683",
    )

    def __init__(self, num_samples: int = 1, boost: int = 1, baseline: Baseline | float | None = None) -> None:
        super().__init__(num_samples)
        if isinstance(boost, bool) or not isinstance(boost, int) or boost < 0:
            raise ValueError(f"RejectionReparameterization: found boost={boost!r}, expected an int >= 0.")
        self.boost = boost
        self.baseline = as_baseline(baseline, num_samples)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return isinstance(factor(q), Gamma | Beta | Dirichlet)

    def draw(self, q: Distribution) -> Accepted:
        """Draw the accepted noise: torch samples a gamma by this very algorithm, so invert its result."""
        alpha = concentration(q).detach()
        self._check(alpha)
        x = Gamma(alpha + self.boost, torch.ones_like(alpha), validate_args=False).sample((self.num_samples,))
        u = torch.rand((self.boost, *x.shape), dtype=x.dtype, device=x.device)
        return Accepted(inverse_marsaglia_tsang(x, alpha + self.boost), u.clamp_min(torch.finfo(u.dtype).tiny))

    def estimate(self, q: Distribution, f: Cost, noise: Accepted, context: Tensor | None = None) -> Tensor:
        alpha = concentration(q)
        boosted = alpha + self.boost
        log_x = marsaglia_tsang(noise.epsilon, boosted).log()
        for i, u in enumerate(noise.u):
            log_x = log_x + u.log() / (alpha + i)
        log_prob = _sum_to(log_accepted(noise.epsilon, boosted), 1 + len(q.batch_shape))
        return weighted(log_prob, f(from_gammas(q, log_x)), self.baseline, context)

    def _check(self, alpha: Tensor) -> None:
        if self.boost == 0 and bool((alpha < 1).any()):
            raise ValueError(
                f"RejectionReparameterization: found a concentration of {alpha.min().item():.4g} with boost=0, "
                "expected at least 1, the range of the Marsaglia-Tsang sampler. Set boost=1 or more."
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, boost={self.boost}"


class Accepted(NamedTuple):
    epsilon: Tensor  # accepted normal noise, [S, *B, ...]
    u: Tensor  # uniforms of the shape augmentation, [boost, S, *B, ...]


def standardize(q: Distribution) -> Transform:
    r"""Return the transform whose inverse removes the first two moments of z.

    Of :math:`\log z` for the gamma, of :math:`\mathrm{logit}\,z` for the beta, of z itself on the real line.

    Raises:
        TypeError: q is none of these.
    """
    p = factor(q)
    if isinstance(p, Gamma):
        scale = torch.polygamma(1, p.concentration).sqrt()
        return ComposeTransform([AffineTransform(p.concentration.digamma() - p.rate.log(), scale), ExpTransform()])
    if isinstance(p, Beta):
        a, b = p.concentration1, p.concentration0
        scale = (torch.polygamma(1, a) + torch.polygamma(1, b)).sqrt()
        return ComposeTransform([AffineTransform(a.digamma() - b.digamma(), scale), SigmoidTransform()])
    if isinstance(p, Cauchy):  # no moments: its location and scale do the same
        return AffineTransform(p.loc, p.scale)
    if getattr(p.support, "base_constraint", p.support) is constraints.real and has_mean(p):
        return AffineTransform(p.mean, p.stddev)
    raise TypeError(
        f"standardize: found {type(p).__name__}, expected a gamma, a beta or a univariate distribution on the real "
        "line. Pass transform=, a function of q that returns a torch.distributions.Transform."
    )


def marsaglia_tsang(epsilon: Tensor, alpha: Tensor) -> Tensor:
    r"""Return :math:`h_\alpha(\epsilon) = (\alpha-\frac13)(1+\epsilon/\sqrt{9\alpha-3})^3`."""
    return (alpha - 1 / 3) * (1 + epsilon / (9 * alpha - 3).sqrt()) ** 3


def inverse_marsaglia_tsang(x: Tensor, alpha: Tensor) -> Tensor:
    r"""Return :math:`\epsilon` with :math:`h_\alpha(\epsilon) = x`."""
    return (9 * alpha - 3).sqrt() * ((x / (alpha - 1 / 3)) ** (1 / 3) - 1)


def log_accepted(epsilon: Tensor, alpha: Tensor) -> Tensor:
    r"""Return :math:`\log\pi_\alpha(\epsilon)`, the log density of the accepted noise."""
    c = (9 * alpha - 3).sqrt()
    x = marsaglia_tsang(epsilon, alpha)
    slope = (alpha - 1 / 3) * 3 * (1 + epsilon / c) ** 2 / c
    return (alpha - 1) * x.log() - x - torch.lgamma(alpha) + slope.log()


def concentration(q: Distribution) -> Tensor:
    """Return the shapes of the gammas that q is made of: one each, or K in a last dim."""
    p = factor(q)
    if isinstance(p, Beta):
        return torch.stack([p.concentration1, p.concentration0], -1)
    return p.concentration


def from_gammas(q: Distribution, log_x: Tensor) -> Tensor:
    """Return z from the logs of standard gammas."""
    p = factor(q)
    if isinstance(p, Gamma):
        return exp_inside(log_x - p.rate.log(), p.rate.dtype)
    z = exp_inside(log_x.log_softmax(-1), log_x.dtype)
    return z[..., 0].clamp_max(1 - torch.finfo(z.dtype).eps / 2) if isinstance(p, Beta) else z


def _sum_to(x: Tensor, ndim: int) -> Tensor:
    return x.flatten(ndim).sum(-1) if x.ndim > ndim else x
