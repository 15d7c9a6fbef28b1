"""Where the queries and the keys of one call stand: lengths, heads, absolute positions, causality."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import attrs

from .checks import non_negative_int, positive_int
from .errors import ConfigError

_MOST_SEGMENTS: Final = 1 << 24  # 128 MiB an array, of which counting and planning hold some ten


def _default_q_offset(geometry: Geometry) -> int:
    return geometry.kv_len - geometry.q_len


@attrs.frozen(kw_only=True)
class Geometry:
    """The shape of one attention call, without its data.

    Query index i stands at absolute position i + q_offset, key index j at j + kv_offset, for pattern and causality
    alike. The default q_offset, kv_len - q_len, puts the last query at the last key where keys begin at 0. A call that
    holds parts of a sequence says in `whole_len` how long the whole is.
    """

    q_len: int = attrs.field(validator=non_negative_int)
    kv_len: int = attrs.field(validator=non_negative_int)
    num_heads: int = attrs.field(validator=positive_int)
    num_kv_heads: int = attrs.field(validator=positive_int)
    is_causal: bool
    q_offset: int = attrs.field(default=attrs.Factory(_default_q_offset, takes_self=True))
    kv_offset: int = 0
    whole_len: int = attrs.field(default=0, validator=non_negative_int)

    def __attrs_post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def seq_len(self) -> int:
        """Length of the whole sequence as far as this call knows it: one past the last position."""
        return max(self._reach, self.whole_len)

    @property
    def identity(self) -> tuple[int, ...]:
        """The fields, for digests; `whole_len` only where it adds something."""
        fields: tuple[int, ...] = attrs.astuple(self)
        return fields if self.whole_len > self._reach else fields[:-1]

    @property
    def _reach(self) -> int:
        return max(self.q_offset + self.q_len, self.kv_offset + self.kv_len, 0)

    def segments(self, width: int) -> tuple[int, int]:
        """Numbers of the first and the last segment of `width` positions that hold a query and a key.

        Raises:
            ConfigError: more of them than can be planned.
        """
        first = max(self.q_offset // width, self.kv_offset // width)
        last = min((self.q_offset + self.q_len - 1) // width, (self.kv_offset + self.kv_len - 1) // width)
        if last - first >= _MOST_SEGMENTS:
            raise ConfigError(
                f"{self.q_len:,} queries lie in {last - first + 1:,} segments of {width:,}, but at most "
                f"{_MOST_SEGMENTS:,} can be planned; use longer segments or a shorter sequence"
            )
        return first, last

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def self_attention(cls, seq_len: int, num_heads: int = 1, *, is_causal: bool = False) -> Geometry:
        """Queries and keys of one whole sequence, one key-value head per query head."""
        return cls(q_len=seq_len, kv_len=seq_len, num_heads=num_heads, num_kv_heads=num_heads, is_causal=is_causal)


def about_as_long(length: int, least: int, most: int) -> int:
    """`length` or up to an eighth more, of which there are few: in steps of an eighth of a power of two.

    Steps are never smaller than `least` nor larger than `most`.
    """
    step = min(max(1 << length.bit_length() >> 4, least), most)
    return -(-length // step) * step


def joined_groups(*groups: Sequence[Hashable]) -> tuple[int, ...]:
    """Heads that are together in each of several groupings, numbered from 0 in order of appearance."""
    seen: dict[tuple[Hashable, ...], int] = {}
    return tuple(seen.setdefault(key, len(seen)) for key in zip(*groups, strict=True))
