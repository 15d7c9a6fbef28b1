"""Building: arguments in their several forms, patterns from mappings, and what is said about wrong names."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

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
    Strided,
    build_attention,
    explain,
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backend": "sdap"}, ["unknown backend 'sdap'", "did you mean 'sdpa'", "registered are ", ", reference"]),
        ({"backend_options": {"spda": {}}}, ["backend_options", "did you mean 'sdpa'"]),
        ({"backend_options": {"sdpa": {"kernle": 1}}}, ["kernle", "did you mean 'kernel'"]),
        ({"backend_options": {"triton": {"unproven": True}}}, ["unproven", "did you mean 'unproven_card'"]),
        ({"backend_options": {"math": {"a": 1}}}, ["backend_options['math'] has no 'a'; it takes nothing"]),
        ({"device": "cdua"}, ["no device 'cdua'", "did you mean 'cuda'"]),
        ({"head_dims": 3}, ["'head_dims'", "did you mean 'head_dim'"]),
        ({"enable_gqa": True}, ["no 'enable_gqa'", "num_kv_heads"]),
        ({"attn_mask": None}, ["no 'attn_mask'", "pattern", "key_padding_mask"]),
        ({"embed_dim": 64}, ["head_dim, which is embed_dim // num_heads"]),
        ({"arch": "sm_90"}, ["explain(..., arch=...)", "for its device"]),
        ({"segment_length": [3]}, ["did you mean 'segment_lengths' of the pattern"]),
        ({"pattern": {"kind": "dialted"}}, ["unknown pattern 'dialted'", "did you mean 'dilated'", "local"]),
        ({"pattern": {"kind": "dilated", "segment_length": [4]}}, ["did you mean 'segment_lengths'"]),
        ({"pattern": {"kind": "dilated", "dilated_ratio": [4]}}, ["did you mean 'dilation_rates'"]),
        ({"pattern": {"kind": "dilated", "segment_lengths": [4]}}, ["needs dilation_rates"]),
        ({"pattern": {"kind": "dilated", "segment_lengths": 4, "dilation_rates": 1}}, ["sequences of integers", "4"]),
        ({"pattern": {"kind": "dilated", "segment_lengths": [], "dilation_rates": []}}, ["empty"]),
        ({"pattern": {"kind": "local", "window_size": -1}}, ["window_size", "-1"]),
        ({"pattern": {"kind": "local", "window_size": "8"}}, ["window_size", "'8'"]),
        ({"pattern": {"kind": "sum", "off": []}}, ["did you mean 'of'"]),
        ({"pattern": {"kind": "sum"}}, ["needs 'of'"]),
        ({"pattern": {"kind": "union", "of": []}}, ["at least one pattern"]),
        ({"pattern": {"kind": "union", "of": ["full"]}}, ["mapping with 'kind'", "'full'"]),
        ({"pattern": {"kind": "full", "x": 1}}, ["has no 'x'", "takes nothing"]),
    ],
)
def test_names_that_do_not_exist_are_told_the_nearest(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_attention(**{"num_heads": 8, "head_dim": 64} | fields)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Dilated((8, 16), (1, 2), offsets="blocked"),
        Local((3, 0)),
        Global(4) | Local(2),
        (Strided(3) + Full()) | Dilated((4,), (2,)),
    ],
)
def test_a_pattern_survives_its_mapping(pattern: Pattern) -> None:
    config = AttentionConfig(num_heads=2, head_dim=16, pattern=pattern)
    mapping = json.loads(json.dumps(config.to_dict()))
    built = build_attention(mapping)
    assert built.config.pattern == pattern
    assert built.plan.config["pattern"] == mapping["pattern"]


def test_like_gives_heads_head_dim_dtype_and_device() -> None:
    query = torch.zeros(2, 10, 4, 16, dtype=torch.bfloat16)
    built = build_attention(like=query, is_causal=True).config
    assert (built.num_heads, built.head_dim, built.dtype, built.device) == (4, 16, "bfloat16", "cpu")
    turned = build_attention(like=query.transpose(1, 2), tensor_layout="bhsd", num_kv_heads=2).config
    assert (turned.num_heads, turned.kv_heads, turned.head_dim) == (4, 2, 16)
    assert build_attention(like=query, dtype="float32").config.dtype == "float32"
    with pytest.raises(ConfigError, match=r"four dimensions 'bshd', got shape \(4, 16\)"):
        build_attention(like=query[0, 0])
    with pytest.raises(ConfigError, match="either a config or like"):
        build_attention(AttentionConfig(num_heads=4, head_dim=16), like=query)
    with pytest.raises(ConfigError, match="mesh is for context_parallel"):
        build_attention(like=query, mesh=object())


def test_explain_takes_like_as_build_attention_does() -> None:
    query = torch.zeros(2, 4, 10, 16, dtype=torch.bfloat16)
    shape: dict[str, Any] = {"tensor_layout": "bhsd", "num_kv_heads": 2}
    assert explain(like=query, **shape).digest == build_attention(like=query, **shape).plan.digest
    assert explain(like=query, dtype="float32", **shape).config["dtype"] == "float32"
    card = explain(like=query, arch="sm_80", **shape)  # though the tensor is on the CPU
    assert (card.device["arch"], card.config["num_heads"], card.config["dtype"]) == ("sm_80", 4, "bfloat16")
    with pytest.raises(ConfigError, match="either a config or like"):
        explain(AttentionConfig(num_heads=4, head_dim=16), like=query)


def test_building_takes_less_than_50_ms() -> None:
    def once() -> float:
        start = time.perf_counter()
        build_attention(num_heads=8, head_dim=64, pattern=Dilated((1024, 2048), (1, 2)), is_causal=True, device="cpu")
        return time.perf_counter() - start

    assert min(once() for _ in range(4)) < 0.05


def test_fields_replace_those_of_a_config() -> None:
    base = AttentionConfig(num_heads=4, head_dim=16)
    assert explain(base, is_causal=True).config["is_causal"]
    assert explain(base.to_dict(), head_dim=32).config["head_dim"] == 32
    with pytest.raises(ConfigError, match="did you mean 'is_causal'"):
        explain(base, causal=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="must be an AttentionConfig or a mapping"):
        explain(8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got 'a\.toml' \(str\); AttentionConfig\.from_file reads a file"):
        explain("a.toml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\(Local\); a pattern is a field: pattern=\.\.\.$"):
        build_attention(Local(4), num_heads=4, head_dim=16)  # type: ignore[arg-type]


def test_an_option_for_cards_is_refused_on_a_cpu_with_its_value() -> None:
    with pytest.raises(ConfigError, match="got 'flash'; there is one kernel on cpu, leave the option out"):
        explain(num_heads=4, head_dim=16, device="cpu", backend_options={"sdpa": {"kernel": "flash"}})


def test_a_plan_says_bands_where_dense_kernels_take_them_and_blocks_on_ranks() -> None:
    fields: dict[str, Any] = {"pattern": Local(9), "num_heads": 2, "head_dim": 8, "backend": "sdpa"}
    assert explain(**fields).layout.kinds == ("band",)
    assert explain(**fields, context_parallel=ContextParallel(size=2)).layout.kinds == ("block",)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("pattern", "is_told"),
    [
        (Local(8) | Global(2), True),
        (Local((3, 40)), True),
        (Global(50) | Local(9), True),
        (Local(3) + Local(700), False),
        (Dilated((64, 256), (1, 4)) + Global(2), False),
    ],
    ids=str,
)
def test_a_table_that_nothing_needs_may_be_larger_than_allowed(
    pattern: Pattern, is_told: bool, is_causal: bool
) -> None:
    fields: dict[str, Any] = {"pattern": pattern, "num_heads": 2, "head_dim": 8, "is_causal": is_causal}
    fields |= {"seq_len": 4096, "backend": "sdpa", "device": "cpu"}
    plan, ample = explain(**fields, limits=Limits(layout_bytes=1000)), explain(**fields)
    assert (plan.layout.pairs, plan.layout.flops) == (ample.layout.pairs, ample.layout.flops)
    wanted = (ample.layout.distinct_pairs, ample.layout.density) if is_told else (None, None)
    assert (plan.layout.distinct_pairs, plan.layout.density) == wanted
    assert (plan.layout.digest, plan.layout.nbytes) == (None, ample.layout.nbytes)
    assert (f" of {'the causal' if is_causal else 'all'} pairs" in plan.explain()) is is_told
    attention = build_attention(**fields, limits=Limits(layout_bytes=1000))
    assert attention(*[torch.zeros(1, 4096, 2, 8)] * 3).shape == (1, 4096, 2, 8)
    with pytest.raises(ConfigError, match=r"raise Limits\.layout_bytes"):
        explain(**fields | {"backend": "reference"}, limits=Limits(layout_bytes=1000))


def test_a_plan_says_what_runs_while_weights_are_dropped() -> None:
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "seq_len": 4096, "backend": "sdpa", "dropout_p": 0.1}
    said = "windows and rectangles (while weights are dropped blocks, where its kernel has no windows)"
    assert f"  layout  {said}, " in explain(**fields, pattern=Local(9)).explain()
    plan = explain(**fields, pattern=Dilated((64,), (1,)) + Local(9))
    assert f"  layout  {said} and strided branches, " in plan.explain()
    assert "dropped blocks" not in explain(**fields, pattern=Dilated((64,), (1,))).explain()
    assert explain(**fields, pattern=Local(9), limits=Limits(layout_bytes=1000)).backend == "sdpa"


@pytest.mark.parametrize(
    ("pattern", "kernel"),
    [
        (Random(2, 16), "PyTorch's matrix products"),
        (Learned(2, 16), "PyTorch's matrix products"),
        (Random(2, 16) | Local(3), "PyTorch's matrix products"),
        (Dilated((64,), (1,)) + Random(2, 16), "aten flash for CPU"),
        (Local(3), "aten flash for CPU"),
    ],
    ids=str,
)
def test_a_plan_names_what_computes_blocks_alone(pattern: Pattern, kernel: str) -> None:
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "pattern": pattern, "device": "cpu"}
    plan = explain(**fields, backend="sdpa")
    assert plan.explain().startswith(f"sdpa ({kernel}) asked for by name")
    attention = build_attention(**fields, backend="sdpa")
    (row,) = [row for row in plan.rows if row.name == "sdpa"]
    assert attention.plan.kernel == attention.counters().kernel == row.kernel == kernel
    assert f"kernel={kernel!r}" in repr(attention)
