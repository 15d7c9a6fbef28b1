"""Dense kernels that compute tables of blocks themselves: when they are asked, and what core does with the answer."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from dilated_attention import Dilated, Global, Local, Pattern, Random
from dilated_attention.backends.joining import JoiningKernel
from dilated_attention.core.block_product import BlockProduct
from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import BlockTable, DensePiece, takes_dlse
from dilated_attention.core.layout import BlockLayout

from .dense_math import ExactSquares, ExactThroughLse
from .kernel_kit import check_emulated, emulated_engine

CPU = torch.device("cpu")
DILATED = Dilated((8, 16), (1, 2))


@attrs.define(eq=False)
class Table:
    """A table of its own, which counts its passes; the arithmetic is that of core."""

    product: BlockProduct
    passes: list[str]

    name = "its own"
    nbytes = 1 << 20

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.passes.append("forward")
        out, lse = self.product.forward(query, key, value)
        return out.to(query.dtype), lse

    def gradients(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not (lse == -torch.inf).any()  # rows without keys have +inf
        self.passes.append("backward" if dlse is None else "backward through lse")
        return self.product.gradients(dout, query, key, value, out, lse, dlse)


class WithTables(ExactThroughLse):
    """A dense kernel that takes tables of blocks of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.passes: list[str] = []

    def table(self, blocks: BlockLayout, piece: DensePiece, device: torch.device) -> BlockTable | None:
        assert not piece.is_causal
        assert piece.window is None
        self.asked.append(blocks.block_size)
        if blocks.block_size != 16:
            return None
        product = BlockProduct.prepare(
            blocks, scale=piece.scale, device=device, dtype=torch.float32, workspace_bytes=1 << 20
        )
        return Table(product, self.passes)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(
    "pattern", [Random(2, 16, seed=1), Local(9) | Random(1, 16), Global(3) | Random(2, 16)], ids=str
)
def test_it_computes_what_is_nothing_but_blocks(pattern: Pattern, is_causal: bool) -> None:
    kernel = WithTables()
    geometry = Geometry(q_len=67, kv_len=67, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check_emulated(kernel, geometry, pattern, head_dim=8)  # what keys receive too, which is core's
    assert kernel.asked == [16]
    assert kernel.passes == ["forward", "backward", "backward through lse"]


@pytest.mark.parametrize(
    ("pattern", "asked"),
    [(Random(2, 8), [8]), (DILATED + Random(1, 16), []), (Local(9), []), (DILATED, [])],
    ids=["it takes no such blocks", "beside branches", "bands", "branches"],
)
def test_the_rest_is_core_s(pattern: Pattern, asked: list[int]) -> None:
    kernel = WithTables()
    check_emulated(kernel, Geometry.self_attention(67, 4, is_causal=True), pattern, head_dim=8)
    assert kernel.asked == asked
    assert not kernel.passes


def test_its_memory_counts_for_the_cache_of_layouts() -> None:
    geometry = Geometry.self_attention(67, 4, is_causal=True)
    engine = emulated_engine(WithTables(), geometry, Random(2, 16), 8, takes_layout=False)
    program = engine._program(67, 67, 0, 0, CPU)
    assert isinstance(program.blocks, Table)
    assert engine.programs.nbytes == program.nbytes > Table.nbytes


def test_a_kernel_whose_pieces_are_joined_keeps_what_it_has_besides() -> None:
    blocks = lower_blocks(Random(2, 16), Geometry.self_attention(67, 2))
    piece = DensePiece(is_causal=False, scale=0.5)
    joined, plain = JoiningKernel(WithTables()), JoiningKernel(ExactSquares())
    assert isinstance(joined.table(blocks, piece, CPU), Table)
    assert plain.table(blocks, piece, CPU) is None
    assert takes_dlse(joined)
    assert not takes_dlse(plain)
