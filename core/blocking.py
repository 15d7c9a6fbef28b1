"""From a pattern to a table of blocks: listed, sorted into full and partial, partial ones evaluated once each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from .checks import require_counts, require_int
from .errors import ConfigError
from .geometry import Geometry
from .layout import ENTRY_BYTES, BlockGrid, BlockLayout, BlockSupport
from .pattern import Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pattern import IntArray

DEFAULT_BLOCK_SIZE = 128  # what block-sparse GPU kernels tile by; masks are token-exact, so results do not depend on it
_PAIRS_AT_ONCE = 1 << 20  # pairs evaluated in one step: some tens of megabytes of temporaries
_BLOCKS_AT_ONCE = 1 << 15  # blocks described in one step: their columns stay in the processor's cache
_MAX_WEIGHT = 255  # masks are uint8


def lower_blocks(
    pattern: Pattern, geometry: Geometry, *, block_size: int | None = None, limit_bytes: int | None = None
) -> BlockLayout:
    """Lower a whole pattern to one table of blocks, branch-like or not. Arguments and errors as `lower`."""
    size = _fitting(pattern.block_size or DEFAULT_BLOCK_SIZE, geometry) if block_size is None else block_size
    require_int("block_size", size, minimum=1)
    groups = pattern.head_groups(geometry.num_heads, geometry.num_kv_heads)
    grid = BlockGrid.of(geometry, size, limit_bytes, tables=max(groups) + 1)
    masks = _MaskPool(size, limit_bytes)
    kinds = _SharedKinds(pattern.signature_groups(geometry.num_heads, geometry.num_kv_heads))
    tables = [_lower_head(pattern, grid, groups.index(g), geometry, masks, kinds) for g in range(max(groups) + 1)]
    row_ptr = np.zeros((len(tables), grid.query_low.size + 1), dtype=np.int64)
    begin = 0
    for t, table in enumerate(tables):
        row_ptr[t] = begin + np.searchsorted(table.rows, np.arange(row_ptr.shape[1]))
        begin += table.rows.size
    return BlockLayout(
        geometry=geometry,
        block_size=size,
        head_table=np.array(groups, dtype=np.int32),
        row_ptr=row_ptr,
        cols=np.concatenate([table.cols for table in tables]),
        weights=np.concatenate([table.weights for table in tables]),
        mask_ids=np.concatenate([table.mask_ids for table in tables]),
        masks=masks.stack(),
    )


def sizes_of_shorter(block_size: int) -> tuple[int, ...]:
    """The blocks that calls shorter than one of `block_size` have in its place, ascending: powers of two from 128.

    Rows and masks are as long as a block, however few tokens there are.
    """
    sizes, size = [], DEFAULT_BLOCK_SIZE
    while size < block_size:
        sizes.append(size)
        size *= 2
    return tuple(sizes)


def _fitting(block_size: int, geometry: Geometry) -> int:
    """The block size of this call; ranks that share a sequence keep that by which they list what each receives."""
    longest = max(geometry.q_len, geometry.kv_len)
    shorter = () if geometry.whole_len else sizes_of_shorter(block_size)
    return next((size for size in shorter if size >= longest), block_size)


@attrs.frozen(eq=False)
class _Table:
    """The blocks of one group of heads, sorted by row and column; shapes (E,)."""

    rows: NDArray[np.int32]
    cols: NDArray[np.int32]
    weights: NDArray[np.int32]
    mask_ids: NDArray[np.int32]


@attrs.define(eq=False)
class _MaskPool:
    """Distinct masks by content, shared by all tables, and the bytes that they and the tables take."""

    block_size: int
    limit_bytes: int | None
    used_bytes: int = 0
    ids: dict[bytes, int] = attrs.field(factory=dict)
    _cuts: dict[tuple[int, ...], int] = attrs.field(factory=dict)

    def take(self, nbytes: int) -> None:
        """Account for `nbytes` more, or raise `ConfigError`."""
        self.used_bytes += nbytes
        if self.limit_bytes is not None and self.used_bytes > self.limit_bytes:
            raise ConfigError(
                f"the block layout needs at least {self.used_bytes:,} bytes, allowed are {self.limit_bytes:,}; "
                f"raise Limits.layout_bytes or block_size"
            )

    def check_one(self) -> None:
        """Raise `ConfigError` where a single mask is larger than all may be, before one is made."""
        if self.limit_bytes is not None and self.block_size**2 > self.limit_bytes:
            raise ConfigError(
                f"a mask of a block of {self.block_size} takes {self.block_size**2:,} bytes, allowed are "
                f"{self.limit_bytes:,}; raise Limits.layout_bytes, or take smaller blocks"
            )

    def add(self, mask: NDArray[np.uint8]) -> int:
        """The number of the mask with this content, (b, b)."""
        content = mask.tobytes()
        known = self.ids.get(content)
        if known is None:
            self.take(len(content))
            known = self.ids[content] = len(self.ids)
        return known

    def cut(self, constant: int, queries: int, keys: int, apart: int) -> int:
        """The number of the mask of a block of so many queries and keys, the first of them so far apart.

        Where causality lets it, every pair counts `constant` times.
        """
        kind = constant, queries, keys, apart
        if kind not in self._cuts:
            self.check_one()
            place = np.arange(self.block_size)
            allowed = (place[:, None] < queries) & (place < keys) & (place <= place[:, None] + apart)
            self._cuts[kind] = self.add(allowed * np.uint8(constant))
        return self._cuts[kind]

    def stack(self) -> NDArray[np.uint8]:
        """All masks, (M, b, b)."""
        flat = np.frombuffer(b"".join(self.ids), dtype=np.uint8)
        return flat.reshape(len(self.ids), self.block_size, self.block_size)


@attrs.define(eq=False)
class _SharedKinds:
    """The kinds of the last table's blocks; the next table has them too if its blocks have the same signatures.

    Attributes:
        groups: of each head, what `Pattern.signature_groups` says.
        group: that of the last head.
        low: first positions (queries, keys) of its blocks.
        kinds: what `_kinds` said.
    """

    groups: tuple[int, ...]
    group: int | None = None
    low: tuple[IntArray, IntArray] | None = None
    kinds: tuple[IntArray, IntArray] | None = None

    def find(
        self, pattern: Pattern, low: tuple[IntArray, IntArray], size: int, head: int, geometry: Geometry
    ) -> tuple[IntArray, IntArray]:
        """Those of these blocks of `head`."""
        group = self.groups[head]
        known = self.kinds
        if known is None or self.low is None or group != self.group or not all(map(np.array_equal, low, self.low)):
            known = _kinds(pattern, *low, size, head, geometry)
        self.group, self.low, self.kinds = group, low, known
        return known


def _lower_head(
    pattern: Pattern, grid: BlockGrid, head: int, geometry: Geometry, masks: _MaskPool, kinds: _SharedKinds
) -> _Table:
    """The blocks of `head` (and of all heads alike)."""
    support, constant = _certain(pattern.block_support(grid, head, geometry), grid, geometry)
    masks.take(ENTRY_BYTES * support.rows.size)
    _check_weight(int(constant.max(initial=0)))
    weights = support.multiplicity.astype(np.int32)
    mask_ids = np.full(weights.size, -1, dtype=np.int32)
    cut, partial = np.flatnonzero((weights == 0) & (constant > 0)), np.flatnonzero((weights == 0) & (constant == 0))
    if cut.size:
        low = grid.query_low[support.rows[cut]], grid.key_low[support.cols[cut]]
        mask_ids[cut] = _cut(constant[cut], *low, geometry, masks)
    if partial.size:
        low = grid.query_low[support.rows[partial]], grid.key_low[support.cols[partial]]
        first, inverse = kinds.find(pattern, low, grid.block_size, head, geometry)
        found = _evaluate(pattern, low[0][first], low[1][first], head, geometry, masks)
        weights[partial], mask_ids[partial] = found[0][inverse], found[1][inverse]
    table = _Table(support.rows.astype(np.int32), support.cols.astype(np.int32), weights, mask_ids)
    kept = (weights > 0) | (mask_ids >= 0)
    if kept.all():
        return table
    masks.take(-ENTRY_BYTES * int(np.count_nonzero(~kept)))
    return _Table(table.rows[kept], table.cols[kept], weights[kept], mask_ids[kept])


def _check_weight(value: int) -> None:
    if value > _MAX_WEIGHT:
        raise ConfigError(
            f"a block layout counts a pair at most {_MAX_WEIGHT} times, this pattern does so {value} times"
        )


def _certain(support: BlockSupport, grid: BlockGrid, geometry: Geometry) -> tuple[BlockSupport, IntArray]:
    """Drop blocks in the future; what crosses the diagonal or the end of the keys is no longer constant.

    Also returns what the blocks were before that.
    """
    rows, cols = support.rows, support.cols
    key_end = geometry.kv_offset + geometry.kv_len
    whole_cols = np.full_like(grid.query_low, np.searchsorted(grid.key_low, key_end - grid.block_size, side="right"))
    if geometry.is_causal:
        query_high = np.minimum(grid.query_low + grid.block_size, geometry.q_offset + geometry.q_len) - 1
        before = np.searchsorted(grid.key_low, grid.query_low - grid.block_size + 1, side="right")
        whole_cols = np.minimum(whole_cols, before)
        seen = cols < np.searchsorted(grid.key_low, query_high, side="right")[rows]
        if not seen.all():
            support = BlockSupport(rows[seen], cols[seen], support.multiplicity[seen])
    whole = support.cols < whole_cols[support.rows]
    certain = BlockSupport(support.rows, support.cols, np.where(whole, support.multiplicity, 0))
    return certain, support.multiplicity


def _cut(
    constant: IntArray, query_low: IntArray, key_low: IntArray, geometry: Geometry, masks: _MaskPool
) -> NDArray[np.int32]:
    """Masks of blocks that are constant but where the diagonal or the end of the keys cuts them: no pattern is asked.

    Each has a pair: `_certain` drops those in the future.
    """
    table = np.concatenate([constant[:, None], _cuts(query_low, key_low, masks.block_size, geometry)], axis=-1)
    first, inverse = group_rows(table)
    return np.array([masks.cut(*table[index].tolist()) for index in first], dtype=np.int32)[inverse]


def _cuts(query_low: IntArray, key_low: IntArray, size: int, geometry: Geometry) -> IntArray:
    """Queries and keys of each block, and how far it is off the diagonal; (blocks, 3)."""
    queries = np.minimum(geometry.q_offset + geometry.q_len - query_low, size)
    keys = np.minimum(geometry.kv_offset + geometry.kv_len - key_low, size)
    apart = query_low - key_low if geometry.is_causal else np.full_like(query_low, size)
    return np.stack([queries, keys, np.clip(apart, -size, size)], axis=-1)


def _kinds(
    pattern: Pattern, query_low: IntArray, key_low: IntArray, size: int, head: int, geometry: Geometry
) -> tuple[IntArray, IntArray]:
    """The index of one block of each kind, and the kind of each block; blocks of a kind have the same entries."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    inverse = np.empty(query_low.size, dtype=np.int64)
    for begin in range(0, query_low.size, _BLOCKS_AT_ONCE):
        chunk = slice(begin, begin + _BLOCKS_AT_ONCE)
        signature = _signature(pattern, query_low[chunk], key_low[chunk], size, head, geometry)
        firsts, kind = group_rows(signature)
        numbers = []
        for index in firsts:
            number = known.setdefault(signature[index].tobytes(), len(first))
            if number == len(first):
                first.append(begin + int(index))
            numbers.append(number)
        inverse[chunk] = np.array(numbers, dtype=np.int64)[kind]
    return np.array(first, dtype=np.int64), inverse


def _signature(
    pattern: Pattern, query_low: IntArray, key_low: IntArray, size: int, head: int, geometry: Geometry
) -> IntArray:
    """The pattern's signature, and where the diagonal and the tensors' ends cut the block; (blocks, columns)."""
    own = pattern.block_signature(query_low, key_low, size, head, geometry)
    return np.concatenate([_cuts(query_low, key_low, size, geometry), own], axis=-1)


def group_rows(table: IntArray) -> tuple[IntArray, IntArray]:
    """Equal rows of (n, columns) int64: the index of one row of each kind, and the kind of each row."""
    key, kinds = np.zeros(table.shape[0], dtype=np.int64), 1
    for column in table.T:
        least = int(column.min())
        width = int(column.max()) - least + 1
        if width == 1:
            continue
        if width > (1 << 62) // kinds:
            key, kinds = _dense_ranks(key)
            column, width = _dense_ranks(column)
            least = 0
        key, kinds = key * width + (column - least), kinds * width
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse


def _dense_ranks(values: IntArray) -> tuple[IntArray, int]:
    distinct, ranks = np.unique(values, return_inverse=True)
    return ranks, distinct.size


def _evaluate(
    pattern: Pattern, query_low: IntArray, key_low: IntArray, head: int, geometry: Geometry, masks: _MaskPool
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Weight and mask number of each block by evaluating every pair of it; weight 0 and mask -1 for an empty one."""
    size = masks.block_size
    weights = np.zeros(query_low.size, dtype=np.int32)
    mask_ids = np.full(query_low.size, -1, dtype=np.int32)
    step = max(1, _PAIRS_AT_ONCE // size**2)
    masks.check_one()
    for begin in range(0, query_low.size, step):
        chunk = slice(begin, begin + step)
        counts = _multiplicity(pattern, query_low[chunk], key_low[chunk], size, head, geometry)
        largest, rows = counts.max(axis=(1, 2)), np.minimum(geometry.q_offset + geometry.q_len - query_low[chunk], size)
        whole = (counts.sum(axis=(1, 2), dtype=np.int64) == largest * rows * size) & (largest > 0)
        weights[chunk] = np.where(whole, largest, 0)
        for i in np.flatnonzero((largest > 0) & ~whole):
            mask_ids[begin + i] = masks.add(counts[i])
    return weights, mask_ids


def _multiplicity(
    pattern: Pattern, query_low: IntArray, key_low: IntArray, size: int, head: int, geometry: Geometry
) -> NDArray[np.uint8]:
    """Multiplicities of whole blocks, (n, b, b), 0 beyond the tensors' ends; of large ones some rows at a time."""
    found = np.empty((query_low.size, size, size), dtype=np.uint8)
    place = np.arange(size, dtype=np.int64)
    key = key_low[:, None, None] + place
    query_end, key_end = geometry.q_offset + geometry.q_len, geometry.kv_offset + geometry.kv_len
    step = max(1, _PAIRS_AT_ONCE // (size * query_low.size))
    for begin in range(0, size, step):
        rows = slice(begin, min(begin + step, size))
        query = query_low[:, None, None] + place[rows, None]
        counts = np.asarray(
            pattern.multiplicity(
                np.minimum(query, query_end - 1), np.minimum(key, key_end - 1), np.array(head, dtype=np.int64), geometry
            )
        )
        require_counts(pattern.kind, counts, (query_low.size, rows.stop - begin, size), pattern.max_multiplicity)
        allowed = (query < query_end) & (key < key_end)
        if geometry.is_causal:
            allowed &= key <= query
        counts = counts * allowed
        _check_weight(int(counts.max(initial=0)))
        found[:, rows] = counts
    return found
