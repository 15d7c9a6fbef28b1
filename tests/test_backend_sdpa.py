"""Which of PyTorch's kernels `sdpa` takes on a card: cuDNN's for calls of a known length, and no others."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention import AttentionConfig, Dilated, Full, Local, Pattern
from dilated_attention.backends.aten import CpuFlash, CudaFlash
from dilated_attention.backends.joining import JoiningKernel
from dilated_attention.backends.sdpa import SdpaBackend
from dilated_attention.core import arranged
from dilated_attention.core.document_ops import attend_documents
from dilated_attention.core.engine import Engine
from dilated_attention.core.kernel import (
    CALL_AXES,
    DensePiece,
    Drops,
    ForOneLength,
    Joins,
    takes_dropout,
    takes_windows,
)
from dilated_attention.core.ops import attend, intern
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.selection import select

from .kernel_kit import H100, request, verdict


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


def attention_ops(kernel: Any, queries: int, keys: int, window: tuple[int, int] | None = None) -> list[str]:
    """Which of PyTorch's attention operators compute such a rectangle or band of one, forward and backward."""
    with FakeTensorMode(), Recorded() as recorded:
        query, dout = (torch.empty(2, queries, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        key, value = (torch.empty(2, keys, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        piece = DensePiece(is_causal=False, scale=1.0, window=window)
        out, lse = kernel.forward(query, key, value, piece)
        kernel.backward(dout, query, key, value, out, lse, piece)
    return [name.removeprefix("aten::_") for name in recorded.names if "attention" in name]


CUDNN = ["scaled_dot_product_cudnn_attention", "scaled_dot_product_cudnn_attention_backward"]
FLASH = ["flash_attention_forward", "flash_attention_backward"]


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
    assert verdict("sdpa", seq_len=4096, pattern=Local(64)).kernel == "flash"  # core's blocks, which no kernel sees
    named: dict[str, Any] = {"backend_options": {"sdpa": {"kernel": "cudnn"}}}
    assert verdict("sdpa", **named).kernel == "cudnn"
    for seq_len in (None, 4096):
        assert not isinstance(SdpaBackend().build(request(seq_len=seq_len, **named)), ForOneLength)  # for any length


def test_weights_are_dropped_by_kernels_that_can() -> None:
    named: dict[str, Any] = {"backend_options": {"sdpa": {"kernel": "efficient"}}}
    assert verdict("sdpa", dropout_p=0.1).kernel == "flash"
    assert verdict("sdpa", dropout_p=0.1, seq_len=4096).kernel == "cudnn, dropout by flash"
    assert verdict("sdpa", dropout_p=0.1, dtype="float32").kernel == "efficient"
    assert verdict("sdpa", dropout_p=0.1, **named).kernel == "efficient"
    for fields in ({}, {"seq_len": 4096}, named):
        kernel = SdpaBackend().build(request(dropout_p=0.1, **fields))
        assert isinstance(kernel, Drops)
        dropping = kernel.dropping(0.1, torch.tensor(3), torch.device("cuda"))
        assert (dropping.name == "efficient") is (fields is named)
        assert takes_windows(dropping) is (fields is not named)


@pytest.mark.parametrize(
    ("head_dim", "fields", "kernel"),
    [
        (192, {"dropout_p": 0.1}, "flash"),
        (200, {}, "efficient"),
        (224, {}, "efficient"),
        (224, {"requires_grad": False}, "flash"),
        (232, {}, "flash"),
        (232, {"dropout_p": 0.1}, "efficient"),
        (256, {"dropout_p": 0.1}, "efficient"),
        (256, {"dropout_p": 0.1, "requires_grad": False}, "flash"),
    ],
)
def test_small_cards_lack_the_widest_gradients(head_dim: int, fields: dict[str, Any], kernel: str) -> None:
    """FlashAttention-2's, which PyTorch does not offer there either."""
    for arch in ("sm_86", "sm_89"):
        assert verdict("sdpa", attrs.evolve(H100, arch=arch), head_dim=head_dim, **fields).kernel == kernel
    assert verdict("sdpa", attrs.evolve(H100, arch="sm_80"), head_dim=head_dim, **fields).kernel == "flash"


def test_a_kernel_that_joins_drops_if_what_it_joins_does() -> None:
    assert takes_dropout(JoiningKernel(CudaFlash()))
    assert not takes_dropout(JoiningKernel(Told("drops nothing", [])))


def test_other_lengths_are_not_planned_for() -> None:
    kernel: Any = SdpaBackend().build(request(seq_len=1000))
    assert isinstance(kernel, ForOneLength)
    assert attention_ops(kernel, 1000, 1000) == CUDNN
    assert attention_ops(kernel, 1, 1) == attention_ops(kernel.other_lengths, 999, 999) == FLASH
    assert attention_ops(kernel, 1000, 1000, window=(31, 0)) == FLASH  # PyTorch passes cuDNN no window
    assert isinstance(kernel.other_lengths, Joins) is isinstance(kernel, Joins)
    assert not isinstance(SdpaBackend().build(request()), ForOneLength)


class Told:
    """Computes as the CPU's kernel, and tells of every piece."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told, self.kernel = name, told, CpuFlash()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        self.told.append(self.name)
        return self.kernel.forward(query, key, value, piece)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.told.append(self.name)
        return self.kernel.backward(*args)


class ToldOfOne(Told):
    """For one length."""

    @property
    def other_lengths(self) -> Told:
        return Told("other", self.told)


@pytest.mark.parametrize("seq_len", [64, None])
@pytest.mark.parametrize("pattern", [Full(), Dilated((16, 32), (1, 2)), Dilated((16, 32), (1, 2)) + Local(5)], ids=str)
def test_a_kernel_for_one_length_gets_calls_of_that_alone(
    pattern: Pattern, seq_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others have the same segments, several at a time or fewer: all that they need is another number."""
    told: list[str] = []
    config = AttentionConfig(num_heads=2, head_dim=8, pattern=pattern, is_causal=True, seq_len=seq_len)
    traits: dict[str, Any] = {"takes_layout": False, "has_dlse": True, "call_axes": frozenset(CALL_AXES)}
    engine = intern(Engine(config, pattern, ToldOfOne("own", told), **traits))

    def kernels_of(length: int, bounds: list[int] | None = None) -> set[str]:
        told.clear()
        query, key, value = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
        if bounds is None:
            rest: dict[str, Any] = {"q_offset": 0, "kv_offset": 0, "seed": None, "tables": None, "recompute": False}
            out, _ = attend(query, key, value, engine, **rest)
        else:
            of_call: dict[str, Any] = {"key_padding_mask": None, "cu_seqlens": torch.tensor(bounds)}
            out, _ = attend_documents(query, key, value, engine, seed=None, gate=None, recompute=False, **of_call)
        out.sum().backward()  # type: ignore[no-untyped-call]
        return set(told)

    others = {"own" if seq_len is None else "other"}
    assert kernels_of(64) == {"own"}
    for length in (16, 32, 63, 128):
        assert kernels_of(length) == others
    assert kernels_of(64, [0, 16, 48, 64]) == others
    assert kernels_of(128, [0, 64, 128]) == {"own"}
    if seq_len is not None:  # filled up, documents are as many as there happen to be
        monkeypatch.setattr(arranged, "fills_documents", lambda engine, device: True)
        assert kernels_of(180, [0, 60, 121, 180]) == others


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "would take its kernel 'cudnn' if seq_len were given"),
        ({"seq_len": 4096}, ""),
        ({"head_dim": 256}, ""),
        ({"pattern": Local(64)}, ""),
        ({"backend_options": {"sdpa": {"kernel": "flash"}}}, ""),
    ],
)
def test_the_plan_says_that_a_length_would_bring_another_kernel(fields: dict[str, Any], told: str) -> None:
    rows = select(request(backend="sdpa", **fields), default_registry()).rows
    (row,) = (row for row in rows if row.name == "sdpa")
    assert row.status == "chosen"
    assert row.detail == told


def test_a_backend_that_is_chosen_anyway_needs_no_length() -> None:
    rows = select(request(seq_len=None), default_registry()).rows
    details = {row.name: row.detail for row in rows}
    assert [row.name for row in rows if row.status == "chosen"] == ["sdpa"]
    assert details["sdpa"] == "would take its kernel 'cudnn' if seq_len were given"
