"""Two ranks: baselines are per rank, gradients average, and every rank stays unbiased."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ranks.py")


def test_two_ranks_of_ddp() -> None:
    """Run tests/ranks.py under torchrun; its own assertions are the test."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"rank {rank} ok" in done.stdout for rank in (0, 1))
