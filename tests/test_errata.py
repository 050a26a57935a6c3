"""Errata whose chapters are still to come."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as D

import gradlab

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize(
    ("start", "end"),
    [((-2.5, 2.5, 9.5), -18.9079), ((9.0, 9.5, 10.0), -35.5785), ((1.0, 1.0, 1.0), -118.0204)],
)
def test_expectation_maximisation_ends_at_a_stationary_point(start: tuple[float, ...], end: float) -> None:
    """Three unit normals on nine points: the likelihood never falls, and its end depends on the start."""
    x = torch.tensor([-3, -2.5, -2, 2, 2.5, 3, 9, 9.5, 10.0])

    def model(means: torch.Tensor):
        return D.Categorical(logits=torch.zeros(3)), lambda z: D.Normal(means[z], 1.0)

    def maximize(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.stack([(r * x * (z == k)).sum() / (r * (z == k)).sum() for k in range(3)])

    _, likelihoods = gradlab.expectation_maximization(model, maximize, x, torch.tensor(start))
    assert (likelihoods.diff() >= -1e-9).all()
    assert likelihoods[-1].item() == pytest.approx(end, abs=1e-4)
