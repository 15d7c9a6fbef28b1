"""The gate of learned attention: its loss, its gradients, and what it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention import (
    Full,
    Learned,
    Limits,
    build_attention,
    reference,
)
from dilated_attention.core.dynamic_tables import TableRows
from dilated_attention.core.geometry import Geometry
from dilated_attention.demo.training import one_thread

from .learned_kit import build, seen_pairs
from .support import inputs


def test_the_gate_begins_as_queries_times_pooled_keys() -> None:
    """Mean keys where these are small, the bound of Quest where they are large."""
    geometry = Geometry.self_attention(64, 2, is_causal=False)
    attention = build_attention(pattern=Learned(2, 16), num_heads=2, head_dim=8)
    query, key, _ = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    mean_query = torch.unflatten(query, 1, (4, 16)).mean(dim=2)
    blocks = torch.unflatten(key, 1, (4, 16))
    small = torch.einsum("brhd,bchd->bhrc", mean_query, blocks.mean(dim=2))
    bound = torch.einsum("brhd,bchd->bhrc", mean_query.relu(), blocks.amax(dim=2))
    bound -= torch.einsum("brhd,bchd->bhrc", (-mean_query).relu(), blocks.amin(dim=2))
    assert torch.equal(attention.gate(query, key / 1000), small.topk(2).indices)
    assert torch.equal(attention.gate(query, key * 1000), bound.topk(2).indices)


def test_a_short_last_block_is_pooled_like_a_whole_one() -> None:
    attention = build_attention(pattern=Learned(2, 16), num_heads=1, head_dim=8)
    gate: Any = attention.gate
    key = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 37, 1, 8)
    scores = gate._scores(key, key, 0)
    torch.testing.assert_close(scores[..., 2], scores[..., 0])


def dense_scores(query: Tensor, key: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, S, T), -inf where causality forbids."""
    sees = reference.multiplicity(Full(), geometry)[0] > 0
    key = key.repeat_interleave(geometry.group_size, dim=2)
    return (8**-0.5 * query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).masked_fill(~sees, -torch.inf)


def dense_weights(query: Tensor, key: Tensor, geometry: Geometry, size: int) -> Tensor:
    """Full attention summed over blocks of keys, from the dense matrix: (B, H, R, b, C)."""
    weights = dense_scores(query, key, geometry).softmax(dim=-1).nan_to_num(0.0)
    padded = nn.functional.pad(weights, (0, -geometry.kv_len % size, 0, -geometry.q_len % size))
    return torch.unflatten(torch.unflatten(padded, 2, (-1, size)), 4, (-1, size)).sum(dim=5)


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 64 << 20])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(q_len=77, kv_len=77, num_heads=4, num_kv_heads=2, is_causal=True),
        Geometry(q_len=77, kv_len=90, num_heads=4, num_kv_heads=2, is_causal=False),
        Geometry(q_len=40, kv_len=90, num_heads=2, num_kv_heads=2, is_causal=True, q_offset=61, kv_offset=5),
        Geometry(q_len=24, kv_len=41, num_heads=2, num_kv_heads=2, is_causal=True),
    ],
)
def test_loss_and_kept_mass_are_those_of_the_dense_weights(geometry: Geometry, workspace_bytes: int) -> None:
    """However small the tiles, the streamed sums are those of the N x N matrix."""
    size, limits = 8, Limits(workspace_bytes=workspace_bytes)
    attention = build(Learned(3, size), geometry, dtype="float64", limits=limits)
    query, key, _ = (x.detach() for x in inputs(geometry, batch=2, head_dim=8, dtype=torch.float64))
    offsets: dict[str, Any] = {"q_offset": geometry.q_offset, "kv_offset": geometry.kv_offset}
    weights = dense_weights(query, key, geometry, size)
    mass = weights.sum(dim=3)
    shift = geometry.q_offset - geometry.kv_offset
    gate: Any = attention.gate
    scores = gate._scores(query, key, shift)
    of = TableRows.of(
        Learned(3, size), geometry.q_len, geometry.kv_len, shift, is_causal=geometry.is_causal, device=query.device
    )
    losses = []
    for row, before in enumerate(of.before.tolist()):
        if before > 1:
            target = mass[:, :, row, :before] / mass[:, :, row, :before].sum(dim=-1, keepdim=True)
            logs = scores[:, :, row, :before].log_softmax(dim=-1)
            losses.append((target * (target.log() - logs)).sum(dim=-1))
    expected = torch.stack(losses).mean()
    actual = attention.gate.distillation_loss(query, key, **offsets)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    tables = attention.gate(query, key, **offsets)
    sees = seen_pairs(tables, geometry, size)
    full = dense_scores(query, key, geometry).softmax(dim=-1).nan_to_num(0.0)
    kept = (full * sees).sum(dim=-1)
    torch.testing.assert_close(attention.gate.kept_mass(query, key, **offsets), kept, rtol=1e-9, atol=1e-12)


def test_the_loss_needs_no_square_matrix() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.numel())
            return result

    length = 4096
    attention = build_attention(
        pattern=Learned(4, 64), num_heads=1, head_dim=8, is_causal=True, limits=Limits(workspace_bytes=1 << 20)
    )
    query, key = torch.randn(2, 1, length, 1, 8, generator=torch.Generator().manual_seed(0))
    with Largest() as seen:  # type: ignore[no-untyped-call]
        torch.autograd.backward(attention.gate.distillation_loss(query, key))
    assert 0 < seen.elements <= length * length // 64


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_gate_parameter_gets_a_gradient(is_causal: bool, kv_heads: int) -> None:
    """At its first step, in every head and direction; attention itself gives it none."""
    geometry = Geometry(q_len=200, kv_len=200, num_heads=4, num_kv_heads=kv_heads, is_causal=is_causal)
    attention = build_attention(
        pattern=Learned(3, 16), num_heads=4, num_kv_heads=kv_heads, head_dim=8, is_causal=is_causal
    )
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    attention(*tensors).sum().backward()
    names = {"gate.query_mix", "gate.query_bias", "gate.key_mix", "gate.nearness"}
    assert {name for name, p in attention.named_parameters() if p.grad is None} == names
    given = [x.grad.clone() for x in tensors if x.grad is not None]  # in which further gradients would be summed
    torch.autograd.backward(attention.gate.distillation_loss(*tensors[:2]))
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name
    for x, grad in zip(tensors, given, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, grad)  # the model learns nothing from it


@pytest.mark.parametrize("is_causal", [True, False])
def test_distillation_teaches_the_gate_where_attention_goes(is_causal: bool) -> None:
    """What a block looks for is not in the summary of its queries as it stands: the untrained gate misses it."""
    generator = torch.Generator().manual_seed(0)
    looks_for = torch.tensor([0.0, 2, -2, 2, -2, 2, -2, 2, 0, -2, 2, -2, 2, -2, 2, -2]).repeat(
        16
    )  # 0 first and on average

    def draw() -> tuple[Tensor, Tensor]:
        query, key = torch.randn(2, 1, 256, 2, 8, generator=generator) / 4
        query[..., 0] = looks_for[:, None]
        query[..., 1] += 1
        found = 12 * (torch.rand(1, 16, 2, generator=generator) < 0.2)  # in some blocks, for either sign a key
        key[:, ::16, :, 0] += found
        key[:, 1::16, :, 0] -= found
        return query, key

    attention = build_attention(pattern=Learned(5, 16), num_heads=2, head_dim=8, is_causal=is_causal)
    test = draw()
    before = float(attention.gate.kept_mass(*test).mean())
    optimizer = torch.optim.Adam(attention.parameters(), lr=3e-2)
    with one_thread():
        for _ in range(60):
            optimizer.zero_grad()
            torch.autograd.backward(attention.gate.distillation_loss(*draw()))
            optimizer.step()
    after = float(attention.gate.kept_mass(*test).mean())
    assert after > before + 0.05
    assert after > 0.9


def test_a_row_without_a_choice_costs_nothing() -> None:
    attention = build_attention(pattern=Learned(3, 16), num_heads=2, head_dim=8, is_causal=True)
    query, key = torch.randn(2, 1, 32, 2, 8, generator=torch.Generator().manual_seed(0))
    loss = attention.gate.distillation_loss(query, key)  # the second row may choose one block of one
    assert float(loss.detach()) == 0
    torch.autograd.backward(loss)
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())
