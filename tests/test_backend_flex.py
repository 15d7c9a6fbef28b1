"""The backend `flex`: its tables and modifiers, PyTorch's own compiled kernel on a CPU, and all of it on a card."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dilated_attention import ConfigError, Dilated, Full, Learned, Limits, Local, Pattern, Random, explain
from dilated_attention.backends import flex_compiled
from dilated_attention.backends.flex import Attend, FlexKernel
from dilated_attention.backends.flex_tables import BLOCK_SIZE, FlexTables, WeightedBlocks, bounds_of_bytes, modifiers
from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower
from dilated_attention.exchange.shards import Shards
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.specs import Device

from .kernel_kit import PATTERNS, build, check, check_emulated, codes, request, verdict
from .ring_simulation import worst
from .support import error, inputs, oracle

WEIGHTED = Dilated(segment_lengths=(128, 256), dilation_rates=(1, 1))  # whole blocks count twice
CASES = [*PATTERNS, WEIGHTED, Random(blocks_per_row=1, block_size=24) + Local(window_size=5)]
CPU = torch.device("cpu")


def listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The lists as a matrix of how often each block is listed, (1, H, rows, columns)."""
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros((*indices.shape[:-1], columns), dtype=torch.long).scatter_add(-1, indices.long(), used.long())


def dense_attend(query: Tensor, key: Tensor, value: Tensor, tables: FlexTables, scale: float) -> tuple[Tensor, Tensor]:
    """What FlexAttention documents, over all pairs: only listed blocks, masks in those of the first list."""
    q_len, kv_len, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    place = (
        torch.zeros(1, 1, 1, 1, dtype=torch.long),
        torch.arange(query.shape[1])[None, :, None, None],
        torch.arange(q_len)[None, None, :, None],
        torch.arange(kv_len)[None, None, None, :],
    )
    columns = -(-kv_len // BLOCK_SIZE)
    masked, full = (
        listed(*pair, columns).repeat_interleave(BLOCK_SIZE, 2).repeat_interleave(BLOCK_SIZE, 3)[:, :, :q_len, :kv_len]
        for pair in (tables.lists[:2], tables.lists[2:4])
    )
    assert int((masked + full).max()) <= 1
    mask_mod, score_mod = modifiers(tables)
    inside = mask_mod(*place)
    seen = (masked > 0) & inside | (full > 0)
    assert torch.equal(seen, inside.expand_as(seen))  # FlexAttention without a compiler knows no lists
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if score_mod is not None:
        scores = score_mod(scores, *place)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return weights @ value, lse


def kernel(limit_bytes: int = 1 << 30) -> FlexKernel:
    def make(tables: FlexTables, *, any_length: bool) -> Attend:
        return lambda query, key, value, scale: dense_attend(query, key, value, tables, scale)

    return FlexKernel("dense", limit_bytes, make=make)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_every_pattern_is_what_its_tables_say(pattern: Pattern, is_causal: bool) -> None:
    length = 257 if is_causal else 150
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check_emulated(kernel(), geometry, pattern, 8, takes_layout=True)


def test_offsets_unequal_lengths_and_rows_without_keys() -> None:
    for pattern in (CASES[1], Local(window_size=20)):
        for q_len, kv_len, q_offset, kv_offset in ((1, 300, 299, 0), (300, 77, 0, 0), (130, 300, 500, 64)):
            geometry = Geometry(
                q_len=q_len, kv_len=kv_len, num_heads=2, num_kv_heads=2, is_causal=True,
                q_offset=q_offset, kv_offset=kv_offset,
            )  # fmt: skip
            check_emulated(kernel(), geometry, pattern, 8, takes_layout=True)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_a_rank_of_a_ring_computes_its_own_keys(pattern: Pattern, is_causal: bool) -> None:
    """Parts of rows, from the results of the whole; rows that have no key of their own among them."""
    shards = Shards(70, 3, 4, 2, is_causal=is_causal)
    for batch, through_lse in ((1, False), (2, True)):
        found = worst(pattern, shards, batch=batch, through_lse=through_lse, kernel=kernel(), dtype=torch.float32)
        assert found < 1e-5


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What is compiled meanwhile; each runs as it was traced."""
    made: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        made.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.compiler.reset()
    monkeypatch.setattr(flex_compiled, "_COMPILED", {})
    return made


def test_it_is_compiled_once_for_forward_and_once_for_backward_wherever_it_is_called_from(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an operator autograd's keys are left behind, in a compiled model's operator some of them: no new guards."""

    def dense(query: Tensor, key: Tensor, value: Tensor, tables: FlexTables, scale: float) -> tuple[Tensor, Tensor]:
        scores = query @ key.transpose(-1, -2) * scale
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    monkeypatch.setattr(flex_compiled, "attend", dense)  # FlexAttention has no gradients on a CPU
    flex = FlexKernel("counted", 1 << 30)
    geometry = Geometry(q_len=130, kv_len=130, num_heads=2, num_kv_heads=2, is_causal=False)
    piece = LayoutPiece(layout=lower(Full(), geometry), scale=0.1)
    query, key, value, dout = (torch.randn(1, 130, 2, 8) for _ in range(4))
    keys = torch._C.DispatchKey
    for autograd, views in ((False, False), (True, True), (True, False)):
        with (
            torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, autograd),
            torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, views),
        ):
            for is_enabled in (True, False):
                with torch.set_grad_enabled(is_enabled):
                    out, lse = flex.forward(query, key, value, piece)
                    dq, _, _ = flex.backward(dout, query, key, value, out, lse, piece)
                    assert not out.requires_grad
                    assert dq.shape == query.shape
    assert len(graphs) == 2


def forward_is_right(flex: FlexKernel, pattern: Pattern, geometry: Geometry, batch: int = 1) -> None:
    tensors = inputs(geometry, batch=batch, head_dim=16, dtype=torch.float32)
    piece = LayoutPiece(layout=lower(pattern, geometry), scale=0.25)
    query, key, value = (x.detach() for x in tensors)
    expected = oracle(pattern, tensors, geometry, through_lse=False)[:2]
    for computed, right in zip(flex.forward(query, key, value, piece), expected, strict=True):
        assert error(computed, right) < 1e-5


@pytest.mark.parametrize("pattern", [Local(200) | Random(2, 128, seed=3), WEIGHTED], ids=str)
def test_it_is_compiled_once_for_all_lengths(pattern: Pattern, graphs: list[torch.fx.GraphModule]) -> None:
    flex = FlexKernel("counted", 1 << 30)
    for q_len, kv_len in ((700, 700), (1000, 1000), (517, 517), (300, 900), (1024, 1024)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=2, num_kv_heads=1, is_causal=True)
        forward_is_right(flex, pattern, geometry)
    assert len(graphs) == 1
    for kv_len in (300, 301, 1000):  # tokens one by one: a length of 1 is always compiled
        forward_is_right(flex, pattern, Geometry(q_len=1, kv_len=kv_len, num_heads=2, num_kv_heads=1, is_causal=True))
    assert len(graphs) == 2
    for batch in (2, 3):
        forward_is_right(flex, pattern, Geometry.self_attention(450, 2, is_causal=True), batch)
        forward_is_right(flex, pattern, Geometry.self_attention(800, 2, is_causal=True), batch)
    assert len(graphs) == 3


def test_its_own_length_is_compiled_by_itself_and_once_for_all_layers(graphs: list[torch.fx.GraphModule]) -> None:
    for seed in (1, 2):
        flex = FlexKernel("counted", 1 << 30, 640)
        for length, batch, compiled in ((640, 2, 1), (700, 2, 2), (800, 2, 2), (640, 3, 2)):
            geometry = Geometry.self_attention(length, 2, is_causal=True)
            forward_is_right(flex, Random(2, 128, seed=seed), geometry, batch)
            assert len(graphs) == (compiled if seed == 1 else 2)


@pytest.mark.parametrize("own_length", [None, 130])
def test_strides_compile_nothing_anew(own_length: int | None, graphs: list[torch.fx.GraphModule]) -> None:
    piece = LayoutPiece(layout=lower(Full(), Geometry.self_attention(130, 2)), scale=0.1)
    flex = FlexKernel("counted", 1 << 30, own_length)
    rows = torch.randn(4, 130, 2, 16)
    odd = rows[:1].as_strided((1, 130, 2, 16), (7, 32, 16, 1))  # one row, whose stride is as good as any
    for x in (rows[:1], rows[::2][:1], odd, torch.randn(1, 130, 3, 2, 16)[:, :, 0]):
        flex.forward(x, x, x, piece)
    assert len(graphs) == 1


def test_a_compiler_that_is_reset_compiles_once_again(graphs: list[torch.fx.GraphModule]) -> None:
    flex = FlexKernel("counted", 1 << 30)
    for compiled in (1, 2):
        for q_len, kv_len in ((700, 700), (1000, 1000), (300, 900)):
            geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=2, num_kv_heads=1, is_causal=True)
            forward_is_right(flex, Local(200), geometry)
        assert len(graphs) == compiled
        torch.compiler.reset()


def tables(pattern: Pattern, geometry: Geometry) -> FlexTables:
    return FlexTables.of(WeightedBlocks.of(lower_blocks(pattern, geometry, block_size=BLOCK_SIZE)), CPU)


@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_the_lists_of_keys_are_those_of_queries_turned(pattern: Pattern) -> None:
    geometry = Geometry(q_len=700, kv_len=900, num_heads=4, num_kv_heads=4, is_causal=True)
    lists = tables(pattern, geometry).lists
    for by_rows, by_columns in ((lists[:2], lists[4:6]), (lists[2:4], lists[6:])):
        rows, columns = listed(*by_rows, 8), listed(*by_columns, 6)
        assert rows.shape[2:] == (6, 8)
        assert torch.equal(rows, columns.transpose(2, 3))


@pytest.mark.parametrize("pattern", [Full(), *CASES], ids=str)
def test_lists_of_both_kinds_have_the_same_strides(pattern: Pattern) -> None:
    """PyTorch 2.11 reads blocks without a mask, on a card, with the strides of the lists of blocks with one."""
    for is_causal in (True, False):
        lists = tables(pattern, Geometry.self_attention(1100, 2, is_causal=is_causal)).lists
        for masked, whole in ((lists[:2], lists[2:4]), (lists[4:6], lists[6:])):
            assert [x.stride() for x in masked] == [x.stride() for x in whole]


def test_only_what_is_seen_is_listed_and_weights_are_for_what_counts_twice() -> None:
    geometry = Geometry.self_attention(1024, 2)
    local = tables(Local(window_size=128), geometry)
    assert int(local.lists[0].sum()) == 2 * 7  # the diagonal's neighbours; one table for both heads
    assert int(local.lists[2].sum()) == 8
    assert not local.is_weighted
    assert modifiers(local)[1] is None
    weighted = tables(WEIGHTED, geometry)
    assert weighted.is_weighted
    layout = lower_blocks(WEIGHTED, geometry, block_size=BLOCK_SIZE)
    assert int(weighted.lists[0].sum()) == int(np.sum(layout.weights == 2)) == 8
    assert bounds_of_bytes(geometry, 1) == (4 * 8 * 8, 4 * (8 * 8 + 4 * 8 * (1 + 8)))
    assert bounds_of_bytes(geometry, 2) == (4 * 2 * 8 * 8, 4 * (2 * 8 * 8 + 2 * 4 * 8 * (1 + 8)))
    for pattern in CASES:
        for length in (1, 128, 200, 1024):
            layout = lower_blocks(pattern, Geometry.self_attention(length, 2), block_size=BLOCK_SIZE)
            least, most = bounds_of_bytes(layout.geometry, layout.row_ptr.shape[0])
            found = WeightedBlocks.of(layout)
            assert least < found.nbytes <= most
            made = FlexTables.of(found, CPU)
            assert made.nbytes == found.nbytes + made.heads.nbytes + made.masks.nbytes


# Some ten seconds to compile each; without lse, which PyTorch does not give on a CPU, and without gradients likewise.
@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [Full(), PATTERNS[1], PATTERNS[7], WEIGHTED], ids=str)
def test_pytorchs_compiled_kernel_reads_the_tables(pattern: Pattern, is_causal: bool) -> None:
    geometry = Geometry(q_len=389, kv_len=389, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    tensors = inputs(geometry, batch=2, head_dim=32, dtype=torch.float32)
    found = tables(pattern, geometry)
    torch.compiler.reset()
    run: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    with torch.no_grad():
        swapped = [x.detach().transpose(1, 2) for x in tensors]
        mask_mod, score_mod = modifiers(found)
        # For a CPU, but not for a GPU, the compiler asks for lists as wide as the table.
        lists = [functional.pad(x, (0, 4 - x.shape[-1])) if x.dim() == 4 else x for x in found.lists]
        make: Any = BlockMask
        mask = make((389, 389), *lists, BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE), mask_mod=mask_mod)
        out = run(*swapped, score_mod=score_mod, block_mask=mask, enable_gqa=True)
    expected = oracle(pattern, tensors, geometry, through_lse=False)[0]
    assert error(out.transpose(1, 2), expected) < 1e-5


@pytest.mark.parametrize("pattern", [*CASES, Learned(block_size=16, blocks_per_row=2)], ids=str)
def test_each_pattern_is_taken_or_refused_with_the_reason(pattern: Pattern) -> None:
    found = verdict("flex", pattern=pattern)
    assert codes(found) == ({"dynamic_tables"} if isinstance(pattern, Learned) else set())
    if found.accepts:
        assert found.kernel == f"FlexAttention (torch {torch.__version__})"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"dtype": "float64"}, "dtypes"),
        ({"head_dim": 8}, "head_dims"),
        ({"head_dim": 20}, "head_dims"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"deterministic": True}, "deterministic"),
        ({"device": Device(type="cpu", arch="x86_64", torch_name="cpu")}, "device_types"),
        ({"seq_len": 1 << 20, "pattern": Random(blocks_per_row=2)}, "layout_bytes"),
        ({"seq_len": 4096, "limits": Limits(layout_bytes=4_000)}, "layout_bytes"),
        ({"seq_len": 4096, "limits": Limits(layout_bytes=33_000), "pattern": Random(8, 128)}, "layout_bytes"),
    ],
)
def test_what_it_does_not_take_is_refused(fields: dict[str, Any], code: str) -> None:
    assert codes(verdict("flex", **fields)) == {code}


def test_with_a_seq_len_it_is_refused_where_a_call_would_be_and_nowhere_else() -> None:
    """Between what tables take at least and at most, it is what they take."""
    pattern = Random(blocks_per_row=2, block_size=128)
    geometry = request(pattern=pattern, seq_len=4096).config.geometry(4096)
    blocks = lower_blocks(pattern, geometry, block_size=BLOCK_SIZE)
    needed = WeightedBlocks.of(blocks).nbytes
    least, most = bounds_of_bytes(geometry, blocks.row_ptr.shape[0])
    assert least < needed < most
    layout = lower(pattern, geometry)
    for limit_bytes, fits in ((least - 1, False), (needed - 1, False), (needed, True), (most, True)):
        limits = Limits(layout_bytes=limit_bytes)
        assert verdict("flex", pattern=pattern, seq_len=4096, limits=limits).accepts is fits
        if fits:
            assert kernel(limit_bytes).tables(layout, CPU)
        else:
            with pytest.raises(ConfigError, match=r"raise Limits\.layout_bytes"):
                kernel(limit_bytes).tables(layout, CPU)


def test_bad_requests_say_so() -> None:
    with pytest.raises(ConfigError, match="it takes nothing"):
        verdict("flex", backend_options={"flex": {"x": 1}})
    layout = lower(Full(), Geometry.self_attention(1024, 2))
    needed = 4 * (64 + 4 * 8 * (1 + 8))  # the blocks, lists of all that are whole, and empty lists as wide
    with pytest.raises(
        ConfigError, match=f"1,024 keys need {needed:,} bytes, allowed are {needed - 1:,}; raise Limits"
    ):
        kernel(needed - 1).tables(layout, CPU)
    tables, _ = kernel(needed).tables(layout, CPU)
    assert tables.nbytes == needed + tables.heads.nbytes + tables.masks.nbytes


def test_it_is_chosen_after_all_others_but_what_is_for_the_rest() -> None:
    priorities = {name: found.spec.priority for name, found in default_registry().backends.items()}
    last = [name for name, priority in priorities.items() if priority <= priorities["flex"]]
    assert last == ["flex", "math", "reference"]
    (row,) = [row for row in explain(num_heads=8, head_dim=64, device="cpu").rows if row.name == "flex"]
    assert [refusal.code for refusal in row.refusals] == ["device_types"]
    assert request().device.type == "cuda"


# On the card.

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_every_pattern_is_computed_on_the_card(pattern: Pattern, dtype: str, is_causal: bool) -> None:
    geometry = Geometry(q_len=517, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check(build("flex", pattern, geometry, dtype, 64), geometry)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("head_dim", [16, 24, 48, 128, 256])
def test_head_dims_on_the_card(head_dim: int) -> None:
    geometry = Geometry(q_len=389, kv_len=389, num_heads=4, num_kv_heads=4, is_causal=True)
    check(build("flex", CASES[1], geometry, "bfloat16", head_dim), geometry)


@pytest.mark.gpu
@gpu
def test_many_lengths_and_offsets_on_the_card() -> None:
    for pattern in (Local(window_size=70), Full()):  # few blocks without a mask in a row, and many
        for q_len in (1, 77, *range(100, 1100, 100)):
            geometry = Geometry(q_len=q_len, kv_len=1100, num_heads=4, num_kv_heads=4, is_causal=True)
            check(build("flex", pattern, geometry, "bfloat16", 64), geometry, [1e-2] * 5)


@pytest.mark.gpu
@gpu
def test_all_lengths_are_compiled_once_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and with a backward, whether blocks divide them or not."""
    counter = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(flex_compiled, "_COMPILED", {})
    torch.compiler.reset()
    for length in (1000, 1024, 517, 1300, 640):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
        check(build("flex", Local(70) | Random(2, 128, seed=3), geometry, "bfloat16", 64), geometry)
    assert counter.frame_count == 2


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [Local(window_size=70), Random(blocks_per_row=2, block_size=32, seed=7)], ids=str)
def test_a_rank_computes_its_own_keys_on_the_card(pattern: Pattern, is_causal: bool) -> None:
    shards = Shards(200, 3, 4, 2, is_causal=is_causal)
    flex = FlexKernel("flex", 1 << 30)
    found = worst(
        pattern, shards, batch=2, through_lse=True, kernel=flex, dtype=torch.float32, head_dim=64, device="cuda"
    )
    assert found < 1e-5
