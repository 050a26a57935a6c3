"""The programs in scripts/, for the tests of what they do."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script(name: str):
    """Import a program from scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
