"""Which of PyTorch's kernels `sdpa` takes on a card: cuDNN's for the shapes of a known length, no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention import Dilated, Full, Pattern
from dilated_attention.backends.sdpa import SdpaBackend
from dilated_attention.core.kernel import DensePiece
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.selection import select

from .kernel_kit import request, verdict


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that serves Hopper cards."""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


class Recorded(TorchDispatchMode):
    """The names of what is called below."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def attention_ops(kernel: Any, queries: int, keys: int) -> list[str]:
    """Which of PyTorch's attention operators compute such a rectangle, forward and backward."""
    with FakeTensorMode(), Recorded() as recorded:
        query, dout = (torch.empty(2, queries, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        key, value = (torch.empty(2, keys, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        piece = DensePiece(is_causal=False, scale=1.0)
        out, lse = kernel.forward(query, key, value, piece)
        kernel.backward(dout, query, key, value, out, lse, piece)
    return [name.removeprefix("aten::_scaled_dot_product_") for name in recorded.names if "scaled_dot" in name]


CUDNN, FLASH = ([f"{name}_attention", f"{name}_attention_backward"] for name in ("cudnn", "flash"))


@pytest.mark.parametrize(
    ("pattern", "shapes", "others"),
    [
        (Full(), [(1000, 1000)], [(999, 999), (1, 1000), (1, 1), (1000, 999)]),
        (Dilated((300, 1000), (1, 2)), [(300, 300), (100, 100), (500, 500)], [(200, 200), (1, 300), (1000, 1000)]),
    ],
    ids=str,
)
def test_other_shapes_than_those_of_the_known_length_are_not_planned_for(
    pattern: Pattern, shapes: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    kernel = SdpaBackend().build(request(pattern=pattern, seq_len=1000))
    assert kernel.name == "cudnn"
    for shape in shapes:
        assert attention_ops(kernel, *shape) == CUDNN, shape
    for shape in others:
        assert attention_ops(kernel, *shape) == FLASH, shape


WITH_CUDA = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch cannot index fake tensors of a card")


@pytest.mark.parametrize("name", ["cudnn", "flash", pytest.param("efficient", marks=WITH_CUDA)])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(77, 300, 2), (300, 300, 8), (1, 5, 4)])
def test_every_kernel_calls_its_operators_as_this_pytorch_has_them(
    name: str, queries: int, keys: int, kv_heads: int
) -> None:
    """Without a card: what they return has the shapes and dtypes that core relies on."""
    kernel: Any = SdpaBackend().build(request(num_kv_heads=kv_heads, backend_options={"sdpa": {"kernel": name}}))
    with FakeTensorMode():
        query, dout = (torch.empty(2, queries, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        key, value = (torch.empty(2, keys, kv_heads, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        piece = DensePiece(is_causal=queries == keys, scale=0.5)
        out, lse = kernel.forward(query, key, value, piece)
        grads = kernel.backward(dout, query, key, value, out, lse, piece)
    assert [(x.shape, x.dtype) for x in (out, *grads)] == [(x.shape, x.dtype) for x in (query, query, key, value)]
    assert (lse.shape, lse.dtype) == ((2, 8, queries), torch.float32)


def test_cudnn_is_for_a_known_length_or_by_name() -> None:
    assert verdict("sdpa").kernel == "flash"
    assert verdict("sdpa", seq_len=4096).kernel == "cudnn"
    assert verdict("sdpa", seq_len=4096, head_dim=256).kernel == "flash"
    named: dict[str, Any] = {"backend_options": {"sdpa": {"kernel": "cudnn"}}}
    assert verdict("sdpa", **named).kernel == "cudnn"
    kernel = SdpaBackend().build(request(**named))
    assert attention_ops(kernel, 77, 300) == CUDNN
    assert attention_ops(kernel, 1, 1) == FLASH


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "would take its kernel 'cudnn' if seq_len were given"),
        ({"seq_len": 4096}, ""),
        ({"head_dim": 256}, ""),
        ({"backend_options": {"sdpa": {"kernel": "flash"}}}, ""),
    ],
)
def test_the_plan_says_that_a_length_would_bring_another_kernel(fields: dict[str, Any], told: str) -> None:
    rows = select(request(backend="sdpa", **fields), default_registry()).rows
    (row,) = (row for row in rows if row.name == "sdpa")
    assert row.status == "chosen"
    assert row.detail == told
