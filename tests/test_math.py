"""The backend `math`: PyTorch's matrix products, and the dropout of attention weights that it has."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import nn

from dilated_attention import (
    Attention,
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
from dilated_attention.core import reference
from dilated_attention.core.draws import Draws
from dilated_attention.models import MultiheadAttention

from .dropout_kit import TOKENS, build, check_draws, drawn
from .support import error

LONGNET = Dilated(segment_lengths=(8, 16, 40), dilation_rates=(1, 2, 4))
PATTERNS: list[Pattern] = [
    Full(),
    LONGNET,
    LONGNET + Full(),  # occurrences of one pair in several calls
    Full() + Full(),  # and in one
    Local(5),
    Local(5) | Global(3),
    Local(5) + Local(9) + Random(2, 8, seed=1),  # masks and blocks that count pairs more than once
    LONGNET | Random(2, 8, seed=3),
    LONGNET + Random(2, 8, seed=3),
    sum([Random(2, 8, seed=1)] * 4, start=Random(2, 8, seed=1)),  # whole blocks that do, which exp(log(5)) is below
    Strided(3),
]


# Every pattern with and without causality, in much memory and in little; neighbours have the other pairs of them.
@pytest.mark.parametrize(
    ("pattern", "is_causal", "workspace_bytes"),
    [
        (pattern, is_causal, 1 << (13 if (number + is_causal) % 2 else 26))
        for number, pattern in enumerate(PATTERNS)
        for is_causal in (True, False)
    ],
    ids=str,
)
def test_what_is_dropped_is_dropped_exactly(pattern: Pattern, is_causal: bool, workspace_bytes: int) -> None:
    limits = Limits(workspace_bytes=workspace_bytes)
    attention = build(pattern, is_causal=is_causal, dropout_p=0.3, limits=limits)
    check_draws(attention, pattern, round(0.3 * 65536) / 65536, of_weights=1e-6, of_results=1e-12)


@pytest.mark.parametrize("pattern", [LONGNET + Full(), LONGNET + Random(2, 8, seed=3)], ids=str)
def test_sdpa_drops_by_the_same_products_on_cpus(pattern: Pattern) -> None:
    """And computes what drops nothing with its own kernel."""
    fields: dict[str, Any] = {"is_causal": True, "dropout_p": 0.3}
    by_sdpa, by_math = (build(pattern, backend=name, **fields) for name in ("sdpa", "math"))
    assert by_sdpa.plan.kernel == "aten flash for CPU, dropout by matrix products"
    tensors = [torch.randn(2, TOKENS, heads, TOKENS, dtype=torch.float64) for heads in (4, 2, 2)]
    assert torch.equal(drawn(by_sdpa, *tensors, seed=7), drawn(by_math, *tensors, seed=7))
    without = build(pattern, backend="sdpa", is_causal=True)
    assert without.plan.kernel == "aten flash for CPU"
    assert torch.equal(by_sdpa.eval()(*tensors), without(*tensors))


def test_a_learned_pattern_drops_too() -> None:
    attention = build(Learned(block_size=8, blocks_per_row=2), is_causal=True, dropout_p=0.25)
    tensors = [torch.randn(2, TOKENS, heads, TOKENS, dtype=torch.float64) for heads in (4, 2)]
    names = torch.eye(TOKENS, dtype=torch.float64)[None, :, None].expand(2, TOKENS, 2, TOKENS)
    dropped = drawn(attention, *tensors, names, seed=3)
    attention.eval()
    weights = drawn(attention, *tensors, names, seed=3)
    factors = torch.where(weights > 0, dropped / weights, 0.0)
    is_kept = (factors * 0.75 - 1).abs() < 1e-9
    assert bool((is_kept | (factors == 0)).all())
    assert 0.7 < float(is_kept.sum() / (weights > 0).sum()) < 0.8


def test_eval_and_no_dropout_are_alike() -> None:
    query, key, value = (torch.randn(1, TOKENS, heads, TOKENS, dtype=torch.float64) for heads in (4, 2, 2))
    without = build(LONGNET)(query, key, value)
    assert torch.equal(build(LONGNET, dropout_p=0.5).eval()(query, key, value), without)
    assert not torch.equal(build(LONGNET, dropout_p=0.5)(query, key, value), without)


def test_documents_draw_for_themselves() -> None:
    """Two equal documents are dropped differently, and the same seed drops the same."""
    attention = build(Full(), dropout_p=0.5)
    query, key = (torch.zeros(1, 2 * 20, heads, TOKENS, dtype=torch.float64) for heads in (4, 2))
    value = torch.eye(TOKENS, dtype=torch.float64)[:20].repeat(2, 1)[None, :, None].expand(1, TOKENS, 2, TOKENS)
    ends = torch.tensor([0, 20, 40])
    first, second = torch.split(drawn(attention, query, key, value, seed=4, cu_seqlens=ends), 20, dim=1)
    assert not torch.equal(first, second)
    again = drawn(attention, query, key, value, seed=4, cu_seqlens=ends)
    assert torch.equal(again, torch.cat([first, second], dim=1))


@pytest.mark.parametrize("backend", ["math", "sdpa", "reference"])
@pytest.mark.parametrize("pattern", [LONGNET, LONGNET + Local(5)], ids=str)
def test_batched_gradients_drop_the_same(pattern: Pattern, backend: str) -> None:
    """Torch's loop over a batch of gradients lets nobody draw, but these numbers do not depend on it."""
    attention = build(pattern, dropout_p=0.3, backend=backend, is_causal=True)
    leaves = [torch.randn(1, TOKENS, heads, TOKENS, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    out = drawn(attention, *leaves, seed=6)
    douts = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        for a, b in zip(batched, torch.autograd.grad(out, leaves, dout, retain_graph=True), strict=True):
            assert error(a[i], b) < 1e-12


def test_a_length_is_prepared_for_training_or_for_evaluation() -> None:
    attention = build(Local(5), dropout_p=0.3)
    tensors = [torch.randn(1, TOKENS, heads, TOKENS, dtype=torch.float64) for heads in (4, 2, 2)]
    for number, mode in enumerate((attention.train, attention.eval), 1):
        mode().prepare(TOKENS)
        assert attention.counters().layouts.misses == number
        attention(*tensors)
        assert attention.counters().layouts.misses == number


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputing_draws_the_same(checkpointing: bool) -> None:
    attention = build(LONGNET, dropout_p=0.4, activation_checkpointing=checkpointing)
    query, key = (torch.randn(1, TOKENS, heads, TOKENS, dtype=torch.float64) for heads in (4, 2))
    value = torch.randn(1, TOKENS, 2, TOKENS, dtype=torch.float64, requires_grad=True)
    out = drawn(attention, query, key, value, seed=9)
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    # Out is linear in the values: with ones as dout, <grad, value> is the sum of out.
    with torch.no_grad():
        assert abs(float((grad * value).sum() - out.sum())) < 1e-9


@pytest.mark.parametrize("strided", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("pattern", [Dilated(segment_lengths=(20,), dilation_rates=(1,)), Local(5)], ids=str)
def test_strides_change_no_draw(pattern: Pattern, strided: str) -> None:
    """More batch rows than segments: dense kernels are launched by strides, in one pass or the other."""
    attention = build(pattern, dropout_p=0.5)
    given = {"query": 4, "key": 2, "value": 2, "dout": 4}
    tensors = {name: torch.randn(3, TOKENS, heads, TOKENS, dtype=torch.float64) for name, heads in given.items()}
    results = []
    for turned in ("", strided):
        *leaves, dout = (
            x.transpose(1, 2).contiguous().transpose(1, 2) if n == turned else x for n, x in tensors.items()
        )
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = drawn(attention, *leaves, seed=2)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("workspace_bytes", "dtype", "allowed"),
    [(1, "float64", 1e-12), (1 << 26, "float64", 1e-12), (1 << 26, "float32", 1e-4), (1, "bfloat16", 3e-2)],
)
@pytest.mark.parametrize("pattern", [Full(), Local(5), LONGNET, LONGNET + Local(5)], ids=str)
def test_rows_without_keys_large_scores_and_gradients_of_lse(
    pattern: Pattern, workspace_bytes: int, dtype: str, allowed: float
) -> None:
    """With a scale below 0, and in as little memory as can be."""
    scale = -8.0 if dtype == "float32" else -0.5  # scores whose exponentials are not finite
    limits = Limits(workspace_bytes=workspace_bytes)
    attention = build(pattern, is_causal=True, head_dim=16, scale=scale, dtype=dtype, limits=limits)
    given = [torch.randn(2, TOKENS, heads, 16, dtype=getattr(torch, dtype)) for heads in (4, 2, 2)]
    upstream = torch.randn(2, TOKENS, 4, 16), torch.randn(2, 4, TOKENS)
    found = []
    for exact in (True, False):
        q, k, v = (x.double().requires_grad_() if exact else x.clone().requires_grad_() for x in given)
        if exact:
            call: dict[str, Any] = {
                "pattern": pattern,
                "is_causal": True,
                "scale": scale,
                "q_offset": 0,
                "kv_offset": 8,
            }
            out, lse = reference.attention(q, k, v, **call)
        else:
            out, lse = attention(q, k, v, return_lse=True, q_offset=0, kv_offset=8)
            assert out.dtype == q.dtype
        weights = [x.to(y.dtype) for x, y in zip(upstream, (out, lse), strict=True)]
        total = (out * weights[0]).sum() + (lse[:, :, 8:] * weights[1][:, :, 8:]).sum()
        found.append((out, lse[:, :, 8:], *torch.autograd.grad(total, (q, k, v))))
        assert bool((lse[:, :, :8] == -torch.inf).all())
    for a, b in zip(*found, strict=True):
        assert error(b, a) < allowed


@pytest.mark.parametrize("dropout_p", [1e-9, 1e-4, 0.1, 0.5, 0.9999, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_draws_are_as_probable_as_they_say(dropout_p: float, dtype: torch.dtype) -> None:
    draws = Draws.of(dropout_p, torch.tensor(3), torch.device("cpu"))
    assert abs(draws.keep - (1 - dropout_p)) <= 2**-16
    assert 0 < draws.keep < 1
    factors = draws.factors(torch.empty(1001, 1003, dtype=dtype))
    assert factors.dtype == dtype
    found = float((factors > 0).double().mean())
    assert found > 0
    assert abs(found - draws.keep) < 5 * (draws.keep * (1 - draws.keep) / factors.numel()) ** 0.5 + 1e-9
    assert torch.allclose(factors[factors > 0], torch.tensor(1 / draws.keep, dtype=dtype), rtol=1e-6)


def test_seeds_that_differ_in_any_of_32_bits_draw_differently() -> None:
    """More a processor's generator does not look at."""
    seeds = [0, *(1 << bit for bit in range(32))]
    drawn_by = {
        Draws.of(0.5, torch.tensor(s), torch.device("cpu")).factors(torch.empty(64)).numpy().tobytes() for s in seeds
    }
    assert len(drawn_by) == len(seeds)


def test_occurrences_are_drawn_one_by_one() -> None:
    draws = Draws.of(0.25, torch.tensor(3), torch.device("cpu"))
    counts = torch.tensor([0.0, 1.0, 2.0, 5.0])[:, None].expand(4, 20_000).contiguous()
    factors = draws.factors(counts, counts)
    assert not factors[0].any()
    for row, count in zip(factors[1:], (1, 2, 5), strict=True):
        kept = row * count * 0.75
        assert (kept - kept.round()).abs().max() < 1e-5
        assert abs(float(kept.mean()) / count - 0.75) < 0.015
        assert abs(float(kept.var()) / count - 0.1875) < 0.015


def test_it_serves_what_nothing_else_takes() -> None:
    shape: dict[str, Any] = {"num_heads": 4, "head_dim": 64, "device": "cpu", "seq_len": 1 << 18, "pattern": LONGNET}
    assert explain(**shape).backend == "sdpa"
    assert explain(**shape, dropout_p=0.1, deterministic=True).backend == "sdpa"
    assert explain(**(shape | {"head_dim": 300})).backend == "math"
    on_a_card = {"device": None, "arch": "sm_90", "dtype": "float64"}
    assert explain(**(shape | on_a_card), dropout_p=0.1).backend == "math"


def test_on_a_card_gradients_are_deterministic_where_pytorch_is_told_to() -> None:
    asked: dict[str, Any] = {
        "num_heads": 4,
        "head_dim": 300,
        "arch": "sm_90",
        "pattern": LONGNET,
        "deterministic": True,
    }
    (row,) = [row for row in explain(**asked, dropout_p=0.1).rows if row.name == "math"]
    assert [refusal.code for refusal in row.refusals] == ["deterministic"]
    assert "torch.use_deterministic_algorithms(True)" in str(row.refusals[0])
    assert explain(**asked, dropout_p=0.1, requires_grad=False).backend == "math"
    torch.use_deterministic_algorithms(True)
    try:
        assert explain(**asked, dropout_p=0.1).backend == "math"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_of_torch_keeps_its_default_dropout() -> None:
    """Whose attention drops a tenth of its weights while it trains."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert layer.self_attn.dropout == 0.1
    layer.register_module("self_attn", MultiheadAttention(32, 4, pattern=LONGNET, dropout=0.1, batch_first=True))
    x = torch.randn(2, TOKENS, 32, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def most_of(name: str, attention: Attention, length: int) -> int:
    """The most bytes that one run of an operator of torch allocates in both passes."""
    config = attention.config
    query, key, value = (
        torch.randn(1, length, heads, config.head_dim, requires_grad=True)
        for heads in (config.num_heads, config.kv_heads, config.kv_heads)
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(query, key, value).sum().backward()
    found = [int(event.self_cpu_memory_usage) for event in profile.events() or () if event.name == name]
    assert len(found) > 1
    return max(found)


def test_the_workspace_bounds_what_is_formed_at_once() -> None:
    """Of 4 MiB of scores for each head no more than the limit."""
    small = build(Full(), num_heads=2, num_kv_heads=2, head_dim=8, dtype="float32", dropout_p=0.1)
    limits = attrs.evolve(small.config.limits, workspace_bytes=1 << 20)
    attention = build_attention(attrs.evolve(small.config, limits=limits))
    assert 4 * most_of("aten::bmm", attention, 1024) <= 1 << 20


@pytest.mark.parametrize(("num_kv_heads", "length"), [(1, 384), (8, 384)])
def test_copies_of_keys_are_within_the_workspace_too(num_kv_heads: int, length: int) -> None:
    """Short segments of a large head_dim have many more elements of keys than scores."""
    limits = Limits(workspace_bytes=1 << 19)
    shape = {"num_heads": 8, "num_kv_heads": num_kv_heads, "head_dim": 256, "dtype": "float32", "limits": limits}
    attention = build(Dilated(segment_lengths=(8,), dilation_rates=(1,)), **shape)
    for name in ("aten::index_select", "aten::bmm"):
        assert 2 * most_of(name, attention, length) <= limits.workspace_bytes


def test_counts_of_repeated_pairs_are_within_the_workspace() -> None:
    """Weights, counts, probabilities or divisors, and what is drawn: a quarter for each."""
    limits = Limits(workspace_bytes=1 << 22)
    attention = build(Local(5) + Local(9), head_dim=8, dtype="float32", dropout_p=0.1, limits=limits)
    assert 4 * most_of("aten::clamp", attention, 2048) <= limits.workspace_bytes
