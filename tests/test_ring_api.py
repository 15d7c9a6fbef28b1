"""How sharded attention is asked for, and what is refused; real ranks where ranks are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    ContextParallel,
    Dilated,
    Full,
    Learned,
    Local,
    Pattern,
    build_attention,
    explain,
    rebuild,
)  # fmt: skip
from dilated_attention.backends.manifest import FLEX
from dilated_attention.core.errors import RingBroken
from dilated_attention.core.plan import AttentionPlan
from dilated_attention.exchange.mesh import plan_facts
from dilated_attention.exchange.setup import pauses, with_backoff
from dilated_attention.registry.capabilities import capability_refusals, make_request
from dilated_attention.registry.device import describe_device

from .ring_cases import behaviour, perturbed, refusals, regrown
from .ring_ranks import Ranks

FIELDS: dict[str, Any] = {"num_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def test_the_request_is_a_value_that_files_hold() -> None:
    config = AttentionConfig(**FIELDS, context_parallel=ContextParallel(size=4, timeout_s=5))
    assert AttentionConfig.from_dict(config.to_dict()).context_parallel == config.context_parallel
    assert AttentionConfig.from_dict(FIELDS | {"context_parallel": {"size": 4, "timeout_s": 5}}) == config
    assert (config.ring_size, AttentionConfig(**FIELDS).ring_size) == (4, 1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"size": 0}, "ContextParallel.size must be at least 1, got 0"),
        ({"size": 2, "timeout_s": 0}, "timeout_s must be a positive number, got 0"),
        ({"size": 2, "timeout_s": 604_801}, r"timeout_s must be at most 604,800 seconds \(a week\), got 604801"),
        ({"size": 2, "transport": "gloo"}, r"gloo_cpu, ring_nccl; got 'gloo' \(did you mean 'gloo_cpu'\?\)"),
        (4, r"context_parallel must be None, a ContextParallel\(size=...\) or, in a file, a table; got 4"),
    ],
)
def test_wrong_requests_are_refused(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttentionConfig.from_dict(FIELDS | {"context_parallel": value})


def test_lengths_devices_patterns_and_backends_that_cannot_be_shared_are_refused() -> None:
    ring = ContextParallel(size=4)
    with pytest.raises(ConfigError, match=r"multiple of context_parallel.size, got 90 and 4; the next multiple is 92"):
        AttentionConfig(**FIELDS, context_parallel=ring, seq_len=90)
    with pytest.raises(ConfigError, match=r"no transport 'ring_nccl' for device 'cpu'.*gloo_cpu serves cpu"):
        explain(**FIELDS, context_parallel={"size": 4, "transport": "ring_nccl"})
    with pytest.raises(ConfigError, match=r"learned pattern chooses its blocks from the whole sequence"):
        explain(**FIELDS, context_parallel=ring, pattern=Learned(block_size=16, blocks_per_row=2))
    said = "context_parallel: needs parts of a sequence that ranks share (context_parallel.size={}), has none declared"
    lacking = attrs.evolve(FLEX, capabilities={k: v for k, v in FLEX.capabilities.items() if k != "context_parallel"})
    for size in (4, 1):  # `rebuild` may make one rank several
        config = AttentionConfig(**FIELDS, context_parallel=ContextParallel(size=size))
        request = make_request(config, Full(), describe_device("cpu"))
        assert said.format(size) in [str(refusal) for refusal in capability_refusals(request, lacking)]
        assert "context_parallel" not in [refusal.code for refusal in capability_refusals(request, FLEX)]


def test_a_backend_for_whole_layouts_needs_a_companion_for_dense_pieces() -> None:
    fields: dict[str, Any] = FIELDS | {"context_parallel": ContextParallel(size=4), "backend": "reference"}
    plan = explain(fields)
    assert plan.backend == "reference"
    assert plan.exchange is not None
    assert (plan.exchange.companion, plan.exchange.companion_kernel) == ("sdpa", "aten flash for CPU")
    said = "          reference over a rank's own keys, sdpa (aten flash for CPU) over received ones"
    assert said in plan.explain().splitlines()
    assert AttentionPlan.from_json(plan.to_json()) == plan
    moved = attrs.evolve(plan, exchange=attrs.evolve(plan.exchange, companion="fa3"))
    assert moved.digest != plan.digest
    assert plan_facts(moved)["companion"] == "fa3"
    assert explain(fields, head_dim=300).exchange == attrs.evolve(
        plan.exchange, companion="math", companion_kernel="matrix products"
    )
    wide = explain(fields, head_dim=300, arch="sm_90", deterministic=True)  # more than any dense kernel takes there
    assert wide.backend is None
    assert wide.rows[0].name == "reference"
    assert [str(refusal) for refusal in wide.rows[0].refusals] == [
        "companion: needs another backend for dense pieces over the rows that other ranks send, has none that takes "
        "this request; see the other rows"
    ]
    assert wide.rows[0].near_miss is not None
    assert wide.rows[0].near_miss.changes == {"deterministic": False}  # no head_dim is out of its own range
    alone = explain(fields, head_dim=300, arch="sm_90", deterministic=True, context_parallel=ContextParallel(size=1))
    assert alone.backend is None
    assert "companion: needs another backend" in alone.explain()


def test_the_plan_is_a_tree() -> None:
    plan = explain(**FIELDS, context_parallel=ContextParallel(size=4, timeout_s=7))
    assert plan.backend == "sdpa"
    assert plan.exchange is not None
    assert (plan.exchange.transport, plan.exchange.size, plan.exchange.timeout_s) == ("gloo_cpu", 4, 7.0)
    assert "  ring    gloo_cpu over 4 ranks, timeout 7 s, around each rank's own" in plan.explain().splitlines()
    assert AttentionPlan.from_json(plan.to_json()) == plan
    assert plan.compile_class == "none"


def test_a_mesh_is_needed_exactly_where_ranks_share() -> None:
    with pytest.raises(ConfigError, match=r"mesh must be a torch DeviceMesh.*got None"):
        build_attention(**FIELDS, context_parallel=ContextParallel(size=2))
    with pytest.raises(ConfigError, match="mesh is for context_parallel=ContextParallel"):
        build_attention(**FIELDS, mesh="cp")
    alone = build_attention(**FIELDS, context_parallel=ContextParallel(size=1))
    x = torch.randn(1, 6, 2, 8)
    assert torch.equal(alone(x, x, x), build_attention(**FIELDS)(x, x, x))
    with pytest.raises(ConfigError, match="rebuild found no attention"):
        rebuild(build_attention(**FIELDS), mesh=None, generation=1)
    with pytest.raises(ConfigError, match=r"dropout_p=0\.5 with context_parallel: no attention that ranks share drops"):
        build_attention(**FIELDS, dropout_p=0.5, context_parallel=ContextParallel(size=1))


@pytest.mark.parametrize(
    ("pattern", "parts", "same"),
    [
        (Local(5), 4, True),
        (Dilated((8, 32), (1, 4)), 2, True),
        (Dilated((8, 32), (1, 4)), 4, False),  # two heads each, whose offsets are 0 and 1
        (Dilated((8, 32), (1, 4), offsets="blocked"), 2, False),
        (Dilated((8, 32), (1, 4), heads="split"), 2, False),
    ],
    ids=str,
)
def test_heads_of_a_tensor_parallel_rank_are_numbered_from_0(pattern: Pattern, parts: int, same: bool) -> None:
    query, key, value = torch.randn(3, 1, 32, 8, 8, dtype=torch.float64)
    fields: dict[str, Any] = {"head_dim": 8, "pattern": pattern, "is_causal": True, "dtype": "float64"}
    whole = build_attention(fields, num_heads=8)(query, key, value)
    part = build_attention(fields, num_heads=8 // parts)
    split = [part(*heads) for heads in zip(*(x.chunk(parts, 2) for x in (query, key, value)), strict=True)]
    assert torch.allclose(torch.cat(split, 2), whole, rtol=0, atol=1e-12) == same


def test_set_up_is_tried_again_with_growing_pauses_until_its_deadline() -> None:
    drawn = iter([0.0, 1.0] * 6)
    found = [pause for pause, _ in zip(pauses(lambda: next(drawn)), range(8), strict=False)]
    assert found == [0.025, 0.1, 0.1, 0.4, 0.4, 1.6, 1.0, 2.0]
    import time

    tries: list[int] = []

    def flaky(number: int) -> str:
        tries.append(number)
        if number < 2:
            raise OSError("connection refused")
        return "connected"

    assert with_backoff(flaky, time.monotonic() + 10) == "connected"
    assert tries == [0, 1, 2]

    def hopeless(number: int) -> str:
        raise OSError("connection refused")

    before = time.monotonic()
    with pytest.raises(OSError, match="connection refused"):
        with_backoff(hopeless, before + 0.3)
    assert time.monotonic() - before < 0.5


def test_ring_broken_travels_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RingBroken(3, 7, 2, "it is gone")))
    assert (error.generation, error.step, error.peer, error.reason) == (3, 7, 2, "it is gone")
    assert str(error) == "the ring is broken (generation 3, pass 7, rank 2): it is gone"


def test_ranks_shard_unshard_count_positions_and_refuse(ranks: Ranks) -> None:
    for rank, said in enumerate(ranks.run(refusals)):
        assert said["positions"] == [3 * rank + i for i in range(3)]
        assert said["whole"]
        assert said["last"]
        assert said["dim"] == "dim must be one of the 3 dimensions of a tensor of shape (1, 12, 2), got 3"
        assert "(1, 3, 2), got -4" in said["minus"]
        assert said["list"] == "what ranks share must be a tensor, got [1] (list); torch.as_tensor makes one"
        assert said["array"].startswith("what ranks share must be a tensor, got array([[[ 0.,")
        uneven = "got (1, 2, 2) torch.float32 on rank 3; (1, 3, 2) torch.float32 on rank 0, 1, 2"
        assert said["uneven"] == f"shards must be of one shape and dtype on all ranks, {uneven}"
        assert "(1, 3, 2) torch.float32 on rank 0, 2, 3; (1, 3, 2) torch.float64 on rank 1" in said["dtypes"]
        words = f"this rank, {rank}, is not in the mesh, of ranks 0, 1: call this on those alone"
        assert said.get("outside") == (None if rank < 2 else words)
        assert "cannot be cut into 4 equal shards; the nearest lengths are 8 and 12" in said["length"]
        assert "must divide the 4 ranks of the mesh, got 3; it can be 1, 2, 4" in said["size"]
        assert "must have one dimension, got 2 ('dp', 'cp')" in said["dims"]
        assert "gathers values, not gradients" in said["gradient"]
        assert "take shards of equal lengths and no offsets" in said["offsets"]
        assert "a ring of 4 ranks computes whole calls of one sequence only" in said["alone"]
        assert "a ring of 4 ranks" in said["received"]
        assert "torch.func does not reach over ranks" in said["func"]
        assert "batched gradients (is_grads_batched, vectorize=True) do not reach over ranks" in said["batched"]
        for name, given in (("padding", "key_padding_mask: "), ("packing", "cu_seqlens: "), ("cache", "make_cache: ")):
            assert said[name].startswith(f"{given}a ring of 4 ranks computes whole calls of one sequence only"), name
            assert said[name].endswith("build without context_parallel for those")
            assert "backend" not in said[name]


def test_one_ring_serves_a_model_and_leaves_no_trace_in_it(ranks: Ranks) -> None:
    for said in ranks.run(behaviour):
        assert said["state_dict"] == []
        assert said["shared"]
        assert said["checkpoint_equal"]
        assert said["selective_equal"]
        assert said["submesh"] < 1e-6
        assert said["groups_kept"]
        assert said["prepared"] == [24, 48]


def test_one_rank_built_with_a_kernel_for_whole_layouts_becomes_several_and_one_again(ranks: Ranks) -> None:
    for said in ranks.run(regrown):
        assert said["companion"] == ("sdpa", "aten flash for CPU")
        assert said["ring"] < 1e-12
        assert said["alone"] < 1e-12
        assert "a ring of 4 ranks computes whole calls of one sequence only" in said["received"]


def test_a_remote_key_moves_exactly_the_rows_that_see_it(ranks: Ranks) -> None:
    pattern = Dilated((8, 48), (1, 4))
    moved = [row for part in ranks.run(perturbed, pattern, 48, 4) for row in part]
    # Position 4 is kept at rate 4 by head 0 (offset 0), at rate 1 in its segment 0..7 by both heads.
    expected = {(p, h) for p in range(4, 8) for h in (0, 1)} | {(p, 0) for p in range(4, 48, 4)}
    assert set(moved) == expected
