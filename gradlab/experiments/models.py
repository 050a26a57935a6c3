r"""The models of source 003, appendix B, for many runs at once: every parameter has a leading dim R of runs.

=========================  =====================================  ============================================
name                       guide                                  likelihood
=========================  =====================================  ============================================
``one-layer-sbn``          linear, 200 bits                       linear
``two-layer-sbn``          linear, 200 bits; linear, 200 bits     linear; linear
``bernoulli-vae``          tanh 200, tanh 200, 200 bits           tanh 200, tanh 200, linear
``one-layer-categorical``  linear, 20 factors of 10 values        linear
``categorical-vae``        ReLU 512, ReLU 256, 20 factors of 10   ReLU 256, ReLU 512, linear
=========================  =====================================  ============================================

Those sizes are for 784 pixels; :data:`SMALL` has the ones for 64. The first three follow Grathwohl et al. (2018): the
pixels are centred, bits enter the next layer as -1 and 1, the prior of the bits is learned, and the last bias starts
at the log odds of the mean image. The widths of the categorical VAE, which source 003 does not give, are those of Jang
et al. (2017), and its prior is uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Distribution, Independent, OneHotCategorical

from gradlab.catalogue import ESTIMATORS, MODELS, TRAINABLE
from gradlab.estimator import Estimator
from gradlab.exact import LocalExpectation
from gradlab.experiments.plan import seeded
from gradlab.rebar import REBAR, RELAX
from gradlab.svi import NegativeELBO

__all__ = ["LARGE", "MODELS", "SMALL", "Affine", "Sizes", "build", "make_estimator"]

Law = Callable[[Tensor], Distribution]


class Sizes(NamedTuple):
    """How large the models are."""

    bits: int
    hidden: int
    """units of each hidden layer of the Bernoulli VAE"""
    factors: int
    values: int
    wide: tuple[int, int]
    """hidden units of the categorical VAE"""


LARGE = Sizes(bits=200, hidden=200, factors=20, values=10, wide=(512, 256))
SMALL = Sizes(bits=32, hidden=64, factors=8, values=10, wide=(128, 64))


class Affine(nn.Module):
    r"""A linear layer of R runs, :math:`y_r = x_r W_r + b_r`.

    Shapes:
        ``[*L, R, N, inputs]`` to ``[*L, R, N, outputs]``.

    >>> Affine(3, 4, 2)(torch.zeros(7, 3, 5, 4)).shape
    torch.Size([7, 3, 5, 2])
    """

    def __init__(self, runs: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(runs, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(runs, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        lead, rows = x.shape[:-3], x.shape[-2]
        x = x.movedim(-3, 0).reshape(len(self.weight), -1, x.shape[-1])  # [R, L N, inputs]
        y = torch.baddbmm(self.bias, x, self.weight)
        return y.reshape(len(y), *lead, rows, y.shape[-1]).movedim(0, -3)

    def extra_repr(self) -> str:
        return "{}, {}, {}".format(*self.weight.shape)


class Centre(nn.Module):
    """Take the mean of the data away."""

    mean: Tensor

    def __init__(self, mean: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Signs(nn.Module):
    """Zeros and ones to -1 and 1."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * z - 1


class Conditional(nn.Module):
    """A distribution whose logits a network gives."""

    def __init__(self, net: nn.Module, law: Law) -> None:
        super().__init__()
        self.net, self.law = net, law

    def forward(self, x: Tensor) -> Distribution:
        return self.law(self.net(x))


class Prior(nn.Module):
    """A distribution with logits of its own, learned or all zero, ``[R, 1, width]``."""

    def __init__(self, runs: int, width: int, law: Law, learned: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(runs, 1, width), requires_grad=learned)
        self.law = law

    def forward(self) -> Distribution:
        return self.law(self.logits)


def bits(logits: Tensor) -> Distribution:
    """Return zeros and ones, drawn jointly."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def one_hots(values: int) -> Law:
    """Return the law of factors of so many values, drawn jointly."""

    def law(logits: Tensor) -> Distribution:
        q = OneHotCategorical(logits=logits.unflatten(-1, (-1, values)), validate_args=False)
        return Independent(q, 1, validate_args=False)

    return law


class Counts(Binomial):
    """A binomial that knows how many ways lead to each count: its log density costs a third of torch's."""

    def __init__(self, levels: int, log_ways: Tensor, logits: Tensor) -> None:
        super().__init__(levels, logits=logits, validate_args=False)
        self.log_ways = log_ways

    def log_prob(self, value: Tensor) -> Tensor:
        ways, cost = self.log_ways[value.long()], nn.functional.softplus(self.logits)
        return torch.addcmul(ways - self.total_count * cost, value, self.logits)


def counts(levels: int) -> Law:
    """Return the law of pixels that count up to ``levels``."""
    if levels == 1:
        return bits
    k = torch.arange(levels + 1, dtype=torch.float64)
    ways = math.lgamma(levels + 1) - torch.lgamma(k + 1) - torch.lgamma(levels - k + 1)

    def law(logits: Tensor) -> Distribution:
        return Independent(Counts(levels, ways.to(logits), logits), 1, validate_args=False)

    return law


def layers(runs: int, *widths: int, activation: type[nn.Module] = nn.Tanh) -> list[nn.Module]:
    """Return affine layers with an activation between any two."""
    pairs = pairwise(widths)
    return [layer for pair in pairs for layer in (activation(), Affine(runs, *pair))][1:]


def build(
    model: str,
    mean: Tensor,
    levels: int,
    estimator: Callable[[int, int, nn.Module], Estimator],
    seeds: Sequence[int],
    sizes: Sizes = LARGE,
    above: Callable[[int, int, nn.Module], Estimator] | None = None,
) -> NegativeELBO:
    """Return the negative ELBO ``[R, N, D] -> [R, N]`` of a model, whose run r starts as ``seeds[r]`` alone would.

    Args:
        model: one of :data:`MODELS`.
        mean: the mean image, ``[D]``, from 0 to ``levels``.
        levels: each pixel counts from 0 to so many.
        estimator: makes the estimator of a layer, of the number of runs, the units of z and a module that flattens z.
        seeds: of the starts, one for each run.
        sizes: of the layers.
        above: the same for the second layer, which draws so many samples for each of the first; by default the same.

    Raises:
        ValueError: the name is unknown.
    """
    if model not in MODELS:
        raise ValueError(f"model: found {model!r}, expected one of {', '.join(MODELS)}.")
    makers = estimator, above or estimator
    together = _build(model, len(seeds), mean, levels, *makers, sizes)
    alone = []
    for seed in seeds:
        with seeded(seed, "cpu"):
            alone.append(dict(_build(model, 1, mean, levels, *makers, sizes).named_parameters()))
    with torch.no_grad():
        for name, parameter in together.named_parameters():
            parameter.copy_(torch.cat([run[name] for run in alone]))
    return together


def _build(
    model: str,
    runs: int,
    mean: Tensor,
    levels: int,
    estimator: Callable[..., Estimator],
    above: Callable[..., Estimator],
    sizes: Sizes,
) -> NegativeELBO:
    pixels, see = len(mean), Centre(mean, levels)

    def decoder(first: nn.Module, *widths: int, activation: type[nn.Module] = nn.Tanh) -> Conditional:
        net = layers(runs, *widths, pixels, activation=activation)
        odds = (mean / levels).clamp(1e-3, 1 - 1e-3).logit()
        net[-1].load_state_dict({**net[-1].state_dict(), "bias": odds.expand(runs, 1, -1)})
        return Conditional(nn.Sequential(first, *net), counts(levels))

    if "categorical" in model:
        d, law = sizes.factors * sizes.values, one_hots(sizes.values)
        wide = sizes.wide if model == "categorical-vae" else ()
        guide = Conditional(nn.Sequential(see, *layers(runs, pixels, *wide, d, activation=nn.ReLU)), law)
        likelihood = decoder(nn.Flatten(-2), d, *reversed(wide), activation=nn.ReLU)
        return NegativeELBO(guide, Prior(runs, d, law, learned=False), likelihood, estimator(runs, d, nn.Flatten(-2)))
    d, wide = sizes.bits, (sizes.hidden,) * 2 if model == "bernoulli-vae" else ()
    guide = Conditional(nn.Sequential(see, *layers(runs, pixels, *wide, d)), bits)
    prior: nn.Module = Prior(runs, d, bits, learned=True)
    likelihood = decoder(Signs(), d, *wide)
    if model == "two-layer-sbn":
        up, down = (Conditional(nn.Sequential(Signs(), Affine(runs, d, d)), bits) for _ in range(2))
        prior = NegativeELBO(up, prior, down, above(runs, d, nn.Identity()), kl="sample")
    return NegativeELBO(guide, prior, likelihood, estimator(runs, d, nn.Identity()))


def make_estimator(
    name: str, num_samples: int, chunk_size: int | None = None
) -> Callable[[int, int, nn.Module], Estimator]:
    """Return what makes the estimator of a layer; REBAR and RELAX learn a control variate for each run."""
    if name not in TRAINABLE:
        raise ValueError(f"estimator: found {name!r}, expected one of {', '.join(TRAINABLE)}.")

    def estimator(runs: int, units: int, flatten: nn.Module) -> Estimator:
        if name == "local-expectation":
            return LocalExpectation(num_samples, chunk_size)
        if name not in ("rebar", "relax"):
            return ESTIMATORS[name](num_samples)
        temperature = torch.full((runs, 1), 0.5)
        if name == "rebar":
            return REBAR(num_samples, temperature)
        *first, last = layers(runs, units, 100, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        return RELAX(nn.Sequential(flatten, *first, last), num_samples, temperature)

    return estimator
