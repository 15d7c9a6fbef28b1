"""Decoding with LongNet's cache: the same logits as without, in less memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Learned, Local, Pattern
from dilated_attention.models import LongNetConfig, LongNetLM

from .support import error

VOCAB = 23


def language_model(dtype: torch.dtype = torch.float64, is_causal: bool = True, **fields: Any) -> LongNetLM:
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "vocab_size": VOCAB}
    config = LongNetConfig(**{"pattern": Dilated((8, 16), (1, 2)), **shape, **fields})
    return LongNetLM(config, is_causal=is_causal, dtype=dtype).eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
@pytest.mark.parametrize("norm", ["sub", "deep"])
def test_steps_are_the_forward(positions: str, norm: str) -> None:
    model, seen = language_model(positions=positions, norm=norm, num_kv_heads=2), tokens(2, 40)
    expected = model(seen)
    cache = model.make_cache(2, 40)
    parts = [model.step(part, cache) for part in torch.split(seen, [11, 1, 1, 5, 1, 21], dim=1)]
    assert error(torch.cat(parts, dim=1), expected) < 1e-11
    assert cache.seq_len == 40


def test_generation_is_forward_by_forward() -> None:
    model, seen = language_model(positions="rotary"), tokens(2, 9)
    expected = seen
    for _ in range(30):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(seen, 30), expected)


@pytest.mark.parametrize("pattern", [Dilated((8, 16), (1, 2)), Learned(block_size=4, blocks_per_row=2)])
def test_decoding_under_autocast(pattern: Pattern) -> None:
    model, seen = language_model(torch.float32, positions="rotary", pattern=pattern), tokens(2, 20)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            cache = model.make_cache(2, 20)
            parts = [model.step(part, cache) for part in torch.split(seen, [11, 1, 1, 7], dim=1)]
            assert error(torch.cat(parts, dim=1), model(seen)) < 0.05
            assert model.generate(seen[:, :5], 3).shape == (2, 8)
    wide = language_model(positions="rotary")  # of which autocast leaves matrix products as they are
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wide.generate(seen, 3), language_model(positions="rotary").generate(seen, 3))


def test_xpos_under_autocast_is_bounded_by_its_dtype() -> None:
    model = language_model(torch.float32, positions="xpos")
    assert model.step(tokens(1, 5), model.make_cache(1, 9_000)).isfinite().all()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ConfigError, match=r"than torch\.float16 bears"):
        model.step(tokens(1, 5), model.make_cache(1, 9_000))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ConfigError, match=r"than torch\.float16 bears"):
        model(tokens(1, 9_000))


def test_draws() -> None:
    model, seen = language_model(torch.float32), tokens(1, 5)
    likeliest = model(seen)[0, -1].topk(3).indices.tolist()
    drawn = [
        int(model.generate(seen, 1, temperature=3.0, top_k=3, generator=torch.Generator().manual_seed(i))[0, -1])
        for i in range(40)
    ]
    assert set(drawn) == set(likeliest)
    again = [model.generate(seen, 8, temperature=1.0, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-200, 5e-324])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_lower_the_temperature_the_likelier_the_token(temperature: float, top_k: int | None) -> None:
    model, seen = language_model(torch.float32), tokens(2, 5)
    assert torch.equal(model.generate(seen, 6, temperature=temperature, top_k=top_k), model.generate(seen, 6))


def test_rows_stop() -> None:
    model, seen = language_model(), tokens(2, 9)
    full = model.generate(seen, 12)
    stop = int(full[0, 11])
    stopped = model.generate(seen, 12, stop_token=stop)
    for row, whole in zip(stopped, full, strict=True):
        ends = (whole[9:] == stop).nonzero().flatten()
        until = 9 + int(ends[0]) + 1 if len(ends) else 21
        assert torch.equal(row[:until], whole[: min(until, len(row))])
        assert (row[until:] == stop).all()


def test_the_cache_keeps_what_can_be_seen() -> None:
    model = language_model(pattern=Local((7, 0)))
    cache = model.make_cache(1, 4096)
    model.step(tokens(1, 1024), cache)
    dense = sum(layer.dense_nbytes for layer in cache.layers)
    assert cache.nbytes < dense / 4


def test_caches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = language_model(), tokens(1, 5)
    with pytest.raises(ConfigError, match="cache must be what make_cache made, got NoneType"):
        model.step(seen, None)  # type: ignore[arg-type]
    for layers in (1, 3):
        cache = language_model(num_layers=layers).make_cache(1, 9)
        with pytest.raises(ConfigError, match=f"made for {layers} layers, and the model has 2"):
            model.step(seen, cache)
        assert cache.seq_len == 0
    with pytest.raises(ConfigError, match="max_seq_len must be an integer, got None"):
        model.make_cache(1, None)  # type: ignore[arg-type]
    cache = model.make_cache(1, 9)
    monkeypatch.setattr(cache.layers[1], "step", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        model.step(seen, cache)
    with pytest.raises(ConfigError, match=r"layers of the cache have seen 5, 0 tokens.* make a new one"):
        model.step(seen[:, :1], cache)


def test_what_cannot_be_decoded() -> None:
    model, seen = language_model(), tokens(1, 5)
    with pytest.raises(ConfigError, match=r"call eval\(\) first"):
        language_model().train().generate(seen, 3)
    with pytest.raises(ConfigError, match="is_causal=False"):
        language_model(is_causal=False).generate(seen, 3)
    with pytest.raises(ConfigError, match=r"tokens must be \(batch, seq_len\), got \(30,\)"):
        model(torch.zeros(30, dtype=torch.int64))
    cache = model.make_cache(1, 9)
    for wrong, words in (
        (seen[0], r"tokens must be \(batch, seq_len\), got \(5,\)"),
        (seen.float(), "tokens must be a tensor of int64 or int32, got torch.float32"),
        ([[1, 2]], "tokens must be a tensor of int64 or int32, got list"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.step(wrong, cache)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=words):
            model.generate(wrong, 3)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="dtype float64, here bfloat16"):
        language_model(torch.float32).step(seen, cache)
    for arguments, words in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 3, "temperature": "1"}, "temperature must be a number of at least 0 and finite, got '1'"),
        ({"max_new_tokens": 3, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 3, "top_k": 0}, "top_k"),
        ({"max_new_tokens": 3, "top_k": 5}, "top_k=5 is for draws, and temperature 0 takes the likeliest token"),
        ({"max_new_tokens": 3, "stop_token": 3.5}, "stop_token must be an integer, got 3.5"),
        ({"max_new_tokens": 3, "stop_token": 1 << 20}, "stop_token must be at most "),
        ({"max_new_tokens": 3, "tokens_BS": seen[:, :0]}, "at least one token"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.generate(**{"tokens_BS": seen, **arguments})  # type: ignore[arg-type]
