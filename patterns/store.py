"""Patterns in files: one safetensors file each, under one root that no name can leave."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from ..core.checks import did_you_mean, is_int, positive_int, require_int
from ..core.errors import ConfigError, PatternFileError, PatternNotFoundError, PluginError, UnsafePathError
from ..core.files import write
from ..core.geometry import Geometry
from ..core.limits import Limits
from ..core.pattern import Branch, KeySpans, Pattern
from ._paths import SUFFIX, checked_root, path_of, read

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.layout import BlockGrid, BlockSupport
    from ..core.pattern import IntArray

SCHEMA: Final = 1
# Stored as parameters; whatever else is drawn, learned or somebody else's is stored as the blocks that it comes to.
_PARAMETRIC: Final = frozenset({"full", "dilated", "local", "global", "strided"})
_COMPOSITE: Final = frozenset({"union", "sum", "head_shard"})
_MAX_DEPTH: Final = 32
_MOST: Final = (1 << 40) - 1  # tokens, and heads: numbers of blocks are int32
_FIELDS: Final = frozenset({"schema", "form", "pattern", "seq_len", "num_heads", "is_causal"})


def _folder(root: str | PathLike[str]) -> Path:
    return Path(checked_root(root))


@attrs.frozen
class StoredInfo:
    """What a stored file says about itself.

    Attributes:
        name: the pattern's name.
        form: "parameters", or "blocks" for one that fits only this seq_len, num_heads and is_causal.
        parameters: the generator's mapping form; None where it has none.
        seq_len: what it was stored for.
        num_heads: what it was stored for.
        is_causal: what it was stored for.
        nbytes: size of the file.
        schema: version of the format.
    """

    name: str
    form: str
    parameters: Mapping[str, Any] | None
    seq_len: int
    num_heads: int
    is_causal: bool
    nbytes: int
    schema: int


@attrs.frozen
class PatternStore:
    """A folder of stored patterns, NAME.safetensors each.

    Names are 1 to 120 letters, digits, `.`, `_` and `-`, beginning with a letter or digit. Every method raises
    `UnsafePathError` for other names and for links that lead out of the root.

    Attributes:
        root: the folder; made when something is saved.
        limit_bytes: largest file that is written or read.
    """

    root: Path = attrs.field(converter=_folder)
    limit_bytes: int = attrs.field(default=Limits().layout_bytes, validator=positive_int)

    def save(
        self,
        name: str,
        pattern: Pattern,
        *,
        seq_len: int,
        num_heads: int,
        is_causal: bool,
        overwrite: bool = False,
    ) -> Path:
        """Store `pattern` and return its file.

        `Full, Dilated, Local, Global, Strided` and their algebra keep their parameters and fit every length; all others
        are lowered to blocks and fit this seq_len, num_heads and is_causal only. The file appears in one step; what
        killed writers of this name left behind goes.

        Raises:
            FileExistsError: the name is taken and `overwrite` is false.
            ConfigError: a pattern that does not take these heads, is larger than `limit_bytes`, or depends on the
                number of key-value heads without being stored as parameters; an `overwrite` that is not a bool.
        """
        path = path_of(self.root, name)
        if not isinstance(overwrite, bool):
            raise ConfigError(f"overwrite must be True or False, got {overwrite!r} ({type(overwrite).__name__})")
        if not isinstance(pattern, Pattern):
            raise ConfigError(f"only patterns such as Full() are stored, got {pattern!r} ({type(pattern).__name__})")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{str(path)!r} exists already; pass overwrite=True to replace it")
        geometry = _geometry(seq_len, num_heads, is_causal)
        pattern = pattern.unwrap()
        pattern.validate(num_heads, num_heads)
        content = self._encoded(pattern, geometry)
        if len(content) > self.limit_bytes:
            raise ConfigError(
                f"{name!r} needs {len(content):,} bytes, allowed are {self.limit_bytes:,}; raise limit_bytes"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write(path, content, overwrite=overwrite)
        return path

    def load(self, name: str) -> Pattern:
        """The stored pattern: the generator where its parameters were stored, else its blocks.

        Raises:
            PatternFileError: for a file that is not, bit by bit, what `save` writes.
            PatternNotFoundError: no pattern has that name.
        """
        return self._read(name)[0]

    def verify(self, name: str) -> StoredInfo:
        """Load everything, check it as `load` does, and return what the file says about itself."""
        return self._read(name)[1]

    def list(self) -> tuple[str, ...]:
        """The names of all files that look like stored patterns, sorted; their content is not read."""
        if not self.root.is_dir():
            return ()
        names = []
        for path in self.root.glob(f"*{SUFFIX}"):
            try:
                if path_of(self.root, path.name.removesuffix(SUFFIX)).is_file():
                    names.append(path.name.removesuffix(SUFFIX))
            except UnsafePathError:  # somebody else's file, or a link out of the root: nothing of ours
                continue
        return tuple(sorted(names))

    def delete(self, name: str) -> None:
        """Remove a stored pattern; `PatternNotFoundError` where there is none."""
        path = path_of(self.root, name)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise self._missing(name) from error

    def _missing(self, name: str) -> PatternNotFoundError:
        near = did_you_mean(name, self.list())
        return PatternNotFoundError(f"there is no stored pattern {name!r} in {str(self.root)!r}{near}")

    def _encoded(self, pattern: Pattern, geometry: Geometry) -> bytes:
        from ._format import encode

        document: dict[str, Any] = {
            "schema": SCHEMA,
            "seq_len": geometry.kv_len,
            "num_heads": geometry.num_heads,
            "is_causal": geometry.is_causal,
        }
        parameters = _parameters(pattern)
        if parameters is not None and _is_parametric(parameters):
            return encode(document | {"form": "parameters", "pattern": parameters}, {})
        size, arrays = self._blocks(pattern, geometry)
        return encode(document | {"form": "blocks", "pattern": parameters, "block_size": size}, arrays)

    def _blocks(self, pattern: Pattern, geometry: Geometry) -> tuple[int, dict[str, NDArray[Any]]]:
        """Block size and arrays of the table, which must not depend on how query heads share keys."""
        from ..core.blocking import lower_blocks
        from ._stored_blocks import ARRAYS

        shared = attrs.evolve(geometry, num_kv_heads=1)
        tables = [lower_blocks(pattern, g, limit_bytes=self.limit_bytes) for g in (geometry, shared)]
        found, other = ({name: getattr(table, name) for name in ARRAYS} for table in tables)
        if any(found[name].tobytes() != other[name].tobytes() for name in ARRAYS):
            raise ConfigError(
                f"a {pattern.kind} pattern that depends on the number of key-value heads cannot be stored as blocks"
            )
        return tables[0].block_size, found

    def _read(self, name: str) -> tuple[Pattern, StoredInfo]:
        from ._format import decode

        path = path_of(self.root, name)
        try:
            content = read(path, self.limit_bytes)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        document, arrays = decode(content, repr(str(path)))
        fields = _FIELDS | ({"block_size"} if document.get("form") == "blocks" else set())
        if not is_int(document.get("schema")) or document["schema"] != SCHEMA:
            raise PatternFileError(f"{str(path)!r} has the schema {document.get('schema')!r}, known is {SCHEMA}")
        if set(document) != fields or document["form"] not in ("parameters", "blocks"):
            raise PatternFileError(f"{str(path)!r} is no valid pattern: its document has {sorted(document)}")
        _check_numbers(document, path)
        pattern = self._pattern(name, path, document, arrays)
        numbers = {key: document[key] for key in ("form", "seq_len", "num_heads", "is_causal", "schema")}
        return pattern, StoredInfo(name=name, parameters=document["pattern"], nbytes=len(content), **numbers)

    def _pattern(self, name: str, path: Path, document: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Pattern:
        mapping = document["pattern"]
        if document["form"] == "blocks":
            from ._stored_blocks import StoredBlocks, table_of

            if mapping is not None and not isinstance(mapping, dict):
                raise PatternFileError(
                    f"{str(path)!r} is no valid pattern: its parameters are {type(mapping).__name__}"
                )
            return StoredBlocks(name=name, root=str(self.root), table=table_of(document, arrays, repr(str(path))))
        if arrays or not _is_parametric(mapping):
            raise PatternFileError(f"{str(path)!r} is no valid pattern: it holds more than parameters of known kinds")
        try:
            pattern = _resolved(mapping)
            pattern.validate(document["num_heads"], document["num_heads"])
        except (ConfigError, PluginError) as error:
            raise PatternFileError(f"{str(path)!r} is no valid pattern: {error}") from error
        if pattern.to_dict() != mapping:
            raise PatternFileError(f"{str(path)!r} is no valid pattern: its parameters are not complete")
        return pattern


def save_pattern(
    root: str | PathLike[str],
    name: str,
    pattern: Pattern,
    *,
    seq_len: int,
    num_heads: int,
    is_causal: bool,
    overwrite: bool = False,
) -> Path:
    """`PatternStore(root).save(...)`."""
    store = PatternStore(root)
    return store.save(name, pattern, seq_len=seq_len, num_heads=num_heads, is_causal=is_causal, overwrite=overwrite)


def load_pattern(root: str | PathLike[str], name: str) -> Pattern:
    """`PatternStore(root).load(name)`."""
    return PatternStore(root).load(name)


def _geometry(seq_len: int, num_heads: int, is_causal: bool) -> Geometry:
    require_int("seq_len", seq_len, minimum=0)
    require_int("num_heads", num_heads, minimum=1)
    for name, number in (("seq_len", seq_len), ("num_heads", num_heads)):
        if number > _MOST:
            raise ConfigError(f"{name} must be at most {_MOST:,} to be stored, got {number:,}")
    if not isinstance(is_causal, bool):
        raise ConfigError(f"is_causal must be True or False, got {is_causal!r}")
    return Geometry.self_attention(seq_len, num_heads, is_causal=is_causal)


def _check_numbers(document: dict[str, Any], path: Path) -> None:
    numbers = document["seq_len"], document["num_heads"]
    whole = all(is_int(number) and 0 <= number <= _MOST for number in numbers)
    if not whole or document["num_heads"] == 0 or not isinstance(document["is_causal"], bool):
        raise PatternFileError(f"{str(path)!r} is no valid pattern: it was stored for {numbers}")


def _parameters(pattern: Pattern) -> dict[str, object] | None:
    try:
        return pattern.to_dict()
    except ConfigError:  # a pattern without parameters says so
        return None


def _is_parametric(mapping: object, depth: int = 0) -> bool:
    """Whether a mapping form is made of the kinds that are stored as parameters."""
    if not isinstance(mapping, dict) or depth > _MAX_DEPTH:
        return False
    kind = mapping.get("kind")
    if kind not in _COMPOSITE:
        return isinstance(kind, str) and kind in _PARAMETRIC
    members = mapping.get("of")
    if kind == "head_shard":
        members = [members]
    return isinstance(members, list) and all(_is_parametric(member, depth + 1) for member in members)


def _resolved(mapping: Mapping[str, Any]) -> Pattern:
    from ..registry.patterns import resolve_pattern

    return resolve_pattern(mapping)


@attrs.frozen
class Stored(Pattern):
    """The pattern of a config file's `{kind = "stored", name = "...", root = "..."}`; read when it is made.

    Attributes:
        name: the name it was saved under.
        root: the store's folder.

    Raises:
        PatternFileError: no such pattern, or a damaged one.
        UnsafePathError: a name that is none, or a link that leads out of the root.
    """

    kind: ClassVar[str] = "stored"

    name: str
    root: str = attrs.field(converter=checked_root)
    _pattern: Pattern = attrs.field(init=False)  # in the repr too: the file may have been another for another process

    @_pattern.default
    def _load(self) -> Pattern:
        try:
            return PatternStore(self.root).load(self.name)
        except PatternNotFoundError:
            raise
        except OSError as error:
            raise PatternFileError(
                f"cannot read the stored pattern {self.name!r} in {self.root!r}: {error.strerror or error}"
            ) from error

    def unwrap(self) -> Pattern:
        """What was stored."""
        return self._pattern

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """That of the stored pattern, as everything below."""
        return self._pattern.multiplicity(query, key, head, geometry)

    @property
    def max_multiplicity(self) -> int:
        """See `multiplicity`."""
        return self._pattern.max_multiplicity

    @property
    def block_size(self) -> int | None:
        """See `multiplicity`."""
        return self._pattern.block_size

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """See `multiplicity`."""
        self._pattern.validate(num_heads, num_kv_heads)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...] | None:
        """See `multiplicity`."""
        return self._pattern.branches(geometry)

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """See `multiplicity`."""
        return self._pattern.head_groups(num_heads, num_kv_heads)

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """See `multiplicity`."""
        return self._pattern.signature_groups(num_heads, num_kv_heads)

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """See `multiplicity`."""
        return self._pattern.key_spans(query_low, query_high, head, geometry)

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """See `multiplicity`."""
        return self._pattern.reachable(key, position, head, geometry)

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """See `multiplicity`."""
        return self._pattern.block_support(grid, head, geometry)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """See `multiplicity`."""
        return self._pattern.block_signature(query_low, key_low, block_size, head, geometry)

    def to_dict(self) -> dict[str, object]:
        """Where it is stored."""
        return {"kind": self.kind, "name": self.name, "root": self.root}
