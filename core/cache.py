"""A least-recently-used cache bounded in bytes, safe under threads."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from .counters import CacheCounters


class Sized(Protocol):
    """What the cache keeps: anything that knows its size in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes that the value keeps alive."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


class ByteLRU(Generic[K, V]):
    """Maps keys to values and drops the least recently used ones before their bytes exceed a limit.

    The newest value stays, however large: whoever works at one length would otherwise make it again at every call. Two
    threads that miss the same key at once share one computation; others go on undisturbed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._values: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._making: dict[K, threading.Lock] = {}
        self._hits = self._misses = self._evictions = 0
        self._making_s = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the values kept now; above `limit_bytes` only where a single value is."""
        with self._lock:
            return self._bytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)

    @property
    def counters(self) -> CacheCounters:
        """What was found, made and dropped by now. A value that failed to be made is a miss too."""
        with self._lock:
            return CacheCounters(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._values),
                nbytes=self._bytes,
                lowering_s=self._making_s,
            )

    def get(self, key: K) -> V | None:
        """The value kept for `key`, now the most recently used, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._hits += 1
                self._values.move_to_end(key)
            return value

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """The value kept for `key`, or that of `make()`, which runs outside the lock and may raise."""
        value = self.get(key)
        if value is not None:
            return value
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                value = self.get(key)  # another thread may have made it meanwhile
                if value is None:
                    value = self._timed(make)
                    self._put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def discard(self, key: K) -> None:
        """Keep the value of `key` no longer, if it is kept."""
        with self._lock:
            value = self._values.pop(key, None)
            self._bytes -= 0 if value is None else value.nbytes

    def _timed(self, make: Callable[[], V]) -> V:
        start = time.perf_counter()
        try:
            return make()
        finally:
            with self._lock:
                self._misses += 1
                self._making_s += time.perf_counter() - start

    def _put(self, key: K, value: V) -> None:
        size = value.nbytes
        with self._lock:
            old = self._values.pop(key, None)
            if old is not None:
                self._bytes -= old.nbytes
            while self._values and self._bytes + size > self.limit_bytes:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= dropped.nbytes
                self._evictions += 1
            self._values[key] = value
            self._bytes += size
