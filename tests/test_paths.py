"""The path of every family: dz/dtheta = -dF/dtheta / p against mpmath, its law, its gradients and its limits."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from scipy import stats
from torch import distributions as D

from gradlab.distributions import Logistic, TruncatedNormal
from gradlab.paths import Path, at, draw, has_path, implicit, path, register_path

F64 = torch.float64


# --------------------------------------------------------------- cdfs with as many digits as mpmath has


def truncated_cdf(z, loc, scale, low, high):
    a, x, b = ((t - loc) / scale for t in (low, z, high))
    sign = -1 if a > 0 else 1
    return (mp.ncdf(sign * x) - mp.ncdf(sign * a)) / (mp.ncdf(sign * b) - mp.ncdf(sign * a))


def student_cdf(z, df, loc, scale):
    x = (z - loc) / scale
    tail = mp.betainc(df / 2, mp.mpf(1) / 2, 0, df / (df + x * x), regularized=True) / 2
    return tail if x < 0 else 1 - tail


def von_mises_cdf(z, loc, kappa):
    """From the cut at -pi, where the samples of torch begin and all components of a mixture start."""
    sines = [mp.besseli(n, kappa) / n * (mp.sin(n * (z - loc)) + mp.sin(n * (mp.pi + loc))) for n in range(1, 40)]
    return (z + mp.pi + 2 * mp.fsum(sines) / mp.besseli(0, kappa)) / (2 * mp.pi)


def von_mises_unwrapped(z, loc, kappa):
    """From the cut at loc - pi, which moves with the sample: dz/dloc = 1."""
    return von_mises_cdf(z - loc, 0, kappa)


def gumbel_cdf(z, loc, scale):
    return mp.exp(-mp.exp(-(z - loc) / scale))


def lower_gamma(a, z):
    return mp.gammainc(a, 0, z, regularized=True)


FAMILIES = {  # constructor, cdf, parameters, points
    "Normal": (D.Normal, lambda z, m, s: mp.ncdf((z - m) / s), [(0.3, 1.7)], [-9.0, 0.1, 6.0]),
    "Laplace": (
        D.Laplace,
        lambda z, m, s: mp.exp((z - m) / s) / 2 if z < m else 1 - mp.exp((m - z) / s) / 2,
        [(0.3, 1.7)],
        [-20.0, 1.0],
    ),
    "Logistic": (Logistic, lambda z, m, s: 1 / (1 + mp.exp((m - z) / s)), [(0.3, 1.7)], [-20.0, 1.0, 30.0]),
    "Cauchy": (
        D.Cauchy,
        lambda z, m, s: mp.atan((z - m) / s) / mp.pi + mp.mpf(1) / 2,
        [(0.3, 1.7)],
        [-1e4, 0.5, 1e3],
    ),
    "Gumbel": (D.Gumbel, gumbel_cdf, [(0.3, 1.7)], [-3.0, 0.5, 20.0]),
    "Uniform": (D.Uniform, lambda z, a, b: (z - a) / (b - a), [(-1.0, 2.0)], [-0.9, 1.9]),
    "Exponential": (D.Exponential, lambda z, r: 1 - mp.exp(-r * z), [(2.0,)], [1e-3, 1.0, 5.0]),
    "LogNormal": (D.LogNormal, lambda z, m, s: mp.ncdf((mp.log(z) - m) / s), [(0.3, 0.7)], [0.1, 1.0, 9.0]),
    "HalfNormal": (D.HalfNormal, lambda z, s: 2 * mp.ncdf(z / s) - 1, [(1.7,)], [0.01, 3.0]),
    "Weibull": (D.Weibull, lambda z, s, k: 1 - mp.exp(-((z / s) ** k)), [(1.5, 0.7)], [0.01, 1.0, 8.0]),
    "Pareto": (D.Pareto, lambda z, s, a: 1 - (s / z) ** a, [(1.5, 2.5)], [1.6, 9.0]),
    "Kumaraswamy": (
        D.Kumaraswamy,
        lambda z, a, b: 1 - (1 - z**a) ** b,
        [(1.5, 2.5)],
        [0.01, 0.5, 0.9],
    ),
    "Gamma": (
        D.Gamma,
        lambda z, a, r: lower_gamma(a, r * z),
        [(0.05, 2.0), (0.8, 2.0), (12.0, 0.5)],
        [1e-9, 0.3, 1.1, 20.0],
    ),
    "Chi2": (D.Chi2, lambda z, df: lower_gamma(df / 2, z / 2), [(3.0,)], [0.01, 3.0, 30.0]),
    "InverseGamma": (
        D.InverseGamma,
        lambda z, a, r: 1 - lower_gamma(a, r / z),
        [(0.8, 2.0), (7.0, 2.0)],
        [0.2, 1.0, 9.0],
    ),
    "StudentT": (D.StudentT, student_cdf, [(0.7, 0.1, 1.0), (4.0, 0.3, 1.7)], [-30.0, 0.2, 1.5, 60.0]),
    "VonMises": (D.VonMises, von_mises_unwrapped, [(0.3, 0.2), (-0.5, 4.0)], [-2.5, -0.6, 0.5, 1.5]),
    "TruncatedNormal": (
        TruncatedNormal,
        truncated_cdf,
        [(0.3, 1.7, -1.0, 2.0), (0.0, 0.1, -1.9, 9.0)],
        [-0.99, 0.1, 1.9],
    ),
    "TruncatedNormal, far tail": (
        TruncatedNormal,
        truncated_cdf,
        [(0.0, 1.0, 30.0, 40.0)],
        [30.001, 30.05, 30.4],
    ),
}


def slopes(cdf, z, parameters):
    """-dF/dtheta / p for each parameter."""
    with mp.workdps(200 if cdf is truncated_cdf else 30):
        point = tuple(mp.mpf(t) for t in (z, *parameters))
        order = lambda i: tuple(int(i == j) for j in range(len(point)))  # noqa: E731
        density = mp.diff(cdf, point, order(0))
        return [float(-mp.diff(cdf, point, order(i)) / density) for i in range(1, len(point))]


def parameters_of(values, dtype=F64):
    return [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]


CASES = [(name, p, z) for name, (_, _, ps, zs) in FAMILIES.items() for p in ps for z in zs]


@pytest.mark.parametrize("dtype, bound", [(F64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name, values, z", CASES)
def test_path_at_a_point(name, values, z, dtype, bound):
    family, cdf = FAMILIES[name][:2]
    theta = parameters_of(values, dtype)
    point = torch.tensor(z, dtype=dtype)
    found = torch.autograd.grad(at(family(*theta, validate_args=False), point), theta)
    exact = slopes(cdf, point.item(), [t.item() for t in theta])
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == dtype
        assert f.item() == pytest.approx(e, rel=bound, abs=bound * 1e-3)


# ------------------------------------------------------------------------------------ laws of the draws


LAWS = {  # distribution, cdf of scipy
    "Gamma": (lambda: D.Gamma(t(0.4), t(2.0)), stats.gamma(0.4, scale=0.5)),
    "InverseGamma": (lambda: D.InverseGamma(t(1.4), t(2.0)), stats.invgamma(1.4, scale=2.0)),
    "Beta": (lambda: D.Beta(t(0.4), t(2.0)), stats.beta(0.4, 2.0)),
    "StudentT": (lambda: D.StudentT(t(1.5), t(0.5), t(2.0)), stats.t(1.5, 0.5, 2.0)),
    "Laplace": (lambda: D.Laplace(t(0.5), t(2.0)), stats.laplace(0.5, 2.0)),
    "Logistic": (lambda: Logistic(t(0.5), t(2.0)), stats.logistic(0.5, 2.0)),
    "Cauchy": (lambda: D.Cauchy(t(0.5), t(2.0)), stats.cauchy(0.5, 2.0)),
    "Gumbel": (lambda: D.Gumbel(t(0.5), t(2.0)), stats.gumbel_r(0.5, 2.0)),
    "Weibull": (lambda: D.Weibull(t(0.5), t(2.0)), stats.weibull_min(2.0, scale=0.5)),
    "TruncatedNormal": (
        lambda: TruncatedNormal(t(0.5), t(2.0), t(3.0), t(9.0)),
        stats.truncnorm(1.25, 4.25, 0.5, 2.0),
    ),
    "VonMises": (lambda: D.VonMises(t(0.0), t(2.0)), stats.vonmises(2.0)),
    "VonMises, flat": (lambda: D.VonMises(t(0.0), t(1e-3)), stats.vonmises(1e-3)),
    "VonMises, sharp": (lambda: D.VonMises(t(0.0), t(1e4)), stats.vonmises(1e4)),
}


def t(*values, dtype=F64):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=dtype)


@pytest.mark.parametrize("name", LAWS)
def test_law(name):
    make, law = LAWS[name]
    z = implicit(make(), (20_000,))
    assert stats.kstest(z.cpu().numpy(), law.cdf).pvalue > 1e-4


def mixtures():
    """Each with its weights, to be compared with the plain sum of the component cdfs."""
    logits = t(0.3, -0.5, 1.0).requires_grad_()
    locs, scales = t(-2.0, 0.5, 1.0).requires_grad_(), t(0.3, 1.0, 2.0).requires_grad_()
    weights = D.Categorical(logits=logits)
    return {
        "Normal": (D.MixtureSameFamily(weights, D.Normal(locs, scales)), [logits, locs, scales]),
        "Laplace": (D.MixtureSameFamily(weights, D.Laplace(locs, scales)), [logits, locs, scales]),
        "Logistic": (D.MixtureSameFamily(weights, Logistic(locs, scales)), [logits, locs, scales]),
        "Gumbel": (D.MixtureSameFamily(weights, D.Gumbel(locs, scales)), [logits, locs, scales]),
        "Cauchy": (D.MixtureSameFamily(weights, D.Cauchy(locs, scales)), [logits, locs, scales]),
        "LogNormal": (D.MixtureSameFamily(weights, D.LogNormal(locs, scales)), [logits, locs, scales]),
        "Gamma": (D.MixtureSameFamily(weights, D.Gamma(locs.exp(), scales)), [logits, locs, scales]),
        "StudentT": (
            D.MixtureSameFamily(weights, D.StudentT(scales + 1, locs, scales)),
            [logits, locs, scales],
        ),
        "VonMises": (D.MixtureSameFamily(weights, D.VonMises(locs, scales)), [logits, locs, scales]),
        "TruncatedNormal": (
            D.MixtureSameFamily(weights, TruncatedNormal(locs, scales, t(-3.0), t(4.0))),
            [logits, locs, scales],
        ),
    }


MP_CDFS = {  # of component k, given (locs, scales)
    "Gamma": lambda z, m, s: lower_gamma(mp.exp(m), s * z),
    "StudentT": lambda z, m, s: student_cdf(z, s + 1, m, s),
    "VonMises": von_mises_cdf,
    "TruncatedNormal": lambda z, m, s: truncated_cdf(z, m, s, mp.mpf(-3), mp.mpf(4)),
}


@pytest.mark.parametrize("name", mixtures())
@pytest.mark.parametrize("z", [0.02, 1.3, 2.9])
def test_mixture_at_a_point(name, z):
    q, theta = mixtures()[name]
    found = torch.cat(torch.autograd.grad(path(q, t(z)), theta)).tolist()
    component = MP_CDFS.get(name) or FAMILIES[name][1]

    def cdf(z, *p):
        weights = [mp.exp(l) for l in p[:3]]
        parts = [w * component(z, m, s) for w, m, s in zip(weights, p[3:6], p[6:], strict=True)]
        return mp.fsum(parts) / mp.fsum(weights)

    exact = slopes(cdf, z, torch.cat(theta).tolist())
    if name == "VonMises":  # on the circle the path of a component keeps its own cut
        component = von_mises_unwrapped
        exact[3:] = slopes(cdf, z, torch.cat(theta).tolist())[3:]
    assert found == pytest.approx(exact, rel=2e-7, abs=1e-10)


def vector_mixture(requires_grad=True):
    torch.manual_seed(3)
    theta = [torch.randn(3), torch.randn(3, 4), torch.rand(3, 4) + 0.5]
    theta = [p.to(F64).requires_grad_(requires_grad) for p in theta]
    component = D.Independent(D.Normal(theta[1], theta[2]), 1)
    return D.MixtureSameFamily(D.Categorical(logits=theta[0]), component), theta


def test_vector_mixture_is_the_distributional_transform():
    """u_i = F_i(z_i | z_<i) stays fixed: (du/dz) (dz/dtheta) + du/dtheta = 0, by autograd on u itself."""
    q, theta = vector_mixture()
    z = path(q, draw(q))

    def uniforms(z, logits, loc, scale):
        base = D.Normal(loc, scale)
        before = base.log_prob(z).cumsum(-1) - base.log_prob(z)
        return (torch.softmax(logits[:, None] + before, 0) * base.cdf(z)).sum(0)

    by_z, *by_theta = torch.autograd.functional.jacobian(uniforms, (z.detach(), *theta))
    for parameter, direct in zip(theta, by_theta, strict=True):
        dz = torch.stack([torch.autograd.grad(z[i], parameter, retain_graph=True)[0] for i in range(4)])
        total = torch.einsum("ij,j...->i...", by_z, dz) + direct
        assert total.abs().max() < 1e-12


def test_mixture_gradient_by_quadrature():
    """E[f'(z) dz/dtheta] = d/dtheta E[f(z)], both as integrals over z."""
    q, theta = mixtures()["Normal"]
    z = torch.linspace(-40, 40, 8001, dtype=F64)
    f = lambda z: torch.sin(z) + z**2 / 5  # noqa: E731
    density = q.log_prob(z).exp()
    exact = torch.autograd.grad(torch.trapezoid(f(z) * density, z), theta, retain_graph=True)
    moved = torch.trapezoid(f(path(q, z)) * density.detach(), z)
    for a, b in zip(torch.autograd.grad(moved, theta), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_mixture_tails_are_finite():
    """Where every density underflows, a gradient is finite and not NaN; a component with weight 0 is inert."""
    for dtype in (F64, torch.float32):
        logits = t(0.0, -1e5, -math.inf, dtype=dtype).requires_grad_()
        loc = t(-1.0, 1.0, 0.0, dtype=dtype).requires_grad_()
        q = D.MixtureSameFamily(
            D.Categorical(logits=logits, validate_args=False), D.Normal(loc, t(1.0, 1.0, 0.1, dtype=dtype))
        )
        z = torch.tensor([-1e4, -40.0, -9.0, 0.0, 9.0, 40.0, 1e4], dtype=dtype)
        found = torch.autograd.grad(path(q, z).sum(), [logits, loc])
        assert all(g.isfinite().all() for g in found)
        assert found[1][1:].tolist() == [0.0, 0.0]


def test_mixture_law():
    q, _ = mixtures()["Normal"]
    z = implicit(q, (20_000,)).detach()
    assert stats.kstest(z.cpu().numpy(), lambda x: q.cdf(t(*x)).detach().cpu().numpy()).pvalue > 1e-4


def test_vector_mixture_law():
    q, _ = vector_mixture(False)
    z = implicit(q, (40_000,))
    error = (z.mean(0) - q.mean) / (q.variance / len(z)).sqrt()
    assert error.abs().max() < 5


def test_probs_and_logits_agree():
    z, loc = t(-0.5, 0.3, 2.0), t(-1.0, 2.0)
    logits = t(0.3, -0.4).requires_grad_()
    by_logits = D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(loc, 1.0))
    by_probs = D.MixtureSameFamily(D.Categorical(probs=torch.softmax(logits, 0)), D.Normal(loc, 1.0))
    a, b = (torch.autograd.grad(path(q, z).sum(), logits)[0] for q in (by_logits, by_probs))
    assert torch.allclose(a, b, rtol=1e-12)


# ----------------------------------------------------------------------- contract of every distribution


def every():
    """One of each, with the leaves that must receive a gradient."""
    p = lambda *v: t(*v).requires_grad_()  # noqa: E731
    a, b, c = p(0.7, 1.5), p(2.0, 3.0), p(1.0, 0.5)
    scalar = {name: (family, parameters_of(ps[0])) for name, (family, _, ps, _) in FAMILIES.items()}
    made = {name: (family(*theta), theta) for name, (family, theta) in scalar.items()}
    tril = t([1.0, 0.0], [0.4, 0.8]).requires_grad_()
    return made | {
        "Beta": (D.Beta(a, b), [a, b]),
        "Dirichlet": (D.Dirichlet(a), [a]),
        "MultivariateNormal": (D.MultivariateNormal(a, scale_tril=tril), [a, tril]),
        "Independent": (D.Independent(D.Gamma(a, b), 1), [a, b]),
        "expanded": (D.VonMises(a, b).expand((3, 2)), [a, b]),
        "transformed": (D.TransformedDistribution(D.Gamma(a, b), [D.AffineTransform(c, 2.0)]), [a, b, c]),
        "mixture": mixtures()["Normal"],
        "vector mixture": vector_mixture(),
    }


EVERY = list(every())


@pytest.mark.parametrize("name", EVERY)
def test_contract(name):
    """Shape, support, a gradient for every parameter, and noise that determines the sample."""
    q, theta = every()[name]
    assert has_path(q)
    z = implicit(q, (5,))
    assert z.shape == (5, *q.batch_shape, *q.event_shape)
    assert q.support.check(z.detach()).all()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in torch.autograd.grad(z.sin().sum(), theta))
    noise = draw(q, (2,))
    assert not any(n.requires_grad for n in (noise if isinstance(noise, tuple) else (noise,)))
    assert torch.equal(path(q, noise), path(q, noise))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in EVERY
        if n
        not in (
            "Beta",
            "Dirichlet",
            "MultivariateNormal",
            "Independent",
            "mixture",
            "vector mixture",
            "TruncatedNormal, far tail",
        )
    ],
)
def test_path_through_the_sample(name):
    """The path of the draw and the path at the point that it reached have the same derivative."""
    q, theta = every()[name]
    z = implicit(q, (4,))
    a, b = (torch.autograd.grad(x.sum(), theta, retain_graph=True) for x in (z, at(q, z)))
    assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(a, b, strict=True))


SECOND_ORDER = ["Normal", "Laplace", "Logistic", "Cauchy", "Gumbel", "Uniform", "Exponential", "LogNormal",
                "HalfNormal", "Weibull", "Pareto", "Kumaraswamy", "MultivariateNormal"]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_second_derivative_is_right_or_raises(name):
    q, theta = every()[name]
    z = implicit(q)
    first = torch.autograd.grad((z**3).sum(), theta, create_graph=True)
    if name in SECOND_ORDER:
        noise = draw(q)
        rebuilt = lambda *p: (path(type(q)(*p), noise) ** 3).sum()  # noqa: E731
        if name != "MultivariateNormal":
            assert torch.autograd.gradgradcheck(rebuilt, theta)
        return
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sum(g.sum() for g in first), theta)


# ------------------------------------------------------------------------------------ float32 extremes


@pytest.mark.parametrize("shape", [1e-4, 1e-3, 1e-2, 1.0, 1e2, 1e4])
def test_float32_extremes(shape):
    a = torch.full((2000,), shape, dtype=torch.float32, requires_grad=True)
    one = torch.ones((), dtype=torch.float32)
    for q in (
        D.Gamma(a, one),
        D.Beta(a, a),
        D.InverseGamma(a, one),
        D.Dirichlet(a.view(-1, 4)),
        D.StudentT(a, one, one),
    ):
        if isinstance(q, D.StudentT) and shape < 1e-1:
            continue  # its quantiles exceed every floating-point number
        z = implicit(q)
        cost = z[:, 0] if isinstance(q, D.Dirichlet) else z.abs().log1p()
        (grad,) = torch.autograd.grad(cost.sum(), a)
        assert z.dtype == grad.dtype == torch.float32
        assert z.isfinite().all()
        assert grad.isfinite().all()
        assert q.support.check(z.detach()).all()


def test_small_dirichlet_rows_are_corners():
    """torch returns the uniform row for 70 % of the draws at 1e-4; the law has them at the corners."""
    z = implicit(D.Dirichlet(torch.full((5,), 1e-4, dtype=torch.float32)), (4000,))
    assert (z.max(-1).values > 0.999).float().mean() > 0.99
    share = (z > 0.999).float().mean(0)
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.16 / 4000)


def test_log_gamma_mean():
    """E log z = psi(alpha) at alpha = 1e-3, where the sample itself underflows."""
    log_z = draw(D.Gamma(t(1e-3), t(1.0)), (40_000,))
    error = (log_z.mean() - torch.digamma(t(1e-3))) / math.sqrt(torch.polygamma(1, t(1e-3)) / 40_000)
    assert abs(error) < 5


# ------------------------------------------------------------------------------ transforms and messages


@pytest.mark.parametrize("name", EVERY)
def test_func_grad(name):
    """torch.func.grad of a pure path is autograd's."""
    q, theta = every()[name]
    if name in ("expanded", "transformed", "Independent", "mixture", "vector mixture", "MultivariateNormal"):
        pytest.skip("built from several distributions")
    noise = draw(q, (3,))
    cost = lambda *p: path(type(q)(*p, validate_args=False), noise).sin().sum()  # noqa: E731
    found = torch.func.grad(cost, argnums=tuple(range(len(theta))))(*theta)
    for f, e in zip(found, torch.autograd.grad(cost(*theta), theta), strict=True):
        assert torch.allclose(f, e, rtol=1e-12)


VMAPPED = {
    "Normal": lambda a: D.Normal(a, 1.0, validate_args=False),
    "Gamma": lambda a: D.Gamma(a, a, validate_args=False),
    "Beta": lambda a: D.Beta(a, a, validate_args=False),
    "Dirichlet": lambda a: D.Dirichlet(torch.stack([a, a]), validate_args=False),
    "StudentT": lambda a: D.StudentT(a, a, a, validate_args=False),
    "VonMises": lambda a: D.VonMises(a, a, validate_args=False),
    "TruncatedNormal": lambda a: TruncatedNormal(a, a, a - 1, a + 1, validate_args=False),
    "mixture": lambda a: D.MixtureSameFamily(
        D.Categorical(logits=torch.stack([a, -a]), validate_args=False),
        D.Normal(torch.stack([a, -a]), 1.0, validate_args=False),
        validate_args=False,
    ),
    "vector mixture": lambda a: D.MixtureSameFamily(
        D.Categorical(logits=torch.stack([a, -a]), validate_args=False),
        D.Independent(D.Normal(torch.stack([a, -a])[:, None].expand(2, 3), 1.0, validate_args=False), 1),
        validate_args=False,
    ),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_of_grad(name):
    grad = torch.func.grad(lambda a: implicit(VMAPPED[name](a)).sin().sum())
    found = torch.vmap(grad, randomness="different")(t(1.5).expand(6).clone())
    assert found.isfinite().all()
    assert found.unique().numel() == 6


@pytest.mark.parametrize("q", [D.Poisson(1.0), D.Independent(D.Bernoulli(0.5).expand((2,)), 1)])
def test_unsupported(q):
    with pytest.raises(TypeError, match=r"no differentiable path for .*Expected one of .*Gamma.*register_path"):
        implicit(q)


def test_register():
    class Shifted(D.Distribution):
        arg_constraints = {}

    register_path(Shifted, lambda q, shape: torch.zeros(shape), lambda q, noise: noise + 1)
    assert implicit(Shifted(), (2,)).tolist() == [1.0, 1.0]
    assert Path(lambda q, shape: None, lambda q, noise: noise).supports(None)
