r"""Implicit reparameterization: one differentiable path per family of distributions, as data.

A :class:`Path` says how a family is sampled along a path that follows its parameters: ``draw`` returns
noise without a graph, ``path`` is a pure function of the distribution and that noise, with

.. math:: \frac{dz}{d\theta} = -\frac{\partial_\theta F_\theta(z)}{p_\theta(z)}

attached. Location-scale families have explicit noise, so that their second derivatives are right. For
the genuinely implicit ones the noise is the sample itself (standardised), and a second derivative raises.

Reference:
    `Implicit Reparameterization Gradients <https://arxiv.org/abs/1805.08498>`_, Figurnov et al., 2018.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as D

from gradlab import special
from gradlab.distributions import Logistic, TruncatedNormal, standard_exponential, tensors
from gradlab.surrogate import attach

__all__ = ["Path", "at", "draw", "has_path", "implicit", "log_gamma", "path", "register_path"]

Noise = Any
BLOCK = 2**15  # elements
F64 = torch.float64


class Path(NamedTuple):
    """How one family of distributions is sampled along a differentiable path.

    Attributes:
        draw: ``(q, sample_shape) -> noise``: tensors without a graph, ``[*S, *B, *E]``.
        path: ``(q, noise) -> z``: a pure function, with the graph of ``q``'s parameters.
        invert: ``(q, z) -> noise`` that leads to ``z``. It gives the path through a given point.
        cdf: ``(q, noise) -> F(z)``. A univariate family with ``invert`` and ``cdf`` can be mixed.
        supports: ``q -> bool``, for the families that contain other distributions.
    """

    draw: Callable[[D.Distribution, torch.Size], Noise]
    path: Callable[[D.Distribution, Noise], Tensor]
    invert: Callable[[D.Distribution, Tensor], Noise] | None = None
    cdf: Callable[[D.Distribution, Noise], Tensor] | None = None
    supports: Callable[[D.Distribution], bool] = lambda q: True


_PATHS: dict[type, Path] = {}


def register_path(cls: type[D.Distribution], *rule: Callable, **fields: Callable) -> None:
    """Register the :class:`Path` of ``cls`` and its subclasses: ``register_path(cls, draw, path, ...)``."""
    _PATHS[cls] = Path(*rule, **fields)


def has_path(q: D.Distribution) -> bool:
    """Say whether ``q`` can be sampled along a differentiable path.

    >>> has_path(D.VonMises(0., 1.)), has_path(D.Poisson(1.))
    (True, False)
    """
    rule = _find(q)
    return rule is not None and rule.supports(q)


def draw(q: D.Distribution, sample_shape: torch.Size = torch.Size()) -> Noise:
    """Return the noise of ``q``: tensors without a graph, with leading dims ``sample_shape``."""
    return _rule(q).draw(q, torch.Size(sample_shape))


def path(q: D.Distribution, noise: Noise) -> Tensor:
    """Return ``z`` ``[*S, *B, *E]``, a pure function of ``q`` and ``noise`` that carries ``q``'s graph."""
    held = next(tensors(q), None)
    with torch.autocast("cpu" if held is None else held.device.type, enabled=False):
        return _rule(q).path(q, noise)


def at(q: D.Distribution, z: Tensor) -> Tensor:
    r"""Return ``z`` with :math:`dz/d\theta` attached: the path of ``q`` through a given point.

    >>> rate = torch.tensor(2., requires_grad=True)
    >>> torch.autograd.grad(at(D.Exponential(rate), torch.tensor(3.)), rate)[0].item()  # -z / rate
    -1.5
    """
    return path(q, _invert(q, z.detach()))


def implicit(q: D.Distribution, sample_shape: torch.Size = torch.Size()) -> Tensor:
    r"""Sample ``q`` with the implicit gradient: an ``rsample`` for the families that torch lacks.

    Args:
        q: any distribution with a path (see ``has_path``).
        sample_shape: ``*S``.

    Returns:
        ``[*S, *B, *E]``.

    Raises:
        TypeError: when ``q`` has no path.

    >>> _ = torch.manual_seed(0)
    >>> kappa = torch.tensor(5., requires_grad=True)
    >>> z = implicit(D.VonMises(torch.tensor(0.), kappa), (1000,))
    >>> torch.autograd.grad(z.cos().mean(), kappa)[0].item()  # d/dkappa I1/I0 = 0.0238
    0.02...
    """
    return path(q, draw(q, sample_shape))


def log_gamma(concentration: Tensor, noise: Tensor) -> Tensor:
    r"""Return the log of a standard gamma sample as a float64 path of ``concentration``.

    It never underflows: at :math:`\alpha=10^{-3}` a typical sample is :math:`e^{-1000}`.
    """
    alpha = concentration.double()
    return attach(noise, alpha, special.log_gamma_grad(alpha, noise)) if _wanted(alpha) else noise


def exp_inside(log_z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp, kept inside the open (0, inf) of dtype, where every density is finite.

    A gamma of shape 0.01 is below the smallest float32 in two draws of five: there the cost is taken at that smallest
    number, and the result is biased. Work in float64, or with :func:`log_gamma`, if that matters.
    """
    info = torch.finfo(dtype)
    return log_z.clamp(math.log(info.tiny), math.log(info.max) * (1 - 1e-15)).exp().to(dtype)


def _wanted(parameter: Tensor) -> bool:
    """Whether anybody will ask for the derivative for this parameter."""
    return torch.is_grad_enabled() and parameter.requires_grad


# ------------------------------------------------------------------------------------------ look-up


def _find(q: D.Distribution) -> Path | None:
    return next((_PATHS[cls] for cls in type(q).__mro__ if cls in _PATHS), None)


def _rule(q: D.Distribution) -> Path:
    rule = _find(q)
    if rule is None or not rule.supports(q):
        names = ", ".join(sorted(cls.__name__ for cls in _PATHS))
        raise TypeError(
            f"gradlab: no differentiable path for {q}. Expected one of {names} (containers of them included). "
            "Use a score-function or relaxed estimator, or add a rule with gradlab.register_path."
        )
    return rule


def _invert(q: D.Distribution, z: Tensor) -> Noise:
    rule = _rule(q)
    if rule.invert is None:
        raise TypeError(f"gradlab: {type(q).__name__} has no path through a given point (it is not univariate).")
    return rule.invert(q, z)


def _cdf(q: D.Distribution, noise: Noise) -> Tensor:
    rule = _rule(q)
    if rule.cdf is None:
        raise TypeError(f"gradlab: {type(q).__name__} has no cdf, which a mixture needs.")
    return rule.cdf(q, noise).detach()


def _like(q: D.Distribution, shape: torch.Size, parameter: Tensor) -> dict:
    return {"size": q._extended_shape(shape), "dtype": parameter.dtype, "device": parameter.device}


# ------------------------------------------------------------------------- explicit: loc + scale eps


def _location_scale(cls: type, standard: Callable[[dict], Tensor], cdf: Callable[[Tensor], Tensor]) -> None:
    register_path(
        cls,
        draw=lambda q, shape: standard(_like(q, shape, q.loc)),
        path=lambda q, eps: q.loc + q.scale * eps,
        invert=lambda q, z: (z - q.loc.detach()) / q.scale.detach(),
        cdf=lambda q, eps: cdf(eps.double()),
    )


def _exponential(kwargs: dict) -> Tensor:
    return standard_exponential(kwargs["size"], torch.empty((), dtype=kwargs["dtype"], device=kwargs["device"]))


_location_scale(D.Normal, lambda kwargs: torch.randn(**kwargs), special.ndtr)
_location_scale(
    D.Laplace,
    lambda kwargs: _exponential(kwargs) - _exponential(kwargs),
    lambda x: torch.where(x < 0, torch.exp(-x.abs()) / 2, 1 - torch.exp(-x.abs()) / 2),
)
_location_scale(Logistic, lambda kwargs: _exponential(kwargs).log() - _exponential(kwargs).log(), torch.sigmoid)
_location_scale(
    D.Cauchy,
    lambda kwargs: torch.tan(math.pi * (torch.rand(**kwargs) - 0.5)),
    lambda x: torch.atan2(torch.ones_like(x), -x) / math.pi,
)
_location_scale(  # torch draws it from a uniform, whose upper tail has 24 bits in float32
    D.Gumbel, lambda kwargs: -_exponential(kwargs).log(), lambda x: torch.exp(-torch.exp(-x))
)
register_path(
    D.Uniform,
    draw=lambda q, shape: torch.rand(**_like(q, shape, q.low)),
    path=lambda q, u: q.low + (q.high - q.low) * u,
    invert=lambda q, z: ((z - q.low) / (q.high - q.low)).detach(),
    cdf=lambda q, u: u.double(),
)
register_path(
    D.Exponential,
    draw=lambda q, shape: _exponential(_like(q, shape, q.rate)),
    path=lambda q, eps: eps / q.rate,
    invert=lambda q, z: z * q.rate.detach(),
    cdf=lambda q, eps: -torch.expm1(-eps.double()),
)
register_path(
    D.MultivariateNormal,
    draw=lambda q, shape: torch.randn(**_like(q, shape, q.loc)),
    path=lambda q, eps: q.loc + (q._unbroadcasted_scale_tril @ eps[..., None])[..., 0],
)


# ------------------------------------------------------------------ gamma and all that is made of it


def _draw_log_gamma(alpha: Tensor, size: torch.Size) -> Tensor:
    r"""log Gamma(alpha) = log Gamma(alpha + 1) - E / alpha: in log space small shapes do not underflow."""
    alpha = alpha.detach().double().expand(size)
    exponential = _exponential({"size": size, "dtype": alpha.dtype, "device": alpha.device})
    return torch._standard_gamma(alpha + 1).log() - exponential / alpha


register_path(
    D.Gamma,
    draw=lambda q, shape: _draw_log_gamma(q.concentration, q._extended_shape(shape)),
    path=lambda q, noise: exp_inside(log_gamma(q.concentration, noise) - q.rate.double().log(), q.rate.dtype),
    invert=lambda q, z: (z.double() * q.rate.detach()).log(),
    cdf=lambda q, noise: torch.special.gammainc(q.concentration.detach().double().expand(noise.shape), noise.exp()),
)
register_path(
    D.InverseGamma,
    draw=lambda q, shape: _draw_log_gamma(q.concentration, q._extended_shape(shape)),
    path=lambda q, noise: exp_inside(q.rate.double().log() - log_gamma(q.concentration, noise), q.rate.dtype),
    invert=lambda q, z: (q.rate.detach() / z.double()).log(),
    cdf=lambda q, noise: torch.special.gammaincc(q.concentration.detach().double().expand(noise.shape), noise.exp()),
)


def _draw_beta(q: D.Beta, shape: torch.Size) -> tuple[Tensor, Tensor]:
    size = q._extended_shape(shape)
    return _draw_log_gamma(q.concentration1, size), _draw_log_gamma(q.concentration0, size)


def _beta_path(q: D.Beta, noise: tuple[Tensor, Tensor]) -> Tensor:
    a, b = q.concentration1, q.concentration0
    z = torch.sigmoid(log_gamma(a, noise[0]) - log_gamma(b, noise[1])).to(a.dtype)
    info = torch.finfo(a.dtype)
    return z.clamp(info.tiny, 1 - info.eps / 2)


def _dirichlet_path(q: D.Dirichlet, noise: Tensor) -> Tensor:
    return exp_inside(torch.log_softmax(log_gamma(q.concentration, noise), -1), q.concentration.dtype)


register_path(D.Beta, _draw_beta, _beta_path)
register_path(
    D.Dirichlet,
    draw=lambda q, shape: _draw_log_gamma(q.concentration, q._extended_shape(shape)),
    path=_dirichlet_path,
)


def _draw_student(q: D.StudentT, shape: torch.Size) -> Tensor:
    half = q.df.detach().double() / 2
    log_g = _draw_log_gamma(half, q._extended_shape(shape))
    return torch.randn_like(log_g) * torch.exp((half.log() - log_g) / 2)


def _student_path(q: D.StudentT, x: Tensor) -> Tensor:
    df = q.df.double()
    t = attach(x, df, special.student_t_grad(df, x)) if _wanted(df) else x
    return (q.loc + q.scale * t).to(q.loc.dtype)


def _student_cdf(q: D.StudentT, x: Tensor) -> Tensor:
    tail = special.student_t_tail(q.df, x)
    return torch.where(x < 0, tail, 1 - tail)


register_path(
    D.StudentT,
    _draw_student,
    _student_path,
    invert=lambda q, z: ((z.double() - q.loc) / q.scale).detach(),
    cdf=_student_cdf,
)


# ----------------------------------------------------------------------------------------- von Mises


def _wrap(x: Tensor) -> Tensor:
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi


def _draw_von_mises(q: D.VonMises, shape: torch.Size) -> Tensor:
    size = torch.Size((3, *q._extended_shape(shape)))
    return _von_mises_standard(q.concentration.detach().double(), torch.rand(size, dtype=F64, device=q.loc.device))


@torch.library.custom_op("gradlab::von_mises_standard", mutates_args=())
def _von_mises_standard(kappa: Tensor, u: Tensor) -> Tensor:
    """Best and Fisher (1979), with uniforms ``[3, ...]`` for the first round; only the rejected are drawn again.

    An operator of its own, because the number of rounds depends on the data: so it serves vmap and compile.
    """
    kappa = kappa.expand(u.shape[1:]).reshape(-1)
    x, accepted = _best_fisher(kappa, u.reshape(3, -1))
    todo = (~accepted).nonzero()[:, 0]
    while todo.numel():
        again, accepted = _best_fisher(kappa[todo], torch.rand((3, len(todo)), dtype=u.dtype, device=u.device))
        x[todo] = again
        todo = todo[~accepted]
    return x.view(u.shape[1:])


@_von_mises_standard.register_fake
def _(kappa, u):
    return torch.empty_like(u[0])


@_von_mises_standard.register_vmap
def _(info, in_dims, kappa, u):
    u = u.unsqueeze(1).expand(3, info.batch_size, *u.shape[1:]) if in_dims[1] is None else u.movedim(in_dims[1], 1)
    if in_dims[0] is not None:
        kappa = kappa.movedim(in_dims[0], 0)
        kappa = kappa.reshape(info.batch_size, *(1,) * (u.ndim - 1 - kappa.ndim), *kappa.shape[1:])
    return _von_mises_standard(kappa, u), 0


def _best_fisher(kappa: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    tau = 1 + torch.sqrt(1 + 4 * kappa * kappa)
    rho = (tau - torch.sqrt(2 * tau)) / (2 * kappa)
    r = torch.where(kappa < 1e-5, 1 / kappa + kappa, (1 + rho * rho) / (2 * rho))
    z = torch.cos(math.pi * u[0])
    f = (1 + r * z) / (r + z)
    c = kappa * (r - f)
    accepted = (c * (2 - c) > u[1]) | (torch.log(c / u[1]) + 1 - c >= 0)
    return torch.sign(u[2] - 0.5) * torch.acos(f.clamp(-1.0, 1.0)), accepted


def _von_mises_path(q: D.VonMises, x: Tensor) -> Tensor:
    kappa = q.concentration.double()
    angle = attach(x, kappa, special.von_mises_grad(kappa, x)) if _wanted(kappa) else x
    return _wrap(q.loc + angle).to(q.loc.dtype)


def _von_mises_cdf(q: D.VonMises, x: Tensor) -> Tensor:
    """The cdf from the common cut at -pi, where all components of a mixture on the circle start."""
    loc, kappa = q.loc.detach().double(), q.concentration.detach()
    turn = (loc + x + math.pi).div(2 * math.pi, rounding_mode="floor")
    cut = -math.pi - loc
    below = special.von_mises_cdf(kappa, _wrap(cut)) + (cut + math.pi).div(2 * math.pi, rounding_mode="floor")
    return special.von_mises_cdf(kappa, x) - below - turn


register_path(
    D.VonMises,
    _draw_von_mises,
    _von_mises_path,
    invert=lambda q, z: _wrap(z.double() - q.loc.detach()),
    cdf=_von_mises_cdf,
)


# ---------------------------------------------------------------------------------- truncated normal


register_path(
    TruncatedNormal,
    draw=lambda q, shape: q.sample(shape),
    path=lambda q, z: q.through(z),
    invert=lambda q, z: z,
    cdf=lambda q, z: q.cdf(z).double(),
)


# -------------------------------------------------------------------------------- containers of others


def _transform(q: D.TransformedDistribution, noise: Noise) -> Tensor:
    z = path(q.base_dist, noise)
    for transform in q.transforms:
        z = transform(z)
    return z


def _untransform(q: D.TransformedDistribution, z: Tensor) -> Noise:
    for transform in reversed(q.transforms):
        z = transform.inv(z).detach()
    return _invert(q.base_dist, z)


def _transformed_cdf(q: D.TransformedDistribution, noise: Noise) -> Tensor:
    cdf = _cdf(q.base_dist, noise)
    sign = math.prod(t.sign for t in q.transforms)
    return sign * (cdf - 0.5) + 0.5


register_path(
    D.TransformedDistribution,
    draw=lambda q, shape: draw(q.base_dist, shape),
    path=_transform,
    invert=_untransform,
    cdf=_transformed_cdf,
    supports=lambda q: has_path(q.base_dist),
)
register_path(
    D.Independent,
    draw=lambda q, shape: draw(q.base_dist, shape),
    path=lambda q, noise: path(q.base_dist, noise),
    invert=lambda q, z: _invert(q.base_dist, z),
    supports=lambda q: has_path(q.base_dist),
)


# ------------------------------------------------------------------------------------------- mixtures


def _coordinates(q: D.MixtureSameFamily) -> D.Distribution:
    """The univariate laws of a mixture: ``[*B, K]``, or ``[*B, K, E]`` below an ``Independent``."""
    component = q.component_distribution
    return component.base_dist if isinstance(component, D.Independent) else component


def _mixable(q: D.MixtureSameFamily) -> bool:
    base = _coordinates(q)
    return len(q.event_shape) <= 1 and not base.event_shape and has_path(base) and _invertible(base)


def _invertible(q: D.Distribution) -> bool:
    """Whether the path through a given point and the cdf are known, here and below every transform."""
    if isinstance(q, D.TransformedDistribution):
        return all(t.bijective for t in q.transforms) and _invertible(q.base_dist)
    rule = _find(q)
    return rule is not None and rule.invert is not None and rule.cdf is not None


def _draw_mixture(q: D.MixtureSameFamily, shape: torch.Size) -> Tensor:
    weights = q.mixture_distribution.probs.detach()
    size = q._extended_shape(shape)[: len(shape) + len(q.batch_shape)]
    below = weights.cumsum(-1)
    u = torch.rand(size, dtype=weights.dtype, device=weights.device)
    index = (u[..., None] * below[..., -1:] >= below[..., :-1]).sum(-1, keepdim=True)  # [*S, *B, 1]
    with torch.no_grad():
        z = implicit(q.component_distribution, shape)  # [*S, *B, K, *E]
    index = index[(...,) + (None,) * len(q.event_shape)].expand(*size, 1, *q.event_shape)
    return z.gather(len(size), index).squeeze(len(size))


def _mixture_path(q: D.MixtureSameFamily, z: Tensor) -> Tensor:
    base, logits = _coordinates(q), q.mixture_distribution.logits
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)  # a component with logit -inf is never met
    return _mix_vector(base, logits, z) if q.event_shape else _mix_scalar(base, logits, z)


def _mix_scalar(base: D.Distribution, logits: Tensor, z: Tensor) -> Tensor:
    r"""With weights :math:`w_k` and responsibilities :math:`\rho_k`, of a mixture with density :math:`p`,

    .. math:: dz = \sum_k \rho_k\,(dz)_k - \frac{1}{p(z)}\sum_k F_k(z)\,dw_k .
    """
    x = z[..., None].expand(*z.shape, logits.shape[-1])
    unchecked = copy.copy(base)  # samples need no check
    unchecked._validate_args = False
    with torch.no_grad():
        parts = [
            _mixture_derivatives(logits, unchecked.log_prob(part), _cdf(base, _invert(base, part)))
            for part in _blocks(x, len(base.batch_shape))
        ]
        posterior, effect = (torch.cat([t.to(z.dtype) for t in part]) for part in zip(*parts, strict=True))
    return attach(attach(z, at(base, x), posterior), logits, effect)


def _blocks(x: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """Split the samples into blocks whose float64 temporaries stay in the cache."""
    if x.ndim == batch_dims or not special.has_cache(x):
        return (x,)
    return x.split(max(1, BLOCK // max(1, x[:1].numel())))


def _mix_vector(base: D.Distribution, logits: Tensor, z: Tensor) -> Tensor:
    r"""The distributional transform: coordinate i is a scalar mixture given the coordinates before it.

    Its log weights :math:`\log w_k + \sum_{j<i}\log p_{kj}(z_j)` move with :math:`z_{<i}`, so that
    :math:`(I - M)\,dz` is known, with M strictly lower triangular.
    """
    x = z.unsqueeze(-2).expand(*z.shape[:-1], logits.shape[-1], z.shape[-1])  # [*S, *B, K, E]
    log_p, pull_back = torch.func.vjp(base.log_prob, x)[:2]
    (slope,) = pull_back(torch.ones_like(log_p))
    weights = (logits[..., None] + log_p.cumsum(-1) - log_p).mT  # [*S, *B, E, K]
    posterior, effect = (
        t.to(z.dtype) for t in _mixture_derivatives(weights, log_p.mT, _cdf(base, _invert(base, x)).mT)
    )
    step = attach(attach(torch.zeros_like(z), at(base, x).mT, posterior), weights, effect)
    system = -(effect @ slope.detach()).tril(-1)
    return z + torch.linalg.solve_triangular(system, step[..., None], upper=False, unitriangular=True)[..., 0]


def _mixture_derivatives(log_weights: Tensor, log_p: Tensor, cdf: Tensor) -> tuple[Tensor, Tensor]:
    """dz/d(path of component k) and dz/d(log weight k), in log space and float64; the components come last."""
    log_weights = torch.log_softmax(log_weights.detach().double(), -1)
    joint = (log_weights + log_p.detach()).clamp(min=-1e30)
    top = joint.amax(-1, keepdim=True)
    density = torch.exp(joint - top)  # of each component, over exp(top)
    total = density.sum(-1, keepdim=True)
    weights = log_weights.exp()
    excess = (weights * cdf).sum(-1, keepdim=True) - cdf
    return density / total, excess * weights * (torch.exp(-top.clamp(min=-700.0)) / total)


register_path(D.MixtureSameFamily, _draw_mixture, _mixture_path, invert=lambda q, z: z, supports=_mixable)
