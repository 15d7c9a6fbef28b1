"""docs/sequences.md, docs/context_parallel.md and README.md are true: what they show runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Invoke

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str = "python") -> list[str]:
    """What a page shows in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_sequences() -> None:
    names: dict[str, Any] = {}
    shown = blocks("docs/sequences.md")
    for block in shown:
        exec(compile(block, "docs/sequences.md", "exec"), names)
    assert len(shown) == 3
    assert names["packed"].shape == (1, 300, 4, 32)
    assert names["received"].shape == (2, 4, 300)
    assert names["received"].sum(-1).sub(300).abs().max() < 1e-3  # every query gives away one
    assert names["out"].shape == (2, 1, 4, 32)


@pytest.mark.slow
def test_a_ring_under_torchrun(tmp_path: Path) -> None:
    shown, recovery = blocks("docs/context_parallel.md")
    compile(recovery, "docs/context_parallel.md", "exec")
    (tmp_path / "ring.py").write_text(shown)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "ring.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {f"rank {rank}: tokens {1024 * rank} to {1024 * rank + 1023}, out (1, 1024, 8, 64)" for rank in range(4)}
    assert {*done.stdout.splitlines()} == said


def test_readmes_configuration_is_explained_stored_and_shown(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("README.md", "toml")
    Path("attention.toml").write_text(config)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    dilated-attention (.*attention\.toml.*|pattern show [^#\n]*)", page, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        done = invoke(*line.partition("#")[0].split())
        assert done.returncode == 0, done.stderr
    assert Path("near.png").stat().st_size > 0
