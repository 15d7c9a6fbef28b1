"""The byte-bounded cache: never above its limit, right under many threads, one computation per missing key."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch

from dilated_attention import Limits, Local, build_attention
from dilated_attention.core.cache import ByteLRU


@attrs.frozen
class Value:
    key: int
    nbytes: int


def test_least_recently_used_goes_first_and_bytes_add_up() -> None:
    cache: ByteLRU[int, Value] = ByteLRU(100)
    for key in range(4):
        cache.get_or_make(key, lambda key=key: Value(key, 30))  # type: ignore[misc]
    assert (cache.get(0), len(cache), cache.nbytes) == (None, 3, 90)
    cache.get(1)
    cache.get_or_make(9, lambda: Value(9, 30))
    assert cache.get(2) is None
    assert cache.get(1) == Value(1, 30)


def test_a_value_above_the_limit_stays_alone_until_the_next_is_made() -> None:
    cache: ByteLRU[int, Value] = ByteLRU(100)
    cache.get_or_make(0, lambda: Value(0, 10))
    for _ in range(2):
        assert cache.get_or_make(1, lambda: Value(1, 101)) == Value(1, 101)
    assert (len(cache), cache.nbytes, cache.counters.misses, cache.counters.hits) == (1, 101, 2, 1)
    cache.get_or_make(2, lambda: Value(2, 10))
    assert (cache.get(1), cache.get(2), cache.nbytes) == (None, Value(2, 10), 10)


def test_a_failing_make_leaves_nothing_behind() -> None:
    cache: ByteLRU[int, Value] = ByteLRU(100)

    def fail() -> Value:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get_or_make(1, fail)
    assert cache.get_or_make(1, lambda: Value(1, 1)) == Value(1, 1)


def test_threads_that_miss_together_make_once() -> None:
    cache: ByteLRU[int, Value] = ByteLRU(100)
    made: list[int] = []
    gate = threading.Barrier(16)

    def make() -> Value:
        made.append(1)
        time.sleep(0.02)
        return Value(1, 10)

    def ask(_: int) -> Value:
        gate.wait()
        return cache.get_or_make(1, make)

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {Value(1, 10)}
    assert len(made) == 1


def test_sixteen_threads_never_exceed_the_limit() -> None:
    cache: ByteLRU[int, Value] = ByteLRU(1000)
    over: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if cache.nbytes > 1000:
                over.append(cache.nbytes)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(2000):
            key = draw.randrange(60)
            value = cache.get_or_make(key, lambda key=key: Value(key, 10 + key * 7))  # type: ignore[misc]
            assert value == Value(key, 10 + key * 7)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    stop.set()
    watcher.join()
    assert not over
    assert 0 < cache.nbytes <= 1000


def test_an_attention_under_threads_and_a_tight_limit_stays_exact() -> None:
    limits = Limits(pattern_cache_bytes=30_000)
    attention = build_attention(pattern=Local(window_size=20), num_heads=2, head_dim=8, limits=limits, is_causal=True)
    fresh = build_attention(pattern=Local(window_size=20), num_heads=2, head_dim=8, is_causal=True)
    expected = {n: fresh(*torch.ones(3, 1, n, 2, 8).cumsum(dim=2)) for n in range(100, 140, 5)}
    seen: list[int] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(20):
            n = draw.choice(list(expected))
            assert torch.equal(attention(*torch.ones(3, 1, n, 2, 8).cumsum(dim=2)), expected[n])
            seen.append(attention._engine.programs.nbytes)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert 0 < max(seen) <= 30_000
    assert len(attention._engine.programs) < len(expected)
