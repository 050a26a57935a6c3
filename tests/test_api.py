"""The public names, what importing them costs, and that the layers point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gradlab as gl

PACKAGE = Path(gl.__file__).parent

PUBLIC = [
    "ARM",
    "LAX",
    "PROBLEMS",
    "REBAR",
    "RELAX",
    "AdaptiveLocalExpectation",
    "AfterLinear",
    "AsymmetricLaplace",
    "Baseline",
    "BernoulliAfterLinear",
    "BernoulliLikelihood",
    "BetaBinomial",
    "Cliques",
    "Comparison",
    "CompoundPoisson",
    "Constant",
    "ControlVariate",
    "Cost",
    "Delta",
    "DirichletMultinomial",
    "DisARM",
    "DoubleControlVariate",
    "Enumerate",
    "Estimator",
    "Fitted",
    "GeneralizedReparameterization",
    "GumbelRao",
    "GumbelSoftmax",
    "ImplicitReparameterization",
    "InverseGaussian",
    "Learned",
    "LeaveOneOut",
    "LikelihoodAfterLinear",
    "LocalExpectation",
    "Logistic",
    "MeanNegativeBinomial",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "NormalInverseGaussian",
    "Path",
    "Problem",
    "Quadrature",
    "ReinMax",
    "RejectionReparameterization",
    "Reparameterization",
    "Row",
    "Sampler",
    "Schedule",
    "ScoreFunction",
    "Skellam",
    "StochasticBackprop",
    "StraightThrough",
    "SumAndSample",
    "SymmetricStable",
    "TaylorLocalExpectation",
    "Traits",
    "TruncatedNormal",
    "UnorderedSet",
    "VarianceGamma",
    "ZeroInflatedPoisson",
    "attach",
    "compare",
    "concrete_log_prob",
    "conditional_gumbels",
    "constant_temperature",
    "descend",
    "exponential_annealing",
    "fit",
    "gumbel",
    "gumbel_max",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_top_k",
    "has_path",
    "huber",
    "implicit",
    "inverse_cdf",
    "inverse_time_annealing",
    "magic_box",
    "problem",
    "register_path",
    "reinmax",
    "replicate",
    "rsample",
    "smooth_l1",
    "smooth_max",
    "soft_max_value",
    "softargmax",
    "softmax",
    "softplus",
    "st_argmax",
    "standardize",
    "stop_gradient",
    "straight_through",
    "zero",
    "IWAE",
    "VIMCO",
    "DReG",
    "LogLikelihood",
    "log_likelihood",
    "ExpectationMaximization",
    "NegativeELBO",
    "expectation_maximization",
]

LAYERS = [
    {"surrogate", "special"},
    {"distributions", "relaxations", "taylor", "densities"},
    {"estimator", "gumbel"},
    {"bernoulli"},
    {"paths", "flips", "families"},
    {"baselines", "samplers"},
    {"count_laws"},
    {"rules"},
    {
        "stochastic_backprop",
        "score",
        "pathwise",
        "generalized",
        "relaxed",
        "rebar",
        "coupled",
        "exact",
        "subsampled",
        "quadrature",
    },
    {"svi"},
    {"multisample"},
    {"diagnostics", "problems", "checkpoints", "metrics", "catalogue"},
    {"training"},
    {"experiments"},
    {"cli"},
]


def test_public_names() -> None:
    assert sorted(gl.__all__) == sorted(PUBLIC)
    assert all(hasattr(gl, name) for name in gl.__all__)


def test_every_module_exports_what_it_says() -> None:
    for name in {m for layer in LAYERS for m in layer} - {"cli"}:
        module = __import__(f"gradlab.{name}", fromlist=["x"])
        assert all(hasattr(module, n) for n in module.__all__), name


def imports(module: str) -> set[str]:
    """The gradlab modules that a module imports, at the top or inside a function."""
    files = (PACKAGE / module).glob("*.py") if (PACKAGE / module).is_dir() else [PACKAGE / f"{module}.py"]
    nodes = [n for file in files for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    found = {n.module for n in nodes if n.module}
    names = {f"gradlab.{a.name}" for n in nodes if n.module == "gradlab" for a in n.names}
    return {n.split(".")[1] for n in found | names if n.startswith("gradlab.")} - {module}


def test_imports_point_down_only() -> None:
    """A family never imports another, a foundation never a family."""
    for level, layer in enumerate(LAYERS):
        below = {m for lower in LAYERS[:level] for m in lower}
        for module in layer:
            assert imports(module) <= below, (module, imports(module) - below)


def test_every_module_has_a_layer() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "notebook"} | {"rules", "experiments"}
    assert modules == {m for layer in LAYERS for m in layer}


def test_import_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys, time, torch, numpy; before = set(sys.modules); start = time.process_time()\n"
        "from gradlab import *\n"
        "print(time.process_time() - start)\n"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - {'gradlab', 'torch', 'numpy'}\n"
        "print(sorted(extra - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", code]
    found = [subprocess.check_output(command, text=True, cwd="/").splitlines() for _ in range(2)]
    assert {extra for _, extra in found} == {"[]"}
    assert min(float(seconds) for seconds, _ in found) < 0.3  # on a busy machine, the quieter run
