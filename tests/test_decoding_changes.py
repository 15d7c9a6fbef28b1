"""Caches whose sequences are chosen anew, or shortened: decoding goes on as if they had always been so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention import (
    Attention,
    ConfigError,
    Dilated,
    Full,
    Global,
    Learned,
    Local,
    Pattern,
    Random,
    build_attention,
)
from dilated_attention.core.decoding import DecodingCache
from dilated_attention.core.geometry import Geometry
from dilated_attention.models import LongNetConfig, LongNetLM

from .support import error, inputs

LONGNET = Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
PATTERNS = [LONGNET, Local(window_size=9) | Global(tokens=3), Local((7, 0)), Full(), Random(2, 16), Learned(2, 8)]
LENGTH = 150


def build(pattern: Pattern, **fields: Any) -> Attention:
    defaults = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "is_causal": True, "dtype": "float64"}
    return build_attention(defaults | fields, pattern=pattern)


def expected_of(pattern: Pattern, tensors: list[Tensor]) -> Tensor:
    """The oracle's output; of a learned pattern, of which it knows nothing, the full forward's."""
    out: Tensor = build(pattern, backend="auto" if isinstance(pattern, Learned) else "reference")(*tensors)
    return out


def tokens(length: int = LENGTH, batch: int = 3) -> list[Tensor]:
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
    return [x.detach() for x in inputs(geometry, batch=batch, head_dim=8, dtype=torch.float64)]


def noise(count: int, batch: int) -> list[Tensor]:
    """Tokens that are taken back."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, count, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def step(attention: Attention, new: list[Tensor], cache: DecodingCache) -> Tensor:
    query, key, value = new
    return attention.step(query, key, value, cache)


@pytest.mark.parametrize("room", [{}, {"max_seq_len": LENGTH}], ids=["grows", "room"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_chosen_sequences_go_on_with_their_own_past(pattern: Pattern, room: dict[str, int]) -> None:
    attention, every = build(pattern), tokens(batch=4)
    past, cache, start = [x[:3, :0] for x in every], attention.make_cache(3, **room), 0
    choices = ([2, 0, 1], [1, 1, 1, 0], [3, 2, 0, 0], [0, 2], [1], [0, 0, 0])
    for number, (choice, end) in enumerate(zip(choices, (37, 38, 61, 64, 101, 102), strict=True)):
        new = [x[: cache.batch_size, start:end] for x in every]
        past = [torch.cat([x, y], dim=1) for x, y in zip(past, new, strict=True)]
        out = step(attention, new, cache)
        assert error(out, expected_of(pattern, past)[:, start:end]) < 1e-12
        index = torch.tensor(choice, dtype=torch.int32 if number % 2 else torch.int64)
        cache.select(index)
        past, start = [x[index] for x in past], end
        assert (cache.batch_size, cache.seq_len) == (len(choice), end)
        assert cache.dense_nbytes == 2 * len(choice) * 2 * end * 8 * 8
    cache.select(torch.empty(0, dtype=torch.int64))
    assert step(attention, [x[:0, :1] for x in every], cache).shape == (0, 1, 4, 8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tokens_that_were_taken_back_leave_nothing(pattern: Pattern) -> None:
    """As a model does that lets a smaller one guess: some tokens at a time, of which some are not the right ones."""
    attention, tensors = build(pattern), tokens()
    expected = expected_of(pattern, tensors)
    for prompt in (1, 37, 64):
        cache = attention.make_cache(3, max_crop=8)
        step(attention, [x[:, :prompt] for x in tensors], cache)
        seen = prompt
        while seen < LENGTH:
            right = min(1 + seen % 3, LENGTH - seen)
            begun = (seen + right) % 8  # of a learned pattern's block, which must not be full when they are taken back
            wrong = noise(7 - begun if isinstance(pattern, Learned) else 8 - right, 3)
            guess = [torch.cat([x[:, seen : seen + right], y], dim=1) for x, y in zip(tensors, wrong, strict=True)]
            out = step(attention, guess, cache)[:, :right]
            assert error(out, expected[:, seen : seen + right]) < 1e-12
            seen += right
            cache.crop(seen)
            assert cache.seq_len == seen
            assert max(cache.rows) <= seen
        cache.crop(LENGTH)
        if not isinstance(pattern, Learned):
            cache.crop(LENGTH - 1)
            out = step(attention, [x[:, LENGTH - 1 :] for x in tensors], cache)
            assert error(out, expected[:, LENGTH - 1 :]) < 1e-12


def test_how_far_a_cache_goes_back() -> None:
    attention, tensors = build(LONGNET), tokens()
    cache = attention.make_cache(3, max_crop=5)
    step(attention, [x[:, :40] for x in tensors], cache)
    with pytest.raises(ConfigError, match=r"crop to 34 tokens.*what tokens from 35 on.*max_crop=5.*from 35 to 40"):
        cache.crop(34)
    cache.crop(36)
    with pytest.raises(ConfigError, match=r"from 35 to 36"):
        cache.crop(34)
    with pytest.raises(ConfigError, match=r"crop to 37 tokens.*has seen 36"):
        cache.crop(37)
    step(attention, [x[:, 36:37] for x in tensors], cache)
    with pytest.raises(ConfigError, match=r"from 35 to 37"):  # what was dropped for 40 tokens does not come back
        cache.crop(34)
    cache.crop(35)
    out = step(attention, [x[:, 35:] for x in tensors], cache)
    assert error(out, expected_of(LONGNET, tensors)[:, 35:]) < 1e-12
    plain = attention.make_cache(3)
    step(attention, [x[:, :40] for x in tensors], plain)
    plain.crop(40)
    with pytest.raises(ConfigError, match=r"crop to 39 tokens.*max_crop=0"):
        plain.crop(39)
    for wrong, words in ((-1, "must be at least 0"), (2.0, "must be an integer")):
        with pytest.raises(ConfigError, match=f"max_crop {words}"):
            attention.make_cache(3, max_crop=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"seq_len {words}"):
            plain.crop(wrong)  # type: ignore[arg-type]
    assert plain.seq_len == 40


def test_memory_stays_bounded_when_tokens_may_be_taken_back() -> None:
    attention = build(Local(window_size=9))
    cache = attention.make_cache(1, max_crop=6)
    tensors = tokens(400, batch=1)
    for i in range(400):
        step(attention, [x[:, i : i + 1] for x in tensors], cache)
        assert max(cache.rows) <= 9 + 6 + 1 + 16


def test_a_learned_pattern_goes_back_to_where_a_block_begins_or_within_the_last() -> None:
    pattern = Learned(block_size=8, blocks_per_row=2)
    attention, tensors = build(pattern), tokens(60)
    expected = expected_of(pattern, tensors)
    cache = attention.make_cache(3)
    step(attention, [x[:, :45] for x in tensors], cache)
    for wrong in (39, 33, 1):
        with pytest.raises(ConfigError, match=rf"crop to {wrong} tokens.*first query.*multiple of 8, or from 41 to 45"):
            cache.crop(wrong)
    for length in (42, 41, 40, 32, 0):
        cache.crop(length)
        out = step(attention, [x[:, length:] for x in tensors], cache)
        assert error(out, expected[:, length:]) < 1e-12
        cache.crop(56)
        with pytest.raises(ConfigError, match=r"crop to 55 tokens.*to a multiple of 8$"):
            cache.crop(55)
        cache.crop(40)
        step(attention, [x[:, 40:45] for x in tensors], cache)
    with pytest.raises(ConfigError, match=r"crop to 46 tokens.*has seen 45"):
        cache.crop(46)


@pytest.mark.parametrize("pattern", [LONGNET, Full(), Learned(2, 8)], ids=str)
def test_wrong_choices_change_nothing(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, tensors = build(pattern), tokens()
    cache = attention.make_cache(3)
    step(attention, [x[:, :37] for x in tensors], cache)
    wrong: list[tuple[Any, str]] = [
        (torch.tensor([0, 3, 1]), r"rows must be at least 0 and below batch_size=3, got 3"),
        (torch.tensor([-1, 0]), r"rows must be at least 0 and below batch_size=3, got -1"),
        (torch.tensor([[0, 1]]), r"one-dimensional tensor of int32 or int64.*got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), r"got torch.float32 of shape \(2,\)"),
        (torch.tensor([True, False, True]), r"got torch.bool of shape \(3,\).*nonzero"),
        ([0, 1], r"got list"),
    ]
    for rows, words in wrong:
        with pytest.raises(ConfigError, match=words):
            cache.select(rows)

    index_select, calls = Tensor.index_select, 0

    def second_fails(self: Tensor, *given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return index_select(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "index_select", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            cache.select(torch.tensor([2, 2, 2]))
    assert (cache.batch_size, cache.seq_len) == (3, 37)
    out = step(attention, [x[:, 37:] for x in tensors], cache)
    assert error(out, expected_of(pattern, tensors)[:, 37:]) < 1e-12


@pytest.mark.parametrize("pattern", [LONGNET, Local((7, 0)), Local(window_size=9) | Global(tokens=3)], ids=str)
def test_a_step_can_be_taken_again_whichever_allocation_fails(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, tensors = build(pattern), tokens()
    expected, from_numpy = expected_of(pattern, tensors), torch.from_numpy
    fails_at = 0
    while True:
        fails_at, calls, failures, cache = fails_at + 1, 0, 0, attention.make_cache(3)

        def fails(x: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == fails_at:  # noqa: B023
                raise torch.OutOfMemoryError("no memory")
            return from_numpy(x)

        for first, last in ((0, 30), (30, 31), (31, 60), (60, 100), (100, 101)):
            part = [x[:, first:last] for x in tensors]
            calls = 0
            with monkeypatch.context() as patch:
                patch.setattr(torch, "from_numpy", fails)
                try:
                    out = step(attention, part, cache)
                except torch.OutOfMemoryError:
                    failures += 1
                    out = None
            out = step(attention, part, cache) if out is None else out
            assert error(out, expected[:, first:last]) < 1e-12, fails_at
        if not failures:
            break
    assert fails_at > 5


def test_a_language_models_cache_is_chosen_and_shortened_in_every_layer() -> None:
    torch.manual_seed(0)
    config = LongNetConfig(embed_dim=32, num_layers=2, num_heads=4, vocab_size=64, pattern=LONGNET, positions="rotary")
    model = LongNetLM(config, dtype=torch.float64).eval()
    seen = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(1))
    cache = model.make_cache(2, 60, max_crop=3)
    model.step(seen, cache)
    rows = torch.tensor([1, 1, 0])
    cache.select(rows)
    seen = torch.cat([seen[rows], torch.arange(6).view(3, 2)], dim=1)
    with torch.no_grad():
        assert error(model.step(seen[:, 50:], cache), model(seen)[:, 50:]) < 1e-9
        model.step(seen[:, :3] * 0, cache)
        with pytest.raises(ConfigError, match="crop to 51 tokens"):
            cache.crop(51)
        cache.crop(52)
        seen = torch.cat([seen, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        assert error(model.step(seen[:, 52:], cache), model(seen)[:, 52:]) < 1e-9
    assert cache.seq_len == 53
    assert all(isinstance(layer, DecodingCache) and layer.batch_size == 3 for layer in cache.layers)
