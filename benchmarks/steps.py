"""One training step of three autoencoders, by every estimator and other libraries, relative to a deterministic one.

Forward, backward and Adam on a batch of 100 binary images. The floor is the same network without noise: z is the mean
of the latents. See ``benchmarks/networks.py`` for L, L1 and J. The guides build their distributions with
``validate_args=False``; one line shows what torch's validation adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, OneHotCategorical, RelaxedOneHotCategorical

import gradlab as gl
from benchmarks import peers
from benchmarks.harness import race, ratio, run, steady
from benchmarks.networks import BATCH, Autoencoder, images, steps

Losses = dict[str, Callable[[Tensor], Tensor]]

OURS: dict[str, Callable[[], gl.Estimator]] = {
    "Gumbel-softmax": lambda: gl.GumbelSoftmax(temperature=0.5),
    "straight-through": gl.StraightThrough,
    "ReinMax": gl.ReinMax,
    "leave-one-out S=2": lambda: gl.ScoreFunction(2, gl.LeaveOneOut()),
    "leave-one-out S=4": lambda: gl.ScoreFunction(4, gl.LeaveOneOut()),
    "DisARM": gl.DisARM,
    "REBAR": gl.REBAR,
    "exact flips": gl.LocalExpectation,
    "Taylor M=1": lambda: gl.TaylorLocalExpectation(flips=1),
    "adaptive M=2": lambda: gl.AdaptiveLocalExpectation(flips=2),
    "adaptive M=5": lambda: gl.AdaptiveLocalExpectation(flips=5),
}
MODELS = {
    "L": ["Gumbel-softmax", "straight-through", "ReinMax", "leave-one-out S=2", "leave-one-out S=4", "REBAR",
          "exact flips"],
    "L1": ["Gumbel-softmax", "leave-one-out S=2", "DisARM", "REBAR", "exact flips", "Taylor M=1"],
    "J": ["Gumbel-softmax", "leave-one-out S=2", "leave-one-out S=4", "REBAR", "adaptive M=2", "adaptive M=5"],
}  # fmt: skip
GOALS = {
    ("L", "leave-one-out S=2"): 1.35,
    ("L", "exact flips"): 5.0,
    ("L", "exact flips, compiled"): 3.2,
    ("L1", "Taylor M=1"): 1.6,
    ("J", "adaptive M=2"): 1.35,
    ("J", "adaptive M=5"): 1.65,
}
