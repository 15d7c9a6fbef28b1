"""Which backend `auto` prefers for what, on an H100: docs/performance.md, "What `auto` picks"."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from dilated_attention import (
    ContextParallel,
    Dilated,
    Full,
    Global,
    Learned,
    Local,
    Random,
    build_attention,
    explain,
)
from dilated_attention.backends import libraries, manifest
from dilated_attention.backends.cards import GLUON_RELEASES

from .kernel_kit import H100, request

LONGNET = Dilated(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))
TWO = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))
WINDOW = Local(window_size=70)
SINKS = WINDOW | Global(tokens=4)
BLOCKS = Random(density=0.1, block_size=128)


@pytest.fixture(autouse=True)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the newest Triton that the kernels in Gluon serve, or with the release that a test is given."""
    chosen = getattr(request, "param", f"{GLUON_RELEASES[-1]}.0")
    monkeypatch.setattr(libraries, "installed", lambda name: {"triton": chosen}[name])


def ranked(**asked: Any) -> list[str]:
    """The order of those that are asked."""
    specs = [manifest.REFERENCE, manifest.FLEX, manifest.SDPA, manifest.TRITON, manifest.FA3]
    return list(manifest.dilated_attention_rank_backends(request(H100, **asked), specs))


@pytest.mark.parametrize(
    ("fields", "is_first"),
    [
        ({"pattern": LONGNET}, True),
        ({"pattern": LONGNET, "context_parallel": ContextParallel(size=2)}, True),
        ({"pattern": LONGNET, "head_dim": 128}, True),
        ({"pattern": LONGNET, "head_dim": 96}, True),
        ({"pattern": LONGNET, "head_dim": 192}, True),
        ({"pattern": LONGNET, "head_dim": 200}, True),
        ({"pattern": LONGNET, "head_dim": 256}, True),
        ({"pattern": LONGNET, "dtype": "float32"}, False),
        ({"pattern": TWO}, True),
        ({"pattern": TWO, "head_dim": 128}, False),
        ({"pattern": Full()}, False),
        ({"pattern": Full(), "varlen": True, "head_dim": 128}, True),
        ({"pattern": Full(), "varlen": True, "head_dim": 192}, True),
        ({"pattern": Full(), "varlen": True, "dtype": "float32"}, False),
        ({"pattern": SINKS}, True),
        ({"pattern": SINKS, "head_dim": 192}, True),
        ({"pattern": TWO, "head_dim": 192, "context_parallel": ContextParallel(size=2)}, False),
        ({"pattern": TWO, "context_parallel": ContextParallel(size=2)}, True),
        ({"pattern": WINDOW, "varlen": True}, True),
        ({"pattern": WINDOW, "context_parallel": ContextParallel(size=2)}, True),
        ({"pattern": SINKS, "head_dim": 64, "dtype": "float32"}, False),
        ({"pattern": SINKS, "head_dim": 64, "dtype": "float32", "seq_len": 8191}, True),  # launches are what bounds
        ({"pattern": SINKS, "head_dim": 64, "dtype": "float32", "seq_len": 8192}, False),
        ({"pattern": SINKS, "head_dim": 72, "dtype": "float32", "seq_len": 4096}, False),
        ({"pattern": SINKS, "head_dim": 64, "dtype": "float32", "varlen": True}, True),
        ({"pattern": BLOCKS, "head_dim": 64, "dtype": "float32"}, True),
        ({"pattern": BLOCKS, "head_dim": 72, "dtype": "float32"}, False),
        ({"pattern": LONGNET | WINDOW, "head_dim": 192}, True),
        ({"pattern": LONGNET | WINDOW, "dtype": "float32"}, False),
        ({"pattern": LONGNET | LONGNET}, True),  # as many branches as they are lowered to
        ({"pattern": Full() + Full() + Full()}, False),
        ({"pattern": Learned(block_size=128, blocks_per_row=2)}, True),
        ({"pattern": Learned(block_size=128, blocks_per_row=2), "dtype": "float32", "head_dim": 128}, True),
        ({"pattern": Learned(block_size=128, blocks_per_row=2), "dtype": "float32", "head_dim": 256}, False),
    ],
)
def test_fused_kernels_come_first_where_they_are_the_fastest(fields: dict[str, Any], is_first: bool) -> None:
    order = ranked(**fields)
    assert order == (
        ["triton", "fa3", "sdpa", "flex", "reference"] if is_first else ["fa3", "sdpa", "triton", "flex", "reference"]
    )


@pytest.mark.parametrize("release", ["3.5.1", "3.10.0", ""], indirect=True)
@pytest.mark.parametrize(
    ("fields", "is_first"),
    [
        ({"pattern": LONGNET, "head_dim": 96}, True),
        ({"pattern": LONGNET, "head_dim": 192}, False),
        ({"pattern": LONGNET, "head_dim": 192, "requires_grad": False}, True),
        ({"pattern": LONGNET, "head_dim": 200}, True),
        ({"pattern": TWO, "head_dim": 96}, False),
        ({"pattern": TWO, "head_dim": 192, "requires_grad": False}, False),
        ({"pattern": Full(), "head_dim": 256, "seq_len": 1 << 14}, False),
        ({"pattern": Full(), "varlen": True, "head_dim": 192}, False),
        ({"pattern": SINKS, "head_dim": 128}, True),
        ({"pattern": SINKS, "head_dim": 192}, False),
        ({"pattern": SINKS, "head_dim": 192, "varlen": True}, True),
        ({"pattern": BLOCKS, "head_dim": 192}, True),
    ],
)
def test_of_all_widths_only_with_releases_that_have_passed(fields: dict[str, Any], is_first: bool) -> None:
    order = ranked(**fields)
    assert order.index("triton") < order.index("sdpa") if is_first else order.index("sdpa") < order.index("triton")


@pytest.mark.parametrize(
    ("fields", "is_second"),
    [
        ({}, True),
        ({"head_dim": 104}, True),
        ({"pattern": Dilated((8192,), (4,))}, False),
        ({"is_causal": False}, False),
        ({"pattern": Dilated((2048, 8200), (1, 4))}, False),
        ({"pattern": Dilated((2048,), (1,)) + Full()}, False),
        ({"pattern": Dilated((8192, 32768), (1, 4))}, False),
        ({"context_parallel": ContextParallel(size=2)}, False),
    ],
    ids=str,
)
def test_two_branches_of_short_segments_are_not_worth_the_launches_of_cudnn(
    fields: dict[str, Any], is_second: bool
) -> None:
    given: dict[str, Any] = {"pattern": Dilated((2048, 8192), (1, 4)), "head_dim": 128, "is_causal": True} | fields
    specs = [manifest.SDPA, manifest.TRITON, manifest.FA3]
    order = manifest.dilated_attention_rank_backends(request(H100, **given), specs)
    assert order == (["fa3", "triton", "sdpa"] if is_second else ["fa3", "sdpa", "triton"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["fa3", "triton", "sdpa"]),
        ({"pattern": Dilated((4096,), (1,)), "head_dim": 32}, ["fa3", "triton", "sdpa"]),
        ({"varlen": True}, ["triton", "fa3", "sdpa"]),
        ({"head_dim": 96}, ["fa3", "triton", "sdpa"]),
        ({"head_dim": 104}, ["fa3", "sdpa", "triton"]),
        ({"head_dim": 128}, ["fa3", "sdpa", "triton"]),
        ({"head_dim": 136}, ["fa3", "triton", "sdpa"]),
        ({"pattern": TWO, "head_dim": 96}, ["fa3", "triton", "sdpa"]),
        ({"pattern": TWO, "head_dim": 256}, ["fa3", "triton", "sdpa"]),
        ({"pattern": Full(), "head_dim": 96}, ["fa3", "sdpa", "triton"]),
        ({"pattern": Full(), "head_dim": 192}, ["fa3", "triton", "sdpa"]),
        ({"pattern": Full(), "head_dim": 192, "seq_len": 2048}, ["fa3", "triton", "sdpa"]),
        ({"pattern": Full(), "head_dim": 192, "seq_len": 2047}, ["fa3", "sdpa", "triton"]),
        ({"head_dim": 192, "context_parallel": ContextParallel(size=2)}, ["fa3", "sdpa", "triton"]),
        ({"dtype": "float32"}, ["fa3", "sdpa", "triton"]),
        ({"context_parallel": ContextParallel(size=2)}, ["fa3", "sdpa", "triton"]),
    ],
    ids=str,
)
def test_one_branch(fields: dict[str, Any], expected: list[str]) -> None:
    given: dict[str, Any] = {"pattern": Dilated((4096,), (4,))} | fields
    specs = [manifest.SDPA, manifest.TRITON, manifest.FA3]
    assert list(manifest.dilated_attention_rank_backends(request(H100, **given), specs)) == expected


@pytest.mark.parametrize(
    ("fields", "is_first"),
    [
        ({"pattern": LONGNET}, True),
        ({"pattern": TWO, "head_dim": 128}, True),
        ({"pattern": LONGNET, "head_dim": 136}, False),
        ({"pattern": LONGNET, "dtype": "float32"}, False),
        ({"pattern": BLOCKS, "head_dim": 200}, True),
        ({"pattern": BLOCKS, "dtype": "float32"}, True),
        ({"pattern": SINKS}, True),
        ({"pattern": WINDOW}, False),
        ({"pattern": WINDOW, "varlen": True}, True),
        ({"pattern": Full(), "seq_len": 1 << 14}, True),
        ({"pattern": Full(), "seq_len": 1 << 13}, False),
        ({"pattern": Full()}, False),
        ({"pattern": Full(), "varlen": True}, True),
        ({"pattern": Learned(block_size=128, blocks_per_row=2)}, True),
    ],
)
def test_who_drops_weights(fields: dict[str, Any], is_first: bool) -> None:
    specs = [manifest.REFERENCE, manifest.SDPA, manifest.TRITON]
    order = manifest.dilated_attention_rank_backends(request(H100, dropout_p=0.1, **fields), specs)
    assert order == (["triton", "sdpa", "reference"] if is_first else ["sdpa", "triton", "reference"])


@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({}, ["fa4", "fa3", "triton", "sdpa"]),
        ({"head_dim": 128}, ["fa4", "fa3", "sdpa", "triton"]),
        ({"requires_grad": False}, ["fa3", "fa4", "triton", "sdpa"]),
        ({"head_dim": 48}, ["fa3", "triton", "sdpa", "fa4"]),
        ({"head_dim": 96}, ["fa3", "triton", "sdpa", "fa4"]),
        ({"head_dim": 256}, ["fa3", "triton", "sdpa", "fa4"]),
        ({"head_dim": 32}, ["fa3", "sdpa", "fa4", "triton"]),
        ({"seq_len": (1 << 14) - 1}, ["fa3", "sdpa", "fa4", "triton"]),
        ({"seq_len": None}, ["fa3", "sdpa", "fa4", "triton"]),
        ({"dtype": "float32"}, ["fa3", "sdpa", "fa4", "triton"]),
        ({"context_parallel": ContextParallel(size=2)}, ["fa3", "sdpa", "fa4", "triton"]),
        ({"pattern": Dilated((1 << 14,), (1,))}, ["fa3", "triton", "sdpa", "fa4"]),
        ({"varlen": True}, ["triton", "fa3", "sdpa", "fa4"]),
    ],
    ids=str,
)
def test_long_dense_attention_is_for_kernels_whose_launches_do_not_count(
    fields: dict[str, Any], order: list[str]
) -> None:
    specs = [manifest.SDPA, manifest.TRITON, manifest.FA4, manifest.FA3]
    given: dict[str, Any] = {"pattern": Full(), "head_dim": 64, "seq_len": 1 << 14, "is_causal": True} | fields
    asked = request(H100, **given)
    assert list(manifest.dilated_attention_rank_backends(asked, specs)) == order


def test_a_window_is_for_kernels_that_have_windows() -> None:
    specs = [manifest.FLEX, manifest.SDPA, manifest.TRITON, manifest.FA4, manifest.FA3]
    found = {
        (dtype, head_dim): manifest.dilated_attention_rank_backends(
            request(H100, pattern=WINDOW, head_dim=head_dim, dtype=dtype, seq_len=4096), specs
        )
        for dtype, head_dim in (
            ("bfloat16", 56), ("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 192), ("float32", 64), ("float32", 128)
        )
    }  # fmt: skip
    assert found["bfloat16", 56] == ["fa3", "triton", "sdpa", "fa4", "flex"]
    assert found["bfloat16", 64] == found["bfloat16", 128] == ["fa3", "fa4", "triton", "sdpa", "flex"]
    assert found["bfloat16", 192] == ["fa3", "triton", "sdpa", "fa4", "flex"]
    assert found["float32", 64] == ["triton", "fa3", "sdpa", "fa4", "flex"]  # of so few tokens
    assert found["float32", 128] == ["fa3", "sdpa", "fa4", "triton", "flex"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_window_without_gradients(head_dim: int) -> None:
    specs = [manifest.TRITON, manifest.FA4, manifest.FA3]
    asked = request(H100, pattern=WINDOW, head_dim=head_dim, requires_grad=False)
    order = manifest.dilated_attention_rank_backends(asked, specs)
    assert order == (["fa3", "triton", "fa4"] if head_dim == 64 else ["fa3", "fa4", "triton"])


@pytest.mark.parametrize(
    ("fields", "is_before"),
    [
        ({"pattern": BLOCKS}, True),
        ({"pattern": BLOCKS, "varlen": True}, True),
        ({"pattern": WINDOW, "varlen": True}, False),
        ({"pattern": SINKS, "varlen": True}, False),
        ({"pattern": Learned(block_size=128, blocks_per_row=2)}, False),
        ({"pattern": BLOCKS, "dtype": "float32"}, False),
        ({"pattern": BLOCKS, "context_parallel": ContextParallel(size=2)}, False),
        ({"pattern": WINDOW}, False),  # the dense kernels have windows
        ({"pattern": SINKS}, False),
        ({"pattern": LONGNET}, False),
        ({"pattern": Full()}, False),
        ({"pattern": Random(density=0.1, block_size=64)}, True),
        ({"pattern": Random(density=0.1, block_size=24)}, False),  # a mask for nearly every block
        ({"pattern": LONGNET | BLOCKS}, False),  # it would visit all that a stride touches
    ],
)
@pytest.mark.parametrize("seq_len", [None, 4096])
def test_flex_follows_for_blocks(fields: dict[str, Any], seq_len: int | None, is_before: bool) -> None:
    order = ranked(**fields, seq_len=seq_len)
    assert order.index("flex") == (1 if is_before else len(order) - 2)
    assert order.index("triton") < order.index("flex")


def test_blocks_and_a_window_are_fused_and_after_that_flex_s() -> None:
    assert ranked(pattern=Local(70) | Random(2, 64), head_dim=192) == ["triton", "flex", "fa3", "sdpa", "reference"]


WHOLE: dict[str, Any] = {"pattern": BLOCKS, "head_dim": 128, "seq_len": 1 << 15}


@pytest.mark.parametrize(
    ("fields", "is_first"),
    [
        ({}, True),
        ({"pattern": BLOCKS | Random(2, 128, seed=5)}, True),
        ({"seq_len": 40_001}, True),  # it ends within a block
        ({"head_dim": 64}, False),
        ({"seq_len": 1 << 14}, False),  # launches count
        ({"seq_len": None}, False),
        ({"is_causal": True}, False),  # the diagonal has masks
        ({"pattern": BLOCKS | WINDOW}, False),
        ({"pattern": BLOCKS | Local(2000)}, False),  # masks where its window ends, however far that is
        ({"pattern": BLOCKS | Global(1100)}, False),  # which its first rows, that all see, do not show
        ({"pattern": Local(2000)}, False),  # a window is no table, nor are tokens that all see
        ({"pattern": Local(2000) | Global(4)}, False),
        ({"pattern": Global(2048)}, False),
        ({"pattern": BLOCKS + BLOCKS}, False),  # pairs may count twice
        ({"pattern": Random(density=0.1, block_size=64)}, False),
        ({"pattern": LONGNET}, False),
        ({"pattern": Learned(block_size=128, blocks_per_row=2)}, False),
        ({"varlen": True}, False),
        ({"context_parallel": ContextParallel(size=2)}, False),
    ],
    ids=str,
)
def test_long_tables_of_whole_blocks_are_flash_attention_4s(fields: dict[str, Any], is_first: bool) -> None:
    specs = [manifest.FLEX, manifest.SDPA, manifest.TRITON, manifest.FA4, manifest.FA3]
    order = manifest.dilated_attention_rank_backends(request(H100, **WHOLE | fields), specs)
    assert (order[0] == "fa4") is is_first
    if is_first:
        assert order[1] == "triton"


def test_a_third_party_of_a_higher_priority_stays_before_both() -> None:
    theirs = attrs.evolve(manifest.SDPA, name="theirs", priority=manifest.TRITON.priority + 1)
    asked = request(H100, pattern=BLOCKS, dtype="bfloat16", seq_len=4096)
    order = manifest.dilated_attention_rank_backends(asked, [manifest.FLEX, manifest.TRITON, theirs, manifest.SDPA])
    assert order == ["theirs", "triton", "flex", "sdpa"]


@pytest.mark.parametrize("size", [1, 3, 12])
def test_no_number_of_ranks_needs_a_length(size: int) -> None:
    plan = explain(num_heads=4, head_dim=64, device="cpu", context_parallel=ContextParallel(size=size))
    assert plan.backend == "sdpa"


@pytest.mark.parametrize(("block_size", "is_first"), [(128, True), (64, False)])
def test_a_pattern_that_fits_one_length_is_judged_by_that(block_size: int, is_first: bool) -> None:
    length = WHOLE["seq_len"]
    gate = build_attention(pattern=Learned(block_size=block_size, blocks_per_row=2), num_heads=2, head_dim=8).gate
    x = torch.randn(1, length, 2, 8)
    plan = explain(pattern=gate.freeze(x, x), num_heads=2, head_dim=128, dtype="bfloat16", arch="sm_90", seq_len=length)
    assert [row for row in plan.rows if row.status == "broken"] == []
    assert (plan.rows[0].name == "fa4") is is_first
