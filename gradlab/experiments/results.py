"""Results as JSON files that say how they came about, and that are never half written."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradlab

__all__ = ["provenance", "read", "rounded", "write"]


def provenance(command: str, device: torch.device | str) -> dict[str, Any]:
    """Return what a number depends on beside its settings: versions, device, commit, and the command that made it."""
    return {
        "command": command,
        "versions": {"gradlab": gradlab.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def commit() -> str | None:
    """Return the commit of the package's source, with a + if it was changed since; None outside a repository."""
    folder = Path(gradlab.__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + "+" * bool(changed.returncode)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside the file and rename it; a list of numbers is a line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"found no way to write the results ({error.strerror})", str(path)) from error


def read(path: Path) -> dict[str, Any] | None:
    """Return the content of a file of results, None if there is none yet.

    Raises:
        ValueError: the file is no JSON object.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"found {path} to be no JSON ({error}), expected results. Move it away.") from error
    if not isinstance(found, dict):
        raise ValueError(f"found {path} to hold {type(found).__name__}, expected results. Move it away.")
    return found


def rounded(x: Tensor, digits: int = 5) -> Any:
    """Return numbers of so many digits, in lists; None for what is not finite.

    >>> rounded(torch.tensor([1.23456789, float("nan")]))
    [1.2346, None]
    """

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None

    return short(x.tolist())
