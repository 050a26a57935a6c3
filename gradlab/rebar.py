"""Unbiased again: a relaxed or learned function as control variate, trained by the backward that trains q."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from gradlab.densities import unchecked_log_prob
from gradlab.distributions import has_moving_support, tensors
from gradlab.estimator import Cost, Estimator, Traits, value_and_slope
from gradlab.gumbel import discrete, is_relaxable, logits_of
from gradlab.paths import draw, has_path, path
from gradlab.samplers import noise_of, sample
from gradlab.surrogate import descend, is_transformed, magic_box, stand_in, zero

__all__ = ["LAX", "REBAR", "RELAX", "DoubleControlVariate"]


class Coupled(NamedTuple):
    """An exact sample, the noise behind it, and fresh noise for its twin."""

    hard: Tensor  # [S, *B, *E]
    noise: Tensor  # [S, *B, *E]
    fresh: Tensor  # [S, *B, *E]


class _ControlVariate(Estimator):
    """Has parameters that its own backward trains to reduce the variance, in training mode only."""

    def _trained(self, parameter: Tensor) -> tuple[dict[str, Tensor], bool]:
        """Return stand-ins for the estimator's parameters, and whether this call trains them."""
        own = dict(self.named_parameters())
        train = (
            self.training
            and torch.is_grad_enabled()
            and parameter.requires_grad
            and not is_transformed(parameter)
            and any(p.requires_grad for p in own.values())
        )
        return {name: stand_in(p) if train else p.detach() for name, p in own.items()}, train

    def _descend(self, gradient: Tensor, dims: int, own: dict[str, Tensor]) -> Tensor:
        r"""Return zeros ``[*B]`` whose backward descends :math:`|g|^2`, for ``gradient [S, *B, *E]``."""
        square = gradient.square().flatten(gradient.ndim - dims).sum(-1) if dims else gradient.square()
        return descend(square.mean(0), self.parameters(), through=own.values())


class _Relaxing(_ControlVariate):
    r"""The estimator of REBAR and RELAX, for a control variate c of the noisy logit.

    .. math:: \hat g = (f(b) - c(\tilde x))\,\nabla\log q(b) + \nabla c(x) - \nabla c(\tilde x), \qquad
              x = \theta + g,\quad b = H(x),\quad \tilde x \sim p(x \mid b)
    """

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return is_relaxable(q)

    def draw(self, q: Distribution) -> Coupled:
        size = torch.Size([self.num_samples])
        noise = noise_of(q, size)
        return Coupled(discrete(q).harden(logits_of(q).detach() + noise), noise, noise_of(q, size))

    def estimate(self, q: Distribution, f: Cost, noise: Coupled, context: Tensor | None = None) -> Tensor:
        rule, hard = discrete(q), noise.hard
        logits = logits_of(q).expand(hard.shape)  # [S, *B, *E]: a gradient for each sample
        own, train = self._trained(logits)
        x, twin = logits + noise.noise, logits + rule.given(logits, hard, noise.fresh)
        cost, at_x, at_twin = self._control(q, f, hard, x, twin, own, context)  # [S, *B] each
        loss = (magic_box(unchecked_log_prob(q, hard)) * (cost - at_twin) + at_x).mean(0)
        if not train:
            return loss
        (slope,) = torch.autograd.grad((at_x - at_twin).sum(), logits, create_graph=True)
        gain = (cost.detach() - at_twin).reshape(*cost.shape, *(1 for _ in q.event_shape))
        gradient = gain * (hard - rule.soften(logits.detach(), 1.0)) + slope
        return loss + self._descend(gradient, len(q.event_shape), own)

    @abstractmethod
    def _control(
        self,
        q: Distribution,
        f: Cost,
        hard: Tensor,
        x: Tensor,
        twin: Tensor,
        own: dict[str, Tensor],
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return f at the sample, and c at x and at its twin."""


def _relaxed_cost(
    q: Distribution, f: Cost, hard: Tensor, x: Tensor, twin: Tensor, own: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return f(b), and :math:`c = \eta f(\sigma_\tau) + \beta` at x and at its twin, from one call of f."""
    tau, eta, offset = own["log_temperature"].exp(), own["coefficient"], own["offset"]
    if tau.ndim:
        tau = tau.reshape(tau.shape + (1,) * len(q.event_shape))
    soft, twin = discrete(q).soften(torch.stack([x, twin]), tau)
    cost, at_x, at_twin = f(torch.cat([hard, soft, twin])).chunk(3)
    return cost, eta * at_x + offset, eta * at_twin + offset


class REBAR(_Relaxing):
    r"""The score function, with the relaxed cost as control variate: unbiased at every temperature.

    .. math:: \hat g = \big(f(b) - \eta f(\sigma_\tau(\tilde x)) - \beta\big)\nabla\log q(b)
              + \eta\nabla f(\sigma_\tau(x)) - \eta\nabla f(\sigma_\tau(\tilde x))

    with :math:`x = \theta + g`, :math:`b = H(x)` and :math:`\tilde x \sim p(x \mid b)`. The temperature
    :math:`\tau`, the coefficient :math:`\eta` and the offset :math:`\beta` (a constant baseline, 0 at first) are
    parameters of the module: give them to the optimiser, and the same ``backward()`` reduces the variance.
    ``requires_grad_(False)`` or ``eval()`` holds them fixed.

    Args:
        num_samples: S; f is evaluated at 3 S points, two thirds of them relaxed.
        temperature: where :math:`\tau` starts. A tensor that broadcasts with the batch of q, such as ``[R, 1]`` for R
            runs of ``[R, N]`` problems, learns a temperature, coefficient and offset for each of its entries.
        coefficient: where :math:`\eta` starts; 0 is the plain score function.

    Reference:
        `REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models
        <https://arxiv.org/abs/1703.07370>`_, Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein, 2017.

    >>> rebar = REBAR(temperature=0.5)
    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> rebar(q, lambda z: (z.sum(-1) - 0.45) ** 2).backward()
    >>> rebar.coefficient.grad is not None
    True
    """

    traits = Traits(
        serves="Bernoulli and OneHotCategorical",
        unbiased=True,
        needs_gradient=True,
        relaxes=True,
        evaluations="3 S",
        second_order=True,
        transforms=True,
        reference="Tucker et al. (2017), https://arxiv.org/abs/1703.07370",
    )

    def __init__(self, num_samples: int = 1, temperature: float | Tensor = 0.5, coefficient: float = 1.0) -> None:
        super().__init__(num_samples)
        self.log_temperature, self.coefficient, self.offset = _scalars(temperature, coefficient)

    def evaluations(self, q: Distribution) -> int:
        return 3 * self.num_samples

    def _control(self, q, f, hard, x, twin, own, context):
        return _relaxed_cost(q, f, hard, x, twin, own)


class RELAX(_Relaxing):
    r"""The score function, with a learned critic of the noisy logit as control variate.

    .. math:: \hat g = \big(f(b) - c_\varphi(\tilde x)\big)\nabla\log q(b)
              + \nabla c_\varphi(x) - \nabla c_\varphi(\tilde x)

    with :math:`x = \theta + g`, :math:`b = H(x)` and :math:`\tilde x \sim p(x \mid b)`. f may be a black box. The
    parameters of the critic are parameters of this module: give them to the optimiser.

    Args:
        critic: a module, ``x [*L, *B, *E] -> [*L, *B]`` (or ``[*L, *B, 1]``); it is called ``critic(x, context)`` where
            a context is given. It must be smooth. Start its last layer at zero: the first step is then the score
            function's, and nothing has to be unlearnt.
        num_samples: S.
        temperature: by default f is evaluated at samples only. With a temperature, REBAR's relaxed cost, its
            temperature, coefficient and offset learned, is added to the critic, and f is evaluated at 3 S points.

    Reference:
        `Backpropagation through the Void: Optimizing control variates for black-box gradient estimation
        <https://arxiv.org/abs/1711.00123>`_, Grathwohl, Choi, Wu, Roeder and Duvenaud, 2018.

    >>> relax = RELAX(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    >>> logits = torch.zeros(3, requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> relax(q, lambda z: (z.sum(-1) > 1).float()).backward()
    >>> relax.critic[0].weight.grad.shape
    torch.Size([8, 3])
    """

    traits = Traits(
        serves="Bernoulli and OneHotCategorical",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Grathwohl et al. (2018), https://arxiv.org/abs/1711.00123",
    )

    def __init__(self, critic: nn.Module, num_samples: int = 1, temperature: float | Tensor | None = None) -> None:
        super().__init__(num_samples)
        self.critic = _checked_critic(critic)
        self.relaxes = temperature is not None
        if temperature is not None:
            self.log_temperature, self.coefficient, self.offset = _scalars(temperature, 1.0)

    def evaluations(self, q: Distribution) -> int:
        return (3 if self.relaxes else 1) * self.num_samples

    def _control(self, q, f, hard, x, twin, own, context):
        cost, at_x, at_twin = _relaxed_cost(q, f, hard, x, twin, own) if self.relaxes else (f(hard), 0.0, 0.0)
        c_x, c_twin = _criticize(self.critic, own, torch.cat([x, twin]), cost.shape[1:], context).chunk(2)
        return cost, at_x + c_x, at_twin + c_twin


class LAX(_ControlVariate):
    r"""The score function, with a learned critic that is also followed along the path of the sample.

    .. math:: \hat g = (f(z) - c_\varphi(z))\,\nabla\log q(z) + \nabla_\theta c_\varphi(h_\theta(\epsilon)),
              \qquad z = h_\theta(\epsilon)

    With c = 0 it is the score function, with c = f the pathwise estimator; f itself may be a black box.

    Args:
        critic: a module, ``z [*L, *B, *E] -> [*L, *B]`` (or ``[*L, *B, 1]``); it is called ``critic(z, context)`` where
            a context is given. It must be smooth.
        num_samples: S.

    Reference:
        `Backpropagation through the Void: Optimizing control variates for black-box gradient estimation
        <https://arxiv.org/abs/1711.00123>`_, Grathwohl, Choi, Wu, Roeder and Duvenaud, 2018.

    >>> lax = LAX(nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    >>> loc = torch.zeros(4, requires_grad=True)
    >>> lax(torch.distributions.Normal(loc, 1.0), lambda z: (z > 0).float()).sum().backward()
    >>> loc.grad.shape
    torch.Size([4])
    """

    traits = Traits(
        serves="continuous distributions with a path and a support that does not move",
        unbiased=True,
        needs_gradient=False,
        relaxes=False,
        evaluations="S",
        second_order=False,
        transforms=True,
        reference="Grathwohl et al. (2018), https://arxiv.org/abs/1711.00123",
    )

    def __init__(self, critic: nn.Module, num_samples: int = 1) -> None:
        super().__init__(num_samples)
        self.critic = _checked_critic(critic)

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return has_path(q) and not has_moving_support(q)

    def draw(self, q: Distribution) -> Any:
        return draw(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Any, context: Tensor | None = None) -> Tensor:
        many = q.expand(torch.Size([self.num_samples]) + q.batch_shape)  # a view of the parameters for each sample
        views = list({id(p): p for p in tensors(many) if p.requires_grad}.values())
        own, train = self._trained(views[0] if views else next(tensors(many)))
        moved = path(many, noise)
        z = moved.detach()
        cost = f(z)
        at_z, at_moved = _criticize(self.critic, own, torch.cat([z, moved]), cost.shape[1:], context).chunk(2)
        loss = magic_box(many.log_prob(z)) * (cost - at_z) + at_moved  # [S, *B]
        if not train:
            return loss.mean(0)
        grads = torch.autograd.grad(loss.sum(), views, create_graph=True, materialize_grads=True)
        gradient = torch.cat([g.reshape(*loss.shape, -1) for g in grads], -1)
        return loss.mean(0) + self._descend(gradient, 1, own)


class DoubleControlVariate(_ControlVariate):
    r"""Leave-one-out, with the slopes of the other samples as a second control variate.

    .. math:: \hat g = \frac1S\sum_s\Big[\big(f(z_s) - a D_s^\top(z_s - \mu) - B_s\big)\nabla\log q(z_s)
              + a D_s^\top\nabla\mu\Big], \qquad \mu = E_q[z],

    .. math:: D_s = \frac1{S-1}\sum_{t\ne s} f'(z_t), \qquad
              B_s = \frac1{S-1}\sum_{t\ne s}\big(f(z_t) - a f'(z_t)^\top(z_t - \mu)\big)

    Each sample is compared with the first-order Taylor expansions of f around the others, so f is evaluated on the
    support of q only. The coefficient a is a parameter of the module: give it to the optimiser.

    Args:
        num_samples: S, at least 2.
        coefficient: where a starts; 0 is leave-one-out, 1 subtracts the whole expansion.

    Reference:
        `Double Control Variates for Gradient Estimation in Discrete Latent Variable Models
        <https://arxiv.org/abs/2111.05300>`_, Titsias and Shi, 2022.

    >>> logits = torch.tensor([0.3, -0.5], requires_grad=True)
    >>> q = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    >>> DoubleControlVariate(2, 1.0)(q, lambda z: (3 * z).sum(-1)).backward()  # no noise for a linear cost
    >>> torch.allclose(logits.grad, 3 * logits.sigmoid() * (1 - logits.sigmoid()))
    True
    """

    traits = Traits(
        serves="Bernoulli and OneHotCategorical",
        unbiased=True,
        needs_gradient=True,
        relaxes=False,
        evaluations="S",
        second_order=True,
        transforms=True,
        reference="Titsias and Shi (2022), https://arxiv.org/abs/2111.05300",
    )

    def __init__(self, num_samples: int = 2, coefficient: float = 0.25) -> None:
        super().__init__(num_samples)
        if self.num_samples < 2:
            raise ValueError(f"DoubleControlVariate: found num_samples={num_samples}, expected at least 2.")
        self.coefficient = nn.Parameter(torch.tensor(float(coefficient)))

    @classmethod
    def supports(cls, q: Distribution) -> bool:
        return is_relaxable(q)

    def draw(self, q: Distribution) -> Tensor:
        return sample(q, torch.Size([self.num_samples]))

    def estimate(self, q: Distribution, f: Cost, noise: Tensor, context: Tensor | None = None) -> Tensor:
        dims = tuple(range(-len(q.event_shape), 0))
        own, train = self._trained(logits_of(q))
        a = own["coefficient"].to(noise)
        cost, slope = value_and_slope(f, noise)  # [S, *B], [S, *B, *E]
        gap, others = noise - q.mean.detach(), _mean_of_others(slope)
        first, second = _sum(slope * gap, dims), _sum(others * gap, dims)  # f'(z_t)(z_t - mu), D_s(z_s - mu)
        b = _mean_of_others(cost.detach() - a * first) + a * second
        fixed = b.detach()
        loss = (magic_box(unchecked_log_prob(q, noise)) * (cost - fixed) + fixed).mean(0)
        loss = loss + a.detach() * _sum(others.mean(0) * zero(q.mean), dims)
        if not train:
            return loss
        gain = (cost.detach() - b).reshape(*cost.shape, *(1 for _ in dims))
        gradient = (gain * gap + a * _times_covariance(q, others)).mean(0, keepdim=True)
        return loss + self._descend(gradient, len(dims), own)


def _times_covariance(q: Distribution, x: Tensor) -> Tensor:
    """Return the covariance of the factors of q, which is the derivative of their mean by the logits, times x."""
    p = q.mean.detach()
    return p * x - p * (p * x).sum(-1, keepdim=True) if discrete(q).dims else p * (1 - p) * x


def _mean_of_others(x: Tensor) -> Tensor:
    return (x.sum(0) - x) / (len(x) - 1)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x


def _scalars(temperature: float | Tensor, coefficient: float) -> list[nn.Parameter]:
    """Return the three parameters of a relaxed control variate, each of the shape of the temperature."""
    tau = temperature.detach() if isinstance(temperature, Tensor) else torch.tensor(float(temperature))
    if not (tau > 0).all():
        raise ValueError(f"found temperature={temperature}, expected a positive number.")
    return [nn.Parameter(x) for x in (tau.log(), torch.full_like(tau, coefficient), torch.zeros_like(tau))]


def _checked_critic(critic: nn.Module) -> nn.Module:
    if not isinstance(critic, nn.Module):
        raise TypeError(
            f"critic: found {type(critic).__name__}, expected a torch.nn.Module, so that its parameters can be trained."
        )
    return critic


def _criticize(
    critic: nn.Module, own: dict[str, Tensor], x: Tensor, batch: torch.Size, context: Tensor | None
) -> Tensor:
    """Return the critic at x ``[L, *B, *E]``, with the stand-ins for its parameters, ``[L, *B]``."""
    weights = {n.removeprefix("critic."): p for n, p in own.items() if n.startswith("critic.")}
    value = torch.func.functional_call(critic, weights, (x,) if context is None else (x, context))
    expected = (len(x), *batch)
    if value.shape not in (expected, (*expected, 1)):
        raise ValueError(
            f"critic: found a result of shape {tuple(value.shape)} for an input of shape {tuple(x.shape)}, expected "
            f"{expected} or {(*expected, 1)}, one number a problem."
        )
    return value.reshape(expected)
