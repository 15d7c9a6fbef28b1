"""Sharded attention on real processes over Gloo, forward and backward, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention import (
    AttentionConfig,
    ContextParallel,
    Dilated,
    Full,
    Global,
    HeadShard,
    Limits,
    Local,
    Pattern,
    Random,
    Strided,
)  # fmt: skip
from dilated_attention.core import reference

from .ring_cases import exact, ordered, streamed, tensors_of
from .ring_ranks import Ranks
from .support import error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def expected(config: AttentionConfig, batch: int, *, through_lse: bool, seed: int = 0) -> list[torch.Tensor]:
    """The oracle's five results."""
    query, key, value, dout, dlse = (x.double() for x in tensors_of(config, batch, seed))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert isinstance(config.pattern, Pattern)
    out, lse = reference.attention(*leaves, pattern=config.pattern, is_causal=config.is_causal)
    outputs, grads = ([out, lse], [dout, dlse]) if through_lse else ([out], [dout])
    return [out, lse, *torch.autograd.grad(outputs, leaves, grads)]


def joined(results: list[Any], ring: int) -> list[torch.Tensor]:
    """Whole tensors from the shards of the first `ring` ranks."""
    shards = [[torch.from_numpy(x) for x in result[0]] for result in results[:ring]]
    return [torch.cat(parts, dim) for parts, dim in zip(zip(*shards, strict=True), (1, 2, 1, 1, 1), strict=True)]


def worst(ranks: Ranks, fields: dict[str, Any], size: int, *, batch: int = 1, through_lse: bool = False) -> float:
    """The largest error over out, lse, dq, dk, dv on `size` ranks."""
    results = ranks.run(exact, fields, size, batch, through_lse)
    return off(results, fields, size, batch=batch, through_lse=through_lse)


def off(results: list[Any], fields: dict[str, Any], size: int, *, batch: int, through_lse: bool) -> float:
    """The largest error of these results of `exact`."""
    parallel = fields.get("context_parallel")
    config = AttentionConfig(**{**fields, "context_parallel": None})
    ring = size if parallel is None else parallel.size
    truth = expected(config, batch, through_lse=through_lse)
    return max(error(a, e) for a, e in zip(joined(results, ring), truth, strict=True))


LONGNET = Dilated((16, 32, 64, 256), (1, 2, 4, 8))
PATTERNS: list[Pattern] = [
    LONGNET, Full(), Strided(5), Local(9) | Global(3), Random(2, 16), Random(2, 8) + Dilated((24, 120), (2, 5)),
]  # fmt: skip


def config_of(pattern: Pattern, **fields: Any) -> dict[str, Any]:
    return {"pattern": pattern, "num_heads": 4, "head_dim": 8, "is_causal": True, "seq_len": 240, **fields}


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_results_and_gradients_are_the_oracles(ranks: Ranks, pattern: Pattern, size: int) -> None:
    """Every pattern on every number of ranks; both kinds of calls for each of either."""
    is_plain = (PATTERNS.index(pattern) + size) % 2 == 0
    fields = config_of(pattern, is_causal=is_plain, num_kv_heads=4 if is_plain else 2)
    assert worst(ranks, fields, size, batch=1 if is_plain else 2, through_lse=not is_plain) < 1e-5


def test_ranks_that_have_some_of_a_models_heads(ranks: Ranks) -> None:
    whole = Dilated((16, 64, 256), (1, 2, 8)) | Random(2, 16)
    shard = HeadShard(whole, first_head=4, total_heads=12, total_kv_heads=1)
    assert worst(ranks, config_of(shard), 3, through_lse=True) < 1e-5


def test_float64_is_exact_and_checkpointing_changes_nothing(ranks: Ranks) -> None:
    for checkpointing in (False, True):
        fields = config_of(LONGNET + Local(5), dtype="float64", activation_checkpointing=checkpointing)
        assert worst(ranks, fields, 3, through_lse=True) < 1e-12


def test_bfloat16_keeps_its_precision(ranks: Ranks) -> None:
    assert worst(ranks, config_of(LONGNET, dtype="bfloat16"), 4) < 1e-2


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_small_budget_makes_shards_travel_hop_by_hop(ranks: Ranks, pattern: Pattern) -> None:
    for is_causal, size in ((True, 4), (False, 3)):
        fields = config_of(pattern, is_causal=is_causal, num_kv_heads=2, limits=Limits(exchange_buffer_bytes=1))
        results = ranks.run(exact, fields, size, 2, True)
        assert off(results, fields, size, batch=2, through_lse=True) < 1e-5
        row = 2 * 2 * 2 * 8 * 4  # batch 2, K and V, 2 heads of 8 floats
        for _, counters in results[:size]:
            assert counters["forward_sent"] == counters["forward_received"] == (size - 1) * (240 // size) * row
            assert counters["backward_sent"] == (2 * size - 1) * (240 // size) * row


STRADDLING = [
    LONGNET,
    Local(9) | Global(3),
    Dilated((7, 50), (1, 3)) + Local(12),
    Dilated((24, 240), (2, 6), offsets_by="kv_head"),
    Random(2, 16),  # its draw depends on how long the sequence is
]


@pytest.mark.parametrize("pattern", STRADDLING, ids=repr)
@pytest.mark.parametrize("budget", [1 << 30, 1], ids=["selective", "hops"])
def test_a_kernel_for_whole_layouts_and_its_companion_are_exact(ranks: Ranks, pattern: Pattern, budget: int) -> None:
    """Its own keys (or every hop's) by `reference`, staged rows by `sdpa`."""
    for size, is_causal, dtype, bound in (
        (2, True, "float64", 1e-12), (3, False, "float64", 1e-12), (4, True, "float32", 1e-5),
    ):  # fmt: skip
        kv_heads = 2 if size == 3 or not is_causal else 4
        fields = config_of(pattern, is_causal=is_causal, num_kv_heads=kv_heads, dtype=dtype, backend="reference")
        fields["limits"] = Limits(exchange_buffer_bytes=budget)
        assert worst(ranks, fields, size, batch=2 - size % 2, through_lse=size != 4) < bound


def test_a_kernel_for_whole_layouts_in_bfloat16(ranks: Ranks) -> None:
    assert worst(ranks, config_of(LONGNET, dtype="bfloat16", backend="reference"), 4) < 1e-2


def test_matrix_products_take_every_head_dim(ranks: Ranks) -> None:
    for dtype, bound in (("float64", 1e-12), ("float32", 1e-5)):
        fields = config_of(LONGNET + Local(5), dtype=dtype, backend="math", head_dim=264)
        assert worst(ranks, fields, 3, through_lse=True) < bound


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("budget", [1 << 30, 1], ids=["selective", "hops"])
def test_ranks_without_pairs_of_their_own_and_batches_of_none(ranks: Ranks, backend: str, budget: int) -> None:
    """Of 4 ranks with 4 tokens each, two keep no position in any of the 4 heads."""
    fields = config_of(Dilated((16,), (8,)), seq_len=16, backend=backend, limits=Limits(exchange_buffer_bytes=budget))
    assert worst(ranks, fields, 4, batch=2, through_lse=True) < 1e-5
    for (out, lse, *grads), counters in ranks.run(exact, fields | {"pattern": LONGNET + Local(5)}, 4, 0, True):
        assert (out.shape, lse.shape) == ((0, 4, 4, 8), (0, 4, 4))
        assert [grad.shape for grad in grads] == [(0, 4, 4, 8)] * 3
        assert counters["forward_sent"] == counters["backward_sent"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_eight_ranks(pattern: Pattern, tmp_path: Path) -> None:
    pool = Ranks(8, tmp_path)
    for is_causal, budget in ((True, 1 << 30), (False, 1 << 30), (True, 1)):
        limits = Limits(exchange_buffer_bytes=budget)
        assert worst(pool, config_of(pattern, is_causal=is_causal, limits=limits), 8, batch=2) < 1e-5
    pool.close()


@pytest.mark.parametrize("launches_first", [True, False], ids=["launched first", "posted first"])
def test_own_keys_hide_that_others_are_waited_for(ranks: Ranks, launches_first: bool) -> None:
    """Launched first where that costs nothing, with the rest aside, else once rows are under way."""
    fields = config_of(LONGNET, backend="reference", dtype="float64")
    told = ranks.run(ordered, fields, 4, launches_first)

    def beside(made: str) -> list[str]:
        if launches_first:
            return ["announce", "mark 1", "own keys", "aside after 1", made, "agree", "post"]
        return ["announce", made, "agree", "post", "own keys"]

    last = 2 if launches_first else 0
    forward = [*beside("pack"), "wait", "received keys"]
    backward = [word.replace("1", "2") for word in beside("received keys")]
    backward += [f"mark {last + 1}", "wait", f"aside after {last + 1}", "sum", "unpack", "rejoin"]
    for seen, _ in told:
        assert seen == forward + backward
    truth = expected(AttentionConfig(**fields), 1, through_lse=False)
    found = joined([(results, None) for _, results in told], 4)
    assert max(error(a, e) for a, e in zip(found, truth, strict=True)) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "pattern", [LONGNET, Strided(5), Dilated((16,), (4,)), Local(9) | Global(3), Random(2, 8) + Dilated((24,), (2,))]
)
def test_what_runs_beside_own_keys_touches_nothing_too_early(ranks: Ranks, pattern: Pattern, dtype: str) -> None:
    """As on two streams: two ranks' own keys and the rest, in order where they meet, each in memory of its own."""
    through_lse = dtype == "float32"
    fields = config_of(pattern, backend="sdpa", dtype=dtype)
    told = ranks.run(streamed, fields, 4, through_lse)
    assert [found for found, _ in told] == [[]] * 4
    truth = expected(AttentionConfig(**fields), 2, through_lse=through_lse)
    found = joined([(results, None) for _, results in told], 4)
    assert max(error(a, e) for a, e in zip(found, truth, strict=True)) < (1e-5 if dtype == "float32" else 2e-2)


def test_two_rings_in_one_mesh(ranks: Ranks) -> None:
    fields = config_of(LONGNET, context_parallel=ContextParallel(size=2))
    results = ranks.run(exact, fields, 4, 1, False)
    config = AttentionConfig(**{**fields, "context_parallel": None})
    truth = expected(config, 1, through_lse=False)
    for ring in (results[:2], results[2:]):
        assert max(error(a, e) for a, e in zip(joined(ring, 2), truth, strict=True)) < 1e-5
