"""The backend `xformers`: what it refuses, and what it computes, over a stand-in for the library and on the card."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention import ConfigError, Dilated, Pattern, explain
from dilated_attention.backends.xformers import XformersBackend
from dilated_attention.core.geometry import Geometry
from dilated_attention.registry.specs import Device

from . import dense_math  # noqa: F401 - the stand-in imports it
from .kernel_kit import PATTERNS, build, check, check_emulated, check_graph, codes, request, verdict


def _installed() -> bool:
    try:
        return bool(version("xformers"))
    except PackageNotFoundError:
        return False


HERE = _installed()
needs_absence = pytest.mark.skipif(HERE, reason="xformers is installed")

# A distribution with the operators' interface and arithmetic: checks, padding of lse and layouts are xformers' own.
STAND_IN = {
    "xformers/__init__.py": "",
    "xformers/_cpp_lib.py": "_built_with_cuda = True",
    "xformers/ops/__init__.py": """
import math, torch
from tests import dense_math
from .fmha import LowerTriangularMask, cutlass, flash

def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
    assert p == 0.0 and query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert query.stride(-1) == 1 and query.stride(-2) % 8 == 0
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    shape = query.shape
    if query.dim() == 5:
        assert op is flash.FwOp and key.stride(3) == value.stride(3) == 0
        query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    out, lse = dense_math.forward(query, key, value, scale, attn_bias is not None)
    pad = -query.shape[1] % 32 if op is cutlass.FwOp else 0
    return out.reshape(shape), torch.nn.functional.pad(lse.unflatten(1, shape[2:-1]), (0, pad), value=math.inf)

def memory_efficient_attention_backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
    assert p == 0.0 and query.dim() == 4 and query.shape[2:] == key.shape[2:] and op in (flash.BwOp, cutlass.BwOp)
    assert output.is_contiguous()
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    return dense_math.backward(grad, query, key, value, output, lse, scale, attn_bias is not None)
""",
    "xformers/ops/fmha/__init__.py": """
from . import cutlass, flash

class LowerTriangularMask:
    pass
""",
    "xformers/ops/fmha/flash.py": """
import torch

class FwOp:
    NAME = "fa2F@stand-in"
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = None
    SUPPORTED_DTYPES = {torch.half, torch.bfloat16}
    SUPPORTED_MIN_K = 0
    SUPPORTED_MAX_K = 256
    IS_DETERMINISTIC = True

    @classmethod
    def is_available(cls):
        return True

class BwOp(FwOp):
    NAME = "fa2B@stand-in"
    IS_DETERMINISTIC = False
""",
    "xformers/ops/fmha/cutlass.py": """
import torch
from .flash import FwOp as Base

class FwOp(Base):
    NAME = "cutlassF-stand-in"
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (5, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = {torch.float, torch.half, torch.bfloat16}
    SUPPORTED_MAX_K = 65536

class BwOp(FwOp):
    NAME = "cutlassB-stand-in"
""",
    "xformers-0.0.35.dist-info/METADATA": "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The distribution, installed for one test."""
    for name, code in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]


def test_on_a_cpu_it_is_refused() -> None:
    plan = explain(num_heads=8, head_dim=64, device="cpu")
    (row,) = [row for row in plan.rows if row.name == "xformers"]
    assert {refusal.code for refusal in row.refusals} == {"device_types"} | (set() if HERE else {"not_installed"})


@needs_absence
def test_without_it_the_line_that_installs_it_is_given() -> None:
    (refusal,) = verdict("xformers").refusals
    assert (refusal.code, refusal.remedy) == ("not_installed", "pip install 'xformers>=0.0.34'")


@needs_absence
@pytest.mark.parametrize(
    ("fields", "kernel"),
    [
        ({}, "fa2F@stand-in"),
        ({"dtype": "float32"}, "cutlassF-stand-in"),
        ({"dtype": "float32", "head_dim": 20}, "cutlassF-stand-in"),
        ({"device": Device(type="cuda", arch="sm_100", torch_name="cuda:0")}, "fa2F@stand-in"),
        ({"dtype": "float16", "device": Device(type="cuda", arch="sm_75", torch_name="cuda:0")}, "cutlassF-stand-in"),
        ({"backend_options": {"xformers": {"kernel": "cutlass"}}}, "cutlassF-stand-in"),
    ],
)
def test_the_fastest_operator_that_fits_is_pinned_with_the_release(
    stand_in: Path, fields: dict[str, Any], kernel: str
) -> None:
    found = verdict("xformers", **fields)
    assert found.accepts
    assert found.kernel == f"{kernel} (xformers 0.0.35)"


@needs_absence
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"head_dim": 20}, {"head_dims"}),
        ({"head_dim": 22, "dtype": "float32"}, {"head_dims"}),
        ({"dtype": "float64"}, {"dtypes"}),
        ({"dropout_p": 0.1}, {"dropout"}),
        ({"deterministic": True}, {"deterministic"}),
        ({"dtype": "float32", "device": Device(type="cuda", arch="sm_100", torch_name="cuda:0")}, {"dtypes", "arch"}),
        ({"dtype": "float32", "backend_options": {"xformers": {"kernel": "flash"}}}, {"dtypes"}),
    ],
)
def test_what_no_operator_takes_is_refused(stand_in: Path, fields: dict[str, Any], expected: set[str]) -> None:
    assert codes(verdict("xformers", **fields)) == expected


@needs_absence
def test_options_are_checked(stand_in: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no 'kernal' \(did you mean 'kernel'\?\)"):
        verdict("xformers", backend_options={"xformers": {"kernal": "flash"}})
    with pytest.raises(ConfigError, match="did you mean 'flash'"):
        verdict("xformers", backend_options={"xformers": {"kernel": "flas"}})


@needs_absence
def test_the_switch_for_deterministic_algorithms_excludes_flash(stand_in: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert verdict("xformers").kernel.startswith("cutlassF")
        assert verdict("xformers", requires_grad=False).kernel.startswith("fa2F")
    finally:
        torch.use_deterministic_algorithms(False)


DID_NOT_LOAD = """
_built_with_cuda = False
try:
    try:
        raise OSError("libcudart.so.12: cannot open shared object file")
    except OSError as exc:
        raise RuntimeError("xFormers can't load C++/CUDA extensions.") from exc
except RuntimeError as e:
    _cpp_library_load_exception = e
"""


@needs_absence
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("ops/fmha/flash.py", "import flash_attn.flash_attn_interface", "No module named 'flash_attn'"),
        ("_cpp_lib.py", "_built_with_cuda, _cpp_library_load_exception = False, None", "one without"),
        ("_cpp_lib.py", DID_NOT_LOAD, "OSError: libcudart.so.12: cannot open shared object file"),
    ],
)
def test_a_library_that_does_not_work_is_refused_with_the_cause(
    stand_in: Path, name: str, code: str, said: str
) -> None:
    (stand_in / "xformers" / name).write_text(code)
    refusals = verdict("xformers").refusals
    assert {refusal.code for refusal in refusals} == {"not_installed"}
    assert said in refusals[0].actual


@needs_absence
@pytest.mark.parametrize("kernel", ["flash", "cutlass"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_computed_emulated(stand_in: Path, pattern: Pattern, kernel: str) -> None:
    asked = request(backend_options={"xformers": {"kernel": kernel}})
    for heads, kv_heads, is_causal in ((4, 4, True), (4, 2, False), (4, 2, True)):
        geometry = Geometry(q_len=99, kv_len=99, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        built = XformersBackend().build(asked)
        check_emulated(built, geometry, pattern, 8)


pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # of xformers' own, as it is imported
gpu = pytest.mark.skipif(not HERE or not torch.cuda.is_available(), reason="needs a CUDA device and xformers")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("flash", "bfloat16"),
        ("flash", "float16"),
        ("cutlass", "bfloat16"),
        ("cutlass", "float16"),
        ("cutlass", "float32"),
    ],
)
def test_every_pattern_is_computed_on_the_card(pattern: Pattern, kernel: str, dtype: str, is_causal: bool) -> None:
    options = {"xformers": {"kernel": kernel}}
    for heads, kv_heads, head_dim, length in ((4, 4, 64, 517), (4, 2, 48, 389), (5, 5, 24, 131), (2, 1, 128, 260)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        check(build("xformers", pattern, geometry, dtype, head_dim, backend_options=options), geometry)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["flash", "cutlass"])
def test_offsets_and_unequal_lengths(kernel: str) -> None:
    pattern = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
    options = {"xformers": {"kernel": kernel}}
    for q_len, kv_len, is_causal in ((1, 300, True), (77, 300, True), (300, 77, False), (77, 300, False)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=4, is_causal=is_causal)
        attention = build("xformers", pattern, geometry, "bfloat16", 64, backend_options=options)
        check(attention, geometry, [1e-2] * 5)


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
@pytest.mark.parametrize("kernel", ["flash", "cutlass"])
def test_it_replays_in_a_cuda_graph(kernel: str) -> None:
    pattern = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    options = {"xformers": {"kernel": kernel}}
    check_graph(build("xformers", pattern, geometry, "bfloat16", 64, backend_options=options), geometry)
