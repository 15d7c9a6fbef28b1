"""The heads of a larger model that one rank computes: tensor parallelism, said by the pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from .checks import non_negative_int, positive_int, promises
from .errors import ConfigError
from .geometry import Geometry, joined_groups
from .pattern import Branch, KeySpans, LearnedPattern, Pattern, Sum, Union
from .repeats import Repeats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .layout import BlockGrid, BlockSupport
    from .pattern import IntArray


def _check_pattern(instance: HeadShard, attribute: attrs.Attribute[Pattern], value: object) -> None:
    if not isinstance(value, Pattern):
        raise ConfigError(f"HeadShard is of a pattern, got {value!r} ({type(value).__name__})")
    if isinstance(value.unwrap(), LearnedPattern):
        raise ConfigError(
            f"a {value.kind} pattern does not number its heads: each rank's gate is of the heads that it is built for, "
            f"so build with the pattern as it is"
        )


@attrs.frozen
class HeadShard(Pattern):
    """What a pattern is for some of a model's heads, where these are spread over ranks.

    Head h of a call is head `first_head + h` of `total_heads`. It sees what that head sees in a model that has them
    all: offsets of `Dilated`, draws of `Random` and tables of stored patterns follow a head's number. Patterns that
    treat all heads alike are what they are without it.

    Attributes:
        of: the pattern of the whole model.
        first_head: number of this rank's first query head, from 0.
        total_heads: query heads of the whole model.
        total_kv_heads: its key-value heads; None: as many as query heads.

    Raises:
        ConfigError: for other values, a learned pattern, and, when it meets its heads, more of them than there are from
            `first_head` on, or query heads that share a key-value head here and do not in the whole model.
    """

    kind: ClassVar[str] = "head_shard"

    of: Pattern = attrs.field(validator=_check_pattern)
    first_head: int = attrs.field(kw_only=True, validator=non_negative_int)
    total_heads: int = attrs.field(kw_only=True, validator=positive_int)
    total_kv_heads: int | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(positive_int)
    )

    def __attrs_post_init__(self) -> None:
        if self.total_heads % self._kv_heads:
            raise ConfigError(
                f"HeadShard.total_heads must be a multiple of total_kv_heads, got {self.total_heads} and "
                f"{self._kv_heads}"
            )
        if self.first_head >= self.total_heads:
            raise ConfigError(
                f"HeadShard.first_head must be below total_heads, which is {self.total_heads}, got {self.first_head}; "
                f"heads are numbered from 0"
            )

    @property
    def _kv_heads(self) -> int:
        return self.total_heads if self.total_kv_heads is None else self.total_kv_heads

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """These heads are among the whole model's, and share keys as they do there."""
        last = self.first_head + num_heads
        if last > self.total_heads:
            raise ConfigError(
                f"HeadShard of {self.total_heads} heads has {self.total_heads - self.first_head} from head "
                f"{self.first_head} on, got num_heads={num_heads}"
            )
        shared, own = self.total_heads // self._kv_heads, num_heads // num_kv_heads
        for head in range(self.first_head, last, own):
            if head // shared != (head + own - 1) // shared:
                raise ConfigError(
                    f"heads {head} to {head + own - 1} share a key-value head here, by num_heads={num_heads} and "
                    f"num_kv_heads={num_kv_heads}, but not in the whole model, where {shared} share one; "
                    f"HeadShard(total_heads={self.total_heads}, total_kv_heads={self._kv_heads}) must say the "
                    f"whole model's heads, and num_heads and num_kv_heads this rank's"
                )
        self.of.validate(self.total_heads, self._kv_heads)

    def unwrap(self) -> Pattern:
        """The pattern itself where all heads are alike, else unions and sums of shards of their members."""
        named = self.of.unwrap()
        if promises(named, "heads_alike"):
            return named
        if isinstance(named, Union | Sum):
            return type(named)(tuple(attrs.evolve(self, of=member).unwrap() for member in named.of))
        return self if named is self.of else attrs.evolve(self, of=named)

    def _whole(self, geometry: Geometry) -> Geometry:
        """The call with all heads."""
        return attrs.evolve(geometry, num_heads=self.total_heads, num_kv_heads=self._kv_heads)

    def _own(self, groups: tuple[int, ...], num_heads: int) -> tuple[int, ...]:
        """Of numbers of all heads, those of this rank's, counted from 0."""
        return joined_groups(groups[self.first_head : self.first_head + num_heads])

    @property
    def max_multiplicity(self) -> int:
        """That of the pattern."""
        return self.of.max_multiplicity

    @property
    def block_size(self) -> int | None:
        """That of the pattern."""
        return self.of.block_size

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """What the pattern says of these heads of the whole model."""
        return self.of.multiplicity(query, key, head + self.first_head, self._whole(geometry))

    def branches(self, geometry: Geometry) -> tuple[Branch, ...] | None:
        """The pattern's branches that one of these heads uses, with their offsets."""
        branches = self.of.branches(self._whole(geometry))
        if branches is None:
            return None
        own = slice(self.first_head, self.first_head + geometry.num_heads)
        parts = (attrs.evolve(branch, offsets=branch.offsets[own]) for branch in branches)
        return tuple(part for part in parts if any(offset is not None for offset in part.offsets))

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """As in the whole model."""
        return self._own(self.of.head_groups(self.total_heads, self._kv_heads), num_heads)

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """As in the whole model."""
        return self._own(self.of.signature_groups(self.total_heads, self._kv_heads), num_heads)

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """Those of the head in the whole model."""
        return self.of.key_spans(query_low, query_high, head + self.first_head, self._whole(geometry))

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """What the head reaches in the whole model."""
        return self.of.reachable(key, position, head + self.first_head, self._whole(geometry))

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """That of the head in the whole model."""
        return self.of.block_support(grid, head + self.first_head, self._whole(geometry))

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """That of the head in the whole model."""
        return self.of.block_signature(query_low, key_low, block_size, head + self.first_head, self._whole(geometry))

    def repeats(self) -> Repeats | None:
        """As the pattern does."""
        return self.of.unwrap().repeats()

    def to_dict(self) -> dict[str, object]:
        """The fields, with `kind`."""
        numbers = {
            "first_head": self.first_head,
            "total_heads": self.total_heads,
            "total_kv_heads": self.total_kv_heads,
        }
        given = {name: number for name, number in numbers.items() if number is not None}
        return {"kind": self.kind, "of": self.of.to_dict(), **given}
