"""What a training run shows: a file of metrics and a bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Bar", "Journal"]

START = b'{"step": '  # of each line, a torn one too


class Journal:
    """Metrics, a JSON object a line."""

    def __init__(self, path: str | os.PathLike[str] | None, step: int) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.exists():
            self._rewind(self.path, step)

    def __enter__(self) -> Journal:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = None if self.path is None else open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"fit: found no way to write a line of the log ({error.strerror or error}), expected room for it; the "
                "last checkpoint is intact. Make room and run the same command again: it resumes from there",
                str(self.path),
            ) from error

    def _rewind(self, path: Path, step: int) -> None:
        """Remove a torn last line and what a killed run wrote after its checkpoint; a fresh run keeps the old file."""
        lines = path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        whole = lines[:-1] if lines and START.startswith(lines[-1][: len(START)]) else lines
        if None in steps[: len(whole)]:
            raise ValueError(
                f"fit: found line {steps.index(None) + 1} of {path} to be no metrics, expected one JSON object with a "
                "step a line. Give another path to log=, or repair the file."
            )
        if step == 0 and lines:
            os.replace(path, path.with_name(path.name + ".previous"))
            return
        kept = sum(len(line) for line, s in zip(lines, steps, strict=True) if s is not None and s <= step)
        os.truncate(path, kept)


def _step_of(line: bytes) -> int | None:
    """Return the step of a whole line, None for any other."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class Bar:
    """One line on a terminal, at most ten times a second."""

    def __init__(self, wanted: bool | None, goal: int | None) -> None:
        self.active = sys.stderr.isatty() if wanted is None else wanted
        self.goal, self.shown = goal, 0.0
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.active and self.shown:
            print(file=sys.stderr)

    def show(self, step: int, loss: float) -> None:
        if self.active and (now := time.monotonic()) - self.shown > 0.1:
            self.first = self.first or (step, now)
            print("\r" + self.text(step, loss, now).ljust(72), end="", file=sys.stderr, flush=True)
            self.shown = now

    def text(self, step: int, loss: float, now: float) -> str:
        done, began = self.first or (step, now)
        speed = (step - done) / (now - began) if now > began else 0.0
        parts = [f"step {step}", f"loss {loss:.4g}", f"{speed:.3g} steps/s"]
        if self.goal:
            full = min(20, 20 * step // self.goal)
            parts[0] = f"[{'#' * full}{'.' * (20 - full)}] step {step}/{self.goal}"
            if speed:
                left = round(max(0, self.goal - step) / speed)
                parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return "  ".join(parts)
