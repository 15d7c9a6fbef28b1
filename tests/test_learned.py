"""Learned attention: exact on the blocks it keeps, blind to the future, frozen and stored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    Learned,
    Local,
    NoBackendError,
    PatternStore,
    Random,
    build_attention,
    explain,
    reference,
)
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Pattern
from dilated_attention.patterns._stored_blocks import FrozenBlocks

from . import strategies
from .learned_kit import build, learned, masked_oracle, seen_pairs
from .support import NAMES, error, inputs, oracle, ours, with_gradients


@given(learned(), strategies.geometries(), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_attention_is_exact_on_whatever_the_gate_chose(pattern: Learned, geometry: Geometry, batch: int) -> None:
    """Ragged lengths, offsets, grouped heads and batch rows that choose differently, in float32."""
    if not geometry.q_len or not geometry.kv_len:
        return
    attention = build(pattern, geometry)
    tensors = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float32)
    tables = attention.gate(*tensors[:2], q_offset=geometry.q_offset, kv_offset=geometry.kv_offset)
    sees = seen_pairs(tables, geometry, pattern.block_size)
    actual = ours(attention, tensors, geometry, through_lse=True)
    for name, a, e in zip(NAMES, actual, masked_oracle(sees, tensors, 8**-0.5), strict=True):
        assert error(a, e) < 1e-5, name


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [Learned(3, 16), Learned(block_size=16, density=0.2)], ids=str)
def test_the_frozen_choice_is_the_same_attention_for_each_batch_row(pattern: Learned, is_causal: bool) -> None:
    geometry = Geometry(q_len=237, kv_len=237, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    attention = build(pattern, geometry)
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    actual = ours(attention, tensors, geometry, through_lse=True)
    frozen = [attention.gate.freeze(tensors[0][b : b + 1], tensors[1][b : b + 1]) for b in range(2)]
    assert frozen[0] != frozen[1]
    outs = [
        reference.attention(*(x[b : b + 1].double() for x in tensors), pattern=f, is_causal=is_causal)
        for b, f in enumerate(frozen)
    ]
    out, lse = (torch.cat(parts) for parts in zip(*outs, strict=True))
    for name, a, e in zip(NAMES, actual, with_gradients(out, lse, tensors, through_lse=True), strict=True):
        assert error(a, e) < 1e-5, name


def test_half_precision_and_float64() -> None:
    geometry = Geometry.self_attention(100, 2, is_causal=True)
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        attention = build(Learned(3, 16), geometry, dtype=dtype)
        tensors = inputs(geometry, batch=1, head_dim=8, dtype=dtype)
        frozen = attention.gate.freeze(*tensors[:2])
        for a, e in zip(
            ours(attention, tensors, geometry, through_lse=True),
            oracle(frozen, tensors, geometry, through_lse=True),
            strict=True,
        ):
            assert error(a, e) < bound


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry.self_attention(130, 2, is_causal=True),
        Geometry(q_len=40, kv_len=130, num_heads=2, num_kv_heads=1, is_causal=True, q_offset=83, kv_offset=-7),
    ],
)
def test_later_tokens_move_neither_the_choice_nor_the_result(geometry: Geometry) -> None:
    """Bit for bit, whatever the later tokens become."""
    attention = build(Learned(3, 16), geometry)
    offsets = {"q_offset": geometry.q_offset, "kv_offset": geometry.kv_offset}
    query, key, value = (x.detach() for x in inputs(geometry, batch=2, head_dim=8, dtype=torch.float32))
    tables = attention.gate(query, key, **offsets)
    out, lse = attention(query, key, value, return_lse=True, **offsets)
    moved = 0
    for position in range(geometry.q_offset, geometry.q_offset + geometry.q_len, 7):
        q_from, k_from = position - geometry.q_offset, position - geometry.kv_offset
        q, k, v = query.clone(), key.clone(), value.clone()
        for x, first in ((q, q_from), (k, k_from), (v, k_from)):
            x[:, first:] = 100 * torch.randn(x[:, first:].shape, generator=torch.Generator().manual_seed(position))
        changed = attention.gate(q, k, **offsets)
        whole_rows = -(-q_from // 16)  # rows of blocks whose first query stands before the perturbed tokens
        assert torch.equal(changed[:, :, :whole_rows], tables[:, :, :whole_rows])
        new_out, new_lse = attention(q, k, v, return_lse=True, **offsets)
        assert torch.equal(new_out[:, :q_from], out[:, :q_from])
        assert torch.equal(new_lse[:, :, :q_from], lse[:, :, :q_from])
        moved += int((changed != tables).any())
    assert moved > 3  # the perturbation does reach the gate


def test_a_piece_that_begins_at_a_block_is_treated_as_in_the_whole() -> None:
    geometry = Geometry.self_attention(128, 2, is_causal=True)
    attention = build(Learned(3, 16), geometry)
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    whole = attention(query, key, value)
    piece = attention(query[:, 96:], key, value)
    torch.testing.assert_close(piece, whole[:, 96:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_each_row_keeps_what_the_pattern_says(is_causal: bool) -> None:
    length, size = 150, 16
    query, key, _ = inputs(Geometry.self_attention(length, 2), batch=3, head_dim=8, dtype=torch.float32)
    counts: list[tuple[Pattern, Callable[[int], int]]] = [
        (Learned(3, size), lambda allowed: min(3, allowed)),
        (Learned(block_size=size, density=0.3), lambda allowed: -(-3 * allowed // 10)),
    ]
    for pattern, expected in counts:
        attention = build(pattern, Geometry.self_attention(length, 2, is_causal=is_causal))
        tables = attention.gate(query, key)
        assert tables.shape[:3] == (3, 2, 10)
        for row in range(10):
            kept = tables[:, :, row]
            count = expected(row + 1 if is_causal else 10)
            assert ((kept >= 0).sum(dim=-1) == count).all()
            assert (kept[..., :count] >= 0).all()
            if is_causal:
                assert (kept[..., 0] == row).all()
                assert (kept <= row).all()


def test_heads_and_batch_rows_choose_for_themselves() -> None:
    geometry = Geometry(q_len=256, kv_len=256, num_heads=4, num_kv_heads=2, is_causal=False)
    tables = build(Learned(4, 16), geometry).gate(*inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)[:2])
    chosen = {tuple(sorted(row)) for row in tables[:, :, 3].flatten(0, 1).tolist()}
    assert len(chosen) == 8


def test_bhsd_is_the_same_gate() -> None:
    geometry = Geometry.self_attention(90, 2, is_causal=True)
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    plain, swapped = build(Learned(2, 16), geometry), build(Learned(2, 16), geometry, tensor_layout="bhsd")
    turned = [x.transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(swapped(*turned).transpose(1, 2), plain(query, key, value))
    for method in ("distillation_loss", "kept_mass", "freeze"):
        expected, actual = (getattr(a.gate, method)(*x) for a, x in ((plain, (query, key)), (swapped, turned[:2])))
        assert torch.equal(expected, actual) if isinstance(expected, Tensor) else expected == actual


def test_freezing_several_rows_keeps_what_is_likely_in_all() -> None:
    geometry = Geometry.self_attention(160, 2, is_causal=True)
    attention = build(Learned(3, 16), geometry)
    query, key, _ = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    alone = attention.gate.freeze(query, key)
    assert attention.gate.freeze(query.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1)) == alone
    assert isinstance(alone, FrozenBlocks)


def test_a_frozen_pattern_is_stored_and_loaded(tmp_path: Path) -> None:
    geometry = Geometry.self_attention(90, 2, is_causal=True)
    attention = build(Learned(2, 16), geometry)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    frozen, store = attention.gate.freeze(*tensors[:2]), PatternStore(tmp_path)
    with pytest.raises(ConfigError, match=r"attention\.gate\.freeze\(query, key\)"):
        store.save("live", Learned(2, 16), seq_len=90, num_heads=2, is_causal=True)
    store.save("kept", frozen, seq_len=90, num_heads=2, is_causal=True)
    info = store.verify("kept")
    assert info.form == "blocks"
    assert info.parameters is not None
    assert info.parameters["generator"] == {"kind": "learned", "block_size": 16, "blocks_per_row": 2}
    loaded = store.load("kept")
    expected = attention(*tensors)
    for pattern in (frozen, loaded):
        static = build_attention(pattern=pattern, num_heads=2, head_dim=8, is_causal=True)
        assert error(static(*tensors), expected) < 1e-6
        assert not list(static.parameters())
    with pytest.raises(ConfigError, match="frozen for seq_len=90 and fits nothing else, got seq_len=80"):
        build_attention(pattern=frozen, num_heads=2, head_dim=8, is_causal=True)(*(x[:, :80] for x in tensors))


def test_two_patterns_stored_under_one_name_in_turn_are_told_apart(tmp_path: Path) -> None:
    store, fields = PatternStore(tmp_path), {"seq_len": 90, "num_heads": 2, "is_causal": True}
    tensors = inputs(Geometry.self_attention(90, 2), batch=1, head_dim=8, dtype=torch.float32)
    kept = []
    for seed in (0, 1):
        pattern = Random(2, 16, seed)
        store.save("drawn", pattern, overwrite=True, **fields)  # type: ignore[arg-type]
        kept.append(build_attention(pattern=store.load("drawn"), num_heads=2, head_dim=8, is_causal=True))
        drawn = build_attention(pattern=pattern, num_heads=2, head_dim=8, is_causal=True)
        assert error(kept[-1](*tensors), drawn(*tensors)) < 1e-6
    assert error(kept[0](*tensors), kept[1](*tensors)) > 1e-2


def test_state_dict_copies_and_configurations() -> None:
    geometry = Geometry.self_attention(90, 2, is_causal=True)
    first, second = build(Learned(2, 16), geometry, seed=1), build(Learned(2, 16), geometry, seed=2)
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    assert not torch.equal(first(query, key, value), second(query, key, value))
    assert first.state_dict().keys() == {"gate.query_mix", "gate.query_bias", "gate.key_mix", "gate.nearness"}
    second.load_state_dict(first.state_dict())
    twin = copy.deepcopy(first)
    for other in (second, twin):
        assert torch.equal(first(query, key, value), other(query, key, value))
    assert first.gate.query_mix is not twin.gate.query_mix
    assert AttentionConfig.from_dict(first.config.to_dict()).to_dict() == first.config.to_dict()
    again = build_attention(first.plan.config)
    assert again.config.pattern == Learned(2, 16)


def test_activation_checkpointing_changes_nothing() -> None:
    geometry = Geometry.self_attention(90, 2, is_causal=True)
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    results = [
        ours(build(Learned(2, 16), geometry, activation_checkpointing=on), tensors, geometry, through_lse=True)
        for on in (False, True)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_chooses_and_computes_in_the_built_dtype() -> None:
    geometry = Geometry.self_attention(90, 2, is_causal=True)
    attention = build(Learned(2, 16), geometry)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    expected, loss = attention(*tensors), attention.gate.distillation_loss(*tensors[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*tensors), expected)
        assert torch.equal(attention.gate.distillation_loss(*tensors[:2]), loss)


@pytest.mark.parametrize(
    "pattern", [Learned(3, 16), pytest.param(Learned(block_size=16, density=0.3), marks=pytest.mark.slow)], ids=str
)
def test_compiles_whole_and_only_for_new_kinds_of_shapes(pattern: Learned) -> None:
    torch.compiler.reset()
    attention = build(pattern, Geometry.self_attention(1, 4, is_causal=True))
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(attention, fullgraph=True, backend=count)
    for step, length in enumerate((96, 130, 131, 256, 131)):
        tensors = inputs(Geometry.self_attention(length, 4), batch=2, head_dim=8, dtype=torch.float32, seed=step)
        expected = torch.autograd.grad(attention(*tensors).sin().sum(), tensors)
        for a, b in zip(torch.autograd.grad(compiled(*tensors).sin().sum(), tensors), expected, strict=True):
            assert error(a, b) < 1e-6
        with torch.no_grad():
            for parameter in attention.parameters():  # a training step
                parameter.add_(0.01)
    assert graphs <= 2  # the second length makes them dynamic


@pytest.mark.slow
def test_inductor_compiles_it_for_new_lengths() -> None:
    """Whose index arithmetic it simplifies, where lengths are symbols."""
    torch.compiler.reset()
    attention = build(Learned(2, 16), Geometry.self_attention(1, 4, is_causal=True))
    compiled = torch.compile(attention)
    for length in (100, 37):
        tensors = inputs(Geometry.self_attention(length, 4), batch=2, head_dim=8, dtype=torch.float32, seed=length)
        with torch.no_grad():
            assert error(compiled(*tensors), attention(*tensors)) < 1e-6


def test_a_gate_of_another_dtype_scores_in_its_own() -> None:
    geometry = Geometry.self_attention(50, 2, is_causal=True)
    attention = build(Learned(2, 16), geometry)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    expected, loss = attention(*tensors), attention.gate.distillation_loss(*tensors[:2])
    attention.double()
    assert torch.equal(attention(*tensors), expected)
    assert torch.equal(attention.gate.distillation_loss(*tensors[:2]), loss)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backends_that_know_no_dynamic_tables_are_refused(backend: str) -> None:
    plan = explain(pattern=Learned(2, 16), num_heads=2, head_dim=8, backend=backend)
    refused = {row.name: row for row in plan.rows}["reference"]
    assert refused.status == "refused"
    assert [refusal.code for refusal in refused.refusals] == ["dynamic_tables"]
    assert "blocks, chosen at every call" in plan.explain()
    if backend == "reference":
        assert plan.backend is None
        with pytest.raises(NoBackendError, match="dynamic_tables: needs blocks chosen at every call"):
            build_attention(pattern=Learned(2, 16), num_heads=2, head_dim=8, backend=backend)
    else:
        assert plan.backend == "sdpa"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Learned(block_size=16), "either blocks_per_row or density"),
        (lambda: Learned(2, 16, density=0.5), "either blocks_per_row or density"),
        (lambda: Learned(2, 0), "block_size must be at least 1"),
        (lambda: Learned(0, 16), "blocks_per_row must be at least 1"),
        (lambda: Learned(block_size=16, density=0.0), "density must be a number from"),
        (lambda: Learned(block_size=16, density=True), "density must be a number from"),
        (lambda: Learned(2, 16) | Local(3), "cannot be part of a union"),
        (lambda: Local(3) + Learned(2, 16), "cannot be part of a sum"),
        (
            lambda: build_attention(pattern=Learned(2, 16), num_heads=2, head_dim=8, dropout_p=0.1, backend="flex"),
            "dropout_p=0.1",
        ),
    ],
)
def test_what_cannot_be_honoured_is_said(make: Any, said: str) -> None:
    with pytest.raises((ConfigError, NoBackendError), match=said):
        make()


def test_wrong_inputs_of_the_gate_are_told() -> None:
    attention = build_attention(pattern=Learned(2, 16), num_heads=2, head_dim=8)
    x = torch.zeros(1, 40, 2, 8)
    with pytest.raises(ConfigError, match=r"key must have 2 heads of 8"):
        attention.gate.distillation_loss(x, x[..., :4])
    with pytest.raises(ConfigError, match="queries and keys of one sequence, got lengths 40 and 30"):
        attention.gate.freeze(x, x[:, :30])
    for shape in ((0, 9, 2, 8), (1, 0, 2, 8)):
        for call in (attention.gate.distillation_loss, attention.gate.kept_mass, attention.gate.freeze):
            with pytest.raises(ConfigError, match=r"at least one batch row and one token"):
                call(torch.zeros(shape), torch.zeros(shape))


def test_from_a_mapping_and_lengths_zero_and_one() -> None:
    attention = build_attention(pattern={"kind": "learned", "block_size": 4, "density": 0.5}, num_heads=2, head_dim=8)
    assert attention.config.pattern == Learned(block_size=4, density=0.5)
    for batch, q_len, kv_len in ((2, 0, 5), (2, 5, 0), (0, 7, 7), (1, 1, 1), (2, 0, 0)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=2, num_kv_heads=2, is_causal=False)
        tensors = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float32)
        out, lse, *grads = ours(attention, tensors, geometry, through_lse=True)
        assert out.shape == tensors[0].shape
        assert torch.isfinite(lse).all() == (kv_len > 0 or not lse.numel())
        assert all(torch.isfinite(grad).all() for grad in grads)
