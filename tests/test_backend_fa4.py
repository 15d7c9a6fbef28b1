"""The backend `fa4`: what it refuses, and what it computes, over a stand-in for the library and on the card."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention import ConfigError, Dilated, Full, Global, Local, Pattern, Random, explain
from dilated_attention.backends.fa4 import Fa4Backend
from dilated_attention.backends.fa4_library import Library
from dilated_attention.backends.fa4_tables import FlashAttention4Table
from dilated_attention.core.block_product import BlockProduct
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DensePiece
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.specs import Device

from .fa4_stand_in import STAND_IN
from .kernel_kit import PATTERNS, build, check, check_emulated, check_graph, codes, request, verdict


def _installed() -> bool:
    try:
        return bool(version("flash-attn-4"))
    except PackageNotFoundError:
        return False


HERE = _installed()
# What the library and its compiler say of themselves while a kernel is compiled.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_absence = pytest.mark.skipif(HERE, reason="flash-attn-4 is installed")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The distribution, installed for one test."""
    for name, code in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "cutlass")]:
        del sys.modules[name]


def test_on_a_cpu_it_is_refused() -> None:
    plan = explain(num_heads=8, head_dim=64, device="cpu")
    (row,) = [row for row in plan.rows if row.name == "fa4"]
    missing = set() if HERE else {"not_installed"}
    assert {refusal.code for refusal in row.refusals} == {"device_types", "dtypes"} | missing
    if not HERE and not torch.cuda.is_available():
        assert row.near_miss is not None
        assert row.near_miss.install == ("flash-attn-4==4.0.0b36",)
        assert row.near_miss.changes == {"dtype": "bfloat16", "device": "cuda"}


@needs_absence
def test_without_it_the_line_that_installs_it_is_given() -> None:
    (refusal,) = verdict("fa4").refusals
    assert (refusal.code, refusal.remedy) == ("not_installed", "pip install 'flash-attn-4==4.0.0b36'")


@needs_absence
@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"dtype": "float32"}, "dtypes"),
        ({"head_dim": 20}, "head_dims"),
        ({"head_dim": 256}, "head_dims"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"deterministic": True}, "deterministic"),
        ({"device": Device(type="cuda", arch="sm_80", torch_name="cuda:0")}, "arch"),
    ],
)
def test_what_it_does_not_take_is_refused(stand_in: Path, fields: dict[str, Any], code: str) -> None:
    assert codes(verdict("fa4", **fields)) == {code}


@needs_absence
def test_it_is_usable_where_it_is_installed_and_named_with_its_release(stand_in: Path) -> None:
    found = verdict("fa4")
    assert found.accepts
    assert found.kernel == "FlashAttention-4 (flash-attn-4 4.0.0b36)"
    assert Fa4Backend().build(request()).name == found.kernel
    with pytest.raises(ConfigError, match="it takes nothing"):
        verdict("fa4", backend_options={"fa4": {"x": 1}})


@needs_absence
def test_another_release_is_refused(stand_in: Path) -> None:
    (stand_in / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b37\n"
    )
    (refusal,) = verdict("fa4").refusals
    assert (refusal.code, refusal.actual) == ("not_installed", "flash-attn-4 4.0.0b37")


@needs_absence
def test_a_library_that_cannot_be_imported_is_refused_with_the_cause(stand_in: Path) -> None:
    (stand_in / "flash_attn/cute/interface.py").write_text("import no_such_compiler")
    (refusal,) = verdict("fa4").refusals
    assert refusal.code == "not_installed"
    assert "No module named 'no_such_compiler'" in refusal.actual


@needs_absence
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_computed_emulated(stand_in: Path, pattern: Pattern, is_causal: bool) -> None:
    kernel = Fa4Backend().build(request())
    for heads, kv_heads, head_dim, length in ((4, 4, 8, 150), (4, 2, 24, 67)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        check_emulated(kernel, geometry, pattern, head_dim)


def check_repeated(length: int, dtype: torch.dtype, device: str, piece: DensePiece) -> None:
    """Of a query that is the same in all batch rows, and a key in all heads, results are those of their copies."""
    query, key, value = (torch.randn(2, length, 4, 64, dtype=dtype, device=device) for _ in range(3))
    query, key = query[:1].expand_as(query), key[:, :, :1].expand_as(key)
    kernel = Fa4Backend().build(request())
    results = kernel.forward(query, key, value, piece)
    for computed, expected in zip(
        results, kernel.forward(query.contiguous(), key.contiguous(), value, piece), strict=True
    ):
        torch.testing.assert_close(computed, expected, rtol=0, atol=0)


@needs_absence
def test_a_kernel_is_compiled_once_for_all_lengths_and_scales(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cute = importlib.import_module("cutlass.cute")
    compiled: list[object] = []
    compile_one = cute.compile

    def counting(kernel: object, *arguments: object, options: str) -> object:
        compiled.append(kernel)
        return compile_one(kernel, *arguments, options=options)

    monkeypatch.setattr(cute, "compile", counting)
    kernel = Fa4Backend().build(request())
    for is_causal, length, scale, expected in ((True, 5, 0.5, 1), (True, 9, 0.1, 1), (False, 9, 0.1, 2)):
        x = torch.randn(2, length, 3, 104, dtype=torch.float64)  # heads that no other test has
        kernel.forward(x, x, x, DensePiece(is_causal=is_causal, scale=scale))
        assert len(compiled) == expected


@needs_absence
def test_inputs_that_are_repeated_are_read_where_they_lie_emulated(stand_in: Path) -> None:
    check_repeated(20, torch.float64, "cpu", DensePiece(is_causal=True, scale=0.2))


@needs_absence
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [Random(1, 128, seed=3), Global(40) | Random(1, 128, seed=7)], ids=str)
def test_tables_are_computed_emulated(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, pattern: Pattern, is_causal: bool
) -> None:
    monkeypatch.delitem(sys.modules, "dilated_attention.backends.fa4_masks", raising=False)  # of another stand-in
    ran: list[str] = []

    def counted(name: str, run: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            ran.append(name)
            return run(*arguments)

        return counting

    for name in ("forward", "gradients"):
        monkeypatch.setattr(FlashAttention4Table, name, counted(name, getattr(FlashAttention4Table, name)))
    for length in (300, 100):  # of one block too
        geometry = Geometry(q_len=length, kv_len=length, num_heads=2, num_kv_heads=1, is_causal=is_causal)
        check_emulated(Fa4Backend().build(request()), geometry, pattern, head_dim=8)
    assert ran == ["forward", "gradients", "gradients"] * 2


gpu = pytest.mark.skipif(not HERE or not torch.cuda.is_available(), reason="needs an sm_90 card and flash-attn-4")
DILATED = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
TABLES: list[Pattern] = [
    Random(2, 128, seed=7),
    Local(200) | Random(1, 128, seed=3),
    Random(2, 128, seed=1) | Global(40),
]


# The kernels of one head_dim take seconds to compile, so patterns are walked with one and head_dims with one pattern.
@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_computed_on_the_card(pattern: Pattern, dtype: str, is_causal: bool) -> None:
    for heads, kv_heads in ((4, 4), (4, 2)):
        geometry = Geometry(q_len=517, kv_len=517, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        check(build("fa4", pattern, geometry, dtype, 64), geometry)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("pattern", [DILATED, Local((70, 30))], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", default_registry().backends["fa4"].spec.capabilities["head_dims"])
def test_every_declared_head_dim(head_dim: int, is_causal: bool, pattern: Pattern) -> None:
    geometry = Geometry(q_len=389, kv_len=389, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    attention = build("fa4", pattern, geometry, "bfloat16", head_dim)
    check(attention, geometry)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (64, "float16")])
@pytest.mark.parametrize("pattern", TABLES, ids=str)
def test_tables_of_blocks_are_its_own(pattern: Pattern, head_dim: int, dtype: str, is_causal: bool) -> None:
    for length, kv_heads in ((517, 4), (1024, 2)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=kv_heads, is_causal=is_causal)
        attention = build("fa4", pattern, geometry, dtype, head_dim)
        check(attention, geometry)
        program = attention._engine._program(length, length, 0, 0, torch.device("cuda", 0))
        assert isinstance(program.blocks, FlashAttention4Table)
        assert program.nbytes > program.blocks.nbytes > 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", default_registry().backends["fa4"].spec.capabilities["head_dims"])
def test_tables_of_every_declared_head_dim(head_dim: int, is_causal: bool) -> None:
    geometry = Geometry(q_len=517, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check(build("fa4", Random(2, 128, seed=7) | Local(200), geometry, "bfloat16", head_dim), geometry)


@pytest.mark.gpu
@gpu
def test_what_its_tables_cannot_say_is_core_s() -> None:
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    for pattern, scale in (
        (Random(2, 64, seed=7), None),
        (DILATED + Random(1, 128, seed=3), None),
        (Random(1, 128) + Random(1, 128), None),
        (Random(2, 128), -0.2),
    ):
        attention = build("fa4", pattern, geometry, "bfloat16", 64, scale=scale)
        if scale is None:
            check(attention, geometry)
        program = attention._engine._program(517, 517, 0, 0, torch.device("cuda", 0))
        assert isinstance(program.blocks, BlockProduct)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, None), (False, (70, 30)), (False, (70, 0))])
def test_dense_pieces_have_the_bits_of_the_library_s_own_function(
    is_causal: bool, window: tuple[int, int] | None, kv_heads: int, dtype: torch.dtype
) -> None:
    query, key, value = (torch.randn(2, 389, n, 64, dtype=dtype, device="cuda") for n in (4, kv_heads, kv_heads))
    found = (
        Fa4Backend()
        .build(request())
        .forward(query, key, value, DensePiece(is_causal=is_causal, scale=0.2, window=window))
    )
    left, right = window or (None, None)
    expected = Library.load().run_forward(
        query, key, value, softmax_scale=0.2, causal=is_causal, window_size_left=left, window_size_right=right,
        return_lse=True,
    )  # fmt: skip
    for computed, own in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(computed, own, rtol=0, atol=0)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("window", [None, (70, 30)])
def test_inputs_that_are_repeated_are_read_where_they_lie(window: tuple[int, int] | None) -> None:
    piece = DensePiece(is_causal=window is None, scale=0.2, window=window)
    check_repeated(389, torch.bfloat16, "cuda", piece)


@pytest.mark.gpu
@gpu
def test_offsets_and_unequal_lengths() -> None:
    for q_len, kv_len, is_causal in (
        (1, 300, True), (77, 300, True), (300, 77, False), (77, 300, False), (77, 77, True)
    ):  # fmt: skip
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=4, is_causal=is_causal)
        for pattern in (DILATED, Local((70, 30)), Random(2, 128, seed=7)):
            check(build("fa4", pattern, geometry, "bfloat16", 64), geometry, [1e-2] * 5, through_lse=False)


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
def test_it_replays_in_a_cuda_graph() -> None:
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    for pattern in (DILATED, Random(2, 128, seed=7)):
        check_graph(build("fa4", pattern, geometry, "bfloat16", 64), geometry)


@pytest.mark.gpu
@gpu
def test_it_comes_behind_what_is_faster() -> None:
    plan = explain(num_heads=16, head_dim=64, dtype="bfloat16", device="cuda", is_causal=True, pattern=Full())
    order = [row.name for row in plan.rows]
    assert order.index("sdpa") < order.index("fa4")
