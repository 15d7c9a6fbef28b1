"""The gate's training over padded rows and packed documents: each sequence as it would be alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import Attention, ConfigError, Learned, build_attention
from dilated_attention.core.geometry import Geometry

from .learned_kit import build
from .support import error, inputs

SIZE = 8
RUNS = ((0, 70), (0, 33), (20, 50), (70, 70), (31, 38), (0, 33))  # first token and the one behind the last, by row
BOUNDS = torch.tensor([0, 33, 33, 66, 73, 143])
PADDED = torch.stack([(torch.arange(70) < low) | (torch.arange(70) >= high) for low, high in RUNS])
GRADED = ["query_mix", "query_bias", "key_mix", "nearness"]


def attention(*, is_causal: bool, **fields: Any) -> Attention:
    geometry = Geometry(q_len=1, kv_len=1, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    return build(Learned(3, SIZE), geometry, **{"dtype": "float64"} | fields)


def tensors(batch: int, length: int) -> tuple[Tensor, Tensor]:
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
    query, key, _ = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float64)
    return query.detach(), key.detach()


def places(mask: Tensor | None) -> list[tuple[int, slice]]:
    """Row and place of each sequence."""
    if mask is not None:
        return [(row, slice(*run)) for row, run in enumerate(RUNS) if run[0] < run[1]]
    bounds = BOUNDS.tolist()
    return [(0, slice(low, high)) for low, high in itertools.pairwise(bounds) if low < high]


def call(mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries and keys, NaN where they are padding, and what says so."""
    if mask is None:
        return *tensors(1, 143), {"cu_seqlens": BOUNDS}
    query, key = (x.masked_fill(mask[:, :, None, None], torch.nan) for x in tensors(len(RUNS), 70))
    return query, key, {"key_padding_mask": mask}


def choosing_rows(length: int, *, is_causal: bool) -> int:
    """Blocks of queries that have two whole key blocks or more to choose from, counted by hand."""
    rows = -(-length // SIZE)
    return max(0, rows - 2) if is_causal else rows * (rows > 1)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("mask", [PADDED, None], ids=["padded", "packed"])
def test_the_loss_is_the_mean_over_all_choosing_rows_of_each_document_alone(
    mask: Tensor | None, is_causal: bool
) -> None:
    gate = attention(is_causal=is_causal).gate
    query, key, documents = call(mask)
    parameters = [gate.get_parameter(name) for name in GRADED]
    loss = gate.distillation_loss(query, key, **documents)
    losses, counts = [], []
    for row, place in places(mask):
        losses.append(gate.distillation_loss(query[row : row + 1, place], key[row : row + 1, place]))
        counts.append(choosing_rows(place.stop - place.start, is_causal=is_causal))
    assert counts[-1] != counts[0]  # so that it is no mean of means
    expected = sum(n * own for n, own in zip(counts, losses, strict=True)) / sum(counts)
    assert isinstance(expected, Tensor)
    assert error(loss, expected) < 1e-12
    grads = torch.autograd.grad(loss, parameters)
    for a, e in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        assert error(a, e) < 1e-12


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("mask", [PADDED, None], ids=["padded", "packed"])
def test_kept_mass_is_that_of_each_document_alone(mask: Tensor | None, layout: str) -> None:
    gate = attention(is_causal=True, tensor_layout=layout).gate
    query, key, documents = call(mask)

    def turn(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if layout == "bhsd" else x

    mass = gate.kept_mass(turn(query), turn(key), **documents)
    expected = torch.zeros_like(mass)
    for row, place in places(mask):
        q, k = (turn(x[row : row + 1, place]) for x in (query, key))
        expected[row, :, place] = gate.kept_mass(q, k)[0]
    assert error(mass, expected) < 1e-12


def test_padding_alone_teaches_nothing() -> None:
    gate = attention(is_causal=True).gate
    query, key = tensors(2, 30)
    loss = gate.distillation_loss(query, key, key_padding_mask=torch.ones(2, 30, dtype=torch.bool))
    assert float(loss.detach()) == 0
    torch.autograd.backward(loss)  # so that every rank has gradients to reduce
    assert all(p.grad is not None and not p.grad.any() for p in gate.parameters())


def test_documents_of_one_length_are_frozen_as_rows_of_that_length() -> None:
    gate = attention(is_causal=True).gate
    query, key = tensors(1, 143)
    rows = [torch.cat([x[:, 3:38], x[:, 50:85]]) for x in (query, key)]
    expected = gate.freeze(*rows)
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[0, 3:38], mask[1, 10:45] = False, False
    padded = [torch.cat([x[:, :45], x[:, 40:85]]) for x in (query, key)]
    assert gate.freeze(*padded, key_padding_mask=mask) == expected
    packed = [torch.cat([x[:, 3:38], x[:, 50:85]], dim=1) for x in (query, key)]
    assert gate.freeze(*packed, cu_seqlens=torch.tensor([0, 35, 35, 70])) == expected
    with pytest.raises(ConfigError, match=r"of a single length, got sequences of 7, 33, 70 tokens; freeze those of"):
        gate.freeze(query, key, cu_seqlens=BOUNDS)
    with pytest.raises(ConfigError, match="of a single length, got padding alone"):
        gate.freeze(query, key, key_padding_mask=torch.ones(1, 143, dtype=torch.bool))


def test_what_the_attention_refuses_the_gate_refuses() -> None:
    made = build_attention(pattern=Learned(2, SIZE), num_heads=4, num_kv_heads=2, head_dim=8, dtype="float64")
    query, key = tensors(2, 40)
    hole = torch.zeros(2, 40, dtype=torch.bool)
    hole[1, 3] = True
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (key, {"key_padding_mask": hole}, "row 1 has padding at position 3 between its tokens"),
        (key, {"key_padding_mask": hole.int()}, "key_padding_mask must be bool"),
        (key, {"cu_seqlens": torch.tensor([0, 40])}, "batch must be 1"),
        (key, {"key_padding_mask": hole, "kv_offset": 3}, "no offsets can be given"),
        (key[:, :39], {"key_padding_mask": hole[:, :39]}, "queries are the last tokens"),
    ]
    for k, arguments, words in wrong:
        for refuses in (lambda *x, **f: made(*x, x[1], **f), made.gate.distillation_loss, made.gate.kept_mass):
            with pytest.raises(ConfigError, match=words):
                refuses(query, k, **arguments)
