"""The training example under torchrun: the single process's losses at any ring size, and across a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def train(folder: Path, ranks: int, *arguments: str) -> dict[int, float]:
    """The losses by step of a run with this many ranks; 0: without torchrun."""
    losses = folder / f"losses-{ranks}-{len(arguments)}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / "examples" / "longnet_ring.py"), "--seq-len", "256"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "--losses", str(losses)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(step): loss for step, loss in json.loads(losses.read_text()).items()}


@pytest.mark.slow
def test_losses_are_those_of_one_process_at_any_ring_size_and_across_a_checkpoint(tmp_path: Path) -> None:
    alone = train(tmp_path, 0, "--steps", "10")
    checkpoint = str(tmp_path / "checkpoint")
    four = train(tmp_path, 4, "--steps", "6", "--save", checkpoint)
    two = train(tmp_path, 2, "--steps", "10", "--resume", checkpoint)
    assert sorted(four | two) == sorted(alone) == list(range(10))
    assert sorted(two) == [6, 7, 8, 9]
    assert all(abs(loss - alone[step]) < 1e-4 * loss for step, loss in (four | two).items())
    assert alone[9] < 0.8 * alone[0]
