"""Tables of blocks as FlashAttention-4 reads them: what lists and bits say is the pattern's multiplicity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dilated_attention import ConfigError, Global, Local, Pattern, Random, Strided
from dilated_attention.backends.fa4 import FlashAttention4
from dilated_attention.backends.fa4_library import Library
from dilated_attention.backends.fa4_tables import BLOCK, Listed, MaskBits, checked, takes
from dilated_attention.core import reference
from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DensePiece
from dilated_attention.core.layout import BlockLayout

CPU = torch.device("cpu")
LISTED: list[Pattern] = [
    Random(2, BLOCK, seed=7),
    Local(200) | Random(1, BLOCK, seed=3),
    Local((300, 0)) | Global(40),
    Strided(stride=3),
]
GEOMETRIES = [
    Geometry.self_attention(517, 4, is_causal=True),
    Geometry(q_len=517, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=False),
    Geometry(q_len=130, kv_len=700, num_heads=2, num_kv_heads=2, is_causal=True, q_offset=570),
]


def lowered(pattern: Pattern, geometry: Geometry) -> BlockLayout:
    return lower_blocks(pattern, geometry, block_size=BLOCK)


def seen(masks: MaskBits, head: int, row: int, col: int) -> NDArray[np.int64]:
    """The mask of a block by `MaskBits` alone."""
    number = int(masks.numbers[int(masks.tables[head]), row, col])
    key = np.arange(BLOCK)
    words = masks.bits[number].numpy().astype(np.int64) & 0xFFFFFFFF
    found: NDArray[np.int64] = words[:, key // 32] >> (key % 32) & 1
    return found


def pasted(
    lists: tuple[Tensor, Tensor, Tensor, Tensor], masks: MaskBits | None, geometry: Geometry, *, of_keys: bool
) -> NDArray[np.int64]:
    """How often each pair counts, (H, S, T), by the lists."""
    rows, cols = -(-geometry.q_len // BLOCK), -(-geometry.kv_len // BLOCK)
    total = np.zeros((geometry.num_heads, rows * BLOCK, cols * BLOCK), dtype=np.int64)
    for (counts, indices), is_masked in ((lists[:2], True), (lists[2:], False)):
        assert counts.dtype == indices.dtype == torch.int32
        for head in range(geometry.num_heads):
            own = head if counts.shape[1] > 1 else 0
            for along in range(counts.shape[2]):
                for across in indices[0, own, along, : int(counts[0, own, along])].tolist():
                    row, col = (across, along) if of_keys else (along, across)
                    block: int | NDArray[np.int64] = 1
                    if is_masked:
                        assert masks is not None
                        block = seen(masks, head, row, col)
                    total[head, row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK] += block
    assert not total[:, :, geometry.kv_len :].any()
    return total[:, : geometry.q_len, : geometry.kv_len]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("pattern", LISTED, ids=str)
def test_lists_and_bits_are_the_multiplicity(pattern: Pattern, geometry: Geometry) -> None:
    blocks = lowered(pattern, geometry)
    assert takes(blocks)
    listed = checked(blocks, 1 << 30)
    masks = listed.bits(blocks, CPU)
    expected = reference.multiplicity(pattern, geometry).numpy()
    for of_keys in (False, True):
        lists = listed.lists(CPU, of_keys=of_keys)
        np.testing.assert_array_equal(pasted(lists, masks, geometry, of_keys=of_keys), expected)


def test_masks_are_told_once_where_all_tables_agree() -> None:
    geometry = Geometry.self_attention(1024, 4, is_causal=True)
    blocks = lowered(Random(2, BLOCK, seed=7), geometry)
    assert len(blocks.row_ptr) == 4  # each head draws its own, and all have the diagonal
    masks = Listed.of(blocks).bits(blocks, CPU)
    assert masks is not None
    assert masks.numbers.shape == (1, 8, 8)
    whole = lowered(Random(2, BLOCK, seed=7), Geometry.self_attention(1024, 4, is_causal=False))
    assert Listed.of(whole).bits(whole, CPU) is None


@pytest.mark.parametrize(
    ("pattern", "block_size"),
    [(Random(2, 64), 64), (Local(9) + Local(5), BLOCK), (Random(1, BLOCK) + Random(1, BLOCK), BLOCK)],
    ids=["smaller blocks", "pairs that count twice", "blocks that count twice"],
)
def test_what_lists_cannot_say_is_left_to_core(pattern: Pattern, block_size: int) -> None:
    geometry = Geometry.self_attention(300, 2, is_causal=False)
    assert not takes(lower_blocks(pattern, geometry, block_size=block_size))


@pytest.mark.parametrize(("scale", "deterministic"), [(-0.5, False), (0.5, True)])
def test_what_its_kernels_cannot_do_is_left_to_core(scale: float, deterministic: bool) -> None:
    def never(*_: object, **__: object) -> tuple[Tensor, ...]:
        raise AssertionError

    blocks = lowered(Random(2, BLOCK), Geometry.self_attention(300, 2, is_causal=False))
    piece = DensePiece(is_causal=False, scale=scale, deterministic=deterministic)
    assert takes(blocks)
    assert FlashAttention4("", Library(never, never), 1 << 30).table(blocks, piece, CPU) is None


@pytest.mark.parametrize("pattern", LISTED, ids=str)
def test_their_bytes_are_known_before_they_are_made(pattern: Pattern) -> None:
    blocks = lowered(pattern, GEOMETRIES[0])
    listed = Listed.of(blocks)
    masks = listed.bits(blocks, CPU)
    tensors = [*listed.lists(CPU, of_keys=False), *listed.lists(CPU, of_keys=True)]
    tensors += [] if masks is None else [masks.numbers, masks.bits]
    needed = sum(x.nbytes for x in tensors)
    assert listed.nbytes(len(blocks.masks)) == needed
    checked(blocks, needed)
    with pytest.raises(
        ConfigError, match=rf"517 queries and 517 keys need {needed:,} bytes, allowed are {needed - 1:,}"
    ):
        checked(blocks, needed - 1)
