"""Padded rows and packed documents: each equals the sequence alone, and nothing of the padding is ever seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import Attention, ConfigError, Dilated, Learned, Local, Pattern, build_attention
from dilated_attention.core import reference
from dilated_attention.core.documents import read_documents, stacked
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry

from .kernel_kit import PATTERNS
from .support import NAMES, error, inputs, with_gradients

LONGNET = Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
BLOCKS = Learned(block_size=16, blocks_per_row=2)
# Rows of one batch as (padding before, tokens), and the same lengths packed; empty ones and equal ones among them.
PADDED = ((0, 70), (23, 47), (11, 40), (0, 0), (30, 40), (5, 40), (69, 1))
LENGTH = 70
CU_SEQLENS = torch.tensor([0, 0, 37, 57, 77, 77, 97, 160, 160])


def build(**fields: Any) -> Attention:
    defaults: dict[str, Any] = {"pattern": LONGNET, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "is_causal": True}
    return build_attention(defaults | fields)


def padding(rows: tuple[tuple[int, int], ...] = PADDED, length: int = LENGTH) -> Tensor:
    place = torch.arange(length)
    return torch.stack([(place < before) | (place >= before + tokens) for before, tokens in rows])


def batch_of(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
    return inputs(geometry, batch=batch, head_dim=8, dtype=dtype)


def spans(mask: Tensor | None, bounds: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, start, end) of each sequence that has tokens."""
    if mask is not None:
        places = [(row, torch.nonzero(~mask[row])[:, 0].tolist()) for row in range(mask.shape[0])]
        return [(row, place[0], place[-1] + 1) for row, place in places if place]
    assert bounds is not None
    ends = bounds.tolist()
    return [(0, low, high) for low, high in itertools.pairwise(ends) if high > low]


def five(
    attention: Callable[..., Any], tensors: list[Tensor], mask: Tensor | None, bounds: Tensor | None
) -> list[Tensor]:
    out, lse = attention(*tensors, return_lse=True, key_padding_mask=mask, cu_seqlens=bounds)
    return with_gradients(out, lse, tensors, through_lse=True)


def check_alone(attention: Attention, mask: Tensor | None, bounds: Tensor | None) -> None:
    """out, lse, dq, dk and dv equal those of each sequence by itself; what is left is 0, and -inf in lse."""
    batch, length = mask.shape if mask is not None else (1, int(bounds[-1]) if bounds is not None else 0)
    tensors = batch_of(batch, length)
    actual = five(attention, tensors, mask, bounds)
    expected = [torch.zeros_like(x) for x in actual]
    expected[1].fill_(-torch.inf)
    generator = torch.Generator().manual_seed(1)  # the gradients of `with_gradients`
    dout = torch.randn(actual[0].shape, generator=generator, dtype=torch.float64).float()
    dlse = torch.randn(actual[1].shape, generator=generator, dtype=torch.float64).float()
    for row, low, high in spans(mask, bounds):
        own = [x[row : row + 1, low:high].detach().requires_grad_() for x in tensors]
        out, lse = attention(*own, return_lse=True)
        grads = torch.autograd.grad([out, lse], own, [dout[row : row + 1, low:high], dlse[row : row + 1, :, low:high]])
        expected[1][row, :, low:high] = lse[0]
        for whole, part in zip((expected[0], *expected[2:]), (out, *grads), strict=True):
            whole[row, low:high] = part[0]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < 1e-5, (name, error(a, e))
        used = torch.isfinite(e) if name == "lse" else e != 0
        assert torch.equal(a[~used], e[~used]), name  # exactly 0 and -inf where nothing is


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", [*PATTERNS, BLOCKS], ids=str)
def test_every_row_and_every_document_is_as_it_would_be_alone(pattern: Pattern, is_causal: bool) -> None:
    attention = build(pattern=pattern, is_causal=is_causal)
    check_alone(attention, padding(), None)
    check_alone(attention, None, CU_SEQLENS)


def test_float64_and_the_reference_backend_and_the_oracle_agree() -> None:
    for pattern in (LONGNET, Local(window_size=9)):
        for mask, bounds in ((padding(), None), (None, CU_SEQLENS)):
            tensors = batch_of(len(PADDED) if bounds is None else 1, 70 if bounds is None else 160, torch.float64)
            out, lse = reference.attention(
                tensors[0],
                tensors[1],
                tensors[2],
                pattern=pattern,
                is_causal=True,
                key_padding_mask=mask,
                cu_seqlens=bounds,
            )
            expected = with_gradients(out, lse, tensors, through_lse=True)
            for backend in ("sdpa", "reference"):
                attention = build(pattern=pattern, dtype="float64", backend=backend)
                for name, a, e in zip(NAMES, five(attention, tensors, mask, bounds), expected, strict=True):
                    assert error(a, e) < 1e-12, (name, backend, error(a, e))


def test_what_padding_holds_is_never_seen() -> None:
    mask = padding()
    clean = batch_of(len(PADDED), LENGTH)
    spoilt = [x.detach().masked_fill(mask[:, :, None, None], torch.nan).requires_grad_() for x in clean]
    for pattern in (LONGNET, Local(window_size=9), BLOCKS):
        attention = build(pattern=pattern)
        for a, e in zip(five(attention, spoilt, mask, None), five(attention, clean, mask, None), strict=True):
            assert torch.equal(a, e)


def test_decoding_with_a_left_padded_cache_gives_the_last_rows() -> None:
    rows = ((0, 70), (23, 47), (69, 1), (60, 10), (0, 66), (0, 0))  # the last but one has padding behind
    mask = padding(rows)
    query, key, value = (x.detach() for x in batch_of(len(rows), LENGTH))
    for pattern in PATTERNS:
        attention = build(pattern=pattern)
        full, full_lse = attention(query, key, value, return_lse=True, key_padding_mask=mask)
        for new in (1, 6, 16):
            out, lse = attention(query[:, -new:], key, value, return_lse=True, key_padding_mask=mask)
            assert error(out, full[:, -new:]) < 1e-5
            assert error(lse, full_lse[:, :, -new:]) < 1e-5


def test_layouts_strides_checkpointing_and_autocast() -> None:
    mask = padding()
    tensors = batch_of(len(PADDED), LENGTH)
    expected = five(build(), tensors, mask, None)
    for a, e in zip(five(build(activation_checkpointing=True), tensors, mask, None), expected, strict=True):
        assert torch.equal(a, e)
    swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    out, lse = build(tensor_layout="bhsd")(*swapped, return_lse=True, key_padding_mask=mask)
    assert torch.equal(out.transpose(1, 2), expected[0])
    assert torch.equal(lse, expected[1])
    strange = [x.detach().permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0).requires_grad_() for x in tensors]
    for a, e in zip(five(build(), strange, mask, None), expected, strict=True):
        assert error(a, e) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build(dtype="bfloat16")(*tensors, key_padding_mask=mask)
    assert mixed.dtype == torch.bfloat16
    assert error(mixed, expected[0]) < 1e-2


def test_compiles_without_a_break_and_other_lengths_compile_nothing() -> None:
    torch.compiler.reset()
    attention = build(pattern=LONGNET + Local(window_size=7))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    tensors = batch_of(len(PADDED), LENGTH)
    five(compiled, tensors, padding(), None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for mask in (padding(), padding().flip(0), torch.zeros_like(padding())):
            actual = five(compiled, tensors, mask, None)
            for a, e in zip(actual, five(attention, tensors, mask, None), strict=True):
                assert error(a, e) < 1e-6
    tensors = batch_of(1, 160)
    for a, e in zip(five(compiled, tensors, None, CU_SEQLENS), five(attention, tensors, None, CU_SEQLENS), strict=True):
        assert error(a, e) < 1e-6
    with pytest.raises(Exception, match="a learned pattern chooses blocks for each document"):
        torch.compile(build(pattern=BLOCKS), fullgraph=True, backend="eager")(*tensors, cu_seqlens=CU_SEQLENS)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch itself reads
def test_the_operators_keep_torch_library_promises() -> None:
    attention = build()
    tensors = batch_of(len(PADDED), LENGTH)
    mask, key = padding(), attention._engine.key
    torch.library.opcheck(
        torch.ops.dilated_attention.attend_documents.default,
        (*tensors, None, mask, None, key, None, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )
    query, k, v = (x.detach() for x in batch_of(1, 160))
    out, lse = attention(query, k, v, return_lse=True, cu_seqlens=CU_SEQLENS)
    torch.library.opcheck(
        torch.ops.dilated_attention.attend_documents_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), query, k, v, out, lse, None, None, CU_SEQLENS, key, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_dropout_draws_for_each_document_and_its_backward_draws_the_same() -> None:
    attention = build(backend="reference", dropout_p=0.4, dtype="float64", is_causal=False)
    query, key, value = batch_of(1, 12, torch.float64)
    twice = [torch.cat([x, x], dim=1).detach() for x in (query, key)]
    leaf = torch.cat([value, value], dim=1).detach().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        out = attention(*twice, leaf, cu_seqlens=torch.tensor([0, 12, 24]))
        uneven = attention(*twice, leaf, cu_seqlens=torch.tensor([0, 9, 12, 21, 24]))
    (dv,) = torch.autograd.grad(out, leaf, out.detach())
    assert (
        abs(float((out * out).sum().detach() - (dv * leaf).sum().detach())) < 1e-9
    )  # for one draw out is linear in the values
    assert not torch.equal(out[:, :12], out[:, 12:])
    assert not torch.equal(uneven[:, :12], uneven[:, 12:])
    plain = build(backend="reference", dtype="float64", is_causal=False)
    bounds = torch.tensor([0, 12, 24])
    assert torch.equal(attention.eval()(*twice, leaf, cu_seqlens=bounds), plain(*twice, leaf, cu_seqlens=bounds))


def test_stacks_hold_every_document_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch, length = (int(x) for x in torch.randint(1, 9, (2,), generator=generator))
        tokens = torch.randint(0, length + 1, (batch,), generator=generator).tolist()
        rows = tuple((int(torch.randint(0, length - n + 1, (1,), generator=generator)), n) for n in tokens)
        q_len = int(torch.randint(1, length + 1, (1,), generator=generator))
        queries, keys = torch.zeros(batch, q_len, 1, 1), torch.zeros(batch, length, 1, 1)
        for stack in stacked(read_documents(padding(rows, length), None, q_len, length)):
            assert stack.count > 0
            stack.queries(queries).add_(1)
            stack.keys(keys).add_(1)
        mask = padding(rows, length)
        assert torch.equal(queries[:, :, 0, 0] == 1, ~mask[:, length - q_len :])
        has_query = (~mask[:, length - q_len :]).any(dim=1, keepdim=True)
        assert torch.equal(keys[:, :, 0, 0] == 1, ~mask & has_query)


def test_equal_lengths_are_one_call() -> None:
    bounds = torch.arange(0, 161, 20, dtype=torch.int32)
    assert [stack.count for stack in stacked(read_documents(None, bounds, 160, 160))] == [8]
    assert [stack.count for stack in stacked(read_documents(torch.zeros(7, 9, dtype=torch.bool), None, 9, 9))] == [7]


def test_nothing_at_all() -> None:
    attention = build()
    for batch, length in ((0, 9), (2, 0), (2, 9)):
        tensors = batch_of(batch, length)
        mask = torch.ones(batch, length, dtype=torch.bool)
        out, lse, *grads = five(attention, tensors, mask, None)
        assert not out.any()
        assert (lse == -torch.inf).all()
        assert not any(grad.any() for grad in grads)
    out = attention(*batch_of(1, 0), cu_seqlens=torch.tensor([0, 0, 0]))
    assert out.shape == (1, 0, 4, 8)


HOLE = torch.tensor([[False, True, False, True], [False, False, False, True]])


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        (2, {"key_padding_mask": HOLE.flip(0)}, r"row 1 has padding at position 1 between its tokens"),
        (2, {"key_padding_mask": HOLE.float()}, r"must be bool, True where a key is padding, got torch.float32"),
        (2, {"key_padding_mask": HOLE[:1]}, r"must be \(batch, kv_len\) = \(2, 4\), got \(1, 4\)"),
        (2, {"key_padding_mask": HOLE[:, 0] & False, "q_offset": 3}, r"must be \(batch, kv_len\)"),
        (2, {"key_padding_mask": HOLE & False, "q_offset": 3}, r"positions from 0, so no offsets.*q_offset=3"),
        (1, {"cu_seqlens": torch.tensor([0, 4]), "kv_offset": 3}, r"positions from 0, so no offsets.*kv_offset=3"),
        (1, {"cu_seqlens": torch.tensor([0, 4]), "key_padding_mask": HOLE[:1]}, r"not both"),
        (2, {"cu_seqlens": torch.tensor([0, 4])}, r"batch must be 1.*flatten the batch"),
        (1, {"cu_seqlens": torch.tensor([0, 3])}, r"end with the number of tokens, 4; got 0 and 3"),
        (1, {"cu_seqlens": torch.tensor([1, 4])}, r"begin with 0.*got 1 and 4"),
        (1, {"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"must not decrease, but number 2 is 2, after 3"),
        (1, {"cu_seqlens": torch.tensor([0.0, 4.0])}, r"int32 or int64.*got \(2,\) torch.float32"),
        (1, {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"documents \+ 1.*got \(0,\)"),
    ],
)
def test_what_cannot_be_is_told(batch: int, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()(*batch_of(batch, 4), **arguments)


def test_queries_of_another_sequence_are_told() -> None:
    query, key, value = batch_of(2, 4)
    with pytest.raises(ConfigError, match=r"3 queries and 4 keys.*which is causal"):
        build(is_causal=False)(query[:, :3], key, value, key_padding_mask=HOLE & False)
    with pytest.raises(ConfigError, match=r"there are 4 queries and 3 keys"):
        build()(query, key[:, :3], value[:, :3], key_padding_mask=HOLE[:, :3] & False)
    with pytest.raises(ConfigError, match=r"have positions from 0"):
        reference.attention(query, key, value, key_padding_mask=HOLE & False, q_offset=1)


def test_a_backend_without_varlen_is_refused_with_that_reason() -> None:
    whole = build()
    engine = Engine(
        whole.config,
        whole._engine.pattern,
        whole._engine.kernel,
        takes_layout=False,
        has_dlse=True,
        call_axes=whole._engine.call_axes - {"varlen"},
    )
    attention = Attention(whole.config, whole.plan, engine)
    with pytest.raises(ConfigError, match=r"cu_seqlens: .*does not declare varlen.*another backend"):
        attention(*batch_of(1, 4), cu_seqlens=torch.tensor([0, 4]))
    assert attention(*batch_of(1, 4)).shape == (1, 4, 4, 8)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the capture that is meant to fail
def test_on_a_card_it_is_the_same_and_a_graph_is_refused() -> None:
    attention, card = build(), build(device="cuda")
    tensors, mask = batch_of(len(PADDED), LENGTH), padding()
    moved = [x.detach().cuda().requires_grad_() for x in tensors]
    expected = five(attention, tensors, mask, None)
    for a, e in zip(five(card, moved, mask.cuda(), None), expected, strict=True):
        assert error(a.cpu(), e) < 1e-5
    graph, mask = torch.cuda.CUDAGraph(), mask.cuda()
    with pytest.raises(ConfigError, match="a CUDA graph cannot capture"), torch.cuda.graph(graph):
        card(*(x.detach() for x in moved), key_padding_mask=mask)


def test_a_graph_outlives_the_module_and_has_no_second_derivative() -> None:
    tensors, mask = batch_of(len(PADDED), LENGTH), padding()
    attention = build(scale=0.321)
    out = attention(*tensors, key_padding_mask=mask)
    expected = torch.autograd.grad(attention(*tensors, key_padding_mask=mask).square().sum(), tensors)
    del attention
    actual = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        actual[0].sum().backward()  # type: ignore[no-untyped-call]
