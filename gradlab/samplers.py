"""Samplers: an ``rsample`` with a chosen backward, usable alone inside a network."""

from __future__ import annotations

import torch
from torch import Size, Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Dirichlet, Distribution, OneHotCategorical

from gradlab.densities import made_from_logits
from gradlab.distributions import base, factor, has_icdf, quantile, tensors
from gradlab.gumbel import discrete, gumbel, logits_of, one_hot
from gradlab.paths import has_path, implicit
from gradlab.surrogate import first_order, is_batched, zero

__all__ = [
    "gumbel_max",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_top_k",
    "implicit",
    "inverse_cdf",
    "reinmax",
    "rsample",
    "straight_through",
]


def sample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return samples without a graph, ``[*sample_shape, *B, *E]``, also inside ``torch.func`` transforms.

    There torch samples neither its Beta, Dirichlet and OneHotCategorical nor, below ``vmap``, most others; and its
    Beta and Dirichlet degenerate in float32 at small concentrations.
    """
    p = factor(q)
    if type(p) is Bernoulli:  # a subclass may sample in a way of its own
        return torch.bernoulli(_probs(p).expand(Size(sample_shape) + p.batch_shape))
    if isinstance(p, OneHotCategorical):
        probs = _probs(p)
        rows = probs.flatten(0, -2) if probs.ndim > 1 else probs[None]
        index = torch.multinomial(rows, Size(sample_shape).numel(), replacement=True)
        index = index.T.reshape(Size(sample_shape) + p.batch_shape + (1,))
        return one_hot(index, probs)
    if isinstance(p, Beta | Dirichlet) or (any(map(is_batched, tensors(p))) and has_path(p)):
        with torch.no_grad():
            return implicit(p, sample_shape)
    return p.sample(sample_shape).detach()


def quick_sample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return :func:`sample`; bits and one-hots by their inverse cdf, in less time and from another random stream.

    A latent takes one uniform of 53 bits. A value of probability 0 is not returned,
    but for a scan in parallel that rounds its end of the cdf up: once in 1e16 draws.
    """
    p = factor(q)
    if type(p) not in (Bernoulli, OneHotCategorical):
        return sample(q, sample_shape)
    lead = Size(sample_shape) + p.batch_shape
    probs = _probs(p)
    if type(p) is Bernoulli:
        return (torch.rand(lead, dtype=torch.float64, device=probs.device) < probs).to(probs.dtype)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    point = (1 - torch.rand(lead + (1,), dtype=torch.float64, device=probs.device)) * cdf[..., -1:]  # never 0
    index = (cdf < point).sum(-1, keepdim=True)  # of the first end that reaches the point
    return one_hot(index, probs)


def _probs(p: Distribution) -> Tensor:
    """Return the probabilities without a graph."""
    if not made_from_logits(p):
        return p.probs.detach()
    logits = p.logits.detach()
    return torch.sigmoid(logits) if isinstance(p, Bernoulli) else logits.exp()


def rsample(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    """Return ``q.rsample(sample_shape)``, ``[*sample_shape, *B, *E]``.

    torch's Beta and Dirichlet return wrong second derivatives without a word, so they are sampled by :func:`implicit`.

    Raises:
        TypeError: q has no rsample.

    >>> loc = torch.tensor(0.5, requires_grad=True)
    >>> rsample(torch.distributions.Normal(loc, 1.0), torch.Size([3])).sum().backward()
    >>> loc.grad.item()
    3.0
    """
    if not q.has_rsample:
        raise TypeError(
            f"rsample: found {type(q).__name__}, which has none, expected a distribution that torch can sample "
            "along a path. Try gradlab.implicit or gradlab.inverse_cdf, or a ScoreFunction estimator."
        )
    return implicit(q, sample_shape) if isinstance(base(q), Beta | Dirichlet) else q.rsample(sample_shape)


def inverse_cdf(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    r"""Return :math:`F_\theta^{-1}(u)` for uniform u, ``[*sample_shape, *B, *E]``.

    Works for every univariate q with an ``icdf``, and for independent products of such q.

    Raises:
        TypeError: q has no icdf.

    >>> scale = torch.tensor(2.0, requires_grad=True)
    >>> z = inverse_cdf(torch.distributions.Laplace(0.0, scale), torch.Size([5]))
    >>> z.sum().backward()
    >>> torch.allclose(scale.grad, z.detach().sum() / 2)
    True
    """
    if not has_icdf(q):
        raise TypeError(
            f"inverse_cdf: found {type(q).__name__}, which has no icdf, expected a univariate distribution that has "
            "one (or an Independent of such). gradlab.implicit needs the cdf only."
        )
    like = next(tensors(q))
    shape = Size(sample_shape) + q.batch_shape + q.event_shape
    eps = torch.finfo(like.dtype).eps
    u = torch.rand(shape, dtype=like.dtype, device=like.device).clamp(eps / 2, 1 - eps / 2)
    return quantile(q, u)


def gumbel_max(q: Distribution, sample_shape: Size = Size()) -> Tensor:
    r"""Return :math:`\mathrm{onehot}(\arg\max_k(\log\pi_k + g_k))` for Gumbel noise g: an exact sample, no gradient.

    Args:
        q: Bernoulli or OneHotCategorical, or an Independent of one.

    Reference:
        `Statistical Theory of Extreme Values and Some Practical Applications
        <https://ntrl.ntis.gov/NTRL/dashboard/searchResults/titleDetail/PB175818.xhtml>`_, Gumbel, 1954.

    >>> gumbel_max(torch.distributions.OneHotCategorical(logits=torch.tensor([0.0, 9e9])), torch.Size([2])).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    rule, logits = discrete(q), logits_of(q).detach()
    return rule.harden(logits + noise_of(q, sample_shape))


def gumbel_softmax(
    q: Distribution, sample_shape: Size = Size(), temperature: float | Tensor = 1.0, hard: bool = False
) -> Tensor:
    r"""Return a sample of the Concrete law, a point of the simplex near a one-hot vector, with its path.

    .. math:: x = \mathrm{softmax}((\log\pi + g)/\tau), \qquad
              x = \sigma((\theta + l)/\tau) \ \text{(Bernoulli; l logistic)}

    Args:
        q: Bernoulli or OneHotCategorical, or an Independent of one.
        temperature: :math:`\tau`; a one-hot sample as it tends to 0.
        hard: return the one-hot argmax, and keep the gradient of the soft sample (straight-through Gumbel-softmax).

    Reference:
        `Categorical Reparameterization with Gumbel-Softmax <https://arxiv.org/abs/1611.01144>`_, Jang, Gu and
        Poole, 2017; `The Concrete Distribution <https://arxiv.org/abs/1611.00712>`_, Maddison, Mnih and Teh, 2017.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> x = gumbel_softmax(torch.distributions.OneHotCategorical(logits=logits), torch.Size([5]), temperature=0.5)
    >>> x.shape, x.requires_grad
    (torch.Size([5, 3]), True)
    """
    return concrete_path(q, noise_of(q, sample_shape), temperature, hard)


def straight_through(q: Distribution, sample_shape: Size = Size(), temperature: float | Tensor = 1.0) -> Tensor:
    r"""Return an exact sample with the gradient of the probabilities, :math:`b + \pi_\tau - \mathrm{sg}(\pi_\tau)`.

    Args:
        q: Bernoulli or OneHotCategorical, or an Independent of one.
        temperature: of the probabilities :math:`\pi_\tau = \mathrm{softmax}(\theta/\tau)` of the backward pass.

    Reference:
        `Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation
        <https://arxiv.org/abs/1308.3432>`_, Bengio, Léonard and Courville, 2013.

    >>> logits = torch.tensor([0.3, -0.2], requires_grad=True)
    >>> straight_through(torch.distributions.Bernoulli(logits=logits)).sum().backward()
    >>> torch.allclose(logits.grad, logits.sigmoid() * (1 - logits.sigmoid()))
    True
    """
    return straight_through_path(q, gumbel_max(q, sample_shape), temperature)


def gumbel_rao(
    q: Distribution, sample_shape: Size = Size(), temperature: float | Tensor = 1.0, num_noises: int = 16
) -> Tensor:
    r"""Return an exact sample b with the mean gradient of M soft samples that harden to b.

    .. math:: b + \frac1M\sum_{m=1}^M \mathrm{zero}\big(\mathrm{softmax}((\log\pi + \mathrm{sg}(g^{(m)}))/\tau)\big),
              \qquad g^{(m)} \sim p(g \mid b)

    The Rao-Blackwell average of straight-through Gumbel-softmax: the same mean, a smaller variance, one evaluation of
    f.

    Args:
        q: Bernoulli or OneHotCategorical, or an Independent of one.
        temperature: :math:`\tau`.
        num_noises: M.

    Reference:
        `Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator
        <https://arxiv.org/abs/2010.04838>`_, Paulus, Maddison and Krause, 2021.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> gumbel_rao(torch.distributions.OneHotCategorical(logits=logits), temperature=0.1).sum().item()
    1.0
    """
    hard = gumbel_max(q, sample_shape)
    return gumbel_rao_path(q, hard, conditional_noise(q, hard, num_noises), temperature)


def reinmax(q: Distribution, sample_shape: Size = Size(), temperature: float | Tensor = 1.0) -> Tensor:
    r"""Return an exact sample b with ReinMax's second-order gradient.

    .. math:: b + \mathrm{zero}\big(2\pi_1 - \tfrac12\pi\big), \qquad
              \pi_1 = \mathrm{softmax}\big(\theta - \mathrm{sg}(\theta) + \log\tfrac12(b + \pi_\tau)\big)

    With :math:`\tau = 1` its mean is the exact gradient for every quadratic f (Heun's rule); straight-through is
    exact for linear f only (Euler's).

    Args:
        q: Bernoulli or OneHotCategorical, or an Independent of one.
        temperature: :math:`\tau`, of :math:`\pi_\tau = \mathrm{softmax}(\theta/\tau)`.

    Reference:
        `Bridging Discrete and Backpropagation: Straight-Through and Beyond <https://arxiv.org/abs/2304.08612>`_,
        Liu, Dong, Liu, Yu and Gao, 2023.

    >>> logits = torch.zeros(3, requires_grad=True)
    >>> reinmax(torch.distributions.OneHotCategorical(logits=logits)).sum().item()
    1.0
    """
    return reinmax_path(q, gumbel_max(q, sample_shape), temperature)


def gumbel_top_k(q: Distribution, k: int, sample_shape: Size = Size()) -> Tensor:
    r"""Return the indices of the k largest :math:`\log\pi + g`: an ordered sample *without* replacement.

    The first index is an exact sample of q, each next one of what is left.

    Args:
        q: Categorical or OneHotCategorical, or an Independent of one, with at least k values.

    Returns:
        Indices, ``[*sample_shape, *B, k]``.

    Reference:
        `Stochastic Beams and Where to Find Them <https://arxiv.org/abs/1903.06059>`_, Kool, van Hoof and Welling,
        2019.

    >>> gumbel_top_k(torch.distributions.Categorical(logits=torch.tensor([0.0, 90.0, 50.0])), 2).tolist()
    [1, 2]
    """
    p = factor(q)
    if not isinstance(p, Categorical | OneHotCategorical):
        raise TypeError(f"gumbel_top_k: found {type(p).__name__}, expected a Categorical or a OneHotCategorical.")
    if not 1 <= k <= p.logits.shape[-1]:
        raise ValueError(f"gumbel_top_k: found k={k}, expected 1 to {p.logits.shape[-1]}, the number of categories.")
    logits = p.logits.detach()
    return (logits + gumbel(Size(sample_shape) + logits.shape, logits)).topk(k, -1).indices


# Each sampler is a noise and a path; the estimators of relaxed.py use the two apart.


def noise_of(q: Distribution, sample_shape: Size) -> Tensor:
    """Return the free noise of q's family, ``[*sample_shape, *B, *E]``."""
    logits = logits_of(q)
    return discrete(q).noise(Size(sample_shape) + logits.shape, logits)


def conditional_noise(q: Distribution, hard: Tensor, count: int) -> Tensor:
    """Return noises that harden to ``hard``, without a graph, ``[count, *L, *B, *E]``."""
    rule, logits = discrete(q), logits_of(q).detach()
    return rule.given(logits, hard, rule.noise(Size([count]) + hard.shape, logits))


def concrete_path(q: Distribution, noise: Tensor, temperature: float | Tensor, hard: bool) -> Tensor:
    """Return the relaxed sample at the noise, or the hard one with its gradient."""
    rule, x = discrete(q), logits_of(q) + noise
    soft = rule.soften(x, temperature)
    return rule.harden(x.detach()) + zero(first_order(soft)) if hard else soft


def straight_through_path(q: Distribution, hard: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``hard`` with the gradient of the probabilities."""
    return hard + zero(first_order(discrete(q).soften(logits_of(q), temperature)))


def gumbel_rao_path(q: Distribution, hard: Tensor, noise: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``hard`` with the gradient of the soft samples, averaged over the first dim of the noise."""
    return hard + zero(first_order(discrete(q).soften(logits_of(q) + noise, temperature).mean(0)))


def reinmax_path(q: Distribution, hard: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``hard`` with ReinMax's gradient."""
    rule, logits = discrete(q), logits_of(q)
    middle = (hard + rule.soften(logits.detach(), temperature)) / 2
    at_middle = middle.log() if rule.dims else torch.logit(middle)
    slope = zero(logits.clamp_min(torch.finfo(logits.dtype).min))  # not -inf + inf where a logit is -inf
    return hard + zero(first_order(2 * rule.soften(slope + at_middle, 1.0) - rule.soften(logits, 1.0) / 2))
