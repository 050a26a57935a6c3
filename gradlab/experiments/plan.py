"""How much of an experiment is run and where, and the random numbers that it has for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Job", "Plan", "seeded"]

POINTS = 20  # checkpoints after the first


@dataclass(frozen=True)
class Plan:
    """What may change from one call to the next; the rest of an experiment is fixed.

    >>> Plan(runs=5, steps=4, replicates=100).checkpoints
    [0, 1, 2, 3, 4]
    """

    runs: int
    steps: int
    """of the optimizer"""
    replicates: int
    """gradients for one variance"""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("steps", 0), ("replicates", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected {least} or more.")
        try:
            torch.empty(0, dtype=torch.float64, device=self.device)
        except (AssertionError, RuntimeError, TypeError) as error:  # not built for it, not there, no float64
            why = str(error).splitlines()[0]
            raise ValueError(f"device: found {self.device!r}, expected one for float64 here ({why})") from error

    @property
    def checkpoints(self) -> list[int]:
        """Return the steps at which is measured: the first, the last, and some between."""
        return sorted({round(self.steps * i / POINTS) for i in range(POINTS + 1)})


class Job(NamedTuple):
    """One method of an experiment: what it finds is kept under its name."""

    name: str
    seed: int
    run: Callable[[], Any]


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Draw from a seed within, and leave the generators as they were.

    >>> before = torch.get_rng_state()
    >>> with seeded(0, "cpu"):
    ...     x = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every device
        for gpu in devices:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
