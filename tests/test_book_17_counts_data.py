"""What chapter 17 claims and no test of the package keeps: exact sums and quadrature on small tables."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch import Tensor
from torch import distributions as D

import gradlab as gl
from gradlab.experiments import data
from gradlab.experiments.files import state

NOTEBOOK = Path(__file__).resolve().parent.parent / "book" / "17_count_data.ipynb"
X = torch.tensor([4.0, 3.0, 5.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # a small table with a change
T = len(X)
EARLY = torch.ones(T - 1, T, dtype=torch.float64).tril()
GRID = torch.linspace(0, 40, 4001, dtype=torch.float64)


def log_rate_out(counts: Tensor, exposure: Tensor) -> Tensor:
    return torch.lgamma(1 + counts) - (1 + counts) * torch.log1p(exposure)


def by_quadrature(x: Tensor, e: Tensor) -> Tensor:
    """log p(x) for one rate with a Gamma(1, 1) law and exposures e."""
    log_p = D.Poisson(GRID[1:, None] * e).log_prob(x).sum(-1) - GRID[1:]
    at_0 = (x == 0).all().double()
    return torch.trapezoid(torch.cat([at_0[None], log_p.exp()]), GRID).log()


def test_the_typed_table_is_the_file():
    """112 years, 191 disasters; and the file of the registry where there is one."""
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    typed = "".join(re.findall(r'^ +"(\d{28})"$', source, re.M))
    assert len(typed) == 112
    assert sum(map(int, typed)) == 191
    if state("counts/coal_disasters.csv") != "ok":
        pytest.skip("the table is not in the data folder")
    assert data.counts("coal_disasters")["disasters"].tolist() == [float(digit) for digit in typed]


def test_change_point():
    """The lemma, the evidence, and the gap of the mean-field optimum as a divergence."""
    n, c = EARLY.sum(1), EARLY @ X
    parts = [
        by_quadrature(X[: s + 1], torch.ones(s + 1)) + by_quadrature(X[s + 1 :], torch.ones(T - s - 1))
        for s in range(T - 1)
    ]
    log_joint = log_rate_out(c, n) + log_rate_out(X.sum() - c, T - n) - torch.lgamma(X + 1).sum()
    torch.testing.assert_close(log_joint, torch.stack(parts), rtol=0, atol=1e-3)

    counts, years = torch.stack([c, X.sum() - c]), torch.stack([n, T - n])
    pi = torch.full((T - 1,), 1 / (T - 1))
    values = []
    for _ in range(200):
        a, b = 1 + counts @ pi, 1 + years @ pi
        log_r = torch.digamma(a) - b.log()
        pi = (log_r @ counts - (a / b) @ years).softmax(0)
        a, b = 1 + counts @ pi, 1 + years @ pi
        fit = pi @ ((torch.digamma(a) - b.log()) @ counts - (a / b) @ years) - torch.lgamma(X + 1).sum()
        kl = D.kl_divergence(D.Gamma(a, b), D.Gamma(torch.ones(2), torch.ones(2))).sum()
        values.append(fit - kl + torch.special.entr(pi).sum() - math.log(T - 1))
    assert (torch.stack(values).diff() > -1e-10).all()  # it never falls
    evidence = log_joint.logsumexp(0) - math.log(T - 1)
    rates = D.kl_divergence(D.Gamma(a[:, None], b[:, None]), D.Gamma(1 + counts, 1 + years)).sum(0)
    kl = pi @ (pi.log() - log_joint.log_softmax(0) + rates)
    torch.testing.assert_close(evidence - values[-1], kl, rtol=0, atol=1e-8)
    assert kl > 1e-3


def year_loss(logits: Tensor, estimator: gl.Estimator, kl: str) -> Tensor:
    guide = D.OneHotCategorical(logits=logits)
    prior = D.OneHotCategorical(torch.ones(T - 1))
    loss = gl.NegativeELBO(
        lambda x: guide, prior, lambda s: D.Independent(D.Poisson(1 + 2 * (s @ EARLY)), 1), estimator, kl
    )
    return loss(X.expand(*logits.shape[:-1], T))


def test_bias():
    """At the posterior: no variance with the KL in the cost, some with the exact KL, a bias when relaxed."""
    torch.manual_seed(0)
    best = D.Poisson(1 + 2 * EARLY).log_prob(X).sum(1)
    scores = gl.ScoreFunction(5, gl.LeaveOneOut())

    def slopes(estimator: gl.Estimator, kl: str) -> Tensor:
        return gl.replicate(lambda logits: year_loss(logits, estimator, kl), best, 2000)

    assert slopes(scores, "sample").abs().max() < 1e-12
    noisy = slopes(scores, "analytic")
    assert noisy.std(0).max() > 1e-2
    assert (noisy.mean(0).abs() < 4 * noisy.std(0) / len(noisy) ** 0.5).all()
    soft = slopes(gl.GumbelSoftmax(5, temperature=0.5), "analytic")
    assert (soft.mean(0).abs() > 6 * soft.std(0) / len(soft) ** 0.5).any()


def test_visits():
    """The reference finds a known evidence; a Poisson model cannot have the zeros of a negative binomial."""
    torch.manual_seed(0)
    y, u = torch.tensor([1.0, -0.5, 2.0, 0.3]), torch.tensor([1.0, 0.5, -1.0, 2.0])
    exact = D.MultivariateNormal(torch.zeros(4), torch.eye(4) + 4 * torch.outer(u, u)).log_prob(y)
    variance = 1 / (u @ u + 1 / 4)
    proposal = D.Normal(variance * (u @ y), (1.2 * variance) ** 0.5)
    z = proposal.sample((4000,))
    log_w = D.Normal(z[:, None] * u, 1.0).log_prob(y).sum(-1) + D.Normal(0.0, 2.0).log_prob(z) - proposal.log_prob(z)
    error = (log_w - exact).exp().std() / 4000**0.5
    assert ((log_w - exact).exp().mean() - 1).abs() < 4 * error
    assert error < 0.01
    m, zero = torch.tensor(2.87), torch.tensor(0.0)
    assert D.Poisson(m).log_prob(zero).exp() < 0.06
    assert gl.MeanNegativeBinomial(m, torch.tensor(1.33)).log_prob(zero).exp() > 0.25


def small_club() -> tuple[Tensor, Tensor]:
    A = torch.zeros(6, 6)
    for i, j, count in [(0, 1, 3), (0, 2, 2), (1, 2, 2), (3, 4, 3), (4, 5, 2), (3, 5, 1), (2, 3, 1)]:
        A[i, j] = A[j, i] = count
    k = A.sum(1)
    return A, torch.outer(k, k) / k.sum() * (1 - torch.eye(6))


def log_blocks(A: Tensor, E: Tensor, z: Tensor) -> Tensor:
    def sums(M: Tensor) -> Tensor:
        ones = ((z @ M) * z).sum(-1) / 2
        mixed = z @ M.sum(1) - 2 * ones
        return torch.stack([ones, mixed, M.sum() / 2 - ones - mixed])

    return log_rate_out(sums(A), sums(E)).sum(0)


def test_ball():
    """The block evidence by quadrature; a ball is half of the sum, its shells are the rest."""
    A, E = small_club()
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    i, j = torch.triu_indices(6, 6, 1)
    constant = (D.Poisson(E[i, j]).log_prob(A[i, j]) + E[i, j]).sum()
    z = values[7]
    kind = z[i] + z[j]
    exact = sum(by_quadrature(A[i, j][kind == g], E[i, j][kind == g]) for g in range(3))
    torch.testing.assert_close(log_blocks(A, E, z) + constant, exact, rtol=0, atol=1e-3)

    log_p = log_blocks(A, E, values)
    torch.testing.assert_close(log_p, log_blocks(A, E, 1 - values), rtol=0, atol=1e-10)
    mode = values[log_p.argmax()]
    assert mode.tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    flips = (values - mode).abs().sum(1)
    near = log_p[flips < 3].logsumexp(0) + math.log(2)
    assert near <= log_p.logsumexp(0)
    assert near > log_p.logsumexp(0) - log_p[flips == 3].logsumexp(0).exp() / log_p.logsumexp(0).exp() - 1e-2


def test_symmetric():
    """Fair bits: the gradients of a draw and of its mirror image cancel, and neither is zero."""
    A, E = small_club()
    torch.manual_seed(0)
    z = D.Bernoulli(torch.full((6,), 0.5)).sample()
    logits = torch.zeros(2, 6, requires_grad=True)
    q = D.Independent(D.Bernoulli(logits=logits), 1)
    loss = gl.LocalExpectation().estimate(q, lambda z: -log_blocks(A, E, z), torch.stack([z, 1 - z])[None])
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope.sum(0).abs().max() < 1e-10
    assert slope[0].abs().max() > 1e-2


def test_diagonal():
    """The best diagonal guide of a Gaussian has the variances 1 / precision."""
    torch.manual_seed(0)
    root = torch.randn(3, 3)
    precision = root @ root.T + torch.eye(3)
    posterior = D.MultivariateNormal(torch.zeros(3), precision_matrix=precision)

    def gap(log_v: Tensor) -> Tensor:
        return D.kl_divergence(D.MultivariateNormal(torch.zeros(3), torch.diag(log_v.exp())), posterior)

    best = -precision.diag().log()
    assert torch.func.grad(gap)(best).abs().max() < 1e-10
    loss = (precision.diag().log().sum() - torch.logdet(precision)) / 2
    torch.testing.assert_close(gap(best), loss)
    assert (best.exp() <= posterior.variance + 1e-12).all()


def test_frogs():
    """After one visit the unseen are Poisson; after three their variance is below their mean."""
    k = torch.arange(80.0)

    def posterior(seen: tuple[float, ...]) -> Tensor:
        N = max(seen) + k
        binomial = D.Binomial(N, torch.tensor(0.5), validate_args=False)
        return (D.Poisson(10.0).log_prob(N) + sum(binomial.log_prob(torch.tensor(s)) for s in seen)).softmax(0)

    torch.testing.assert_close(posterior((5.0,)), D.Poisson(5.0).log_prob(k).exp(), rtol=0, atol=1e-10)
    three = posterior((5.0, 3.0, 6.0))
    mean = three @ k
    assert three @ (k - mean) ** 2 < mean - 0.1
