"""The suite runs in float64 with a fixed seed, on the CPU or, with ``--device cuda``, on a GPU.

The tests that ask for the fixture ``device`` run there: every estimator x every problem, nesting, second derivatives,
extremes. What is integrated or compared without noise, and what concerns files, needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the suite runs: cpu, cuda, cuda:1 ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(20261121)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile leaves it off
    if "device" in request.fixturenames:
        torch.set_default_device(request.getfixturevalue("device"))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)
