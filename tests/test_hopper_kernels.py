"""The kernels in Gluon: they compile for Hopper without losing their overlap, and give the bits of those in Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import attrs
import pytest
import torch

from dilated_attention import Dilated, Full, Pattern, Strided
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.tiles import TileSizes, can_be_by_hand
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower

ROOT = Path(__file__).parents[1]
LONGNET = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
RAGGED = Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 2))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "release", "expected"),
    [
        (64, torch.bfloat16, "3.6.0", True),
        (48, torch.float16, "3.6.1", True),
        (128, torch.bfloat16, "3.6.0", True),
        (32, torch.bfloat16, "3.6.0", False),
        (256, torch.bfloat16, "3.6.0", False),
        (64, torch.float32, "3.6.0", False),
        (64, torch.bfloat16, "3.7.0", False),
        (64, torch.bfloat16, "3.60.0", False),
    ],
)
def test_they_serve_what_they_passed_their_tests_for(
    head_dim: int, dtype: torch.dtype, release: str, expected: bool
) -> None:
    assert can_be_by_hand(head_dim, dtype, release) is expected


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [True, False])
def test_tables_of_small_blocks_are_never_theirs(head_dim: int, is_causal: bool) -> None:
    sizes = TileSizes.of(head_dim, torch.bfloat16, is_causal=is_causal, by_hand=True)
    assert sizes.branches.queries.by_hand
    assert sizes.branches.keys.by_hand
    for block in (16, 32, 64, 128):
        tiles = sizes.within(block)
        assert not any(tile.by_hand for tile in (tiles.forward, tiles.queries, tiles.keys))


@pytest.mark.slow
def test_they_compile_for_hopper_and_keep_their_overlap(tmp_path: Path) -> None:
    """With the Triton that they are made for, installed for it alone."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "triton==3.6.0"], check=True)
    tiles = []
    for width in (64, 128):
        branches = TileSizes.of(width, torch.bfloat16, is_causal=True, by_hand=True).branches
        for name, tile in (("gradients_of_queries", branches.queries), ("gradients_of_keys", branches.keys)):
            tiles.append([name, width, tile.rows, tile.columns, tile.stages, tile.warps, tile.registers])
    script, folder = ROOT / "tests" / "compile_hopper.py", ROOT / "backends" / "fused"
    command = [str(python), str(script), str(folder), json.dumps(tiles)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    assert len(lines) == 8
    for line in lines:
        name, head_dim, spilled, overlap = line.split()
        assert overlap == "overlaps", line
        assert int(spilled) <= 64, (name, head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not version("triton").startswith("3.6."), reason="they are made for Triton 3.6")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [LONGNET, RAGGED, Full(), Strided(3)], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 48), (torch.bfloat16, 104)])
def test_they_give_the_bits_of_those_in_triton(
    dtype: torch.dtype, head_dim: int, pattern: Pattern, is_causal: bool
) -> None:
    """The same sums in the same order, where tiles are as many columns wide; also of rows and keys that meet none."""
    geometry = Geometry(
        q_len=700, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=is_causal, q_offset=90, kv_offset=7
    )
    layout = lower(pattern, geometry)
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(length: int, heads: int) -> torch.Tensor:
        packed = torch.randn((2, length, heads, 2, head_dim), generator=generator, device="cuda")
        return packed.to(dtype)[:, :, :, 1]  # strided

    query, dout = draw(700, 4), draw(700, 4)
    key, value = draw(517, 2), draw(517, 2)
    piece = LayoutPiece(layout=layout, scale=head_dim**-0.5)
    by_hand = TileSizes.of(head_dim, dtype, is_causal=is_causal, by_hand=True)
    branches = by_hand.branches
    plain = {
        which: attrs.evolve(tile, by_hand=False, stages=2)
        for which, tile in (("queries", branches.queries), ("keys", branches.keys))
    }
    in_triton = attrs.evolve(by_hand, branches=attrs.evolve(branches, **plain))
    out, lse = FusedKernel("forward", by_hand).forward(query, key, value, piece)
    found, expected = (
        FusedKernel("backward", sizes).backward(dout, query, key, value, out, lse, piece)
        for sizes in (by_hand, in_triton)
    )
    for name, a, b in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert torch.isfinite(a).all(), name
        assert torch.equal(a, b), name
