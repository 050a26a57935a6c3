"""Laws of counts, of finite sets and of a single point that torch lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributions as td
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from gradlab.distributions import Family, _expand
from gradlab.samplers import sample

__all__ = [
    "BetaBinomial",
    "Cliques",
    "CompoundPoisson",
    "Delta",
    "DirichletMultinomial",
    "MeanNegativeBinomial",
    "Skellam",
    "ZeroInflatedPoisson",
]


def _check_count(name: str, total_count: int) -> int:
    if isinstance(total_count, bool) or not hasattr(total_count, "__index__") or total_count < 1:
        raise ValueError(
            f"{name}: found total_count={total_count!r}, expected a positive int, one for the whole batch. Build one "
            "distribution a count."
        )
    return int(total_count)


def _table(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return all joint values, made on the device, the last variable fastest."""
    index = torch.arange(math.prod(sizes), device=like.device)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return torch.stack([index // stride % size for stride, size in zip(strides, sizes, strict=True)], -1).to(like.dtype)


def _draw(probs: Tensor, size: Size) -> Tensor:
    """Return categories by a uniform each, ``[*size]``; ``probs [..., K]`` broadcasts, and nothing is looked at."""
    u = torch.rand((*size, 1), dtype=probs.dtype, device=probs.device)
    return (u >= probs.cumsum(-1)).sum(-1).clamp_max(probs.shape[-1] - 1)


class MeanNegativeBinomial(Family):
    r"""The negative binomial law, by its mean m and its dispersion :math:`\alpha`.

    .. math:: P(z) = \frac{\Gamma(z+1/\alpha)}{z!\,\Gamma(1/\alpha)}
              \Big(\frac1{1+\alpha m}\Big)^{1/\alpha}\Big(\frac{\alpha m}{1+\alpha m}\Big)^z,
              \qquad \operatorname{Var} z = m + \alpha m^2

    It is a Poisson law whose rate has a gamma law; :math:`\alpha\to0` is the Poisson law itself.

    Args:
        loc: the mean m, positive.
        dispersion: :math:`\alpha`, positive: one over torch's ``total_count``.

    Reference:
        `Negative Binomial Regression <https://doi.org/10.1017/CBO9780511973420>`_, Hilbe, 2011.

    >>> MeanNegativeBinomial(torch.tensor(2.0), torch.tensor(0.5)).variance.item()
    4.0
    """

    arg_constraints = {"loc": constraints.positive, "dispersion": constraints.positive}
    support = constraints.nonnegative_integer

    def __init__(self, loc, dispersion, validate_args=None):
        super().__init__(loc, dispersion, validate_args=validate_args)

    @property
    def probs(self):
        r"""The probability of success in the parameterisation of torch, :math:`\alpha m/(1+\alpha m)`."""
        return self.dispersion * self.loc / (1 + self.dispersion * self.loc)

    def _draw(self, size):
        return torch.poisson(torch._standard_gamma((1 / self.dispersion).expand(size)) * self.dispersion * self.loc)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        r, scaled = 1 / self.dispersion, self.dispersion * self.loc
        choices = torch.lgamma(value + r) - torch.lgamma(r) - torch.lgamma(value + 1)
        return choices - (r + value) * torch.log1p(scaled) + torch.xlogy(value, scaled)

    @property
    def mean(self):
        return self.loc

    @property
    def variance(self):
        return self.loc + self.dispersion * self.loc**2


class Skellam(Family):
    r"""The difference of two Poisson counts, :math:`z = n_1 - n_2`.

    .. math:: P(z) = e^{-\lambda_1-\lambda_2}\Big(\frac{\lambda_1}{\lambda_2}\Big)^{z/2}
              I_{|z|}\big(2\sqrt{\lambda_1\lambda_2}\big)

    It has no ``log_prob``: torch has no Bessel function of any order.

    Args:
        rate1: :math:`\lambda_1`, positive.
        rate2: :math:`\lambda_2`, positive.

    Reference:
        `The frequency distribution of the difference between two Poisson variates belonging to different populations
        <https://doi.org/10.1111/j.2397-2335.1946.tb04670.x>`_, Skellam, 1946.

    >>> Skellam(torch.tensor(2.0), torch.tensor(0.5)).mean.item()
    1.5
    """

    arg_constraints = {"rate1": constraints.positive, "rate2": constraints.positive}
    support = constraints.integer_interval(-math.inf, math.inf)

    def __init__(self, rate1, rate2, validate_args=None):
        super().__init__(rate1, rate2, validate_args=validate_args)

    def _draw(self, size):
        return torch.poisson(self.rate1.expand(size)) - torch.poisson(self.rate2.expand(size))

    @property
    def mean(self):
        return self.rate1 - self.rate2

    @property
    def variance(self):
        return self.rate1 + self.rate2


class ZeroInflatedPoisson(Family):
    r"""A Poisson count that is replaced by 0 with probability g.

    .. math:: P(z) = g\,1[z=0] + (1-g)\,e^{-\lambda}\frac{\lambda^z}{z!}

    Args:
        rate: :math:`\lambda`, positive.
        gate: g, in [0, 1].

    Reference:
        `Zero-Inflated Poisson Regression <https://doi.org/10.2307/1269547>`_, Lambert, 1992.

    >>> ZeroInflatedPoisson(torch.tensor(2.0), torch.tensor(0.25)).mean.item()
    1.5
    """

    arg_constraints = {"rate": constraints.positive, "gate": constraints.unit_interval}
    support = constraints.nonnegative_integer

    def __init__(self, rate, gate, validate_args=None):
        super().__init__(rate, gate, validate_args=validate_args)

    def sample_with_count(self, sample_shape=Size()):
        """Return samples, and the Poisson counts before some were replaced by 0."""
        with torch.no_grad():
            count = torch.poisson(self.rate.expand(self._extended_shape(sample_shape)))
            return torch.where(torch.rand_like(count) < self.gate, 0.0, count), count

    def sample(self, sample_shape=Size()):
        return self.sample_with_count(sample_shape)[0]

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        poisson = torch.xlogy(value, self.rate) - self.rate - torch.lgamma(value + 1)
        zero = torch.where(value == 0, self.gate.log(), -torch.inf)
        return torch.logaddexp(zero, torch.log1p(-self.gate) + poisson)

    @property
    def mean(self):
        return (1 - self.gate) * self.rate

    @property
    def variance(self):
        return (1 - self.gate) * self.rate * (1 + self.gate * self.rate)


class CompoundPoisson(Family):
    r"""The sum of a Poisson number of exponential jumps, :math:`z = \sum_{i=1}^N J_i`: an amount that may be 0.

    .. math:: \log E\,e^{i\omega z} = \lambda\Big(\frac1{1-i\omega b}-1\Big),
              \qquad N\sim\mathrm{Poisson}(\lambda),\ J_i\sim\mathrm{Exp}(\text{mean } b)

    It has no ``log_prob``: the law has an atom at 0 and a density elsewhere.

    Args:
        rate: the expected number of jumps :math:`\lambda`, positive.
        scale: the mean b of a jump, positive.

    Reference:
        `Lévy Processes and Infinitely Divisible Distributions
        <https://www.cambridge.org/9780521553025>`_, Sato, 1999.

    >>> CompoundPoisson(torch.tensor(2.0), torch.tensor(0.5)).mean.item()
    1.0
    """

    arg_constraints = {"rate": constraints.positive, "scale": constraints.positive}
    support = constraints.nonnegative

    def __init__(self, rate, scale, validate_args=None):
        super().__init__(rate, scale, validate_args=validate_args)

    def _draw(self, size):
        count = torch.poisson(self.rate.expand(size))
        return torch.where(count > 0, self.scale * torch._standard_gamma(count.clamp_min(1.0)), 0.0)

    @property
    def mean(self):
        return self.rate * self.scale

    @property
    def variance(self):
        return 2 * self.rate * self.scale**2


class DirichletMultinomial(Distribution):
    r"""Counts of n draws from categories whose probabilities have a Dirichlet law.

    .. math:: P(z) = \frac{n!\,\Gamma(s)}{\Gamma(n+s)}\prod_k\frac{\Gamma(z_k+\alpha_k)}{z_k!\,\Gamma(\alpha_k)},
              \qquad s = \sum_k\alpha_k

    Args:
        total_count: n, one int for the whole batch.
        concentration: :math:`\alpha`, positive, ``[*B, K]``.

    Reference:
        `On the compound multinomial distribution <https://doi.org/10.1093/biomet/49.1-2.65>`_, Mosimann, 1962.

    >>> DirichletMultinomial(3, torch.tensor([1.0, 2.0])).mean.tolist()
    [1.0, 2.0]
    """

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}
    has_rsample = False

    def __init__(self, total_count, concentration, validate_args=None):
        self.total_count = _check_count("DirichletMultinomial", total_count)
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.multinomial(self.total_count)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(DirichletMultinomial, _instance)
        new.total_count = self.total_count
        new.concentration = self.concentration.expand(*batch_shape, *self.event_shape)
        Distribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample_items(self, sample_shape=Size()):
        """Return the n draws, one-hot and exchangeable, ``[*sample_shape, *B, n, K]``."""
        with torch.no_grad():
            probs = sample(td.Dirichlet(self.concentration.detach(), validate_args=False), Size(sample_shape))
            draws = _draw(probs[..., None, :], Size([*probs.shape[:-1], self.total_count]))
            return (draws[..., None] == torch.arange(probs.shape[-1], device=probs.device)).to(probs.dtype)

    def sample(self, sample_shape=Size()):
        return self.sample_items(sample_shape).sum(-2)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        s, n = self.concentration.sum(-1), self.total_count
        each = torch.lgamma(value + self.concentration) - torch.lgamma(self.concentration) - torch.lgamma(value + 1)
        return math.lgamma(n + 1) + torch.lgamma(s) - torch.lgamma(n + s) + each.sum(-1)

    @property
    def mean(self):
        return self.total_count * self.concentration / self.concentration.sum(-1, keepdim=True)

    @property
    def variance(self):
        s = self.concentration.sum(-1, keepdim=True)
        share = self.concentration / s
        return self.total_count * share * (1 - share) * (self.total_count + s) / (1 + s)


class BetaBinomial(Distribution):
    r"""The number of successes in n trials whose probability of success has a Beta law.

    .. math:: P(z) = \binom nz\frac{B(z+\alpha,\,n-z+\beta)}{B(\alpha,\beta)}

    Args:
        total_count: n, one int for the whole batch.
        concentration1: :math:`\alpha`, positive.
        concentration0: :math:`\beta`, positive.

    Reference:
        `A probability distribution derived from the binomial distribution by regarding the probability of success as
        variable between the sets of trials <https://doi.org/10.1111/j.2517-6161.1948.tb00014.x>`_, Skellam, 1948.

    >>> BetaBinomial(4, torch.tensor(1.0), torch.tensor(3.0)).mean.item()
    1.0
    """

    arg_constraints = {"concentration1": constraints.positive, "concentration0": constraints.positive}
    has_rsample = False
    has_enumerate_support = True

    def __init__(self, total_count, concentration1, concentration0, validate_args=None):
        self.total_count = _check_count("BetaBinomial", total_count)
        self.concentration1, self.concentration0 = broadcast_all(concentration1, concentration0)
        super().__init__(self.concentration1.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(0, self.total_count)

    def expand(self, batch_shape, _instance=None):
        new = _expand(self, batch_shape, _instance, "concentration1", "concentration0")
        new.total_count = self.total_count
        return new

    def sample_items(self, sample_shape=Size()):
        """Return the n trials, 1 or 0 and exchangeable, ``[*sample_shape, *B, n]``."""
        with torch.no_grad():
            law = td.Beta(self.concentration1.detach(), self.concentration0.detach(), validate_args=False)
            probs = sample(law, Size(sample_shape))[..., None].expand(
                *self._extended_shape(sample_shape), self.total_count
            )
            return (torch.rand_like(probs) < probs).to(probs.dtype)

    def sample(self, sample_shape=Size()):
        return self.sample_items(sample_shape).sum(-1)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        a, b, n = self.concentration1, self.concentration0, self.total_count
        choices = math.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        pairs = torch.lgamma(value + a) + torch.lgamma(n - value + b) - torch.lgamma(n + a + b)
        return choices + pairs - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)

    def enumerate_support(self, expand=True):
        like = self.concentration1
        values = torch.arange(self.total_count + 1, dtype=like.dtype, device=like.device)
        values = values.reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    @property
    def mean(self):
        return self.total_count * self.concentration1 / (self.concentration1 + self.concentration0)

    @property
    def variance(self):
        a, b, n = self.concentration1, self.concentration0, self.total_count
        s = a + b
        return n * a * b * (n + s) / (s**2 * (1 + s))


class Cliques(Distribution):
    r"""Discrete variables in disjoint blocks: each block has a categorical law over its joint values.

    .. math:: P(z) = \prod_c \pi_c(z_c)

    Args:
        blocks: for each block the places of its variables; together they are a permutation of 0, ..., d - 1.
        logits: for each block ``[*B, K]``, K being the product of the sizes of its variables; the last variable of a
            block varies fastest.
        sizes: the number of values of each variable, which takes 0, 1, ...; an int serves all of them.

    Reference:
        `Generalized Stochastic Backpropagation <https://hal.science/hal-02968975v3>`_, Echraibi et al., 2020,
        theorem 2.

    >>> q = Cliques([[0, 2], [1]], [torch.zeros(4), torch.zeros(2)])
    >>> q.event_shape, q.log_prob(torch.tensor([1.0, 0.0, 1.0])).exp().item()
    (torch.Size([3]), 0.125)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        logits: Sequence[Tensor],
        sizes: int | Sequence[int] = 2,
        validate_args: bool | None = None,
    ) -> None:
        self.blocks = tuple(tuple(b) for b in blocks)
        places = [i for b in self.blocks for i in b]
        if sorted(places) != list(range(len(places))):
            raise ValueError(
                f"Cliques: found blocks {list(map(list, self.blocks))}, expected each of 0, ..., {len(places) - 1} in "
                "one block. Give a variable that stands alone a block of its own."
            )
        self.sizes = (sizes,) * len(places) if isinstance(sizes, int) else tuple(sizes)
        counts = [math.prod(self.sizes[i] for i in b) for b in self.blocks]
        found = [x.shape[-1] for x in logits]
        if found != counts:
            raise ValueError(f"Cliques: found {found} logits a block, expected {counts}: one a joint value of a block.")
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in logits))
        for c, x in enumerate(logits):
            law = td.Categorical(logits=x.expand(*batch, x.shape[-1]), validate_args=validate_args)
            setattr(self, f"clique{c}", law)
        super().__init__(batch, Size([len(places)]), validate_args=validate_args)

    @property
    def laws(self) -> list[td.Categorical]:
        """The categorical laws of the blocks."""
        return [getattr(self, f"clique{c}") for c in range(len(self.blocks))]

    def values(self, c: int) -> Tensor:
        """Return the joint values of a block, ``[K, |c|]``."""
        return _table([self.sizes[i] for i in self.blocks[c]], self.clique0.logits)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(Cliques, _instance)
        new.blocks, new.sizes = self.blocks, self.sizes
        for c, law in enumerate(self.laws):
            setattr(new, f"clique{c}", law.expand(Size(batch_shape)))
        Distribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def replace(self, z: Tensor, c: int, values: Tensor) -> Tensor:
        """Return z with the variables of a block replaced, ``values [..., |c|]``."""
        columns = list(z.unbind(-1))
        for i, place in enumerate(self.blocks[c]):
            columns[place] = values[..., i]
        return torch.stack(torch.broadcast_tensors(*columns), -1)

    def sample(self, sample_shape=Size()):
        with torch.no_grad():
            z = self.clique0.logits.new_zeros(self._extended_shape(sample_shape))
            for c, law in enumerate(self.laws):
                z = self.replace(z, c, self.values(c)[law.sample(Size(sample_shape))])
            return z

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        total = 0.0
        for c, (block, law) in enumerate(zip(self.blocks, self.laws, strict=True)):
            part = torch.stack([value[..., i] for i in block], -1)
            same = (part[..., None, :] == self.values(c)).all(-1)  # [..., K]
            total = total + torch.where(same, law.logits, 0.0).sum(-1)
        return total

    def enumerate_support(self, expand=True):
        values = _table(self.sizes, self.clique0.logits)
        values = values.reshape(-1, *(1 for _ in self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, -1) if expand else values

    @property
    def mean(self):
        z = self.clique0.logits.new_zeros(self._extended_shape())
        for c, law in enumerate(self.laws):
            z = self.replace(z, c, law.probs @ self.values(c))
        return z

    @property
    def variance(self):
        z = self.clique0.logits.new_zeros(self._extended_shape())
        for c, law in enumerate(self.laws):
            z = self.replace(z, c, law.probs @ self.values(c) ** 2)
        return z - self.mean**2


class Delta(Distribution):
    r"""All mass at one point, :math:`z = a`: stochastic backpropagation is then backpropagation.

    Args:
        loc: a.

    >>> Delta(torch.tensor(2.0)).rsample().item()
    2.0
    """

    arg_constraints = {"loc": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc, validate_args=None):
        (self.loc,) = broadcast_all(loc)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return _expand(self, batch_shape, _instance, "loc")

    def rsample(self, sample_shape=Size()):
        return self.loc.expand(self._extended_shape(sample_shape))

    @property
    def mean(self):
        return self.loc

    @property
    def variance(self):
        return torch.zeros_like(self.loc)
