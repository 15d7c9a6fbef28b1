"""Decoding token by token: the steps equal the full forward, and the cache keeps what can be reached and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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
    PatternStore,
    Random,
    build_attention,
)
from dilated_attention.bench.timing import peak_bytes
from dilated_attention.core import decoding
from dilated_attention.core.decoding import DecodingCache
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.reach import Reach
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.patterns import resolve_pattern

from .kernel_kit import PATTERNS
from .support import error, inputs

LONGNET = Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
MORE: list[Pattern] = [
    LONGNET,
    Dilated(segment_lengths=(45, 70, 100), dilation_rates=(2, 3, 5), offsets="blocked"),
    Dilated(segment_lengths=(16, 64), dilation_rates=(3, 5), heads="split", offsets_by="query_head"),
    Dilated(segment_lengths=(40, 80, 40), dilation_rates=(1, 2, 1)),
    Dilated(segment_lengths=(24,), dilation_rates=(3,)),  # heads 0 and 3 are alike, and their key-value heads are not
    LONGNET + Local(window_size=7),
    LONGNET | Global(tokens=5),
    Local(window_size=0),
    Learned(block_size=16, blocks_per_row=2),
    Learned(block_size=16, density=0.5),
]
LENGTH = 150
# Prompts and the numbers of tokens in the steps after them, which are repeated.
CHUNKS = ((1, (1,)), (64, (1,)), (16, (16,)), (1, (70, 1, 2)), (LENGTH, (1,)))


def build(pattern: Pattern, **fields: Any) -> Attention:
    defaults: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "is_causal": True}
    return build_attention(defaults | fields, pattern=pattern)


def tokens(length: int = LENGTH, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
    return [x.detach() for x in inputs(geometry, batch=batch, head_dim=8, dtype=dtype)]


def decode(attention: Attention, tensors: list[Tensor], prompt: int, steps: tuple[int, ...], **room: Any) -> Tensor:
    """The outputs of a prompt and all steps after it."""
    cache = attention.make_cache(tensors[0].shape[0], **room)
    length, parts, number, new = tensors[0].shape[1], [], 0, prompt
    while cache.seq_len < length:
        piece = slice(cache.seq_len, min(cache.seq_len + new, length))
        query, key, value = (x[:, piece] for x in tensors)
        parts.append(attention.step(query, key, value, cache))
        new, number = steps[number % len(steps)], number + 1
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE], ids=str)
def test_steps_equal_the_full_forward(pattern: Pattern) -> None:
    attention = build(pattern)
    tensors = tokens()
    expected = attention(*tensors)
    for prompt, steps in CHUNKS:
        assert error(decode(attention, tensors, prompt, steps), expected) < 1e-5, (prompt, steps)
    assert error(decode(attention, tensors, 37, (1, 1, 5), max_seq_len=LENGTH), expected) < 1e-5


def test_float64_half_precision_and_the_reference_backend() -> None:
    for pattern in (LONGNET, Local(window_size=9) | Global(tokens=2), Full()):
        exact = tokens(70, torch.float64)
        for backend in ("sdpa", "reference"):
            attention = build(pattern, dtype="float64", backend=backend)
            assert error(decode(attention, exact, 20, (1, 3)), attention(*exact)) < 1e-12
        half = build(pattern, dtype="bfloat16")
        rounded = tokens(70, torch.bfloat16)
        actual = decode(half, rounded, 20, (1, 3))
        assert actual.dtype == torch.bfloat16
        assert error(actual, build(pattern)(*(x.float() for x in rounded))) < 5e-3


def test_layouts_autocast_tiles_and_an_empty_batch() -> None:
    tensors = tokens(90)
    expected = build(LONGNET)(*tensors)
    swapped = build(LONGNET, tensor_layout="bhsd")
    cache = swapped.make_cache(2)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    parts = [swapped.step(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], cache) for i in range(90)]
    assert error(torch.cat(parts, dim=2).transpose(1, 2), expected) < 1e-5
    small = build(LONGNET, limits={"workspace_bytes": 4096})
    assert error(decode(small, tensors, 3, (40,)), expected) < 1e-5
    half = build(LONGNET, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(decode(half, tensors, 20, (1,)), expected) < 1e-2
        assert error(decode(build(LONGNET), tensors, 20, (1,)), expected) < 1e-5
    assert decode(build(LONGNET), tokens(20, batch=0), 5, (1,)).shape == (0, 20, 4, 8)


@pytest.mark.parametrize("pattern", [LONGNET, Local((7, 0)), Full(), Learned(2, 8)], ids=str)
def test_a_step_of_no_tokens_changes_nothing(pattern: Pattern) -> None:
    attention, tensors = build(pattern), tokens(20)
    cache = attention.make_cache(2)
    for first, last in ((0, 5), (5, 6), (6, 20)):
        query, key, value = (x[:, first:last] for x in tensors)
        assert attention.step(query[:, :0], key[:, :0], value[:, :0], cache).shape == (2, 0, 4, 8)
        out = attention.step(query, key, value, cache)
        assert error(out, attention(*tensors)[:, first:last]) < 1e-5
        assert cache.seq_len == last


@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE], ids=str)
def test_reachable_is_what_some_later_query_counts(pattern: Pattern) -> None:
    if isinstance(pattern, Learned):
        pattern = Full()  # its blocks are chosen at the call: everything may be
    length = 600  # every segment that holds one of the positions below has ended by then
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=True)
    place = np.arange(length, dtype=np.int64)
    for head in range(4):
        counts = pattern.multiplicity(place[:, None], place, np.array(head), geometry)
        for position in (1, 2, 15, 16, 17, 31, 63, 64, 69, 70, 71, 90, 99, 100, 101, 139):
            seen = counts[position:, :position].any(axis=0)
            kept = pattern.reachable(place[:position], position, head, geometry)
            assert kept.shape == seen.shape
            assert not (seen & ~kept).any(), "a key that a later query counts would be lost"
            if not isinstance(pattern, Random):  # which keeps what it may yet draw
                assert np.array_equal(kept, seen), (head, position)


def test_memory_is_bounded_by_what_is_reachable() -> None:
    bound = {LONGNET: 16 + 8 + 8, Local(window_size=9): 9, Local(window_size=9) | Global(tokens=3): 12}
    for pattern, most in bound.items():
        attention = build(pattern)
        cache = attention.make_cache(1)
        query, key, value = tokens(400, batch=1)
        most *= 2 if pattern is LONGNET else 1  # two query heads read each key-value head, at offsets of their own
        rooms = []
        for i in range(400):
            attention.step(query[:, i : i + 1], key[:, i : i + 1], value[:, i : i + 1], cache)
            assert max(cache.rows) <= most + 1 + 16 + most // 64
            rooms.append(cache._keys.shape[2])
            assert cache.nbytes == 2 * 2 * rooms[-1] * 8 * 4 + 2 * rooms[-1] * 8
            assert cache.dense_nbytes == 2 * 2 * (i + 1) * 8 * 4
        assert max(rooms) <= most + 1 + 16 + most // 64
        rows = Reach(attention.config, pattern).rows
        assert max(max(rows(length)) for length in range(1, 200)) <= most
    # Of the segments that end at 128 only those still matter whose last kept place is 127. By hand: 112 ... 126; for
    # odd offsets 97, 99, ... of stride 2; for offset 3 also 67, 71, ... of stride 4.
    assert Reach(build(LONGNET, num_kv_heads=4).config, LONGNET).rows(127) == [15, 15 + 8, 15, 15 + 8 + 8]


def test_longnet_at_128k_keeps_less_than_a_twentieth() -> None:
    longnet = Dilated(
        segment_lengths=tuple(2048 << i for i in range(5)), dilation_rates=tuple(1 << i for i in range(5))
    )
    config = build(longnet, num_heads=16, num_kv_heads=16).config
    reach = Reach(config, longnet)
    assert reach.rows(131072) == [0] * 16  # every segment has just closed
    worst = reach.rows(131071)
    assert max(worst) <= 2048 + 4 * 1024  # what branches share is kept once
    assert max(worst) < 0.05 * 131071
    wide = 16 + max(worst) // 64
    assert (max(worst) + 1 + wide) * (2 * 64 * 2 + 8) < 0.05 * 131071 * 2 * 64 * 2  # as held, in bfloat16


def test_patterns_that_reach_everything_keep_everything() -> None:
    for pattern in PATTERNS:
        keeps = build(pattern).make_cache(1).reach.keeps_all
        assert keeps == (not isinstance(pattern, Local | Global | Dilated) and pattern != PATTERNS[7])
    attention = build(Full())
    cache = attention.make_cache(2, max_seq_len=50)
    before = cache.nbytes
    query, key, value = tokens(50)
    for i in range(50):
        attention.step(query[:, i : i + 1], key[:, i : i + 1], value[:, i : i + 1], cache)
    assert cache.nbytes == before == 2 * 2 * 2 * 50 * 8 * 4
    assert cache.rows == (50, 50)


def test_tokens_without_outputs_can_be_taken_in() -> None:
    for pattern in (LONGNET, Full()):
        attention = build(pattern)
        query, key, value = tokens(90)
        cache = attention.make_cache(2)
        cache.extend(key[:, :80], value[:, :80])
        out = attention.step(query[:, 80:], key[:, 80:], value[:, 80:], cache)
        assert error(out, attention(query, key, value)[:, 80:]) < 1e-5
        assert "seq_len=90" in repr(cache)


@pytest.mark.parametrize("pattern", [LONGNET, Full()], ids=str)
def test_what_is_taken_in_is_looked_at(pattern: Pattern) -> None:
    query, key, value = tokens(20)
    attention = build(pattern)
    cache = attention.make_cache(2)
    taken = r"key and value must be \(batch, new_tokens, 2, 8\) of torch.float32 on cpu, got "
    for wrong in (
        (key[:, :, :1], value[:, :, :1]),
        (query, query),
        (key, value[:, :7]),
        (key, value[:1]),
        (key[..., :1], value[..., :1]),
        (key.double(), value.double()),
        (key.transpose(1, 2), value.transpose(1, 2)),
        (key[0], value[0]),
    ):
        with pytest.raises(ConfigError, match=taken):
            cache.extend(*wrong)
    with pytest.raises(ConfigError, match="key and value must be tensors, got list, Tensor"):
        cache.extend([1], value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"under torch.no_grad\(\)"):
        cache.extend(key.clone().requires_grad_(), value)
    assert cache.seq_len == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.extend(key.bfloat16(), value.bfloat16())  # cast, as those of a step are
    assert cache.seq_len == 20
    turned = build(pattern, tensor_layout="bhsd")
    cache = turned.make_cache(2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    cache.extend(k[:, :, :18], v[:, :, :18])
    out = turned.step(q[:, :, 18:], k[:, :, 18:], v[:, :, 18:], cache)
    assert error(out.transpose(1, 2), attention(query, key, value)[:, 18:]) < 1e-5


def test_a_learned_pattern_takes_tokens_in_with_their_queries_only() -> None:
    attention = build(Learned(block_size=4, blocks_per_row=2))
    query, key, value = tokens(20)
    cache = attention.make_cache(2)
    attention.step(query[:, :5], key[:, :5], value[:, :5], cache)
    with pytest.raises(ConfigError, match=r"learned pattern chooses blocks by queries.*call step\(\)"):
        cache.extend(key[:, 5:10], value[:, 5:10])
    rest = attention.step(query[:, 5:], key[:, 5:], value[:, 5:], cache)
    assert error(rest, attention(query, key, value)[:, 5:]) < 1e-5


@pytest.mark.parametrize("pattern", [LONGNET, Full(), Learned(2, 16)], ids=str)
def test_buffers_may_be_used_again_after_a_step(pattern: Pattern) -> None:
    attention, tensors = build(pattern), tokens(50)
    expected, cache = attention(*tensors), attention.make_cache(2)
    q, k, v = (torch.empty_like(x[:, :1]) for x in tensors)
    for i in range(50):
        for buffer, x in zip((q, k, v), tensors, strict=True):
            buffer.copy_(x[:, i : i + 1])
        assert error(attention.step(q, k, v, cache), expected[:, i : i + 1]) < 1e-5


@pytest.mark.parametrize("pattern", [LONGNET, Local((7, 0)), Full(), Learned(2, 8)], ids=str)
def test_a_step_that_fails_can_be_taken_again(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, tensors = build(pattern), tokens(100)
    expected = attention(*tensors)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    places: list[tuple[object, str]] = [(type(attention._engine), "forward"), (DecodingCache, "_attend")]
    for where, name in (*places, (decoding, "_moved")):
        cache, parts, failures = attention.make_cache(2), [], 0
        for first, last in ((0, 30), (30, 31), (31, 60), (60, 100)):
            q, k, v = (x[:, first:last] for x in tensors)
            with monkeypatch.context() as patch:
                patch.setattr(where, name, fail)
                try:
                    parts.append(attention.step(q, k, v, cache))
                    continue
                except torch.OutOfMemoryError:
                    failures += 1
            assert cache.seq_len == first
            parts.append(attention.step(q, k, v, cache))
        assert error(torch.cat(parts, dim=1), expected) < 1e-5, name
        assert failures or name == "_attend"  # which patterns that keep all have no use for


def test_what_cannot_be_is_told() -> None:
    query, key, value = tokens(8)
    attention = build(LONGNET)
    with pytest.raises(ConfigError, match="is_causal=True"):
        build(LONGNET, is_causal=False).make_cache(2)
    with pytest.raises(ConfigError, match="max_seq_len must be at least 1"):
        attention.make_cache(2, max_seq_len=0)
    with pytest.raises(ConfigError, match="batch_size must be an integer"):
        attention.make_cache(2.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"made for max_seq_len=7 and has seen 0 tokens; 8 more"):
        attention.step(query, key, value, attention.make_cache(2, max_seq_len=7))
    with pytest.raises(ConfigError, match=r"made for batch_size=3, got 2"):
        attention.step(query, key, value, attention.make_cache(3))
    with pytest.raises(ConfigError, match=r"got 1 queries and 8 keys"):
        attention.step(query[:, :1], key, value, attention.make_cache(2))
    with pytest.raises(ConfigError, match="an attention of another configuration"):
        attention.step(query, key, value, build(Full()).make_cache(2))
    with pytest.raises(ConfigError, match=r"cache must be what make_cache made, got None"):
        attention.step(query, key, value, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"under torch.no_grad\(\)"):
        attention.step(query.requires_grad_(), key, value, attention.make_cache(2))
    with torch.no_grad():
        assert attention.step(query, key, value, attention.make_cache(2)).shape == query.shape
    dropping = build(LONGNET, backend="reference", dropout_p=0.1)
    with pytest.raises(ConfigError, match=r"dropout_p=0.1; call eval\(\)"):
        dropping.step(query.detach(), key, value, dropping.make_cache(2))
    dropping.eval()
    assert dropping.step(query.detach(), key, value, dropping.make_cache(2)).shape == query.shape


def test_blocks_kept_for_one_length_are_refused_before_a_cache_is_made(tmp_path: Path) -> None:
    store = PatternStore(tmp_path)
    store.save("drawn", Random(2, 16), seq_len=LENGTH, num_heads=4, is_causal=True)
    drawn = resolve_pattern({"kind": "stored", "name": "drawn", "root": str(tmp_path)}, default_registry())
    learned = build(Learned(block_size=16, blocks_per_row=2))
    query, key, _ = tokens(batch=1)[:3]
    frozen = learned.gate.freeze(query, key)
    for pattern in (store.load("drawn"), drawn, frozen, frozen | Global(4), Local(3) + drawn):
        with pytest.raises(ConfigError, match=f"holds the blocks of {LENGTH} tokens.*cannot.*grows.*decode with"):
            build(pattern).make_cache(1)
    store.save("kept", LONGNET, seq_len=LENGTH, num_heads=4, is_causal=True)
    kept = resolve_pattern({"kind": "stored", "name": "kept", "root": str(tmp_path)}, default_registry())
    assert build(kept).make_cache(1).seq_len == 0  # as its parameters, which fit every length


@pytest.mark.gpu
def test_steps_on_a_card_equal_its_full_forward() -> None:
    for pattern in (LONGNET, Local(window_size=9), Full(), Learned(block_size=16, blocks_per_row=2)):
        for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
            attention = build(pattern, device="cuda", dtype=dtype, num_kv_heads=4)
            tensors = [x.cuda().to(getattr(torch, dtype)) for x in tokens()]
            tensors = [tensors[0], *(x.repeat_interleave(2, dim=2) for x in tensors[1:])]
            assert error(decode(attention, tensors, 37, (1, 3)), attention(*tensors)) < bound


def test_a_step_arranges_only_what_it_uses() -> None:
    attention = build(Random(2, 16))
    cache = attention.make_cache(1, max_seq_len=4096)
    query, key, value = torch.randn(3, 1, 4001, 4, 8)
    with torch.no_grad():
        attention.step(query[:, :4000], key[:, :4000, :2], value[:, :4000, :2], cache)
        rest = query[:, 4000:], key[:, 4000:, :2], value[:, 4000:, :2]
        used = peak_bytes(lambda: attention.step(*rest, cache))
    assert used < cache.nbytes / 8
