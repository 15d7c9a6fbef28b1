"""Programs of documents that a kernel computes together: made of one lowered sequence, and kept for a while."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from weakref import ReferenceType, ref

import attrs
import numpy as np

from .band_calls import band_calls, branches_and_bands
from .counting import packing_pairs, query_pairs
from .errors import ConfigError
from .geometry import about_as_long
from .lowering import lower
from .program import Program
from .schedule import Schedule

if TYPE_CHECKING:
    import torch

    from .cache import ByteLRU
    from .config import AttentionConfig
    from .documents import Packing
    from .kernel import Packs
    from .layout import Layout
    from .pattern import IntArray, Pattern

# Documents seldom come again: only what may still be under way is kept, several calls between forward and backward.
KEPT: Final = 8


class DocumentPrograms:
    """The programs of one configuration's documents.

    Args:
        programs: where they are kept, beside those of other calls.
        kernel: computes them.
        pattern: the configuration's, resolved.
        config: the configuration.
    """

    def __init__(
        self, programs: ByteLRU[tuple[Any, ...], Program], kernel: Packs, pattern: Pattern, config: AttentionConfig
    ) -> None:
        self._programs = programs
        self._kernel = kernel
        self._pattern = pattern
        self._config = config
        self._recent: deque[tuple[tuple[Any, ...], ReferenceType[Program]]] = deque()
        self._lock = Lock()

    def program(self, packing: Packing, device: torch.device) -> Program:
        """That of these documents, found or made."""
        key = (packing, device)
        made = self._programs.get_or_make(key, lambda: self._make(packing, device))
        with self._lock:
            self._recent.append((key, ref(made)))
            while len(self._recent) > KEPT:
                old, _ = self._recent.popleft()
                if all(old != other for other, _ in self._recent):
                    self._programs.discard(old)
        return made

    def _make(self, packing: Packing, device: torch.device) -> Program:
        layout, before = self._lowered(packing.longest)
        if before is not None:
            pairs = int(before[packing.places[:, 4]].sum())
        else:
            pairs = packing_pairs(layout.branches, packing, is_causal=layout.geometry.is_causal)
            pairs += self._pairs_in_bands(packing)
        deterministic = self._config.deterministic
        prepared = self._kernel.prepare_packing(layout, packing, device, deterministic=deterministic)
        schedule = Schedule((), 0)
        return Program(layout, schedule, packing=packing, pairs_before=before, prepared_bytes=prepared, pairs=pairs)

    def _lowered(self, longest: int) -> tuple[Layout, IntArray | None]:
        """A layout that is no shorter, the same for many lengths, and the pairs of its queries where it has blocks.

        Of queries that do not see more where more tokens follow.
        """
        length = about_as_long(longest, 1, longest)
        with self._lock:
            known = [program for _, found in self._recent if (program := found()) is not None]
        for program in known:
            if longest <= program.layout.geometry.q_len <= length:
                # A layout of its own: kernels keep what they make of it for as long as it lives.
                return attrs.evolve(program.layout), program.pairs_before
        try:
            layout = self._lower(length)
        except ConfigError:  # the little that is rounded up may be what Limits.layout_bytes has no room for
            if length == longest:
                raise
            layout = self._lower(longest)
        if layout.blocks is None or not self._config.is_causal:
            return layout, None
        return layout, np.append(0, query_pairs(layout, layout.geometry.q_len).cumsum())

    def _pairs_in_bands(self, packing: Packing) -> int:
        """Pairs of all documents in what the pattern has beside branches."""
        _, bands = branches_and_bands(self._pattern, self._config.geometry(1))
        if not bands:
            return 0
        total = 0
        for length, count in zip(*np.unique(packing.places[:, 4], return_counts=True), strict=True):
            calls = band_calls(bands, self._config.geometry(int(length)), windows=True)
            assert calls is not None  # queries and keys are at the same positions
            total += int(count) * sum(call.pairs for call in calls)
        return total

    def _lower(self, length: int) -> Layout:
        return lower(self._pattern, self._config.geometry(length), limit_bytes=self._config.limits.layout_bytes)
