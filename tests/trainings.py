"""A small training run with everything that has a state, for test_training.py; also run as a program and killed.

python tests/trainings.py FOLDER step    kill itself (SIGKILL) after step 17
python tests/trainings.py FOLDER write   kill itself in the middle of writing the second checkpoint
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torch.utils.data import DataLoader, Dataset

import gradlab as gl

BATCHES = 6  # an epoch; 26 steps end in the middle of the fifth


class Noisy(Dataset):
    """Images that every random number generator has a hand in."""

    def __init__(self) -> None:
        self.images = torch.rand(8 * BATCHES, 5, generator=torch.Generator().manual_seed(0))
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, float]:
        x = torch.bernoulli(self.images[i], generator=self.generator)
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
        return x, torch.tensor(0.01 * noise)


class Objective(nn.Module):
    """Dropout, batch norm, a moving average, a learned baseline and a relaxation with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Dropout(0.3))
        self.decoder = nn.Linear(4, 5)
        self.average = gl.ScoreFunction(2, gl.MovingAverage())
        self.learned = gl.ScoreFunction(2, gl.Learned(nn.Linear(5, 1)))
        self.relaxed = gl.GumbelSoftmax(1, temperature=1.0)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        q = Independent(Bernoulli(logits=self.encoder(x)), 1)

        def cost(z: Tensor) -> Tensor:
            return ((self.decoder(z) - x) ** 2).sum(-1) + noise

        return self.average(q, cost) + self.learned(q, cost, context=x) + self.relaxed(q, cost)


def build(shuffle: str = "generator", workers: int = 0) -> dict:
    """Return the arguments of fit, all of them fresh."""
    torch.manual_seed(2)
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    loss = Objective()
    generator = torch.Generator().manual_seed(5) if shuffle == "generator" else None
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9, threshold=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    temperature = {"relaxed.temperature": gl.exponential_annealing(1.0, 0.05, 0.2)}
    return {
        "loss": loss,
        "loader": DataLoader(Noisy(), 8, shuffle=shuffle != "none", generator=generator, num_workers=workers),
        "optimizer": optimizer,
        "schedules": [plateau, cosine, temperature],
        "log_every": 4,
        "every": 5,
        "clip": 5.0,
        "progress": False,
    }


def files(folder: Path) -> dict:
    """Return the arguments of fit that name files."""
    return {"checkpoint": folder / "run.pt", "log": folder / "log.jsonl"}


def kill(step: int, values: Tensor) -> None:
    """Die at once, without a word, in the middle of an epoch and between two checkpoints."""
    if step == 17:
        os.kill(os.getpid(), signal.SIGKILL)


def before_call(n: int, action: Callable[[], object], function: Callable) -> Callable:
    """Return the function, with an action before its n-th call."""
    calls = iter(range(1, 1000))

    def wrapped(*args):
        if next(calls) == n:
            action()
        return function(*args)

    return wrapped


def main(folder: str, how: str) -> None:
    """Run the command line."""
    torch.set_default_dtype(torch.float64)  # as in the suite
    if how == "write":  # each checkpoint syncs its file and its folder
        os.fsync = before_call(3, lambda: os.kill(os.getpid(), signal.SIGKILL), os.fsync)
    gl.fit(**build(), **files(Path(folder)), steps=26, on_step=kill if how == "step" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
