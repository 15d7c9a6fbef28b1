"""Where there is nothing to compute, attention is 0 and no kernel is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import AttentionConfig, Dilated, Global, Learned, Local, Pattern, build_attention
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.backends.reference import ReferenceKernel
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES, DensePiece, LayoutPiece
from dilated_attention.core.layout import Layout
from dilated_attention.exchange.shards import Shards

from .ring_simulation import worst
from .support import error, inputs, oracle

LONGNET = Dilated((16, 32, 64), (1, 2, 4))


class WholeKernel(ReferenceKernel):
    """Fails where it is handed nothing."""

    def prepare(self, layout: Layout, device: torch.device) -> int:
        assert layout.pairs
        return super().prepare(layout, device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        assert all(x.numel() for x in (query, key, value))
        assert piece.layout.pairs
        return super().forward(query, key, value, piece)

    def backward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert all(x.numel() for x in arguments[:-1])
        assert arguments[-1].layout.pairs
        return super().backward(*arguments, **options)


class PieceKernel(CpuFlash):
    """The same for dense pieces."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        assert all(x.numel() for x in (query, key, value))
        return super().forward(query, key, value, piece)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert all(x.numel() for x in (dout, query, key, value, out, lse))
        return super().backward(dout, query, key, value, out, lse, piece)


@pytest.mark.parametrize("kernel", [WholeKernel(1 << 30), PieceKernel()], ids=["layouts", "pieces"])
@pytest.mark.parametrize("pattern", [LONGNET, Local(3) | Global(2)], ids=repr)
def test_no_kernel_meets_nothing(kernel: WholeKernel | PieceKernel, pattern: Pattern) -> None:
    """No batch rows, no queries, no keys, and no pairs, all keys being in the future; then one with everything."""
    config = AttentionConfig(num_heads=4, head_dim=8, pattern=pattern, is_causal=True)
    traits: dict[str, Any] = {"has_dlse": True, "call_axes": frozenset(CALL_AXES)}
    engine = Engine(config, pattern, kernel, takes_layout=isinstance(kernel, WholeKernel), **traits)
    for batch, q_len, kv_len, offsets in (
        (0, 7, 7, (0, 0)), (2, 0, 5, (5, 0)), (2, 5, 0, (-5, 0)), (2, 5, 9, (0, 20)), (1, 7, 7, (0, 0)),
    ):  # fmt: skip
        lengths = {"q_len": q_len, "kv_len": kv_len, "num_heads": 4, "num_kv_heads": 4}
        geometry = Geometry(**lengths, is_causal=True, q_offset=offsets[0], kv_offset=offsets[1])
        tensors = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float64)
        q, k, v = (x.detach() for x in tensors)
        out, lse = engine.forward(q, k, v, *offsets, None, None)
        generator = torch.Generator().manual_seed(1)  # what the oracle's gradients are drawn from
        dout, dlse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
        grads = engine.backward(dout, dlse, q, k, v, out, lse, *offsets, None, None)
        truth = oracle(pattern, tensors, geometry, through_lse=True)
        for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), truth, strict=True):
            assert error(a, e) < 1e-12, (name, batch, q_len, kv_len)


def test_learned_patterns_too() -> None:
    attention = build_attention(pattern=Learned(2, 16), num_heads=2, head_dim=8, is_causal=True)
    for batch, length in ((0, 40), (2, 0), (1, 40)):
        query = torch.randn(batch, length, 2, 8, requires_grad=True)
        out, lse = attention(query, query, query, return_lse=True)
        out.sum().backward()
        assert out.shape == query.shape
        assert lse.shape == (batch, 2, length)
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()


def test_a_shard_without_pairs_of_its_own_asks_no_kernel() -> None:
    """Ranks of 4 tokens, of which every other one keeps no position in any of the 4 heads."""
    shards = Shards(4, 8, 4, 4, is_causal=True)
    assert worst(Dilated((32,), (8,)), shards, through_lse=True, kernel=WholeKernel(1 << 30)) < 1e-12
