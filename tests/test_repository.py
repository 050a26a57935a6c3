"""The top level: what stands there, and that its files agree with each other."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
TOP_LEVEL = [
    *("book", "gradlab", "scripts", "tests", "_config.yml", "_toc.yml"),
    *("environment.yml", "requirements.lock", "pyproject.toml", "Makefile"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
    *(".ci/run", ".github/workflows/test.yml", ".github/workflows/book.yml", ".pre-commit-config.yaml"),
]


def direct_dependencies() -> list[str]:
    """What `make book` and `make test` need; the libraries that are compared with pin themselves."""
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "bench"}
    return PROJECT["dependencies"] + [line for extra in extras.values() for line in extra]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_top_level_is_complete(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("line", direct_dependencies())
def test_the_lock_satisfies_the_project(line):
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    assert requirement.specifier.contains(LOCK[requirement.name]), f"{line}, locked {LOCK[requirement.name]}"


def test_the_conda_environment_has_the_locked_versions():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pins = dict(line.split("==") for line in conda[-1]["pip"] if "==" in line)
    names = {re.match(r"[\w.-]+", line)[0] for line in direct_dependencies()}
    assert pins == {name: LOCK[name] for name in names}
    assert f"python{PROJECT['requires-python']}" in conda


def test_the_libraries_to_compare_with_are_pinned():
    """All else that the benchmarks need is locked."""
    for line in PROJECT["optional-dependencies"]["bench"]:
        assert "==" in line or re.match(r"[\w-]+", line)[0] in LOCK


def test_the_lock_is_complete():
    """Whatever is installed and needed by what is locked is locked too."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    for name in LOCK:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # an environment of the user's own
        for requirement in map(Requirement, lines):
            known = re.sub(r"[-_.]+", "-", requirement.name).lower() in LOCK
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            assert known or not needed or name == "torch", f"{name} needs {requirement}"


def test_versions_agree():
    import gradlab

    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert getattr(gradlab, "__version__", version) == version


def test_the_core_needs_torch_and_numpy_only():
    assert {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]} == {"torch", "numpy"}


def test_the_readme_and_ci_name_the_same_commands():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("book", "test"):
        assert f"make {command} " in readme
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_readme_never_tells_to_install_the_other_gradlab():
    for line in (ROOT / "README.md").read_text().splitlines():
        assert "pip install gradlab" not in line or "never `pip install gradlab`" in line


def test_the_example_of_the_readme_runs():
    """The Python block of the README leaves a gradient behind."""
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].grad.shape == (8,)
    [line] = re.findall(r"^\+(estimator = .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    exec(line, names)
    names["estimator"](names["q"], names["f"]).backward()
