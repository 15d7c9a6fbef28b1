"""Documents of many lengths as few batches: what makes it exact, that it is, and what it saves and counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import packing
from dilated_attention import Attention, Dilated, Full, Global, Learned, Local, Pattern, Random, Strided
from dilated_attention.core import arranged, reference
from dilated_attention.core.counting import branch_pairs, query_pairs
from dilated_attention.core.documents import Document, Stack, read_documents
from dilated_attention.core.filled import MOST_TOKENS, TOKENS_TOGETHER, Filled, filled, filled_length
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import Layout
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch
from dilated_attention.core.program import Program, keeps_prefixes
from dilated_attention.core.schedule import Schedule

from .strategies import patterns
from .support import NAMES, error
from .test_packing import batch_of, build, five, padding

BANDS = Local((9, 0)) | Global(3)
BLOCKS = Local((9, 0)) | Random(blocks_per_row=1, block_size=16, seed=3)
BOUNDS = torch.tensor([0, 0, 37, 57, 78, 78, 99, 160, 171])
ROWS = ((0, 70), (23, 47), (11, 40), (0, 0), (30, 39), (5, 40), (69, 1))  # padding before, tokens
CASES: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {
    "packed": (None, BOUNDS),
    "padded": (padding(ROWS, 70), None),
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card."""
    monkeypatch.setattr(
        arranged, "fills_documents", lambda engine, _: engine.config.is_causal and keeps_prefixes(engine.pattern)
    )


@settings(deadline=None)
@given(pattern=patterns(), short=st.integers(1, 40), more=st.integers(0, 40))
def test_queries_see_the_same_when_more_tokens_follow(pattern: Pattern, short: int, more: int) -> None:
    assert keeps_prefixes(pattern)
    place = np.arange(short)
    for head in range(4):
        of, longer = (
            pattern.multiplicity(
                place[:, None], place, np.array(head), Geometry.self_attention(length, 4, is_causal=True)
            )
            for length in (short, short + more)
        )
        assert (np.broadcast_to(of, (short, short)) == longer)[np.tril_indices(short)].all()


def test_learned_patterns_promise_nothing() -> None:
    assert not keeps_prefixes(Learned(block_size=16, blocks_per_row=2))


@settings(deadline=None)
@given(pattern=patterns(), length=st.integers(1, 60), more=st.integers(0, 30))
def test_pairs_of_prefixes(pattern: Pattern, length: int, more: int) -> None:
    long, short = (lower(pattern, Geometry.self_attention(n, 4, is_causal=True)) for n in (length + more, length))
    assert Program(long, Schedule((), 0)).counted(2, [length, length]) == (2 * length, 2 * short.pairs)


@settings(deadline=None)
@given(
    width=st.none() | st.integers(1, 70),
    stride=st.integers(1, 9),
    offsets=st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=6),
    length=st.integers(1, 60),
)
def test_pairs_of_queries(width: int | None, stride: int, offsets: list[int | None], length: int) -> None:
    """Of any branch that a plug-in may have, offsets beyond the stride among them."""
    branch, heads = Branch(width, stride, tuple(offsets), 2), len(offsets)
    layout = Layout(Full(), Geometry.self_attention(length, heads, is_causal=True), (branch,), None)
    shorter = [branch_pairs(branch, Geometry.self_attention(n, heads, is_causal=True)) for n in range(length + 1)]
    assert np.array_equal(query_pairs(layout, 256), np.diff(shorter))
    assert np.array_equal(query_pairs(layout, 5), np.diff(shorter)[-5:])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300, 1000, 4095, 4096, 4097, 100_000])
def test_documents_are_filled_up_by_little(length: int) -> None:
    found = filled_length(length)
    assert length <= found <= length + max(16, min(length // 8, 256))
    assert filled_length(found) == found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "pattern", [Full(), Dilated((16, 32), (1, 2)), Strided(3), BANDS, BLOCKS, Random(2, 8)], ids=str
)
def test_each_document_is_as_alone(always: None, pattern: Pattern, case: str) -> None:
    """Out, lse and gradients, through lse too, against the oracle; what belongs to none is 0, and -inf in lse."""
    mask, bounds = CASES[case]
    attention = build(pattern=pattern, dtype="float64")
    shape = (1, 171) if mask is None else (len(ROWS), 70)
    tensors = batch_of(*shape, dtype=torch.float64)
    found = five(attention, tensors, mask, bounds)

    def oracle(*given: torch.Tensor, **fields: Any) -> Any:
        return reference.attention(
            *given, pattern=pattern, is_causal=True,
            key_padding_mask=fields["key_padding_mask"], cu_seqlens=fields["cu_seqlens"],
        )  # fmt: skip

    expected = five(oracle, tensors, mask, bounds)
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert error(a, e) < 1e-12, name
    assert counted(attention) == counted(exactly(pattern, mask, bounds))


def counted(attention: Attention) -> tuple[int, ...]:
    of = attention.counters()
    return of.forward.calls, of.forward.tokens, of.forward.flops, of.backward.tokens, of.backward.flops


def exactly(pattern: Pattern, mask: torch.Tensor | None, bounds: torch.Tensor | None) -> Attention:
    """The same work, each length as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arranged, "fills_documents", lambda engine, device: False)
        attention = build(pattern=pattern, dtype="float64", scale=0.7)
        shape = (1, 171) if mask is None else (len(ROWS), 70)
        five(attention, batch_of(*shape, dtype=torch.float64), mask, bounds)
    return attention


@pytest.mark.parametrize("case", CASES)
def test_copies_of_few_tokens_give_the_same(always: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, bounds = CASES[case]
    shape = (1, 171) if mask is None else (len(ROWS), 70)
    tensors = batch_of(*shape, dtype=torch.float64)
    attention = build(pattern=BLOCKS, dtype="float64")
    whole = five(attention, tensors, mask, bounds)
    monkeypatch.setattr("dilated_attention.core.filled.MOST_TOKENS", 64)
    monkeypatch.setattr("dilated_attention.core.filled.TOKENS_TOGETHER", 64)
    assert len(filled(read_documents(mask, bounds, shape[1], shape[1]))) > 2
    for name, a, e in zip(NAMES, five(attention, tensors, mask, bounds), whole, strict=True):
        assert torch.equal(a, e), name


def test_lengths_that_are_alike_are_lowered_once(always: None) -> None:
    """And strided tensors, as of one projection for all three, need no copy of theirs."""
    attention = build(pattern=BLOCKS, num_kv_heads=4, scale=0.3)
    before = attention.counters().layouts.misses
    for lengths in ((33, 40, 47, 48), (34, 36, 41), (45, 46)):
        bounds = torch.tensor([0, *np.cumsum(lengths)])
        query, key, value = torch.randn(1, sum(lengths), 3, 4, 8).unbind(2)
        out = attention(query, key, value, cu_seqlens=bounds)
        for low, high in itertools.pairwise(bounds.tolist()):
            alone = reference.attention(
                *(x[:, low:high].double() for x in (query, key, value)), pattern=BLOCKS, is_causal=True, scale=0.3
            )
            assert error(out[:, low:high], alone[0]) < 1e-6
    assert attention.counters().layouts.misses == before + 1


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("pattern", [Dilated((16, 32), (1, 2)), Strided(3), Random(2, 8)], ids=str)
def test_large_scores_of_keys_that_no_token_sees(always: None, pattern: Pattern, backend: str) -> None:
    """Behind its end a document has rows that see other keys than its last token does, and must not weigh them."""
    attention = build(pattern=pattern, dtype="float64", backend=backend)
    tensors = [(40 * x.detach()).requires_grad_() for x in batch_of(1, 171, dtype=torch.float64)]

    def oracle(*given: torch.Tensor, **fields: Any) -> Any:
        return reference.attention(*given, pattern=pattern, is_causal=True, cu_seqlens=fields["cu_seqlens"])

    for name, a, e in zip(
        NAMES, five(attention, tensors, None, BOUNDS), five(oracle, tensors, None, BOUNDS), strict=True
    ):
        assert error(a, e) < 1e-11, name


def test_a_derived_class_promises_for_itself() -> None:
    class Other(Local):
        """May see what it likes."""

    assert keeps_prefixes(Local((9, 0)))
    assert not keeps_prefixes(Other((9, 0)))
    assert Local((9, 0)).head_groups(3, 1) == Local((9, 0)).signature_groups(3, 1) == (0, 0, 0)
    assert Other((9, 0)).head_groups(3, 1) == Other((9, 0)).signature_groups(3, 1) == (0, 1, 2)


def test_a_graph_keeps_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be copied there from memory that is another's when it is replayed."""
    engine, card = build()._engine, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert arranged.fills_documents(engine, card)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not arranged.fills_documents(engine, card)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(Full(), False), (Full() + Full(), False), (Full() + BLOCKS, True), (Dilated((16,), (1,)), True), (BLOCKS, True)],
)
def test_a_document_that_is_one_dense_call_is_left_as_it_is(
    pattern: Pattern, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert arranged.fills_documents(build(pattern=pattern)._engine, torch.device("cuda")) is expected
    assert arranged.fills_documents(build(pattern=pattern, backend="reference")._engine, torch.device("cuda"))


@pytest.mark.parametrize(
    ("pattern", "expected"), [(BLOCKS, True), (Full() + BLOCKS, True), (BANDS, False), (Dilated((16,), (1,)), False)]
)
def test_on_a_processor_lengths_are_alike_only_to_tables(pattern: Pattern, expected: bool) -> None:
    assert arranged.fills_documents(build(pattern=pattern)._engine, torch.device("cpu")) is expected


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_waits_for_nothing_where_lengths_are_its_own() -> None:
    attention = build(device="cuda")
    tensors = [x.detach().cuda().requires_grad_() for x in batch_of(1, 171)]
    for mode in ("default", "error"):  # once what is made of a length is there
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, lse = attention(*tensors, return_lse=True, cu_seqlens=BOUNDS)
            torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_padded_rows_of_any_strides_are_not_copied_whole(always: None) -> None:
    """Heads before tokens, as many models have them: only the documents' tokens are taken."""
    attention = build(pattern=BLOCKS, dtype="float64", tensor_layout="bhsd")
    mask = CASES["padded"][0]
    tensors = batch_of(len(ROWS), 70, dtype=torch.float64)
    swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    taken: list[int] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.clone.default:
                taken.append(result.numel())
            return result

    stack = next(x for x in filled(read_documents(mask, None, 70, 70)) if isinstance(x, Filled))
    view = swapped[0].detach().transpose(1, 2)
    with Watch():  # type: ignore[no-untyped-call]
        found = stack.queries(view)
    assert torch.equal(found, stack.queries(view.contiguous()))
    assert not taken
    expected = five(build(pattern=BLOCKS, dtype="float64"), tensors, mask, None)
    actual = five(attention, swapped, mask, None)
    assert error(actual[1], expected[1]) < 1e-12


def test_a_pass_finds_a_length_once(always: None) -> None:
    attention = build(pattern=BLOCKS, dtype="float64", scale=0.55)
    five(attention, batch_of(1, 171, dtype=torch.float64), None, BOUNDS)
    lengths = {stack.kv_len for stack in batches(filled(read_documents(None, BOUNDS, 171, 171)))}
    counters = attention.counters().layouts
    assert counters.misses == len(lengths) > 1
    assert counters.hits == len(lengths)  # of the backward


def batches(of: Sequence[Stack | Filled]) -> list[Stack]:
    """All of them, in copies or not."""
    return [stack for x in of for stack in (x.stacks if isinstance(x, Filled) else (x,))]


def test_what_is_not_filled_up() -> None:
    of = [
        Document(0, 0, 20, 0, 20),
        Document(0, 20, 21, 20, 21),
        Document(0, 41, 5, 41, 9),
        Document(0, 50, 90, 50, 90),
    ]
    alone, together = filled(of)
    assert alone == Stack(of[2])
    assert isinstance(together, Filled)
    assert [(stack.kv_len, stack.lengths) for stack in together.stacks] == [(32, (20, 21)), (96, (90,))]
    same = [Document(0, 32 * i, 32, 32 * i, 32) for i in range(3)]
    assert filled([*same, Document(0, 96, 33, 96, 33)])[0] == Stack(same[0], 3, 0, 32, 32)


def test_a_batch_is_no_larger_than_a_launch_can_be() -> None:
    """Very many short documents, one token and two by turns, are several batches."""
    bounds = torch.cumsum(torch.tensor([0, *(1, 2) * 40_000]), 0)
    of = filled(read_documents(None, bounds, 120_000, 120_000))
    assert sum(stack.count for stack in batches(of)) == 80_000
    for stack in batches(of):
        assert stack.count <= 65_535
        assert stack.count * stack.kv_len <= MOST_TOKENS
    assert len(of) == len(batches(of)) == 80_000 * 16 // MOST_TOKENS + 1


def test_copies_are_bounded_and_few() -> None:
    """Of long documents one by one, of short ones as many as fit, in whole batches."""
    lengths = [*range(100, 1500, 10), 200_000, 100, *range(4100, 9000, 100)]
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    of = filled(read_documents(None, bounds, int(bounds[-1]), int(bounds[-1])))
    copies = [x for x in of if isinstance(x, Filled)]
    tokens = [sum(stack.count * stack.kv_len for stack in x.stacks) for x in copies]
    assert all(few <= TOKENS_TOGETHER or len(x.stacks) == 1 for few, x in zip(tokens, copies, strict=True))
    assert sum(tokens) < 1.13 * sum(lengths)
    assert len(copies) < sum(len(x.stacks) for x in copies) < len(lengths)


def test_the_end_of_a_document_does_not_reach_into_others(always: None) -> None:
    """Not-a-numbers of one stay its own."""
    attention = build(pattern=BLOCKS)
    tensors = batch_of(1, 171)
    with torch.no_grad():
        for x in tensors:
            x[:, 37:57] = torch.nan
    found = five(attention, tensors, None, BOUNDS)
    for name, x in zip(NAMES, found, strict=True):
        x = x.transpose(1, 2) if name == "lse" else x
        assert x[:, 37:57].isnan().all()
        assert x[:, :37].isfinite().all()
        assert x[:, 57:].isfinite().all()


def test_the_benchmark_of_packing(capsys: pytest.CaptureFixture[str]) -> None:
    packing.main(["--tokens", "200", "--shortest", "5", "--longest", "90", "--rounds", "1", "--head-dim", "8"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert "one call" in head
    assert [row.partition("  ")[0] for row in rows] == list(packing.PATTERNS)
