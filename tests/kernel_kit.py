"""What the tests of backends over third-party kernels share: verdicts for a card that is not here, and the gate."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from dilated_attention import (
    Attention,
    AttentionConfig,
    Dilated,
    Full,
    Global,
    Local,
    Pattern,
    Random,
    Strided,
    build_attention,
)
from dilated_attention.backends.libraries import can_compile
from dilated_attention.core import reference
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES, DenseKernel, LayoutKernel
from dilated_attention.registry.capabilities import make_request
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.selection import Verdict, judge
from dilated_attention.registry.specs import Device, Request

from .support import NAMES, error, inputs, oracle, ours, with_gradients

H100 = Device(type="cuda", index=0, name="NVIDIA H100", arch="sm_90", torch_name="cuda:0")

# One of each kind and of each combination, small enough for the oracle.
PATTERNS: list[Pattern] = [
    Full(),
    Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4)),
    Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 7)),
    Local(window_size=70),
    Global(tokens=3),
    Strided(stride=3),
    Random(blocks_per_row=2, block_size=32, seed=7),
    Local(window_size=70) | Global(tokens=3),
    Strided(stride=3) + Local(window_size=9),
]


def request(device: Device = H100, pattern: Pattern | None = None, **fields: Any) -> Request:
    """A request for that device; by default bfloat16, 8 heads of 64."""
    chosen = pattern or Full()
    given: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": "bfloat16", "pattern": chosen} | fields
    return make_request(AttentionConfig(**given), chosen, device)


def verdict(backend: str, device: Device = H100, **fields: Any) -> Verdict:
    """What the backend says through the registry."""
    if backend in ("triton", "flex") and not can_compile():
        pytest.skip("Triton finds nothing to compile with here, and they are refused")
    return judge(default_registry().backends[backend], request(device, **fields))


def codes(found: Verdict) -> set[str]:
    """The codes of its refusals."""
    assert not found.fault
    return {refusal.code for refusal in found.refusals}


def load_libraries() -> None:
    """Load the libraries that FA3_LIBRARIES names, the CUDA runtime first: operators without a package."""
    for path in os.environ.get("FA3_LIBRARIES", "").split(os.pathsep):
        if "libcudart" in path:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        elif path:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]


def emulated_engine(
    kernel: DenseKernel | LayoutKernel, geometry: Geometry, pattern: Pattern, head_dim: int, *, takes_layout: bool
) -> Engine:
    """The engine that a build would make, over a kernel that computes on CPU in float32."""
    config = AttentionConfig(
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=head_dim,
        pattern=pattern,
        is_causal=geometry.is_causal,
    )
    return Engine(config, pattern, kernel, takes_layout=takes_layout, has_dlse=True, call_axes=frozenset(CALL_AXES))


def check_emulated(
    kernel: DenseKernel | LayoutKernel,
    geometry: Geometry,
    pattern: Pattern,
    head_dim: int,
    *,
    takes_layout: bool = False,
) -> None:
    """Out, lse and all gradients, through lse too, of `kernel` on CPU against the oracle."""
    engine = emulated_engine(kernel, geometry, pattern, head_dim, takes_layout=takes_layout)
    tensors = inputs(geometry, batch=2, head_dim=head_dim, dtype=torch.float32)
    query, key, value = (x.detach() for x in tensors)
    offsets = geometry.q_offset, geometry.kv_offset
    out, lse = engine.forward(query, key, value, *offsets, None, None)
    if not takes_layout:
        check_received(engine, pattern, geometry, query, key, lse)
    for through_lse in (False, True):
        expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
        generator = torch.Generator().manual_seed(1)
        dout, dlse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in (out, lse))
        grads = engine.backward(dout, dlse if through_lse else None, query, key, value, out, lse, *offsets, None, None)
        for name, a, e in zip(NAMES, (out, lse, *grads), expected, strict=True):
            assert error(a, e) < 1e-5, (name, error(a, e), through_lse)


def check_received(
    engine: Engine, pattern: Pattern, geometry: Geometry, query: Tensor, key: Tensor, lse: Tensor
) -> None:
    """What each key receives against the columns of the dense weights, in tiles of a few pairs too."""
    counts = reference.multiplicity(pattern, geometry)
    k = key.double().repeat_interleave(geometry.group_size, dim=2)
    scores = engine.scale * torch.einsum("bshd,bthd->bhst", query.double(), k)
    expected = (counts * (scores - lse.double()[..., None]).exp()).nan_to_num(0, 0, 0).sum(-2)
    offsets = geometry.q_offset, geometry.kv_offset
    kept = engine.config
    for workspace_bytes in (kept.limits.workspace_bytes, 1 << 10):
        engine.config = attrs.evolve(kept, limits=attrs.evolve(kept.limits, workspace_bytes=workspace_bytes))
        assert error(engine.received(query, key, lse, *offsets, None), expected) < 1e-5
    engine.config = kept


def build(backend: str, pattern: Pattern, geometry: Geometry, dtype: str, head_dim: int, **fields: Any) -> Attention:
    """The attention on the card that is here, by that backend or none."""
    return build_attention(
        pattern=pattern,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=head_dim,
        is_causal=geometry.is_causal,
        dtype=dtype,
        device="cuda",
        backend=backend,
        **fields,
    )


def on_card(geometry: Geometry, dtype: str, head_dim: int) -> list[Tensor]:
    """Random inputs on the card that require gradients."""
    found = inputs(geometry, batch=2, head_dim=head_dim, dtype=getattr(torch, dtype))
    return [x.detach().cuda().requires_grad_() for x in found]


def dense_error(tensors: list[Tensor], geometry: Geometry) -> list[float]:
    """Twice the error of dense `scaled_dot_product_attention` in the same dtype; for lse that of float32."""
    swapped = [x.transpose(1, 2) for x in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(
        swapped[0], swapped[1], swapped[2], is_causal=geometry.is_causal, enable_gqa=True
    ).transpose(1, 2)
    lse = torch.zeros(out.shape[0], out.shape[2], out.shape[1], device=out.device)
    exact = oracle(Full(), tensors, geometry, through_lse=False)
    found = with_gradients(out, lse, tensors, through_lse=False)
    return [1e-5 if name == "lse" else 2 * error(a, e) for name, a, e in zip(NAMES, found, exact, strict=True)]


def check(
    attention: Attention,
    geometry: Geometry,
    bounds: list[float] | None = None,
    *,
    through_lse: bool = True,
    factor: float = 1.0,
) -> None:
    """Out, lse and all gradients, through lse too, against the oracle; the bounds are dense attention's errors.

    The queries are multiplied by `factor`.
    """
    config = attention.config
    tensors = on_card(geometry, config.dtype, config.head_dim)
    tensors = [tensors[0].detach().mul(factor).requires_grad_(), *tensors[1:]]
    if bounds is None:
        bounds = [1e-5] * 5 if config.dtype == "float32" else dense_error(tensors, geometry)
    pattern = config.pattern
    assert isinstance(pattern, Pattern)
    for lse_counts in (False, True) if through_lse else (False,):
        actual = ours(attention, tensors, geometry, through_lse=lse_counts)
        expected = oracle(pattern, tensors, geometry, through_lse=lse_counts)
        for name, a, e, bound in zip(NAMES, actual, expected, bounds, strict=True):
            assert error(a, e) <= bound, (name, error(a, e), bound, lse_counts)


def check_graph(attention: Attention, geometry: Geometry) -> None:
    """Forward and backward replay in a CUDA graph with new inputs."""
    tensors = on_card(geometry, attention.config.dtype, attention.config.head_dim)
    dout = torch.randn_like(tensors[0])

    def step() -> tuple[Tensor, ...]:
        out = attention(*tensors)
        return (out, *torch.autograd.grad(out, tensors, dout))

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (*tensors, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, e in zip(captured, step(), strict=True):
        assert error(a, e) < 5e-3  # a backward adds up in any order


def run_interpreted(name: str, *, is_slow: bool = False) -> None:
    """The tests of a file beside this one pass in Triton's interpreter.

    In a process of its own: Triton decides when it is imported whether its functions are interpreted.
    """
    if torch.cuda.is_available():
        pytest.skip("on this machine the compiled kernels are tested")
    if Version(version("triton")) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton's interpreter before 3.7 reads scalars as NumPy 2.4 no longer allows")
    path = Path(__file__).with_name(name)
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.interpreting"]
    command = [sys.executable, "-m", "pytest", *options, *["-m", "slow"] * is_slow, str(path)]
    found = subprocess.run(
        command, cwd=path.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
