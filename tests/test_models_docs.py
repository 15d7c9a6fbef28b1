"""docs/models.md is true: its blocks of Python run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a model
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), names)
    assert len(blocks) == 6
    assert names["out"].shape == (2, 50, 64)
    assert names["text"].shape == (1, 30)
    assert names["embedding"].shape == (1, 96)
    assert bool(torch.isfinite(names["embedding"]).all())
    seen = torch.arange(3, 43)[None]
    dense = names["llama"](seen).logits
    names["llama"].set_attn_implementation(names["name"])
    assert torch.equal(names["again"](seen).logits, names["llama"](seen).logits)
    assert not torch.allclose(dense, names["llama"](seen).logits, atol=1e-3)
