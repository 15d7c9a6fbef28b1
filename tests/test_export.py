"""Exported programs: any length, and what they need where they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention import Dilated, Local, build_attention


class Doubled(nn.Module):
    """An attention that is part of a program."""

    def __init__(self) -> None:
        super().__init__()
        pattern = Dilated((16, 32), (1, 2)) | Local(3)
        self.attention = build_attention(pattern=pattern, num_heads=2, head_dim=8, is_causal=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.attention(query, key, value)
        return 2 * out


def test_a_saved_program_runs_where_its_attention_is_built_again(tmp_path: Path) -> None:
    model, inputs, longer = Doubled(), tuple(torch.randn(3, 2, 40, 2, 8)), tuple(torch.randn(3, 2, 77, 2, 8))
    length: Any = {1: torch.export.Dim("length", min=2, max=999)}
    program = torch.export.export(model, inputs, dynamic_shapes=(length, length, length))
    torch.export.save(program, tmp_path / "program.pt2")
    expected = [model(*inputs), model(*longer)]
    del program, model
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    with pytest.raises(RuntimeError, match=r"not in this process.*torch\.export.*Build it again"):
        loaded(*inputs)
    kept = Doubled()
    assert [torch.equal(loaded(*x), e) for x, e in zip((inputs, longer), expected, strict=True)] == [True, True]
    del kept
