"""Is the guard awake? Break one line of the package, and require that the chapter which teaches it turns red.

python scripts/canary.py [chapter ...]    all chapters, or those named as 02
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Canary(NamedTuple):
    """One line to break; ``old`` stands exactly once in ``file``."""

    chapter: str
    file: str
    old: str
    new: str


CANARIES = [
    Canary(
        "01", "exact.py", "(q.log_prob(noise).exp() * f(noise)).sum(0)", "(q.log_prob(noise).exp() * f(noise)).mean(0)"
    ),
    Canary(
        "02",
        "score.py",
        "weighted(unchecked_log_prob(q, noise), cost,",
        "weighted(0.9 * unchecked_log_prob(q, noise), cost,",
    ),
    Canary("03", "baselines.py", "(cost.sum(0) - cost) / (len(cost) - 1)", "(cost.sum(0) + 0 * cost) / len(cost)"),
    Canary("04", "pathwise.py", "return f(noise).mean(0)", "return f(0.9 * noise + 0.1 * noise.detach()).mean(0)"),
    Canary("05", "paths.py", "special.log_gamma_grad(alpha, noise)", "0.98 * special.log_gamma_grad(alpha, noise)"),
    Canary(
        "07",
        "relaxations.py",
        "_positive(temperature) * torch.logsumexp(x / temperature, -1)",
        "_positive(temperature) * torch.logsumexp(x, -1)",
    ),
    Canary("08", "gumbel.py", "math.lgamma(size) + (size - 1) * tau.log()", "math.lgamma(size) + size * tau.log()"),
    Canary(
        "09",
        "samplers.py",
        "middle = (hard + rule.soften(logits.detach(), temperature)) / 2",
        "middle = 0.49 * hard + 0.51 * rule.soften(logits.detach(), temperature)",
    ),
    Canary(
        "10",
        "rebar.py",
        "logits + rule.given(logits, hard, noise.fresh)",
        "logits + rule.given(logits.detach(), hard, noise.fresh)",
    ),
    Canary("11", "flips.py", "- cost.detach()[..., None, None]", "- 0.9 * cost.detach()[..., None, None]"),
    Canary(
        "12",
        "stochastic_backprop.py",
        "derivative / float(math.factorial(n)))",
        "derivative / float(math.factorial(n - 1)))",
    ),
    Canary(
        "14",
        "rules/counts.py",
        "return [Shift(torch.ones_like(z), z + 1)]",
        "return [Shift(torch.ones_like(z), z + 2)]",
    ),
    Canary(
        "15",
        "coupled.py",
        "return Weak(1 / (p.scale * math.sqrt(math.tau)), p.loc + step, p.loc - step)",
        "return Weak(1 / (p.scale * math.sqrt(math.pi)), p.loc + step, p.loc - step)",
    ),
    Canary(
        "13",
        "rules/continuous.py",
        "weight = 2 / (p.scale * jump**2)",
        "weight = 1.9 / (p.scale * jump**2)",
    ),
    Canary("06", "generalized.py", "unchecked_log_prob(q, z) + log_det", "unchecked_log_prob(q, z)"),
    Canary("19", "multisample.py", "(-square * slope).movedim(0, -1)", "(-0.98 * square * slope).movedim(0, -1)"),
    Canary(
        "17",
        "svi.py",
        "self.kl_weight * (log_q(q, z) - log_prior(prior, z))",
        "self.kl_weight * (0.9 * log_q(q, z) - log_prior(prior, z))",
    ),
    Canary(
        "20",
        "exact.py",
        "return attach(cost.mean(0), probabilities(q), table.mean(0))",
        "return attach(cost.mean(0), probabilities(q), 0.9 * table.mean(0))",
    ),
    Canary(
        "16",
        "svi.py",
        'log_q = log_density if self.kl == "total" or has_moving_support(q) else path_log_density',
        "log_q = log_density",
    ),
    Canary("18", "svi.py", "return loss + self.kl_weight * kl", "return loss + 0.9 * self.kl_weight * kl"),
    Canary("21", "rules/registry.py", "omega = -1j * s.to(", "omega = 1j * s.to("),
    Canary("22", "training.py", "sampler.set_epoch(self.epoch)", "sampler.set_epoch(0)"),
]


def broken_copy(canary: Canary, folder: Path) -> None:
    """Copy the package and the book, and break the line."""
    for name in ("gradlab", "book", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_extra"))
        else:
            shutil.copy(source, folder)
    path = folder / "gradlab" / canary.file
    text = path.read_text(encoding="utf-8")
    if text.count(canary.old) != 1:
        raise ValueError(f"gradlab/{canary.file}: found {text.count(canary.old)} times, expected once: {canary.old}")
    path.write_text(text.replace(canary.old, canary.new), encoding="utf-8")


def notices(canary: Canary) -> tuple[bool, str]:
    """Does the chapter's comparison fail, in at least one cell, with a package that still imports?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broken_copy(canary, folder)
        environment = os.environ | {"PYTHONPATH": name, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        python = [sys.executable, "-c", "import gradlab; print(gradlab.__file__)"]
        found = subprocess.run(python, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        if not found.startswith(name):
            raise RuntimeError("the broken copy is not the package that is imported")
        [chapter] = (folder / "book").glob(f"{canary.chapter}_*.ipynb")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--nbval",
            "--nbval-current-env",
        ]
        command += ["--nbval-sanitize-with", "tests/nbval.cfg", str(chapter)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done.returncode == 1, done.stdout[-2000:]


def main() -> int:
    """Run the command line."""
    wanted = [canary for canary in CANARIES if not sys.argv[1:] or canary.chapter in sys.argv[1:]]
    missed = 0
    for canary in wanted:
        noticed, _ = notices(canary)
        missed += not noticed
        print(
            f"{canary.chapter} {canary.file}: {'noticed' if noticed else 'NOT NOTICED'}: {canary.old} -> {canary.new}"
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
