"""Patterns that were drawn or learned once, kept as their table of blocks."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..core.errors import ConfigError, PatternFileError
from ..core.geometry import Geometry
from ..core.pattern import Pattern

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.layout import BlockGrid, BlockLayout, BlockSupport
    from ..core.pattern import IntArray

ARRAYS = ("cols", "head_table", "mask_ids", "masks", "row_ptr", "weights")


@attrs.frozen(eq=False, kw_only=True)
class BlockTable(Pattern):
    """Blocks with their multiplicities, for one sequence length, number of heads and causality only.

    Attributes:
        table: the blocks; its geometry says what it fits.
    """

    # By its digest, since engines, graphs and rings are told apart by what their patterns' repr says.
    table: BlockLayout = attrs.field(repr=lambda table: table.digest[:16])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockTable) and self.table.digest == other.table.digest

    def __hash__(self) -> int:
        return hash(self.table.digest)

    @property
    def block_size(self) -> int:
        """The table's."""
        return self.table.block_size

    @property
    def max_multiplicity(self) -> int:
        """The largest in the table."""
        return max(int(self.table.weights.max(initial=0)), int(self.table.masks.max(initial=0)), 1)

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """Only the number of heads that it was stored for."""
        self._fits("num_heads", self.table.geometry.num_heads, num_heads)

    def _fits(self, what: str, own: object, actual: object) -> None:
        if own != actual:
            raise self._misfit(f"{what}={own}", f"{what}={actual}")

    @abstractmethod
    def _misfit(self, own: str, actual: str) -> ConfigError | PatternFileError:
        """The error for a use with `actual` of a table made for `own`."""

    def branches(self, geometry: Geometry) -> None:
        """None; but causality can be judged before anything is lowered."""
        self._fits("is_causal", self.table.geometry.is_causal, geometry.is_causal)

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Heads that share a table."""
        return tuple(int(table) for table in self.table.head_table)

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """Raises `ConfigError`: a sequence that grows has other lengths than the table's."""
        raise ConfigError(
            f"a {self.kind} pattern holds the blocks of {self.table.geometry.kv_len:,} tokens and cannot tell what "
            "those of a sequence that grows see; decode with a pattern that is no table, as the one it is from"
        )

    def _check(self, geometry: Geometry) -> None:
        own = self.table.geometry
        self._fits("num_heads", own.num_heads, geometry.num_heads)
        self._fits("is_causal", own.is_causal, geometry.is_causal)
        self._fits("seq_len", own.kv_len, geometry.seq_len)

    def _codes(self, rows: IntArray, cols: IntArray, tables: IntArray) -> IntArray:
        """What the table has for each block: its weight, -1 - its mask, or 0 where it is not listed; broadcast."""
        import numpy as np

        own, count = self.table, self.table.row_ptr.shape[1] - 1
        listed_rows = np.repeat(np.arange(own.row_ptr[:, :-1].size), np.diff(own.row_ptr, axis=1).ravel())
        listed = listed_rows * count + own.cols
        codes = np.where(own.mask_ids < 0, own.weights, -1 - own.mask_ids).astype(np.int64)
        inside = (rows >= 0) & (rows < count) & (cols >= 0) & (cols < count)
        wanted = np.where(inside, (tables * count + rows) * count + cols, -1)
        if not listed.size:
            return np.zeros(wanted.shape, dtype=np.int64)
        place = np.minimum(np.searchsorted(listed, wanted), listed.size - 1)
        return np.where(listed[place] == wanted, codes[place], 0)

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """What the table holds. Raises `PatternFileError` where it does not fit the call."""
        import numpy as np

        self._check(geometry)
        (rows, q_place), (cols, k_place) = np.divmod(query, self.block_size), np.divmod(key, self.block_size)
        codes = self._codes(rows, cols, self.table.head_table[head].astype(np.int64))
        if not self.table.masks.size:
            return codes
        masked = self.table.masks[np.where(codes < 0, -1 - codes, 0), q_place, k_place]
        return np.where(codes < 0, masked, codes)

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """The listed blocks, those with one weight constant."""
        import numpy as np

        from ..core.supports import support_from_table

        self._check(geometry)
        pointers = self.table.row_ptr[int(self.table.head_table[head])]
        entries = slice(int(pointers[0]), int(pointers[-1]))
        rows = np.arange(pointers.size - 1, dtype=np.int64)
        cols = self.table.cols[entries].astype(np.int64)
        weights = self.table.weights[entries].astype(np.int64)
        return support_from_table(grid, geometry, self.block_size, rows, pointers - pointers[0], cols, weights)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """What the at most four stored blocks that a block touches are, and where their edges cut it."""
        from ..core.supports import corner_signature

        def codes(rows: IntArray, cols: IntArray) -> IntArray:
            return self._codes(rows, cols, self.table.head_table[head : head + 1].astype(rows.dtype))

        return corner_signature(query_low, key_low, block_size, self.block_size, codes)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The table's arrays by name."""
        return {name: getattr(self.table, name) for name in ARRAYS}


@attrs.frozen(eq=False, kw_only=True)
class StoredBlocks(BlockTable):
    """A table from a store.

    Attributes:
        name: the stored pattern's name.
        root: the store it came from.
    """

    kind: ClassVar[str] = "stored"

    name: str
    root: str

    def _misfit(self, own: str, actual: str) -> PatternFileError:
        return PatternFileError(
            f"the stored pattern {self.name!r} was drawn for {own} and fits nothing else, got {actual}; store it again "
            f"for that, or use the generator itself"
        )

    def to_dict(self) -> dict[str, object]:
        """Where it is stored."""
        return {"kind": self.kind, "name": self.name, "root": self.root}


@attrs.frozen(eq=False, kw_only=True)
class FrozenBlocks(BlockTable):
    """What a gate chose for one input, as a pattern that no longer looks at any.

    It has no parameters that a file could hold: `PatternStore.save` keeps its blocks, and what the store loads can
    stand in a configuration file.

    Attributes:
        generator: the learned pattern that it was frozen from.
    """

    kind: ClassVar[str] = "frozen"

    generator: Pattern

    def _misfit(self, own: str, actual: str) -> ConfigError:
        return ConfigError(f"this pattern was frozen for {own} and fits nothing else, got {actual}; freeze it for that")

    def to_dict(self) -> dict[str, object]:
        """What identifies it in a plan; it cannot be made again from that."""
        return {"kind": self.kind, "digest": self.table.digest, "generator": self.generator.to_dict()}


def table_of(document: dict[str, Any], arrays: dict[str, NDArray[Any]], source: str) -> BlockLayout:
    """The table that a file holds, every index checked; `PatternFileError` otherwise."""
    import numpy as np

    from ..core.layout import BlockLayout

    def require(condition: object, problem: str) -> None:
        if not condition:
            raise PatternFileError(f"{source} is no valid pattern: {problem}")

    size, seq_len, num_heads = document["block_size"], document["seq_len"], document["num_heads"]
    require(type(size) is int and 1 <= size <= 1 << 20, f"block_size is {size!r}")
    require(set(arrays) == set(ARRAYS), f"its tensors are {', '.join(sorted(arrays))[:200]}")
    dtypes = dict(zip(ARRAYS, ("<i4", "<i4", "<i4", "|u1", "<i8", "<i4"), strict=True))
    for name, dtype in dtypes.items():
        require(arrays[name].dtype.str == dtype, f"{name} has the dtype {arrays[name].dtype}")
    heads, row_ptr, cols, masks = arrays["head_table"], arrays["row_ptr"], arrays["cols"], arrays["masks"]
    weights, mask_ids = arrays["weights"], arrays["mask_ids"]
    blocks = -(-seq_len // size)
    require(heads.shape == (num_heads,), f"head_table has the shape {heads.shape}")
    require(row_ptr.ndim == 2 and row_ptr.shape[0] and row_ptr.shape[1] == blocks + 1, f"row_ptr is {row_ptr.shape}")
    require(masks.ndim == 3 and masks.shape[1:] == (size, size), f"masks has the shape {masks.shape}")
    require(cols.ndim == 1 and cols.shape == weights.shape == mask_ids.shape, "its blocks have unequal columns")
    require(heads.min() >= 0 and heads.max() < row_ptr.shape[0], "head_table is out of range")
    flat = row_ptr.ravel()
    require(flat[0] == 0 and flat[-1] == cols.size and (np.diff(flat) >= 0).all(), "row_ptr is not ascending")
    require((row_ptr[1:, 0] == row_ptr[:-1, -1]).all(), "its tables overlap")
    if cols.size:
        require(cols.min() >= 0 and cols.max() < blocks, "cols is out of range")
        rows = np.repeat(np.arange(row_ptr[:, :-1].size), np.diff(row_ptr, axis=1).ravel())
        require((np.diff(rows * blocks + cols) > 0).all(), "cols is not ascending in a row")
        require(weights.min() >= 0 and weights.max() <= 255, "weights is out of range")
        require(mask_ids.min() >= -1 and mask_ids.max() < masks.shape[0], "mask_ids is out of range")
        require(((weights > 0) != (mask_ids >= 0)).all(), "a block is neither full nor masked, or both")
    geometry = Geometry.self_attention(seq_len, num_heads, is_causal=document["is_causal"])
    return BlockLayout(geometry=geometry, block_size=size, **arrays)
