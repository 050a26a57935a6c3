"""Two ranks: baselines are per rank, gradients average, those of learned control variates too, and fit trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """Run tests/ranks.py under torchrun, once; its own assertions are the tests."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(SCRIPT), str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("what", ["baselines", "gradients", "fit"])
def test_two_ranks_of_ddp(said, what):
    assert all(f"rank {rank}: {what} ok" in said for rank in (0, 1)), said
