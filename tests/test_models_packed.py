"""Documents packed in one row of our layers and models: each is computed as it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import ConfigError, Full
from dilated_attention.models import LongNetDecoder, LongNetDecoderLayer, LongNetEncoder, MultiheadAttention
from dilated_attention.models.positions import packed_positions

from .model_kit import data, gradients, padding
from .test_models_longnet import config, language_model, tokens
from .test_models_multihead import DILATED, E, H, S, assert_close

LENGTHS = [9, 0, 1, 14]
BOUNDS = torch.tensor([0, 9, 9, 10, S])


def documents(x: Tensor, dim: int) -> list[Tensor]:
    """Those that hold a token."""
    return [part for part in torch.split(x, LENGTHS, dim) if part.numel()]


def test_positions_start_again_with_each_document() -> None:
    places = packed_positions(BOUNDS.int(), S, torch.device("cpu"))
    assert places.tolist() == [*range(9), 0, *range(14)]


@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
@pytest.mark.parametrize("pattern", [Full(), DILATED], ids=["full", "dilated"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_are_each_alone(is_causal: bool, pattern: Any, positions: str) -> None:
    torch.manual_seed(0)
    fields = {"pattern": pattern, "positions": positions, "dtype": torch.float64, "num_kv_heads": 2}
    ours, x = MultiheadAttention(E, H, **fields), data(S, 1, E, dtype=torch.float64).requires_grad_()
    alone = torch.cat([ours(part, part, part, is_causal=is_causal)[0] for part in documents(x, 0)])
    leaves = [x, *ours.parameters()]
    expected = [alone, *gradients(alone, *leaves)]
    for bounds in (BOUNDS, BOUNDS.int()):
        packed, _ = ours(x, x, x, is_causal=is_causal, cu_seqlens=bounds)
        assert_close([packed, *gradients(packed, *leaves)], expected, 1e-11)
    y = x[:, 0]
    assert_close([ours(y, y, y, is_causal=is_causal, cu_seqlens=BOUNDS)[0]], [alone[:, 0]], 1e-11)


@pytest.mark.parametrize("checkpointing", [False, True, "pointwise"])
def test_models_take_packed_documents(checkpointing: bool | str) -> None:
    model, seen = language_model(torch.float64, activation_checkpointing=checkpointing), tokens(1)
    alone = torch.cat([model(part) for part in documents(seen, 1)], dim=1)
    packed = model(seen, cu_seqlens=BOUNDS)
    leaves = list(model.parameters())
    assert_close([packed, *gradients(packed, *leaves)], [alone, *gradients(alone, *leaves)], 1e-11)
    encoder, x = LongNetEncoder(config(positions="xpos"), dtype=torch.float64), data(1, S, E, dtype=torch.float64)
    states = encoder.hidden_states(x, cu_seqlens=BOUNDS)
    parts = [encoder.hidden_states(part) for part in documents(x, 1)]
    assert_close(states, [torch.cat(together, dim=1) for together in zip(*parts, strict=True)], 1e-11)
    assert_close(
        [encoder(x, cu_seqlens=BOUNDS)],
        [torch.cat([encoder(p) for p in documents(x, 1)], 1)],
        1e-11,
    )


def test_packed_documents_compiled() -> None:
    model, seen = language_model(), tokens(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close([compiled(seen, cu_seqlens=BOUNDS)], [model(seen, cu_seqlens=BOUNDS)])


def test_what_cannot_be_packed() -> None:
    model, seen, mask = language_model(), tokens(1), padding(9, length=S)
    layer, decoder = LongNetDecoderLayer(config(), has_memory=True), LongNetDecoder(config(), has_memory=True)
    x, wide = data(1, S, E), data(2, S, E)
    ours = MultiheadAttention(E, H, batch_first=True)
    lengths: Any = LENGTHS

    def refused(words: str, call: Any, *given: Tensor | None, **others: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            call(*given, **others)

    refused("not both", model, seen, mask, cu_seqlens=BOUNDS)
    refused("not both", ours, x, x, x, mask, cu_seqlens=BOUNDS)
    refused("cu_seqlens must be a tensor, got list", model, seen, cu_seqlens=lengths)
    refused("batch must be 1", ours, wide, wide, wide, cu_seqlens=BOUNDS)
    refused("24 queries and 20 keys", ours, x, x[:, :20], x[:, :20], cu_seqlens=BOUNDS)
    refused("must begin with 0 and end with", model, seen, cu_seqlens=BOUNDS + 1)
    refused("beside a memory", decoder, x, None, x, cu_seqlens=BOUNDS)
    refused("beside a memory", layer, x, None, None, x, cu_seqlens=BOUNDS)
