"""What passes cost, for `torch.utils.flop_counter.FlopCounterMode`, which is shown operators and nothing inside them.

The same numbers as in `AttentionCounters`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .documents import read_documents, stacked
from .ops import engine_of


def register_flops() -> None:
    """Tell the counter, where a user has imported it: it brings Triton in, which takes longer than a small build."""
    counter = sys.modules.get("torch.utils.flop_counter")
    operators: Any = torch.ops.dilated_attention
    if counter is None or operators.attend in counter.flop_registry:
        return
    for name, formula in (
        ("attend", _attend),
        ("attend_backward", _backward_of(_attend)),
        ("attend_documents", _attend_documents),
        ("attend_documents_backward", _backward_of(_attend_documents)),
    ):
        counter.register_flop_formula(getattr(operators, name), get_raw=True)(formula)


def _flops(engine: str, query: Tensor, batch: int, q_len: int, kv_len: int, q_offset: int, kv_offset: int) -> int:
    """FLOPs of a forward pass."""
    runner = engine_of(engine)
    program = runner._program(q_len, kv_len, q_offset, kv_offset, query.device)
    return 4 * runner.config.head_dim * batch * program.pairs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    tables: Tensor | None,
    engine: str,
    q_offset: int,
    kv_offset: int,
    *_: object,
    out_val: object,
) -> int:
    return _flops(engine, query, query.shape[0], query.shape[1], key.shape[1], q_offset, kv_offset)


def _attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    engine: str,
    *_: object,
    out_val: object,
) -> int:
    total = 0
    for stack in stacked(read_documents(key_padding_mask, cu_seqlens, query.shape[1], key.shape[1])):
        q_len, kv_len = stack.q_len, stack.kv_len
        total += _flops(engine, query, stack.count, q_len, kv_len, kv_len - q_len, 0)
    return total


def _backward_of(forward: Callable[..., int]) -> Callable[..., int]:
    """Five products where the forward has two, and those two again where nothing was kept."""

    def formula(
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        *rest: object,
        out_val: object,
    ) -> int:
        flops = forward(query, key, value, *rest, out_val=out_val)
        return flops * 5 // 2 + (flops if out is None else 0)

    return formula
