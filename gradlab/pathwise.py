"""The pathwise family: move the sample with the parameters, and differentiate f along the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from gradlab.distributions import has_icdf, is_discrete
from gradlab.estimator import Cost, Estimator, Sampler, Traits
from gradlab.paths import draw, has_path, path
from gradlab.samplers import rsample

__all__ = ["ImplicitReparameterization", "Reparameterization"]


class Reparameterization(Estimator):
    r"""The reparameterization estimator: :math:`z = h_\theta(\epsilon)` with noise free of :math:`\theta`.

    .. math:: \nabla E_q[f] = E_\epsilon[\nabla_\theta f(h_\theta(\epsilon))]

    f must be locally absolutely continuous (a step has a derivative almost everywhere, and the answer would still
    be wrong); for a second derivative so must f' (that of relu is not).

    Args:
        num_samples: S.
        sampler: where the path comes from: :func:`rsample` (torch's), :func:`inverse_cdf`, :func:`implicit`, or
            any function ``(q, sample_shape) -> z`` with a graph to q's parameters.

    Reference:
        `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_, Kingma and Welling, 2014.

    >>> loc = torch.tensor(0.7, requires_grad=True)
    >>> Reparameterization(8)(torch.distributions.Normal(loc, 1.3), lambda z: 3 * z).backward()
    >>> round(loc.grad.item(), 6)
    3.0
    """

    traits = Traits(
        serves="continuous distributions with an rsample, or any path with another sampler (inverse_cdf, implicit)",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Kingma and Welling (2014), https://arxiv.org/abs/1312.6114",
    )

    def __init__(self, num_samples: int = 1, sampler: Sampler = rsample) -> None:
        super().__init__(num_samples)
        self.sampler = sampler

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return not is_discrete(q) and (q.has_rsample or has_icdf(q) or has_path(q))

    def draw(self, q: Distribution) -> Tensor:
        return self.sampler(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return f(noise).mean(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampler={getattr(self.sampler, '__name__', self.sampler)}"


class ImplicitReparameterization(Estimator):
    r"""The implicit reparameterization estimator: differentiate the cdf, never invert it.

    .. math:: \nabla E_q[f] = E_q[f'(z)\,\nabla_\theta z], \qquad
              \nabla_\theta z = -\frac{\nabla_\theta F_\theta(z)}{q_\theta(z)}

    Args:
        num_samples: S.

    Reference:
        `Implicit Reparameterization Gradients <https://arxiv.org/abs/1805.08498>`_, Figurnov, Mohamed and Mnih,
        2018.

    >>> shape = torch.tensor(2.3, requires_grad=True)
    >>> q = torch.distributions.Gamma(shape, 1.0)
    >>> ImplicitReparameterization(1000)(q, lambda z: z).backward()
    >>> abs(shape.grad.item() - 1) < 0.2  # E[z] is the shape
    True
    """

    traits = Traits(
        serves="gamma, beta, Dirichlet, Student-t, von Mises, truncated normal, mixtures, location-scale families",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=False,
        transforms=True,
        reference="Figurnov, Mohamed and Mnih (2018), https://arxiv.org/abs/1805.08498",
    )

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_path(q)

    def draw(self, q: Distribution) -> Any:
        return draw(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Any, context: Tensor | None = None) -> Tensor:
        return f(path(q, noise)).mean(0)
