"""The backend `fa3`: what it refuses, how it finds its operators, and what it computes, emulated and on the card."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Full, Global, Learned, Local, Pattern, explain
from dilated_attention.backends.fa3 import Fa3Backend, FlashAttention3, find_operators
from dilated_attention.backends.libraries import aligned
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DensePiece
from dilated_attention.core.refusal import Refusal
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.specs import Device

from . import dense_math
from .distributions import run
from .kernel_kit import (
    PATTERNS,
    build,
    check,
    check_emulated,
    check_graph,
    codes,
    load_libraries,
    on_card,
    request,
    verdict,
)
from .support import NAMES, error, oracle, ours

load_libraries()

HERE = hasattr(torch.ops.flash_attn_3, "fwd")
# The signatures of xformers 0.0.34's operators.
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
needs_absence = pytest.mark.skipif(HERE, reason="the real operators are registered")


def given(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operator was called with, by name; PyTorch leaves out trailing defaults."""
    names = [argument.name for argument in operator._schema.arguments]
    defaults = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def emulated_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The forward operator's arithmetic, and what the real one asks of its arguments."""
    call = given(torch.ops.flash_attn_3.fwd.default, args, kwargs)
    query, key, value = call["q"], call["k"], call["v"]
    assert call["num_splits"] == 1
    assert dense_math.is_aligned(query, key, value)
    window = call["window_size_left"], call["window_size_right"]
    out, lse = dense_math.forward(query, key, value, call["softmax_scale"], call["is_causal"], window)
    return out, lse, query.new_empty(0), query.new_empty(0)


def emulated_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The backward operator's arithmetic; releases differ in what they return."""
    call = given(torch.ops.flash_attn_3.bwd.default, args, kwargs)
    dout, query, key, value, out = (call[name] for name in ("dout", "q", "k", "v", "out"))
    assert dense_math.is_aligned(dout, query, key, value, out)
    scale, is_causal = call["softmax_scale"], call["is_causal"]
    window = call["window_size_left"], call["window_size_right"]
    grads = dense_math.backward(dout, query, key, value, out, call["softmax_lse"], scale, is_causal, window)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        call[name].copy_(grad)
    return tuple(query.new_empty(0) for _ in range(8))


@pytest.fixture
def emulated() -> Iterator[FlashAttention3]:
    """The kernel over operators with the real signatures that compute on CPU."""
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        library.define(FORWARD)
        library.define(BACKWARD)
        library.impl("fwd", emulated_forward, "CPU")
        library.impl("bwd", emulated_backward, "CPU")
        found = find_operators()
        assert not isinstance(found, Refusal)
        yield FlashAttention3(found)


def test_listing_it_imports_nothing_of_it() -> None:
    code = (
        "import sys; from dilated_attention.registry.discovery import default_registry\n"
        "print('fa3' in default_registry().backends, "
        "[m for m in sys.modules if m.startswith(('torch', 'flash_attn', 'xformers'))])"
    )
    assert run(None, "-c", code).stdout.split(maxsplit=1) == ["True", "[]\n"]


def test_on_a_cpu_it_is_refused_and_the_near_miss_says_what_it_takes() -> None:
    plan = explain(num_heads=8, head_dim=64, device="cpu")
    (row,) = [row for row in plan.rows if row.name == "fa3"]
    assert {refusal.code for refusal in row.refusals} == {"device_types", "dtypes"}
    if not torch.cuda.is_available():
        assert row.near_miss is not None
        assert row.near_miss.changes == {"dtype": "bfloat16", "device": "cuda"}
        assert not row.near_miss.verified


@needs_absence
def test_without_its_operators_both_packages_are_named() -> None:
    (refusal,) = verdict("fa3").refusals
    assert refusal.code == "not_installed"
    assert "xformers==0.0.34" in refusal.remedy
    assert "subdirectory=hopper" in refusal.remedy


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"dtype": "float32"}, "dtypes"),
        ({"dtype": "float64"}, "dtypes"),
        ({"head_dim": 20}, "head_dims"),
        ({"head_dim": 264}, "head_dims"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"deterministic": True}, "deterministic"),
        ({"device": Device(type="cuda", arch="sm_80", torch_name="cuda:0")}, "arch"),
        ({"device": Device(type="cuda", arch="sm_100", torch_name="cuda:0")}, "arch"),
        ({"device": Device(type="hip", arch="gfx942", torch_name="cuda:0")}, "device_types"),
    ],
)
def test_what_it_does_not_take_is_refused(fields: dict[str, Any], code: str) -> None:
    assert codes(verdict("fa3", **fields)) == {code}


@needs_absence
def test_it_has_no_options() -> None:
    with pytest.raises(ConfigError, match=r"'fa3'\] has no 'kernel'; it takes nothing"):
        verdict("fa3", backend_options={"fa3": {"kernel": "x"}})


@needs_absence
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "does not register them"),
        ("raise ImportError('undefined symbol: x')", "ImportError: undefined symbol: x"),
    ],
)
def test_an_interface_that_does_not_work_is_refused_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        (refusal,) = verdict("fa3").refusals
    finally:
        sys.modules.pop("flash_attn_interface", None)
    assert refusal.code == "not_installed"
    assert said in refusal.actual


@needs_absence
def test_a_bundled_library_that_cannot_be_loaded_is_refused_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "xformers" / "flash_attn_3"
    folder.mkdir(parents=True)
    (tmp_path / "xformers" / "__init__.py").write_text("raise RuntimeError('xformers must not be imported for this')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "neither" in verdict("fa3").refusals[0].actual
    (folder / "_C.so").write_bytes(b"no library")
    (refusal,) = verdict("fa3").refusals
    assert str(folder / "_C.so") in refusal.actual
    assert "OSError" in refusal.actual


@needs_absence
def test_operators_of_another_release_are_refused() -> None:
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        library.define(FORWARD.replace("num_splits", "splits"))
        library.define(BACKWARD)
        (refusal,) = verdict("fa3").refusals
    assert (refusal.code, refusal.actual) == ("not_installed", "one without num_splits")


@needs_absence
def test_it_is_chosen_where_it_is_usable(emulated: FlashAttention3) -> None:
    found = verdict("fa3")
    assert found.accepts
    assert found.kernel == emulated.name == "FlashAttention-3 (operators already loaded)"
    specs = default_registry().backends
    assert specs["fa3"].spec.priority > specs["sdpa"].spec.priority > specs["xformers"].spec.priority


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@needs_absence
def test_every_pattern_is_computed_emulated(pattern: Pattern, is_causal: bool, emulated: FlashAttention3) -> None:
    assert verdict("fa3", pattern=pattern, is_causal=is_causal).accepts
    for heads, kv_heads, head_dim, length in ((4, 4, 8, 150), (4, 2, 24, 67)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        check_emulated(emulated, geometry, pattern, head_dim)


def test_the_patterns_walked_are_all_that_there_are() -> None:
    walked = str([pattern.to_dict() for pattern in PATTERNS])
    kinds = set(default_registry().patterns) - {"stored", "learned"}  # one of the others; blocks that core computes
    assert [kind for kind in sorted(kinds) if f"'kind': '{kind}'" not in walked] == []


@needs_absence
def test_what_it_does_not_compute_itself_it_takes_for_core_to_compute(emulated: FlashAttention3) -> None:
    assert verdict("fa3", pattern=Learned(block_size=32, blocks_per_row=2)).accepts


@needs_absence
def test_unaligned_inputs_are_copied_and_aligned_ones_are_not(emulated: FlashAttention3) -> None:
    packed = torch.randn(2, 33, 3, 4 * 8 + 1)
    query, key, value = (torch.unflatten(packed[:, :, i, 1:], 2, (4, 8)) for i in range(3))
    assert not dense_math.is_aligned(query)
    piece = DensePiece(is_causal=True, scale=0.3)
    out, lse = emulated.forward(query, key, value, piece)
    again, again_lse = emulated.forward(query.clone(), key.clone(), value.clone(), piece)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    strided = torch.randn(2, 66, 4, 8)[:, ::2, 1:3]
    assert next(aligned(strided)) is strided


gpu = pytest.mark.skipif(
    not HERE or not torch.cuda.is_available(),
    reason="needs an sm_90 card and FlashAttention-3's operators (installed, or named by FA3_LIBRARIES)",
)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_computed_on_the_card(pattern: Pattern, dtype: str, is_causal: bool) -> None:
    for heads, kv_heads, head_dim, length in ((4, 4, 64, 517), (4, 2, 48, 389), (5, 5, 24, 131), (2, 1, 128, 260)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        check(build("fa3", pattern, geometry, dtype, head_dim), geometry)


@pytest.mark.gpu
@gpu
def test_offsets_and_unequal_lengths() -> None:
    pattern = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
    for q_len, kv_len, is_causal in ((1, 300, True), (77, 300, True), (300, 77, False), (77, 300, False)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=4, is_causal=is_causal)
        for each in (pattern, Local((70, 30)), Local((5, 0)) | Global(9)):
            check(build("fa3", each, geometry, "bfloat16", 64), geometry, [1e-2] * 5)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("head_dim", [8, 96, 192, 256])
def test_other_head_dims(head_dim: int) -> None:
    geometry = Geometry.self_attention(260, 4, is_causal=True)
    attention = build("fa3", Full(), geometry, "bfloat16", head_dim)
    tensors = on_card(geometry, "bfloat16", head_dim)
    through_lse = head_dim < 256  # there are no more columns for its gradient
    actual = ours(attention, tensors, geometry, through_lse=through_lse)
    for name, a, e in zip(NAMES, actual, oracle(Full(), tensors, geometry, through_lse=through_lse), strict=True):
        assert error(a, e) < 1e-2, name


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
def test_it_replays_in_a_cuda_graph() -> None:
    pattern = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    check_graph(build("fa3", pattern, geometry, "bfloat16", 64), geometry)


@pytest.mark.gpu
@gpu
def test_auto_prefers_it() -> None:
    plan = explain(num_heads=16, head_dim=64, dtype="bfloat16", device="cuda", is_causal=True)
    assert plan.backend == "fa3"
    assert plan.kernel.startswith("FlashAttention-3 (")
    assert not list(Fa3Backend().refusals(request()))
