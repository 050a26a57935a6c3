"""Errata whose chapters are still to come."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as D

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize(
    ("start", "end"),
    [((-2.5, 2.5, 9.5), -18.9079), ((9.0, 9.5, 10.0), -35.5785), ((1.0, 1.0, 1.0), -118.0204)],
)
def test_expectation_maximisation_ends_at_a_stationary_point(start: tuple[float, ...], end: float) -> None:
    """Three unit normals on nine points: the likelihood never falls, and its end depends on the start."""
    x = torch.tensor([-3, -2.5, -2, 2, 2.5, 3, 9, 9.5, 10.0])
    means, last = torch.tensor(start), -math.inf
    for _ in range(400):
        log_joint = D.Normal(means, 1.0).log_prob(x[:, None]) - math.log(3)
        likelihood = log_joint.logsumexp(-1).sum().item()
        assert likelihood >= last - 1e-9
        weights, last = log_joint.softmax(-1), likelihood
        means = (weights * x[:, None]).sum(0) / weights.sum(0)
    assert last == pytest.approx(end, abs=1e-4)
