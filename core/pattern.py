"""Patterns and their algebra: torch-free values that say how often a query position counts a key position.

A pattern is a multiplicity m(p, q) in {0, 1, 2, ...} per head. `a | b` takes the larger multiplicity, `a + b` the sum.
Everything else (lowering, the oracle, the drawings) follows from `multiplicity`; a pattern may add `branches`, `bands`,
`key_spans`, `head_groups` and `block_signature` so that lowering costs only what it keeps.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from .checks import positive_int, promises
from .errors import ConfigError
from .geometry import Geometry, joined_groups
from .repeats import Repeats
from .structure import NamesChecked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .bands import Band
    from .config import AttentionConfig
    from .gate import Gate
    from .layout import BlockGrid, BlockSupport

    IntArray = NDArray[np.int64]


@attrs.frozen
class Branch:
    """A dilated set of pairs: in each segment a head keeps the positions at its offset modulo the stride.

    Query p and key q of head h are a pair when both lie in the same segment (p // segment_length) and the place of
    each in it, (p mod segment_length), is congruent to offsets[h] modulo `stride`. `segment_length=None` is one
    segment over all positions. `offsets[h] = None` leaves head h out, others are kept as residues. A pair counts
    `weight` times.
    """

    segment_length: int | None
    stride: int
    offsets: tuple[int | None, ...]
    weight: int = attrs.field(default=1, validator=positive_int)

    def __attrs_post_init__(self) -> None:
        residues = tuple(offset if offset is None else offset % self.stride for offset in self.offsets)
        object.__setattr__(self, "offsets", residues)


@attrs.frozen(eq=False)
class KeySpans:
    """Key positions that blocks of queries may see, as half-open intervals; arrays of shape (blocks, spans), int64.

    `low:high` holds every key seen by any query of the block. Every query of the block counts every key of
    `inner_low:inner_high` exactly `multiplicity` times (empty when inner_low >= inner_high). Spans of one block are
    disjoint and sorted.
    """

    low: IntArray
    high: IntArray
    inner_low: IntArray
    inner_high: IntArray
    multiplicity: int = 1


class Pattern(NamesChecked, ABC):
    """Who attends to whom. Subclasses are frozen attrs classes with a `kind` that names them in files."""

    kind: ClassVar[str]
    # Queries of causal attention see the same keys if more tokens follow, and branches do not depend on lengths.
    keeps_prefixes: ClassVar[bool] = False
    # `multiplicity` and `block_signature` do not depend on the head: all are lowered as one. A class derived from one
    # that promises this, or what stands above, promises it anew.
    heads_alike: ClassVar[bool] = False

    @abstractmethod
    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """How often each query counts each key, before causality.

        Args:
            query: absolute query positions, int64, broadcastable against the others.
            key: absolute key positions, int64.
            head: query head indices, int64.
            geometry: lengths, heads and causality of the call (a pattern may depend on them).

        Returns:
            Integers of the broadcast shape, at least 0.
        """

    @property
    def max_multiplicity(self) -> int:
        """The largest value that `multiplicity` can return."""
        return 1

    @property
    def block_size(self) -> int | None:
        """The block size that the pattern is defined on, where it is defined on blocks."""
        return None

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise `ConfigError` when the pattern cannot be used with these numbers of heads."""

    def unwrap(self) -> Pattern:
        """The pattern that this one stands for; itself unless it only names another one."""
        return self

    def branches(self, geometry: Geometry) -> tuple[Branch, ...] | None:
        """The pattern as a sum of strided branches, or None where it has no such form."""
        return None

    def bands(self) -> tuple[Band, ...] | None:
        """The pattern as a sum of bands, alike for all heads, before causality; None where it has no such form."""
        return None

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """A group number per head, counted from 0; heads of one group have the same multiplicity."""
        return (0,) * num_heads if promises(self, "heads_alike") else tuple(range(num_heads))

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """Bounds on the keys seen from blocks of query positions query_low..query_high (inclusive), before causality.

        The default claims nothing: every key may be seen. Override it, or lowering to blocks visits every block.
        """
        import numpy as np

        low = np.full((query_low.size, 1), geometry.kv_offset, dtype=np.int64)
        return KeySpans(low, low + geometry.kv_len, low, low)

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """Which keys a causal query at `position` or later may count: what a cache must keep when decoding.

        `key` (any shape, int64) stands before `position`; of `geometry` only the numbers of heads count. Returns
        booleans of key's shape: exact by default for a sum of strided branches, all True for other patterns.
        """
        from .supports import branch_reachable

        return branch_reachable(self.branches(geometry), key, position, head)

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """The blocks of `grid` that hold a pair for `head`, each either constant or to be evaluated."""
        from .supports import support_from_spans

        return support_from_spans(self, grid, head, geometry)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """Columns of int64 per block such that blocks with equal rows have equal multiplicities, entry for entry.

        `query_low` and `key_low`, shape (blocks,), are the positions of the first corners of square blocks of
        `block_size` positions. Causality and the ends of the tensors are not part of it. The default distinguishes all
        blocks; a translation-invariant pattern returns the difference and makes lowering cheap.
        """
        import numpy as np

        return np.stack([query_low, key_low], axis=-1)

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """A group number per head; heads of one have the same `block_signature` of every block."""
        return (0,) * num_heads if promises(self, "heads_alike") else tuple(range(num_heads))

    def repeats(self) -> Repeats | None:
        """How it repeats itself along the sequence, if it does: what it costs a ring is then found for one period."""
        return None

    def to_dict(self) -> dict[str, object]:
        """The mapping form used in files: `{"kind": ..., parameter: value, ...}`."""
        raise ConfigError(f"a {self.kind} pattern must say its parameters: write to_dict, as {{'kind': {self.kind!r}}}")

    def __or__(self, other: object) -> Union:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union(tuple(_members(Union, self)) + tuple(_members(Union, other)))

    def __add__(self, other: object) -> Sum:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Sum(tuple(_members(Sum, self)) + tuple(_members(Sum, other)))


class LearnedPattern(Pattern):
    """A pattern whose key blocks are chosen from the input at every call, by a module with parameters: its gate.

    It is defined on blocks of `block_size` queries and keys, counted from the first of each in the call. What the core
    computes is settled by the number of blocks each row keeps (`take`); which ones they are, the gate says per call.
    """

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Queries and keys in a block."""

    @abstractmethod
    def take(self, visible: Tensor) -> Tensor:
        """How many of the key blocks that a row of blocks may see it keeps, int64 for int64; at most all of them.

        Blocks that the causal diagonal cuts are kept in any case.
        """

    @abstractmethod
    def make_gate(self, config: AttentionConfig) -> Gate:
        """A new gate on the configuration's device, which becomes `attention.gate`."""

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """Raises `ConfigError`: it depends on the input."""
        raise ConfigError(
            f"a {self.kind} pattern chooses its blocks at every call; attention.gate.freeze(query, key) gives a fixed "
            f"pattern, which can be lowered, drawn and stored"
        )

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """Raises `ConfigError`, as `multiplicity`."""
        raise ConfigError(
            f"a {self.kind} pattern has no blocks of its own; use what attention.gate.freeze(query, key) returns"
        )


def _members(cls: type[_Composite], pattern: Pattern) -> Iterator[Pattern]:
    """The members of `pattern` when it is a `cls` itself (both operations are associative), else the pattern."""
    if isinstance(pattern, cls):
        yield from pattern.of
    else:
        yield pattern


def parameters(pattern: Pattern) -> dict[str, object]:
    """The mapping form of a pattern whose attrs fields are plain values."""
    fields: Mapping[str, object] = attrs.asdict(pattern, recurse=False)  # type: ignore[arg-type]
    return {"kind": pattern.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


@attrs.frozen
class Full(Pattern):
    """Every query sees every key once: dense attention, the default."""

    kind: ClassVar[str] = "full"
    keeps_prefixes: ClassVar[bool] = True
    heads_alike: ClassVar[bool] = True

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """1 everywhere."""
        import numpy as np

        return np.ones(np.broadcast_shapes(query.shape, key.shape, head.shape), dtype=np.int64)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...]:
        """One segment over everything, stride 1."""
        return (Branch(None, 1, (0,) * geometry.num_heads),)

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """All keys, every one of them exactly once."""
        import numpy as np

        low = np.full((query_low.size, 1), geometry.kv_offset, dtype=np.int64)
        return KeySpans(low, low + geometry.kv_len, low, low + geometry.kv_len)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """All blocks are alike."""
        import numpy as np

        return np.zeros((query_low.size, 0), dtype=np.int64)

    def to_dict(self) -> dict[str, object]:
        """`{"kind": "full"}`."""
        return parameters(self)


def _member_tuple(value: Iterable[Pattern]) -> tuple[Pattern, ...]:
    return tuple(value)


def _check_members(instance: object, attribute: attrs.Attribute[tuple[Pattern, ...]], value: object) -> None:
    name = type(instance).__name__
    if not isinstance(value, tuple) or not value:
        raise ConfigError(f"{name} needs at least one pattern, got {value!r}")
    for member in value:
        if not isinstance(member, Pattern):
            raise ConfigError(f"{name} is made of patterns, got {member!r} ({type(member).__name__})")
        if isinstance(member, LearnedPattern):
            raise ConfigError(
                f"a {member.kind} pattern cannot be part of a {name.lower()}: its blocks are chosen at every call; "
                f"combine what attention.gate.freeze(query, key) returns"
            )


@attrs.frozen
class _Composite(Pattern):
    """What a union and a sum share: their members and everything that is decided member by member."""

    of: tuple[Pattern, ...] = attrs.field(converter=_member_tuple, validator=_check_members)

    @property
    def block_size(self) -> int | None:
        """The smallest block size that a member is defined on."""
        return min((size for member in self.of if (size := member.block_size) is not None), default=None)

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """Every member must accept the heads."""
        for member in self.of:
            member.validate(num_heads, num_kv_heads)

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Heads are alike where every member says so."""
        return joined_groups(*(member.head_groups(num_heads, num_kv_heads) for member in self.of))

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Signatures are alike where every member says so."""
        return joined_groups(*(member.signature_groups(num_heads, num_kv_heads) for member in self.of))

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """What any member can reach."""
        members = [member.reachable(key, position, head, geometry) for member in self.of]
        return functools.reduce(operator.or_, members)

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """Blocks of any member; constant where all members are."""
        from .supports import combine_supports

        parts = [member.block_support(grid, head, geometry) for member in self.of]
        return combine_supports(parts, is_sum=isinstance(self, Sum))

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """The members' signatures side by side."""
        import numpy as np

        parts = [member.block_signature(query_low, key_low, block_size, head, geometry) for member in self.of]
        return np.concatenate(parts, axis=-1)

    def repeats(self) -> Repeats | None:
        """As all members do."""
        return Repeats.of_all(member.unwrap().repeats() for member in self.of)

    def to_dict(self) -> dict[str, object]:
        """`{"kind": ..., "of": [...]}`."""
        return {"kind": self.kind, "of": [member.to_dict() for member in self.of]}


@attrs.frozen
class Union(_Composite):
    """The larger multiplicity of several patterns: `a | b`."""

    kind: ClassVar[str] = "union"

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """The maximum over the members."""
        import numpy as np

        result = self.of[0].multiplicity(query, key, head, geometry)
        for member in self.of[1:]:
            result = np.maximum(result, member.multiplicity(query, key, head, geometry))
        return result

    @property
    def max_multiplicity(self) -> int:
        """The largest of the members'."""
        return max(member.max_multiplicity for member in self.of)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...] | None:
        """A union of one is that one; others have no branch form of their own."""
        return self.of[0].branches(geometry) if len(self.of) == 1 else None


@attrs.frozen
class Sum(_Composite):
    """The sum of several multiplicities: `a + b`."""

    kind: ClassVar[str] = "sum"

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """The sum over the members."""
        result = self.of[0].multiplicity(query, key, head, geometry)
        for member in self.of[1:]:
            result = result + member.multiplicity(query, key, head, geometry)
        return result

    @property
    def max_multiplicity(self) -> int:
        """The sum of the members'."""
        return sum(member.max_multiplicity for member in self.of)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...] | None:
        """The members' branches together, where all members have some."""
        parts = [member.branches(geometry) for member in self.of]
        return None if any(p is None for p in parts) else tuple(b for p in parts if p is not None for b in p)
