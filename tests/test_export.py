"""Exported programs: any length, and what they need where they are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

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


_LOADS = """
import sys
import pytest
import torch
from dilated_attention import build_attention
from tests.test_export import Doubled

other = build_attention(num_heads=2, head_dim=8)  # which registers the operators
loaded = torch.export.load(sys.argv[1] + "/program.pt2").module()
calls, expected = torch.load(sys.argv[1] + "/calls.pt")
with pytest.raises(RuntimeError, match=r"not in this process.*torch\\.export.*Build it again"):
    loaded(*calls[0])
kept = Doubled()
print([torch.equal(loaded(*call), out) for call, out in zip(calls, expected, strict=True)])
"""


def test_a_saved_program_runs_where_its_attention_is_built_again(tmp_path: Path) -> None:
    model, calls = Doubled(), [tuple(torch.randn(3, 2, length, 2, 8)) for length in (40, 77)]
    length: Any = {1: torch.export.Dim("length", min=2, max=999)}
    program = torch.export.export(model, calls[0], dynamic_shapes=(length, length, length))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((calls, [model(*call) for call in calls]), tmp_path / "calls.pt")
    command = [sys.executable, "-c", _LOADS, str(tmp_path)]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.stdout == "[True, True]\n", found.stderr
