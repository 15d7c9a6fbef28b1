"""How one sequence is cut into contiguous shards, and the geometries that a rank's queries meet. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ..core.checks import an_int, positive_int, require_int
from ..core.errors import ConfigError
from ..core.geometry import Geometry


def shard_length(seq_len: int, size: int) -> int:
    """seq_len / size.

    Raises:
        ConfigError: where `size` does not divide it, naming the nearest lengths that it does.
    """
    require_int("seq_len", seq_len, minimum=0)
    if seq_len % size:
        below, above = seq_len // size * size, -(-seq_len // size) * size
        raise ConfigError(
            f"a sequence of {seq_len:,} tokens cannot be cut into {size} equal shards; the nearest lengths are "
            f"{f'{below:,} and ' if below else ''}{above:,}: cut it, or pad it at its end"
        )
    return seq_len // size


@attrs.frozen
class Shards:
    """A sequence of `size` shards of `length` positions: shard i holds positions i * length onwards, on rank i."""

    length: int = attrs.field(validator=an_int(0))
    size: int = attrs.field(validator=positive_int)
    num_heads: int
    num_kv_heads: int
    is_causal: bool

    @property
    def seq_len(self) -> int:
        """Positions of the whole sequence."""
        return self.length * self.size

    @property
    def whole(self) -> Geometry:
        """All queries against all keys."""
        return self.together(0, self.size)

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads

    def geometry(self, rank: int, first: int, stop: int) -> Geometry:
        """The queries of `rank` against the keys at positions first:stop."""
        return Geometry(
            q_len=self.length,
            kv_len=stop - first,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            is_causal=self.is_causal,
            q_offset=rank * self.length,
            kv_offset=first,
            whole_len=self.seq_len,
        )

    def together(self, first: int, stop: int) -> Geometry:
        """The queries of ranks first:stop against all keys that causality allows any of them."""
        whole = self.geometry(first, 0, stop * self.length if self.is_causal else self.seq_len)
        return attrs.evolve(whole, q_len=(stop - first) * self.length)

    def against(self, rank: int, owner: int) -> Geometry:
        """The queries of `rank` against the keys of `owner`."""
        return self.geometry(rank, owner * self.length, (owner + 1) * self.length)

    def remote(self, rank: int) -> Iterator[Geometry]:
        """The queries of `rank` against the keys before its shard and, where causality allows any, those after it."""
        if rank > 0:
            yield self.geometry(rank, 0, rank * self.length)
        if rank < self.size - 1 and not self.is_causal:
            yield self.geometry(rank, (rank + 1) * self.length, self.seq_len)
