"""Pieces that are joined in one pass: which, where they belong, and what it computes, interpreted and on the card."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import Attention, Dilated, Full, Pattern, Strided
from dilated_attention.backends import joining
from dilated_attention.backends.aten import CudaFlash
from dilated_attention.backends.joining import MAX_LENGTH, JoiningKernel, reciprocal
from dilated_attention.bench.timing import extra_bytes
from dilated_attention.core.composed import Composers
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.joining import are_joined, launches_of
from dilated_attention.core.kernel import Joins
from dilated_attention.core.lowering import lower
from dilated_attention.core.schedule import Rows, schedule
from dilated_attention.core.slabs import Place

from .distributions import run
from .kernel_kit import build, check, check_graph, load_libraries, on_card, run_interpreted, verdict
from .strategies import dilated, geometries
from .support import NAMES, error, inputs, oracle, ours

load_libraries()

LONGNET = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))


def decision(pattern: Pattern, geometry: Geometry, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, bool]:
    """Whether pieces are joined forward, and backward."""
    query = torch.empty(1, geometry.q_len, geometry.num_heads, 64, dtype=dtype, device="meta")
    key = torch.empty(1, geometry.kv_len, geometry.num_kv_heads, 64, dtype=dtype, device="meta")
    launches = launches_of(schedule(lower(pattern, geometry).branches, geometry).calls, (query,), (key,))
    rows, columns = [launch.of_queries for launch in launches], [launch.of_keys for launch in launches]
    joins = JoiningKernel(CudaFlash())
    forward = are_joined(joins, [(query, rows)], adds=False)
    return forward, are_joined(joins, [(key, columns), (key, columns), (query, rows)], adds=True)


def test_it_is_joined_where_that_takes_no_more_memory() -> None:
    longnet = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    for geometry in (
        Geometry.self_attention(131072, 16, is_causal=True),
        Geometry.self_attention(100003, 16, is_causal=True),
        Geometry(q_len=32768, kv_len=32768, num_heads=16, num_kv_heads=4, is_causal=True),
    ):
        assert decision(longnet, geometry) == (True, True)
        assert decision(longnet, geometry, torch.float16) == (True, True)
        assert decision(longnet, geometry, torch.float32) == (False, False)
        assert decision(longnet, geometry, torch.float64) == (False, False)
    whole = Geometry.self_attention(1024, 4)
    assert decision(Dilated((128, 256), (1, 1)), whole) == (True, True)
    assert decision(Dilated((64, 128, 256), (1, 1, 8)), whole) == (False, True)  # 2.125 elements for each, and 1
    assert decision(Dilated((64, 128, 256), (1, 1, 1)), whole) == (False, False)
    assert decision(Full(), whole) == (False, False)  # there is nothing to join
    assert decision(Strided(4), whole) == (True, True)
    assert decision(Strided(40), whole) == (False, False)  # more pieces than a kernel is compiled for


@settings(max_examples=100, deadline=None)
@given(dilated(), geometries(), st.integers(1, 3))
def test_places_are_those_of_the_views(pattern: Pattern, geometry: Geometry, batch: int) -> None:
    """And no two elements of a piece meet."""
    query, key = (x.detach()[..., :1] for x in inputs(geometry, batch=batch, head_dim=1, dtype=torch.float32)[:2])
    calls = schedule(lower(pattern, geometry).branches, geometry).calls
    for launch in launches_of(calls, (query,), (key,)):
        for x, rows, place in (
            (query, launch.call.query, launch.of_queries),
            (key, launch.call.key, launch.of_keys),
        ):
            numbers = torch.arange(x.numel()).view(x.shape)
            seen = launch.slab.view(numbers, rows).squeeze(-1)
            found = place.rows
            b, s, i, t = (torch.arange(n) for n in (place.batches, place.segments, found.count, found.num_heads))
            b, s, i, t = b[:, None, None, None], s[:, None, None], i[:, None], t
            row = found.start + s * found.segment_step + i * found.step + t * found.head_shift
            head = found.head + t * found.head_step + 0 * row
            expected = numbers.squeeze(-1)[place.batch + b + 0 * row, row + 0 * b, head + 0 * b]
            assert torch.equal(seen, expected.flatten(0, 1))
            assert len(set(seen.flatten().tolist())) == seen.numel() == place.num_rows


@settings(max_examples=300, deadline=None)
@given(st.integers(1, MAX_LENGTH), st.integers(0, MAX_LENGTH - 1))
def test_division_by_a_reciprocal(divisor: int, x: int) -> None:
    multiplier, log = reciprocal(divisor)
    assert -(1 << 31) <= multiplier < 0
    for value in {x, x // divisor * divisor, max(x // divisor * divisor - 1, 0), MAX_LENGTH - 1}:
        high = 2 * value * (multiplier + (1 << 32)) >> 32
        assert high >> log == value // divisor


def test_a_kernel_joins_where_triton_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CudaFlash()
    monkeypatch.setattr(joining, "can_compile", lambda: True)
    joined = joining.joining(kernel)
    assert isinstance(joined, Joins)
    assert isinstance(joined, JoiningKernel)
    assert joined.kernel is kernel
    assert joined.name == "flash"
    monkeypatch.setattr(joining, "can_compile", lambda: False)
    assert joining.joining(kernel) is kernel
    assert not isinstance(kernel, Joins)


def test_while_a_graph_is_captured_it_joins_what_it_has_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's module cannot be loaded then."""
    like: Any = SimpleNamespace(shape=(1, 64, 4, 64), is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    kernel, place = JoiningKernel(CudaFlash()), Place(Rows(0, 1, 64, 0, 0, 1, 0, 4), 1, 0, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernel.can_join(like, [place] * 3, adds=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernel.can_join(like, [place] * 3, adds=False)
    kernel._launched.add(joining._variant("merge_pieces", like, 4))
    assert kernel.can_join(like, [place] * 3, adds=False)
    assert not kernel.can_join(like, [place] * 5, adds=False)
    assert not kernel.can_join(like, [place] * 3, adds=True)


def test_building_a_kernel_that_joins_does_not_import_triton() -> None:
    code = (
        "import sys; from dilated_attention.backends.aten import CudaFlash\n"
        "from dilated_attention.backends.joining import joining\n"
        "joining(CudaFlash()); print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    )
    assert run(None, "-c", code).stdout == "[]\n"


def test_a_kernel_that_is_compiled_for_one_schedule_serves_others() -> None:
    pytest.importorskip("triton")
    from dilated_attention.backends import joining_kernels

    for kernel, pointers in (
        (joining_kernels.merge_pieces, {"outs", "lses", "out_ptr", "lse_ptr"}),
        (joining_kernels.add_pieces, {"pieces", "total_ptr"}),
    ):
        params: Any = kernel.params
        assert {p.name for p in params if not p.is_constexpr and not p.do_not_specialize} == pointers


def test_its_kernels_interpreted_on_a_cpu() -> None:
    """In a process of its own: Triton decides when it is imported whether its functions are interpreted."""
    run_interpreted("interpreted_joining.py")


@pytest.mark.slow
def test_further_cases_interpreted_on_a_cpu() -> None:
    run_interpreted("interpreted_joining.py", is_slow=True)


# On the card.

CARD: list[Pattern] = [
    LONGNET,
    Dilated(segment_lengths=(100, 230, 500), dilation_rates=(1, 2, 3)),
    Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 7)),  # some rows are in no call
    Dilated(segment_lengths=(64, 256), dilation_rates=(2, 4), heads="split"),
    Strided(stride=3),
    Dilated((64,), (1,)) + Dilated((64, 128), (1, 4)),  # pairs that count twice
]
# What FlashAttention-4's compiler says of itself.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BACKENDS = [
    ("sdpa", {"kernel": "cudnn"}),
    ("sdpa", {"kernel": "flash"}),
    ("sdpa", {"kernel": "efficient"}),
    ("fa3", {}),
    pytest.param("fa4", {}, marks=compiles),
    ("xformers", {}),
]
of_backends = pytest.mark.parametrize(("backend", "options"), BACKENDS, ids=lambda x: str(x))


def built(
    backend: str, options: dict[str, Any], pattern: Pattern, geometry: Geometry, dtype: str = "bfloat16", d: int = 64
) -> Attention:
    """The attention, whose kernel joins; skips where the backend is not there."""
    given = {backend: options} if options else {}
    if not verdict(backend, dtype=dtype, head_dim=d, backend_options=given).accepts:
        pytest.skip(f"{backend} is not usable here")
    attention = build(backend, pattern, geometry, dtype, d, backend_options=given)
    assert isinstance(attention._engine.kernel, Joins)
    return attention


def in_turns(attention: Attention) -> None:
    """Let it merge piece by piece from now on."""
    engine: Any = attention._engine
    engine._composers = Composers.of(engine.kernel.kernel, engine.scale, engine.config)


def peak_bytes(attention: Attention, tensors: list[Tensor], geometry: Geometry) -> int:
    """Of memory, above what the inputs hold, of a forward and a backward."""
    ours(attention, tensors, geometry, through_lse=False)
    gc.collect()  # other tests' graphs, compiled and captured, are cycles: freed within the call they would be missing
    return extra_bytes(lambda: ours(attention, tensors, geometry, through_lse=False), "cuda")


@pytest.mark.gpu
@of_backends
@pytest.mark.parametrize("pattern", CARD, ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float16", 24), ("bfloat16", 128)])
def test_it_agrees_with_the_oracle(
    dtype: str, head_dim: int, pattern: Pattern, backend: str, options: dict[str, Any]
) -> None:
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    attention = built(backend, options, pattern, geometry, dtype, head_dim)
    check(attention, geometry, through_lse=attention._engine.has_dlse)


@pytest.mark.gpu
@of_backends
def test_grouped_heads_offsets_and_strided_inputs(backend: str, options: dict[str, Any]) -> None:
    geometry = Geometry(q_len=300, kv_len=700, num_heads=4, num_kv_heads=2, is_causal=True, q_offset=520, kv_offset=64)
    attention = built(backend, options, LONGNET, geometry)
    check(attention, geometry, through_lse=attention._engine.has_dlse)
    whole = Geometry.self_attention(512, 4, is_causal=True)
    tensors = on_card(whole, "bfloat16", 64)
    packed = torch.stack([x.detach() for x in tensors], dim=2)
    views = [packed[:, :, i].requires_grad_() for i in range(3)]
    attention = built(backend, options, LONGNET, whole)
    actual = ours(attention, views, whole, through_lse=False)
    for name, a, e in zip(NAMES, actual, oracle(LONGNET, tensors, whole, through_lse=False), strict=True):
        assert error(a, e) < 1e-2, name


@pytest.mark.gpu
@of_backends
def test_it_is_as_near_as_merging_in_turns_and_takes_no_more_memory(backend: str, options: dict[str, Any]) -> None:
    geometry = Geometry.self_attention(2048, 8, is_causal=True)
    pattern = Dilated(segment_lengths=(256, 512, 1024, 2048), dilation_rates=(1, 2, 4, 8))
    attention = built(backend, options, pattern, geometry)
    tensors = on_card(geometry, "bfloat16", 64)
    joined = ours(attention, tensors, geometry, through_lse=False)
    taken = peak_bytes(attention, tensors, geometry)
    in_turns(attention)
    merged = ours(attention, tensors, geometry, through_lse=False)
    assert taken <= 1.01 * peak_bytes(attention, tensors, geometry)
    expected = oracle(pattern, tensors, geometry, through_lse=False)
    for name, a, b, e in zip(NAMES, joined, merged, expected, strict=True):
        assert error(a, e) <= 1.02 * error(b, e) + 1e-6, name


@pytest.mark.gpu
@of_backends
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
def test_it_replays_in_a_graph_and_compiles(backend: str, options: dict[str, Any]) -> None:
    geometry = Geometry.self_attention(1024, 4, is_causal=True)
    attention = built(backend, options, LONGNET, geometry)
    check_graph(attention, geometry)
    tensors = on_card(geometry, "bfloat16", 64)
    compiled = torch.compile(attention, fullgraph=True)
    assert torch.equal(compiled(*tensors), attention(*tensors))


@pytest.mark.gpu
def test_a_graph_may_be_captured_of_a_length_that_is_only_prepared() -> None:
    """Its pieces are then merged in turns."""
    geometry = Geometry.self_attention(768, 4, is_causal=True)
    attention = built("sdpa", {"kernel": "flash"}, LONGNET, geometry)
    tensors = [x.detach() for x in on_card(geometry, "bfloat16", 64)]
    attention.prepare(geometry.q_len)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*tensors)
    graph.replay()
    assert error(captured, attention(*tensors)) < 5e-3
