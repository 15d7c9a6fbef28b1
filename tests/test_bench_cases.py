"""Cases with fewer key-value heads, and FlashAttention-4's tables as the baseline makes them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch

from benchmarks import fa4_tables
from dilated_attention import Local, Random
from dilated_attention.bench.cases import CASES, BenchCase
from dilated_attention.bench.peers import dense_sdpa
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.reference import multiplicity

CASE = attrs.evolve(
    CASES["random-32k-10"], pattern=Random(density=0.4, block_size=128), seq_len=768, num_heads=2, num_kv_heads=2
)


class Tables(NamedTuple):
    """The library's, as far as it is used."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module of tables."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity"):
        module: Any = ModuleType(name)
        module.BlockSparseTensorsTorch = Tables
        monkeypatch.setitem(sys.modules, name, module)


def test_grouped_heads_are_in_the_inputs_the_configuration_and_the_words() -> None:
    case = CASES["random-32k-10-gqa"]
    small = case.small()
    shapes = [tuple(x.shape) for x in small.inputs("cpu")]
    assert shapes == [(1, 1024, 16, 64), (1, 1024, 4, 64), (1, 1024, 4, 64), (1, 1024, 16, 64)]
    config: dict[str, Any] = case.to_dict()["config"]
    assert case.config("auto", device="cpu").kv_heads == config["num_kv_heads"] == 4
    assert "16/4 heads of 64" in str(case)
    assert CASES["longnet-4k"].num_kv_heads == 8
    peer = dense_sdpa(small, "cpu")
    assert peer is not None
    assert peer.attend(*small.inputs("cpu")[:3]).shape == small.shape


@pytest.mark.parametrize(
    "case",
    [
        attrs.evolve(CASE, is_causal=True),
        attrs.evolve(CASE, seq_len=700),
        attrs.evolve(CASE, pattern=Random(density=0.4, block_size=64)),
        attrs.evolve(CASE, pattern=Local(window_size=64)),
        CASES["longnet-4k"],
    ],
    ids=str,
)
def test_the_baseline_takes_full_blocks_alone(case: BenchCase) -> None:
    assert fa4_tables.tables(case, "cpu") is None


@pytest.mark.usefixtures("library")
def test_the_baseline_lists_the_blocks_of_each_row_and_of_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    listed = fa4_tables.listed

    def keep(*arguments: Any, **named: Any) -> Any:
        made.append(listed(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(fa4_tables, "listed", keep)
    assert fa4_tables.tables(CASE, "cpu") is not None
    geometry = Geometry.self_attention(CASE.seq_len, CASE.num_heads)
    seen = multiplicity(CASE.pattern, geometry).numpy()[:, ::128, ::128]
    for tables, expected in zip(made, (seen, seen.transpose(0, 2, 1)), strict=True):
        found = np.zeros_like(expected)
        for head, row in np.ndindex(*expected.shape[:2]):
            for column in tables.full_block_idx[0, head, row, : int(tables.full_block_cnt[0, head, row])].tolist():
                found[head, row, column] += 1
        assert np.array_equal(found, expected)
        assert not tables.mask_block_cnt.any()
