"""Every derivative against mpmath, from the far lower to the far upper tail; the bound is the claim."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from scipy import stats

from gradlab import special

UNIFORMS = [1e-6, 1e-3, 0.05, 0.3, 0.45, 0.55, 0.75, 0.9, 0.97, 0.9999, 1 - 1e-6]
GAMMA = [1e-3, 1e-2, 0.1, 0.3, 0.8, 1.5, 4.0, 8.5, 20.0, 100.0, 1e3, 1e4]
KAPPA = [1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4]
NU = [0.3, 1.0, 2.0, 5.0, 29.0, 31.0, 1e3, 1e4]


def log_gamma_quantile(alpha, u):
    small = alpha < 0.05 and u < 0.9  # the quantile underflows: P = z^alpha / Gamma(alpha + 1)
    return (mp.log(u) + mp.loggamma(alpha + 1)) / alpha if small else mp.log(stats.gamma.ppf(u, alpha))


def gamma_reference(alpha, log_z):
    """sum_n z^n / (alpha)_{n+1} (psi(alpha + n + 1) - log z), the derivative of the power series of P."""
    alpha, log_z = mp.mpf(alpha), mp.mpf(log_z)
    z, digits = mp.exp(log_z), mp.mp.dps
    with mp.workdps(digits + int(0.9 * max(z - alpha, 0) + 10)):  # above the centre the terms cancel
        term, total, n = 1 / alpha, mp.mpf(0), 0
        psi = mp.digamma(alpha + 1)
        while n <= z or abs(term) > mp.mpf(10) ** (-digits) * abs(total) * 1e-3:
            total += term * (psi - log_z)
            n += 1
            term, psi = term * z / (alpha + n), psi + 1 / (alpha + n)
        return total


def gamma_difference(alpha, log_z):
    """-dP/dalpha / (z p) by differences of the regularised incomplete gamma function, with 50 digits."""
    with mp.workdps(50):
        alpha, z = mp.mpf(alpha), mp.exp(mp.mpf(log_z))
        slope = mp.diff(lambda a: mp.gammainc(a, 0, z, regularized=True), alpha, h=mp.mpf(10) ** -18 * alpha)
        return -slope * mp.gamma(alpha) * mp.exp(z) / z**alpha


def von_mises_tail(kappa, x):
    w = abs(mp.mpf(x))
    fallen = mp.cos(w) - 80 / mp.mpf(kappa)
    end = mp.pi if fallen < -1 else mp.acos(fallen)
    mass = mp.quad(lambda t: mp.exp(kappa * (mp.cos(t) - 1)), mp.linspace(w, end, 5))
    return mass / (2 * mp.pi * mp.besseli(0, kappa) * mp.exp(-mp.mpf(kappa)))


def von_mises_reference(kappa, x):
    kappa, w = mp.mpf(kappa), abs(mp.mpf(x))
    mean = mp.besseli(1, kappa) / mp.besseli(0, kappa)

    def integrand(t):
        return (mp.cos(t) - mean) * mp.exp(kappa * (mp.cos(t) - mp.cos(w)))

    if mp.cos(w) > mean:
        return -mp.sign(x) * mp.quad(integrand, [0, w])
    fallen = mp.cos(w) - 45 / kappa
    return mp.sign(x) * mp.quad(integrand, mp.linspace(w, mp.pi if fallen < -1 else mp.acos(fallen), 5))


def student_reference(nu, x):
    """The derivative of the hypergeometric form of the cdf, by differences with 50 digits."""
    with mp.workdps(50):
        nu, w = mp.mpf(nu), abs(mp.mpf(x))
        slope = mp.diff(lambda v: student_tail(v, w), nu, h=mp.mpf(10) ** -18 * nu)
        return mp.sign(x) * slope / mp.diff(lambda t: -student_tail(nu, t), w, h=mp.mpf(10) ** -18 * w)


def student_tail(nu, w):
    return mp.betainc(nu / 2, mp.mpf(1) / 2, 0, nu / (nu + w * w), regularized=True) / 2


def student_tail_abs(nu, x):
    return student_tail(mp.mpf(nu), mp.mpf(x))


def worst(function, reference, points, dtype=torch.float64):
    """Max relative error, where the reference is taken at the point rounded to ``dtype``."""
    a, x = (torch.tensor([float(p[i]) for p in points], dtype=dtype) for i in (0, 1))
    with mp.workdps(40):
        exact = [reference(*pair) for pair in zip(a.tolist(), x.tolist(), strict=True)]
    found = function(a, x).tolist()
    return max(abs(f / e - 1) for f, e in zip(found, exact, strict=True))


def grid(parameters, quantile):
    return [(p, quantile(p, u)) for p in parameters for u in UNIFORMS]


CASES = {  # function, reference, points, bound in float64, bound in float32
    "gamma": (special.log_gamma_grad, gamma_reference, grid(GAMMA, log_gamma_quantile), 2e-9, 2e-7),
    "von Mises": (
        special.von_mises_grad,
        von_mises_reference,
        grid(KAPPA, lambda k, u: stats.vonmises.ppf(u, k)),
        2e-8,
        2e-7,
    ),
    "Student": (special.student_t_grad, student_reference, grid(NU, lambda n, u: stats.t.ppf(u, n)), 1e-7, 2e-7),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_derivative(name, dtype):
    function, reference, points, double, single = CASES[name]
    points = points if dtype == torch.float64 else points[::5]
    error = worst(function, reference, points, dtype)
    assert error < (double if dtype == torch.float64 else single), f"{float(error):.1e}"


VALUES = {  # function, reference, points, bound
    "gamma, by differences": (special.log_gamma_grad, gamma_difference, CASES["gamma"][2][3:77:9], 2e-9),
    "von Mises cdf": (
        lambda k, x: special.von_mises_cdf(k, -x.abs()),
        von_mises_tail,
        CASES["von Mises"][2][::2],
        1e-9,
    ),
    "Student tail": (special.student_t_tail, student_tail_abs, CASES["Student"][2][::2], 5e-8),
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name):
    function, reference, points, bound = VALUES[name]
    error = worst(function, reference, points)
    assert error < bound, f"{float(error):.1e}"


def test_gamma_underflow():
    """Where z = exp(-1e5) is zero in floating point, the first term of the series is everything."""
    alpha = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    found = special.log_gamma_grad(alpha, torch.tensor(-1e5, dtype=torch.float64))
    assert torch.allclose(found, (torch.digamma(alpha + 1) + 1e5) / alpha, rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [special.log_gamma_grad, special.von_mises_grad, special.student_t_grad])
def test_blocks_dtype_vmap(function):
    """The result does not depend on the layout, follows the dtype, and has no graph."""
    a = torch.linspace(0.5, 20, 12000, dtype=torch.float32).requires_grad_()
    x = torch.linspace(-2, 3, 12000, dtype=torch.float32)
    whole = function(a, x)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert torch.allclose(whole, torch.vmap(function)(a, x), rtol=1e-6)
    assert torch.allclose(whole[:100], function(a[:100], x[:100]), rtol=1e-6)
    assert function(a[:3, None], x[:5]).shape == (3, 5)


def test_symmetry():
    x = torch.linspace(0, 3, 50, dtype=torch.float64)
    for function in (special.von_mises_grad, special.student_t_grad):
        assert torch.equal(function(torch.tensor(2.5), x), -function(torch.tensor(2.5), -x))
    assert torch.allclose(special.von_mises_cdf(torch.tensor(2.5), -x), 1 - special.von_mises_cdf(torch.tensor(2.5), x))


INTERVALS = [(-1, 2), (0.5, 0.500001), (5, 6), (30, 31), (-40, -39.9), (20, 20.001), (-1, 40)]


@pytest.mark.parametrize("a, b", INTERVALS)
def test_log_diff_ndtr(a, b):
    with mp.workdps(60):
        a, b = mp.mpf(float(a)), mp.mpf(float(b))
        sign = -1 if a > 0 else 1
        exact = mp.log(abs(mp.ncdf(sign * b) - mp.ncdf(sign * a)))
    found = special.log_diff_ndtr(*(torch.tensor(float(t), dtype=torch.float64) for t in (a, b)))
    assert abs(found.item() - float(exact)) < 1e-9 + 4e-16 * abs(float(exact))


def test_ndtri_exp():
    log_p = -torch.logspace(-14, 6, 200, dtype=torch.float64)
    x = special.ndtri_exp(log_p)
    lower = log_p < -0.1
    assert torch.allclose(torch.special.log_ndtr(x[lower]), log_p[lower], rtol=1e-13, atol=0)
    assert torch.allclose(special.ndtr(-x[~lower]), -torch.expm1(log_p[~lower]), rtol=1e-11, atol=0)
