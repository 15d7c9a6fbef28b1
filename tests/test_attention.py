"""The module itself: layouts, autocast, checkpointing, torch.compile, copies, and what it refuses at a call."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from dilated_attention import Attention, ConfigError, Dilated, Full, Local, Pattern, build_attention
from dilated_attention.core.geometry import Geometry

from .support import error, inputs, oracle, ours

LONGNET = Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
GEOMETRY = Geometry.self_attention(90, 4, is_causal=True)


def build(**fields: Any) -> Attention:
    defaults: dict[str, Any] = {"pattern": LONGNET, "num_heads": 4, "head_dim": 8, "is_causal": True}
    return build_attention(defaults | fields)


def test_bhsd_is_the_same_attention_transposed() -> None:
    tensors = inputs(GEOMETRY, batch=2, head_dim=8, dtype=torch.float32)
    expected, lse = build()(*tensors, return_lse=True)
    swapped = [x.transpose(1, 2) for x in tensors]
    out, lse_bhsd = build(tensor_layout="bhsd")(*swapped, return_lse=True)
    assert torch.equal(out.transpose(1, 2), expected)
    assert torch.equal(lse_bhsd, lse)
    assert lse.shape == (2, 4, 90)


def test_out_and_lse_are_contiguous_and_of_the_documented_dtype() -> None:
    for dtype, lse_dtype in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        for pattern in (Full(), LONGNET, Local(window_size=3)):
            out, lse = build(pattern=pattern, dtype=dtype)(
                *inputs(GEOMETRY, batch=2, head_dim=8, dtype=dtype), return_lse=True
            )
            assert out.is_contiguous()
            assert lse.is_contiguous()
            assert (out.dtype, lse.dtype) == (dtype, lse_dtype)


def test_activation_checkpointing_keeps_only_the_inputs_and_changes_nothing() -> None:
    tensors = inputs(GEOMETRY, batch=2, head_dim=8, dtype=torch.float32)
    results = {}
    kept: dict[bool, set[int]] = {False: set(), True: set()}
    for checkpointing in (False, True):

        def pack(x: Tensor, seen: set[int] = kept[checkpointing]) -> Tensor:
            seen.add(x.untyped_storage().data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention = build(activation_checkpointing=checkpointing)
            results[checkpointing] = ours(attention, tensors, GEOMETRY, through_lse=True)
    for a, b in zip(results[False], results[True], strict=True):
        assert torch.equal(a, b)
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    assert kept[True] == storages
    assert len(kept[False] - storages) == 2  # out and lse


def test_works_under_torch_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    attention = build()
    tensors = inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)
    plain = torch.autograd.grad(attention(*tensors).sum(), tensors)
    again = torch.autograd.grad(checkpoint(attention, *tensors, use_reentrant=False).sum(), tensors)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_to_the_dtype_it_was_built_for() -> None:
    attention = build(dtype="bfloat16")
    tensors = inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"query is torch.float32, but the attention was built for torch.bfloat16"):
        attention(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*tensors)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), tensors))
    # The block computation multiplies in float32 even while autocast is on.
    exact = build(pattern=Local(window_size=5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ours(exact, tensors, GEOMETRY, through_lse=True)
    for a, e in zip(actual, oracle(Local(window_size=5), tensors, GEOMETRY, through_lse=True), strict=True):
        assert error(a, e) < 1e-5


class Block(nn.Module):
    """A projection, the attention and a projection: enough of a model to train."""

    def __init__(self, attention: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.attention = attention
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.unflatten(self.qkv(x), -1, (12, 8))
        mixed: Tensor = self.attention(heads[:, :, :4], heads[:, :, 4:8], heads[:, :, 8:])
        update: Tensor = self.out(mixed.flatten(2))
        return x + update


def train(dtype: torch.dtype, steps: int) -> list[float]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block(build(dtype=dtype))
        x, target = torch.randn(2, 90, 32), torch.randn(2, 90, 32).cumsum(dim=1) / 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (model(x) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_fifty_steps_under_autocast_track_float32() -> None:
    exact, mixed = train(torch.float32, 50), train(torch.bfloat16, 50)
    assert exact[-1] < 0.7 * exact[0]
    assert max(abs(a - b) / a for a, b in zip(exact, mixed, strict=True)) < 0.02


def test_compiles_without_a_graph_break_and_without_recompiling_for_lengths() -> None:
    torch.compiler.reset()
    attention = build(pattern=LONGNET + Local(window_size=7))
    frames: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        frames.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention(q, k, v, return_lse=True)
        total: Tensor = out.sin().sum() + lse.cos().sum()
        return total

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for length in (90, 77, 128, 65):
        tensors = inputs(Geometry.self_attention(length, 4), batch=2, head_dim=8, dtype=torch.float32)
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
            assert error(a, b) < 1e-6
    assert len(frames) <= 4  # forward and backward; the second length makes them dynamic, later ones are free
    names = set().union(*frames)
    assert {"dilated_attention.attend.default", "dilated_attention.attend_backward.default"} <= names
    assert not any("scaled_dot_product" in name or "as_strided" in name for name in names)  # nothing was traced through


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    model = Block(build())
    x = torch.randn(2, 90, 32)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x).sum(), list(model.parameters())), expected, strict=True):
        assert error(a, b) < 1e-5


def test_the_operators_keep_torch_library_promises() -> None:
    attention = build(pattern=LONGNET + Local(window_size=7))
    tensors = [x.detach() for x in inputs(GEOMETRY, batch=2, head_dim=8, dtype=torch.float32)]
    out, lse = attention(*tensors, return_lse=True)
    key = attention._engine.key
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dilated_attention.attend.default, (*tensors, None, None, key, 0, 0, False), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.dilated_attention.attend_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, None, None, key, 0, 0),
        test_utils=tests,
    )


def test_copies_and_equal_attentions_share_lowered_lengths() -> None:
    model = Block(build())
    twin = copy.deepcopy(model)
    x = torch.randn(1, 40, 32)
    assert torch.equal(model(x), twin(x))
    del model
    assert torch.isfinite(twin(x)).all()
    assert twin.state_dict().keys() == {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    first, second = build(), build()
    assert first._engine is second._engine
    assert first._engine is not build(is_causal=False)._engine


def test_lengths_zero_and_one_and_an_empty_batch() -> None:
    attention = build()
    for batch, q_len, kv_len in ((2, 0, 5), (2, 5, 0), (0, 7, 7), (1, 1, 1), (2, 0, 0)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=4, is_causal=True)
        tensors = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float32)
        actual = ours(attention, tensors, geometry, through_lse=True)
        for a, e in zip(actual, oracle(LONGNET, tensors, geometry, through_lse=True), strict=True):
            assert error(a, e) < 1e-5


def test_a_graph_outlives_the_module() -> None:
    tensors = inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)
    attention = build(scale=0.123)
    loss = attention(*tensors).sum()
    expected = torch.autograd.grad(attention(*tensors).sum(), tensors)
    del attention
    for a, b in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative_is_an_error_not_a_wrong_number() -> None:
    tensors = inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)
    (grad,) = torch.autograd.grad(build()(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("is_causal", r"that is fixed when an attention is built, by build_attention\(is_causal=\.\.\.\)"),
        ("causal", r"by build_attention\(is_causal=\.\.\.\)"),
        ("dropout", r"by build_attention\(dropout_p=\.\.\.\)"),
        ("seqlen", r"by build_attention\(seq_len=\.\.\.\)"),
        ("attn_mask", "who attends to whom is the pattern"),
        ("attention_mask", "who attends to whom is the pattern"),
        ("enable_gqa", "grouped queries are said by num_kv_heads"),
        ("key_padding", r"did you mean 'key_padding_mask'\?"),
        ("rope", "it takes return_lse, q_offset, kv_offset, key_padding_mask, cu_seqlens"),
    ],
)
def test_arguments_of_other_attentions_are_told_where_they_belong(argument: str, told: str) -> None:
    x = torch.randn(1, 4, 4, 16)
    with pytest.raises(TypeError, match=f"a call of an attention has no '{argument}'.*{told}"):
        build()(x, x, x, **{argument: None})


def test_dropout_is_exact_on_the_reference_backend_and_off_in_eval() -> None:
    attention = build(backend="reference", dropout_p=0.5, dtype="float64")
    short = Geometry.self_attention(24, 4)
    query, key, value = (x.detach() for x in inputs(short, batch=1, head_dim=8, dtype=torch.float64))
    plain = build(backend="reference", dtype="float64")(query, key, value)
    assert torch.equal(attention.eval()(query, key, value), plain)
    attention.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([attention(query, key, value) for _ in range(600)])
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(dim=0) / len(draws) ** 0.5
    seen = spread > 0
    assert ((draws.mean(dim=0) - plain)[seen] / spread[seen]).abs().mean() < 1.0  # about 0.8 where unbiased


def bad(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (bad((2, 4, 9, 8), (2, 9, 4, 8), (2, 9, 4, 8)), r"it looks like a bhsd tensor: transpose it"),
        (bad((9, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8)), r"query must be \(batch, seq_len, 4, 8\).*got \(9, 4, 8\)"),
        (bad((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 4, 8)), r"key must be .*got \(2, 9, 2, 8\); .*num_kv_heads=2"),
        (bad((2, 9, 4, 8), (2, 9, 3, 8), (2, 9, 3, 8)), r"got \(2, 9, 3, 8\)$"),
        (bad((2, 9, 4, 16), (2, 9, 4, 8), (2, 9, 4, 8)), r"got \(2, 9, 4, 16\)"),
        (bad((2, 9, 4, 8), (2, 9, 4, 8), (2, 8, 4, 8)), r"key and value equal lengths"),
        (bad((2, 9, 4, 8), (3, 9, 4, 8), (3, 9, 4, 8)), r"equal batch sizes"),
        (bad((2, 9, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), dtype=torch.float16), r"built for torch.float32; cast it"),
        (
            [*bad((2, 9, 4, 8), (2, 9, 4, 8)), torch.zeros(2, 9, 4, 8, device="meta")],
            r"value is on meta, but the attention was built for cpu",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_are_told_apart(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()(*tensors)


def test_what_is_no_tensor_no_position_and_not_to_be_pickled() -> None:
    attention = build()
    tensors = [x.detach() for x in inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)]
    arguments: list[Any] = [tensors[0], None, [1.0]]
    for call in (attention, attention.received, lambda q, k, v: attention.step(q, k, v, attention.make_cache(1))):
        with pytest.raises(ConfigError, match="called with tensors, got Tensor, NoneType, list"):
            call(*arguments)
    for name, value in (("q_offset", 1.5), ("q_offset", True), ("kv_offset", None), ("kv_offset", torch.tensor(3))):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=f"{name} is one position for all batch rows, an integer, got"):
            attention(*tensors, **wrong)
    with pytest.raises(ConfigError, match="kv_offset must lie between"):
        attention(*tensors, kv_offset=1 << 63)
    with pytest.raises(ConfigError, match="query is on meta, but the attention was built for cpu"):
        attention(tensors[0].to("meta"), *tensors[1:])
    mask: Any = [[False] * 90]
    with pytest.raises(ConfigError, match="key_padding_mask must be a tensor, got list"):
        attention(*tensors, key_padding_mask=mask)
    with pytest.raises(TypeError, match="an attention is not pickled; save config"):
        pickle.dumps(Block(attention))


def test_offsets_of_numpy_are_offsets() -> None:
    attention, (q, k, v) = build(), inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)[:3]
    for offsets in ((3, 1), (40, 0)):
        numpys: Any = [np.int64(offsets[0]), np.int32(offsets[1])]
        out, lse = attention(q, k, v, q_offset=numpys[0], kv_offset=numpys[1], return_lse=True)
        assert torch.equal(out, attention(q, k, v, q_offset=offsets[0], kv_offset=offsets[1]))
        received = [attention.received(q, k, lse, q_offset=a, kv_offset=b) for a, b in (numpys, offsets)]
        assert torch.equal(*received)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_old_tracer_is_refused() -> None:
    tensors = tuple(x.detach() for x in inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)[:3])
    trace: Any = torch.jit.trace
    with pytest.raises(ConfigError, match=r"torch.jit.trace cannot trace an attention; use torch.compile"):
        trace(build(), tensors)


def test_a_length_that_cannot_be_planned_takes_no_memory_first() -> None:
    attention = build(pattern=Dilated((16, 32), (1, 2)))
    with pytest.raises(ConfigError, match=r"62,500,000,000 segments of 16, but at most 16,777,216 can be planned"):
        attention.prepare(10**12)
    endless = torch.zeros(1, 1, 4, 8).expand(1, 10**12, 4, 8)
    with pytest.raises(ConfigError, match=r"can be planned; use longer segments or a shorter sequence"):
        attention(endless, endless, endless)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_told_of_packing() -> None:
    attention, dense = build(), torch.zeros(1, 5, 4, 8)
    with pytest.raises(ConfigError, match=r"dense tensors, got sparse_coo, strided, strided; .* with cu_seqlens"):
        attention(dense.to_sparse(), dense, dense)
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([torch.zeros(n, 4, 8) for n in (2, 3)], layout=layout)
        with pytest.raises(ConfigError, match="dense tensors, got nested, nested, nested"):
            attention(nested, nested, nested)


def test_a_gradient_that_was_built_away_is_an_error() -> None:
    attention = build(requires_grad=False)
    tensors = inputs(GEOMETRY, batch=1, head_dim=8, dtype=torch.float32)
    with pytest.raises(ConfigError, match="requires_grad=False"):
        attention(*tensors)
    with torch.no_grad():
        attention(*tensors)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("pattern", [Full(), LONGNET, Local(5)], ids=str)
def test_out_may_be_changed_in_place_unless_it_is_kept(pattern: Pattern, backend: str) -> None:
    """As for PyTorch's own functions: what the backward needs is an error there, and never a wrong gradient."""
    x = torch.randn(1, 90, 4, 8, requires_grad=True)
    lean, keeping = (build(pattern=pattern, backend=backend, activation_checkpointing=c) for c in (True, False))
    (expected,) = torch.autograd.grad(keeping(x, x, x).sum() * 2, x)
    (found,) = torch.autograd.grad(lean(x, x, x).mul_(2).sum(), x)
    assert error(found, expected.double()) < 1e-5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(keeping(x, x, x).mul_(2).sum(), x)


def test_a_call_changes_no_global_state_and_needs_no_optional_library() -> None:
    state = "torch.get_rng_state().sum(), torch.get_float32_matmul_precision(), dict(os.environ)"
    code = (
        f"import os, sys, torch; before = ({state});"
        "from dilated_attention.reference import attention;"  # by its path, as the first of all
        "from dilated_attention import Dilated, build_attention, counters_of;"
        "a = build_attention(pattern=Dilated(segment_lengths=(4,), dilation_rates=(2,)), num_heads=2, head_dim=8);"
        "a(*torch.zeros(3, 1, 9, 2, 8)); counters_of();"
        f"after = ({state});"
        "assert before == after;"
        "assert not {'prometheus_client', 'matplotlib', 'bokeh', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
