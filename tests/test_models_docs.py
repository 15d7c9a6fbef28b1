"""docs/models.md is true: its blocks of Python run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()


def test_the_page_runs() -> None:
    names: dict[str, torch.Tensor] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), names)
    assert len(blocks) == 5
    assert names["out"].shape == (2, 50, 64)
    assert names["text"].shape == (1, 30)
    assert names["embedding"].shape == (1, 96)
    assert bool(torch.isfinite(names["embedding"]).all())
