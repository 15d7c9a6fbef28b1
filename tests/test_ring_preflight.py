"""What is said of a ring before it runs: counted without listing, and equal to the counters of real ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    ContextParallel,
    Dilated,
    Full,
    Global,
    Learned,
    Limits,
    Local,
    Pattern,
    Random,
    explain,
    preflight,
    presets,
)  # fmt: skip
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower

from .conftest import Invoke
from .distributions import as_json
from .ring_cases import exact, watched
from .ring_ranks import Ranks


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_are_shared_out_whole(is_causal: bool) -> None:
    for pattern in (Dilated((7, 24, 96), (1, 2, 5)), Full(), Local(5) | Global(2)):
        fields: dict[str, Any] = {"pattern": pattern, "num_heads": 4, "num_kv_heads": 2, "is_causal": is_causal}
        costs = preflight(**fields, head_dim=8, seq_len=96, ranks=6, batch=3)
        geometry = Geometry(q_len=96, kv_len=96, num_heads=4, num_kv_heads=2, is_causal=is_causal)
        assert sum(load.flops for load in costs.loads) == 3 * 4 * 8 * lower(pattern, geometry).pairs
        assert costs.imbalance >= 1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "pattern", [Dilated((8, 64, 240), (1, 2, 12)), Random(2, 8) + Dilated((240,), (3,)), Full(), Local(9)], ids=repr
)
def test_counters_of_real_ranks_are_equal_to_the_byte(ranks: Ranks, pattern: Pattern) -> None:
    for dtype, budget in (("float32", 1 << 30), ("bfloat16", 1 << 30), ("float32", 1)):
        fields: dict[str, Any] = {
            "pattern": pattern, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "is_causal": True, "seq_len": 240,
            "dtype": dtype, "limits": Limits(exchange_buffer_bytes=budget),
        }  # fmt: skip
        costs = preflight(**fields, ranks=4, batch=2)
        for load, (_, counters) in zip(costs.loads, ranks.run(exact, fields, 4, 2, False), strict=True):
            for name in ("forward_received", "forward_sent", "backward_received", "backward_sent"):
                assert counters[name] == getattr(load, name), (name, load)
            assert counters["passes"] == 2
            assert counters["header_bytes"] == 2 * 3 * 55


@pytest.mark.parametrize(
    ("pattern", "budget", "backend"),
    [
        (Dilated((8, 64, 240), (1, 2, 12)), 1 << 30, "sdpa"),
        (Dilated((8, 64, 240), (1, 2, 12)), 1, "reference"),
        (Random(2, 8) | Local(9), 1 << 30, "reference"),
        (Random(2, 8) | Local(9), 1, "sdpa"),
    ],
    ids=["selective-branches-sdpa", "hops-branches-reference", "selective-blocks-reference", "hops-blocks-sdpa"],
)
def test_an_attention_counts_what_it_moved_and_computed_by_itself(
    ranks: Ranks, pattern: Pattern, budget: int, backend: str
) -> None:
    fields: dict[str, Any] = {
        "pattern": pattern, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "is_causal": True, "seq_len": 240,
        "limits": Limits(exchange_buffer_bytes=budget), "backend": backend,
    }  # fmt: skip
    costs = preflight(**fields, ranks=4)
    results = ranks.run(watched, fields, 4)
    for load, (counters, ranges) in zip(costs.loads, results, strict=True):
        forward, backward = counters.forward, counters.backward
        assert (forward.sent_bytes, forward.received_bytes) == (load.forward_sent, load.forward_received)
        assert (backward.sent_bytes, backward.received_bytes) == (load.backward_sent, load.backward_received)
        assert (forward.calls, forward.tokens, forward.flops) == (1, 60, load.flops)
        assert (backward.calls, backward.tokens, backward.flops) == (1, 60, load.flops * 5 // 2)
        assert (counters.layouts.hits, counters.layouts.misses, counters.header_bytes) == (1, 1, 2 * 3 * 55)
        passes = {f"dilated_attention {backend} {name} (plan {counters.plan})" for name in ("forward", "backward")}
        assert passes <= ranges
    ranges = results[2][1]
    if budget == 1:
        steps = {f"ring step {step} receive from 1" for step in (1, 2, 3)}
        assert steps | {f"keys of rank {owner}" for owner in range(4)} <= ranges
    else:
        assert {"own keys", "received keys"} <= ranges
        assert any(name.startswith("ring step 1 receive from ") for name in ranges)


def test_dilated_attention_moves_a_hundredth_of_what_a_full_ring_does() -> None:
    lengths, rates = tuple(512 << i for i in range(8)), tuple(1 << i for i in range(8))
    costs = preflight(pattern=Dilated(lengths, rates), num_heads=8, head_dim=64, is_causal=True, seq_len=65536, ranks=4)
    assert lengths[-1] == 65536
    assert costs.saving == 96
    dense = preflight(num_heads=8, head_dim=64, is_causal=True, seq_len=65536, ranks=4, pattern=Full())
    assert dense.saving == 1


def test_the_published_volume_of_a_million_tokens() -> None:
    # w = 2048 * 2**i, r = 2**i up to the whole sequence: the last of 8 ranks gets 3072 rows a head, nested ones once.
    lengths, rates = tuple(2048 << i for i in range(10)), tuple(1 << i for i in range(10))
    costs = preflight(
        pattern=Dilated(lengths, rates), num_heads=1, head_dim=64, is_causal=True, seq_len=1 << 20, ranks=8
    )
    row = 2 * 64 * 4
    assert max(load.forward_received for load in costs.loads) == 3072 * row
    assert costs.full_ring_bytes == 917_504 * row


def test_a_thousand_ranks_and_a_billion_tokens_take_seconds() -> None:
    lengths, rates = tuple(2048 << i for i in range(20)), tuple(1 << i for i in range(20))
    before = time.process_time()
    costs = preflight(
        pattern=Dilated(lengths, rates), num_heads=2, head_dim=64, is_causal=True, seq_len=1 << 30, ranks=1024
    )
    assert time.process_time() - before < 30
    assert len(costs.loads) == 1024
    assert sum(load.forward_sent for load in costs.loads) == sum(load.forward_received for load in costs.loads) > 0


@pytest.mark.parametrize(
    "pattern",
    [
        Dilated(tuple(2048 << 2 * i for i in range(5)), tuple(1 << 2 * i for i in range(5))),
        Dilated((2048, 1_024_000_000), (1, 512)),
        Local(2048) | Global(64),
    ],
    ids=["longnet", "branch-over-all", "local-global"],
)
def test_a_million_ranks_take_seconds(pattern: Pattern) -> None:
    before = time.process_time()
    costs = preflight(
        pattern=pattern, num_heads=16, head_dim=64, dtype="bfloat16", is_causal=True, seq_len=1_024_000_000,
        ranks=1_000_000,
    )  # fmt: skip
    assert len(str(costs).splitlines()) < 12
    assert time.process_time() - before < 30
    totals = costs.totals
    assert totals.forward_sent.sum() == totals.forward_received.sum() > 0


@pytest.mark.parametrize(
    "pattern", [presets.bigbird(), Random(8) | Dilated((1 << 20,), (512,))], ids=["bigbird", "drawn"]
)
def test_a_thousand_ranks_that_are_not_alike_take_seconds(pattern: Pattern) -> None:
    before = time.process_time()
    totals = preflight(
        pattern=pattern, num_heads=16, head_dim=64, dtype="bfloat16", is_causal=True, seq_len=1 << 20, ranks=1024
    ).totals
    assert time.process_time() - before < 15
    assert totals.forward_sent.sum() == totals.forward_received.sum() > 0


def test_what_cannot_be_simulated_is_said() -> None:
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "ranks": 3}
    with pytest.raises(ConfigError, match="give seq_len"):
        preflight(**fields)
    with pytest.raises(ConfigError, match="ranks must be at most 1,048,576, got 100,000,000"):
        preflight(**fields | {"ranks": 10**8}, seq_len=10**9)
    with pytest.raises(ConfigError, match=r"100 tokens cannot be cut into 3 equal shards.*99 and 102"):
        preflight(**fields, seq_len=100)
    with pytest.raises(ConfigError, match=r"learned pattern chooses its blocks from the whole sequence"):
        preflight(**fields, seq_len=99, pattern=Learned(block_size=3, blocks_per_row=2))


def test_explain_shows_ranks(invoke: Invoke) -> None:
    arguments = "explain --heads 4 --head-dim 8 --causal --seq-len 4096 --segment-lengths 64,4096 --dilation-rates 1,64"
    done = invoke(*arguments.split(), "--ranks", "4", "--batch", "2", "--json")
    assert done.returncode == 0
    data = json.loads(done.stdout)
    ring = {"transport": "gloo_cpu", "size": 4, "timeout_s": 60.0, "companion": None, "companion_kernel": ""}
    assert data["exchange"] == ring
    config = AttentionConfig(
        num_heads=4, head_dim=8, is_causal=True, seq_len=4096, pattern=Dilated((64, 4096), (1, 64))
    )
    costs = preflight(config, ranks=4, batch=2)
    assert [load["forward_received"] for load in data["preflight"]["loads"]] == [
        load.forward_received for load in costs.loads
    ]
    text = invoke(*arguments.split(), "--ranks", "64").stdout
    assert "gloo_cpu over 64 ranks" in text
    assert "attention over 4,096 tokens: 4 heads" in text
    assert "MFLOP forward" in text
    assert "planned without the length" not in text
    assert "4,096 tokens over 64 ranks, batch 1, selective" in text
    rows = [line for line in text.splitlines() if line[:2].strip().isdigit()]
    assert f"  {len(rows)} of 64 ranks: the first, the last, and those with the most in a column\n" in text
    assert 2 <= len(rows) < 10
    assert "the first, the last" not in invoke(*arguments.split(), "--ranks", "4").stdout


def test_explain_names_the_kernel_that_a_ring_of_that_length_gets(invoke: Invoke) -> None:
    """cuDNN is chosen where every piece is long enough, which takes a length to say."""
    flags = "--heads 8 --head-dim 64 --dtype bfloat16 --arch h100 --backend sdpa --seq-len 1048576 --ranks 64 --json"
    plan = as_json(invoke("explain", *flags.split()))
    asked: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": "bfloat16", "backend": "sdpa", "seq_len": 1 << 20}
    expected = explain(**asked, arch="h100", context_parallel=ContextParallel(size=64))
    assert (plan["kernel"], plan["config"]["seq_len"]) == (expected.kernel, 1 << 20)
    assert plan["kernel"] != explain(**asked | {"seq_len": None}, arch="h100").kernel
    assert plan["layout"]["flops"] == expected.layout.flops


def test_a_length_that_is_not_planned_for_is_said(invoke: Invoke) -> None:
    command = ("explain", "--heads", "2", "--head-dim", "8", "--ranks", "64", "--seq-len", str(1 << 32))
    told = "which may take minutes beyond 67,108,864 tokens; with it another kernel may"
    text = invoke(*command).stdout
    assert f"planned without the length, {told}" in text
    assert "; lowered by each rank for its own rows\n" in text
    assert as_json(invoke(*command, "--json"))["planned_without_length"].startswith(told)


def test_the_table_of_a_whole_sequence_may_be_larger_than_a_rank_is_allowed(invoke: Invoke, tmp_path: Path) -> None:
    """A build of that length is refused alone, and over a ring only where a rank's own rows take more."""
    fields = 'num_heads = 2\nhead_dim = 8\npattern = {kind = "random", blocks_per_row = 4}\nseq_len = 65536\n'
    (tmp_path / "config.toml").write_text(f"{fields}limits = {{layout_bytes = 20_000}}\n")
    text = invoke("explain", str(tmp_path / "config.toml"), "--ranks", "64").stdout
    assert "over 65,536 tokens" in text
    assert "; lowered by each rank for its own rows\n" in text
    with pytest.raises(ConfigError, match=r"raise Limits\.layout_bytes"):
        explain(AttentionConfig.from_file(tmp_path / "config.toml"))


def test_a_ring_in_which_nothing_travels_says_so() -> None:
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "pattern": Dilated((16,), (1,)), "seq_len": 64}
    assert "\n  nothing travels; a full ring would bring 6,144 bytes to a rank\n" in str(preflight(**fields, ranks=4))
    assert "\n  nothing travels\n" in str(preflight(**fields, ranks=1))
    assert "times fewer than a full ring's 6,144\n" in str(preflight(**fields | {"pattern": Local(1)}, ranks=4))
