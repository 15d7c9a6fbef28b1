"""The attention that each key receives, against the column sums of the oracle's dense weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import Attention, ConfigError, Dilated, Full, Learned, Limits, Local, Pattern, build_attention
from dilated_attention.core import reference
from dilated_attention.core.geometry import Geometry

from .kernel_kit import PATTERNS
from .support import error, inputs

REPEATED = Dilated(segment_lengths=(40, 80, 40), dilation_rates=(1, 2, 1))  # weights in branches
WEIGHTED = Local(window_size=300) + Local(window_size=300)  # weights of blocks
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def build(pattern: Pattern, geometry: Geometry, **fields: Any) -> Attention:
    return build_attention(
        pattern=pattern,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=8,
        is_causal=geometry.is_causal,
        **fields,
    )


def dense(pattern: Pattern, query: Tensor, key: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, T): the columns of the weights summed, in float64."""
    q, k = query.double().transpose(1, 2), key.double().transpose(1, 2)
    scores = q @ k.repeat_interleave(geometry.group_size, dim=1).mT * q.shape[-1] ** -0.5
    weights = reference.multiplicity(pattern, geometry) * scores.exp()
    total = weights.sum(-1, keepdim=True)
    received: Tensor = (weights / torch.where(total == 0, 1.0, total)).sum(-2)
    return received


def check(pattern: Pattern, geometry: Geometry, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    attention = build(pattern, geometry, dtype=dtype, **fields)
    query, key, value = (x.detach() for x in inputs(geometry, batch=2, head_dim=8, dtype=dtype))
    places: dict[str, Any] = {"q_offset": geometry.q_offset, "kv_offset": geometry.kv_offset}
    _, lse = attention(query, key, value, return_lse=True, **places)
    actual = attention.received(query, key, lse, **places)
    assert actual.dtype == lse.dtype
    assert error(actual, dense(pattern, query, key, geometry)) < BOUNDS[dtype]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", [*PATTERNS, REPEATED, WEIGHTED], ids=str)
def test_every_pattern_equals_the_oracle(pattern: Pattern, is_causal: bool) -> None:
    heads: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "is_causal": is_causal}
    check(pattern, Geometry(q_len=300, kv_len=300, **heads))
    check(pattern, Geometry(q_len=37, kv_len=150, **heads), torch.float64)
    check(pattern, Geometry(q_len=64, kv_len=37, q_offset=5, kv_offset=17, **heads))
    check(pattern, Geometry(q_len=131, kv_len=131, **heads), torch.bfloat16)


def test_tiles_and_the_reference_backend() -> None:
    geometry = Geometry.self_attention(700, 3, is_causal=True)
    small = Limits(workspace_bytes=1 << 16)
    for pattern in (Full(), Dilated(segment_lengths=(600, 700), dilation_rates=(1, 2)), Local(window_size=200)):
        check(pattern, geometry)
        check(pattern, geometry, limits=small)
        check(pattern, Geometry.self_attention(90, 3), backend="reference")
        check(pattern, Geometry.self_attention(90, 3, is_causal=True), backend="reference")


def test_the_blocks_that_a_gate_chooses() -> None:
    geometry = Geometry(q_len=100, kv_len=100, num_heads=4, num_kv_heads=2, is_causal=True)
    attention = build(Learned(block_size=16, blocks_per_row=2), geometry)
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    _, lse = attention(query, key, value, return_lse=True)
    frozen = attention.gate.freeze(query, key)
    assert error(attention.received(query, key, lse), dense(frozen, query, key, geometry)) < 1e-5


def test_padded_rows_and_packed_documents() -> None:
    geometry = Geometry(q_len=60, kv_len=60, num_heads=4, num_kv_heads=2, is_causal=True)
    query, key, value = (x.detach() for x in inputs(geometry, batch=3, head_dim=8, dtype=torch.float32))
    place = torch.arange(60)
    mask = torch.stack([place < 7, place >= 53, place < 60])
    pattern = Dilated(segment_lengths=(16, 32), dilation_rates=(1, 2)) | Local(window_size=5)
    attention = build(pattern, geometry)
    _, lse = attention(query, key, value, return_lse=True, key_padding_mask=mask)
    actual = attention.received(query, key, lse, key_padding_mask=mask)
    assert not actual[mask[:, None].expand_as(actual)].any()
    for row, rows in ((0, slice(7, 60)), (1, slice(0, 53))):
        own = Geometry(q_len=53, kv_len=53, num_heads=4, num_kv_heads=2, is_causal=True)
        alone = dense(pattern, query[row : row + 1, rows], key[row : row + 1, rows], own)
        assert error(actual[row : row + 1, :, rows], alone) < 1e-5
    ends = torch.tensor([0, 20, 20, 60])
    _, lse = attention(query[:1], key[:1], value[:1], return_lse=True, cu_seqlens=ends)
    actual = attention.received(query[:1], key[:1], lse, cu_seqlens=ends)
    for low, high in ((0, 20), (20, 60)):
        own = Geometry(q_len=high - low, kv_len=high - low, num_heads=4, num_kv_heads=2, is_causal=True)
        assert error(actual[:, :, low:high], dense(pattern, query[:1, low:high], key[:1, low:high], own)) < 1e-5


def test_its_sum_is_the_number_of_queries_that_see_a_key() -> None:
    geometry = Geometry(q_len=40, kv_len=10, num_heads=2, num_kv_heads=2, is_causal=True)  # 30 queries see nothing
    query, key, value = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    for pattern in (Full(), Local(window_size=4)):
        attention = build(pattern, geometry)
        _, lse = attention(query, key, value, return_lse=True)
        received = attention.received(query, key, lse)
        assert not received.requires_grad
        assert error(received.sum(-1), torch.full((2, 2), 10.0)) < 1e-6
    empty = attention.received(query[:, :0], key, lse[:, :, :0])
    assert empty.shape == (2, 2, 10)
    assert not empty.any()


def test_layouts_and_autocast_and_wrong_shapes() -> None:
    geometry = Geometry.self_attention(50, 4, is_causal=True)
    query, key, value = (x.detach() for x in inputs(geometry, batch=2, head_dim=8, dtype=torch.float32))
    attention = build(Local(window_size=9), geometry)
    _, lse = attention(query, key, value, return_lse=True)
    expected = attention.received(query, key, lse)
    swapped = build(Local(window_size=9), geometry, tensor_layout="bhsd")
    assert torch.equal(swapped.received(query.transpose(1, 2), key.transpose(1, 2), lse), expected)
    strange = query.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert error(attention.received(strange, key, lse), expected) < 1e-6
    half = build(Local(window_size=9), geometry, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(half.received(query, key, lse), expected) < 2e-2
    with pytest.raises(
        ConfigError, match=r"lse must be \(batch, num_heads, seq_len\) = \(2, 4, 50\).*got \(2, 50, 4\)"
    ):
        attention.received(query, key, lse.transpose(1, 2))
    with pytest.raises(ConfigError, match="it looks like a bhsd tensor"):
        attention.received(query.transpose(1, 2), key, lse)
