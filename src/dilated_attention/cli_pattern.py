"""The commands `dilated-attention pattern ...`: patterns in files."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import attrs
import typer

from .console import CONTEXT, FAILED, AsJson, as_path, given, registry, show
from .core.config import AttentionConfig, check_fields, read_mapping
from .core.errors import ConfigError, DilatedAttentionError, PatternFileError, PatternNotFoundError, UnsafePathError
from .core.explain import amount, columns, counted, pattern_words
from .core.geometry import Geometry
from .pattern_flags import DilationRates, Kind, Parameters, SegmentLengths, pattern_of

if TYPE_CHECKING:
    from .core.pattern import Pattern
    from .pattern_cells import Cells
    from .patterns.store import PatternStore, StoredInfo
    from .quality import Quality

pattern_app = typer.Typer(
    name="pattern",
    help="Store patterns in files, look at them, check them.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)

Root: TypeAlias = Annotated[Path, typer.Option(parser=as_path, metavar="PATH", help="Folder of the stored patterns.")]
Name: TypeAlias = Annotated[str, typer.Argument(help="A stored pattern's name.", show_default=False)]
_ROOT: Final = Path("pattern-store")
_BAD_FILE: Final = 4
_TABLE_BYTES: Final = 512 << 20  # most that a drawing's table of blocks may take
_REPORT_WIDTH: Final = 36  # characters beside the map, its frame and the gap included
_MAP_WIDTH: Final = 64
_MOST_LAYERS: Final = 1000


@pattern_app.command("list")
def list_patterns(context: typer.Context, root: Root = _ROOT, as_json: AsJson = False) -> None:
    """List the stored patterns and their sizes; the files are not read."""
    _require_named(context, root)
    sizes, causes = dict[str, int](), list[str]()
    with _store(root) as store:
        for name in store.list():
            try:
                sizes[name] = (store.root / f"{name}.safetensors").stat().st_size
            except OSError as error:
                causes.append(_cause(error))
    rows = [{"name": name, "nbytes": size} for name, size in sizes.items()]
    text = "\n".join(columns([(name, amount(size, "B")) for name, size in sizes.items()])) if rows else ""
    show(text or f"no patterns are stored in {str(root)!r}", rows, as_json=as_json)
    for cause in causes:
        typer.echo(f"error: {cause}", err=True)
    if causes:
        raise typer.Exit(FAILED)


@pattern_app.command()
def save(
    name: Annotated[str, typer.Argument(help="1 to 120 letters, digits, '.', '_', '-'.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="PATH", help="A TOML or JSON config file with the pattern.")
    ] = None,
    pattern: Kind = None,
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    pattern_option: Parameters = None,
    seq_len: Annotated[int | None, typer.Option(help="Length to store for. Default: the file's.")] = None,
    num_heads: Annotated[int | None, typer.Option("--heads", help="Query heads. Default: the file's.")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--no-causal", help="Default: the file's.")] = None,
    root: Root = _ROOT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pattern of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store a pattern: that of a config file, or of the flags, which replace what the file says.

    Full, dilated, local, global, strided and what is made of them keep their parameters and fit every length; drawn
    patterns are stored as blocks, which fit this length, number of heads and causality only.
    """
    from .registry.patterns import resolve_pattern

    fields = {} if config is None else read_mapping(config)
    fields |= given(seq_len=seq_len, num_heads=num_heads, is_causal=causal)
    fields["pattern"] = pattern_of(
        pattern, pattern_option, segment_lengths, dilation_rates, of_file=fields.get("pattern")
    )
    read = _config(fields, config)
    assert read.seq_len is not None
    with _store(root, limit_bytes=read.limits.layout_bytes) as store:
        try:
            store.save(
                name,
                resolve_pattern(read.pattern, registry()),
                seq_len=read.seq_len,
                num_heads=read.num_heads,
                is_causal=read.is_causal,
                overwrite=overwrite,
            )
        except FileExistsError as error:
            raise ConfigError(f"{name!r} exists already in {str(root)!r}; --overwrite replaces it") from error
        except ConfigError as error:
            raise _with_remedy(error, "set a larger limits = {layout_bytes = ...} in the file of --config") from error
        info = store.verify(name)
    show(_info_text(info), attrs.asdict(info), as_json=as_json)


@pattern_app.command()
def load(name: Name, root: Root = _ROOT, as_json: AsJson = False) -> None:
    """Check a stored pattern and print its parameters."""
    info = _loaded(root, name)[1]
    show(_info_text(info), attrs.asdict(info), as_json=as_json)


@pattern_app.command("show")
def show_pattern(
    name: Name,
    root: Root = _ROOT,
    head: Annotated[int, typer.Option(help="The head that the map shows.")] = 0,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Another length; of a pattern stored as parameters.")
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, max=_MOST_LAYERS, help="Layers to follow the receptive field through.")
    ] = 4,
    plot: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="PATH", help="Also draw it: a .png or .svg file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a map of a stored pattern, and say how good it is.

    Rows of the map are queries, columns keys, of one head. The figures beside it are those of all heads.
    """
    if plot is not None:
        from .pattern_plot import check_can_plot

        check_can_plot(plot)
    pattern, info = _loaded(root, name)
    if seq_len is not None:
        info = attrs.evolve(info, seq_len=seq_len)
    geometry = Geometry.self_attention(info.seq_len, info.num_heads, is_causal=info.is_causal)
    if not 0 <= head < info.num_heads:
        raise ConfigError(f"--head must be 0 to {info.num_heads - 1}, got {head}")
    try:
        quality, text, data = _report(pattern, info, geometry, head, layers)
        picture = None if plot is None else _picture(pattern, geometry, head)
    except (ConfigError, PatternFileError) as error:  # of a sound file: it is the length that does not fit
        said = f"{name!r} cannot be shown at {info.seq_len:,} tokens (--seq-len): {error}"
        raise _with_remedy(type(error)(said), "show fewer tokens") from error
    if plot is not None and picture is not None:
        _plot(picture, quality, info, head, plot)
    show(text, data, as_json=as_json)
    if plot is not None:
        typer.echo(f"drawn: {plot}", err=True)


def _report(
    pattern: Pattern, info: StoredInfo, geometry: Geometry, head: int, layers: int
) -> tuple[Quality, str, dict[str, Any]]:
    """The figures, and map and figures as text and as data."""
    from .pattern_map import ASCII, UNICODE, draw, even_cells, legend, quality_lines, table_block_size
    from .quality import measure

    size = table_block_size(pattern, geometry.q_len)
    quality = measure(pattern, geometry, layers=layers, block_size=size, limit_bytes=_TABLE_BYTES)
    width = max(16, min(_MAP_WIDTH, shutil.get_terminal_size().columns - _REPORT_WIDTH)) // 2 * 2
    # Characters are twice as high as wide: half as many rows give a square.
    rows = width // 2
    cols = width if geometry.q_len >= width else rows
    cells = even_cells(pattern, geometry, head, rows=rows, cols=cols, limit_bytes=_TABLE_BYTES)
    ink = UNICODE if _can_print(UNICODE + "│─┌┐└┘") else ASCII
    map_lines = draw(cells, length=geometry.q_len, ink=ink)
    beside = ["", *quality_lines(quality, size), "", *legend(ink, is_causal=geometry.is_causal)]
    alike = pattern.head_groups(info.num_heads, info.num_heads)
    same = [h for h, group in enumerate(alike) if group == alike[head]]
    text = "\n".join([_title(info), *_head_words(head, same, info.num_heads), *_side_by_side(map_lines, beside)])
    data = {**attrs.asdict(info), "quality": attrs.asdict(quality), "head": head, "map": _plain(cells)}
    return quality, text, data


def _picture(pattern: Pattern, geometry: Geometry, head: int) -> Cells:
    from .pattern_map import even_cells
    from .pattern_plot import CELLS

    return even_cells(pattern, geometry, head, rows=CELLS, cols=CELLS, limit_bytes=_TABLE_BYTES)


def _plot(picture: Cells, quality: Quality, info: StoredInfo, head: int, path: Path) -> None:
    from .pattern_plot import plot

    plot(picture, quality, _title(info), path, length=info.seq_len, head=head)


@pattern_app.command()
def verify(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One pattern. Default: all.", show_default=False)] = None,
    root: Root = _ROOT,
    as_json: AsJson = False,
) -> None:
    """Check stored patterns, bit by bit. Exit status 4 when one is bad or missing, else 1 when one cannot be read."""
    _require_named(context, root)
    with _store(root) as store:
        names = store.list() if name is None else (name,)
        rows = [_verified(store, each, is_asked_for=name is not None) for each in names]
    table = list(columns([(row["name"], row["status"], row["kind"]) for row in rows])) if rows else []
    lines = [f"no patterns are stored in {str(root)!r}"] if not rows else []
    for line, row in zip(table, rows, strict=True):
        lines += [line, f"    {row['cause']}"] if row["cause"] else [line]
    show("\n".join(lines), rows, as_json=as_json)
    statuses = {row["status"] for row in rows} - {"ok"}
    if statuses:
        raise typer.Exit(_BAD_FILE if "bad" in statuses else FAILED)


def _verified(store: PatternStore, name: str, *, is_asked_for: bool) -> dict[str, str]:
    """A row of what `verify` says; one of many that is gone meanwhile is one that cannot be read."""
    try:
        info = store.verify(name)
    except PatternNotFoundError as error:
        if is_asked_for:
            raise
        return {"name": name, "status": "unreadable", "kind": "", "cause": str(error)}
    except (PatternFileError, UnsafePathError) as error:
        return {"name": name, "status": "bad", "kind": "", "cause": str(error)}
    except OSError as error:
        return {"name": name, "status": "unreadable", "kind": "", "cause": _cause(error)}
    return {"name": name, "status": "ok", "kind": _kind(info), "cause": ""}


def _cause(error: OSError) -> str:
    return f"cannot read {str(error.filename)!r}: {error.strerror or error}"


def _require_named(context: typer.Context, root: Path) -> None:
    """Raise `ConfigError` for a `--root` that was given and is not there: a check of nothing must not pass."""
    source = context.get_parameter_source("root")
    if source is not None and source.name != "DEFAULT" and not root.exists():
        raise ConfigError(f"--root must be a folder, but there is no {str(root)!r}; save makes one")


@contextlib.contextmanager
def _store(root: Path, **fields: int) -> Iterator[PatternStore]:
    """The store at `root`; what the system refuses there is one message."""
    from .patterns.store import PatternStore

    try:
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--root must be a folder, but {str(root)!r} is none; choose another")
        yield PatternStore(root, **fields)
    except DilatedAttentionError:  # a missing pattern is an OSError too
        raise
    except OSError as error:
        raise ConfigError(f"cannot use the store {str(root)!r}: {error.strerror or error}") from error


def _loaded(root: Path, name: str) -> tuple[Pattern, StoredInfo]:
    with _store(root) as store:
        return store.load(name), store.verify(name)


def _with_remedy(error: DilatedAttentionError, remedy: str) -> DilatedAttentionError:
    """The error with a remedy that the command has, in the place of a limit that is a value of Python."""
    return type(error)(re.sub(r"; raise (Limits\.layout|limit)_bytes.*", f"; {remedy}", str(error)))


def _config(fields: dict[str, Any], path: Path | None) -> AttentionConfig:
    """The config of the flags and the file, if any; what a pattern does not depend on may be left out."""
    check_fields(fields)
    for name, flag in (("pattern", "--pattern"), ("num_heads", "--heads"), ("seq_len", "--seq-len")):
        if fields.get(name) is None:
            lack = "no --config is given" if path is None else f"{str(path)!r} has no {name}"
            raise ConfigError(f"give {flag}: {lack}")
    return AttentionConfig.from_dict({"head_dim": 64} | fields)


def _kind(info: StoredInfo) -> str:
    kind = pattern_words(info.parameters) if info.parameters else "pattern"
    return f"{kind}, as {info.form}"


def _title(info: StoredInfo) -> str:
    causal = "causal" if info.is_causal else "not causal"
    return f"{info.name}: {_kind(info)}, {counted(info.seq_len, 'token')}, {counted(info.num_heads, 'head')}, {causal}"


def _info_text(info: StoredInfo) -> str:
    fits = "every length" if info.form == "parameters" else "only this length, these heads and this causality"
    rows = [("name", info.name), ("stored as", f"{info.form}, {amount(info.nbytes, 'B')}, schema {info.schema}")]
    rows += [("seq_len", f"{info.seq_len:,}"), ("num_heads", str(info.num_heads))]
    rows += [("is_causal", "yes" if info.is_causal else "no"), ("fits", fits)]
    ordered = sorted((info.parameters or {}).items(), key=lambda item: (item[0] != "kind", item[0]))
    rows += [(key, _words(value)) for key, value in ordered]
    return "\n".join(columns(rows))


def _words(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _head_words(head: int, same: list[int], num_heads: int) -> Iterator[str]:
    others = [h for h in same if h != head]
    if not others:
        if num_heads > 1:
            yield f"head {head}"
        return
    if len(same) == num_heads:
        yield "every head sees the same"
        return
    listed = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    yield f"head {head}; head{'s' * (len(others) > 1)} {listed} see{'s' * (len(others) == 1)} the same"


def _side_by_side(left: list[str], right: list[str]) -> list[str]:
    width = max(map(len, left))
    height = max(len(left), len(right))
    padded = [*left, *[""] * (height - len(left))], [*right, *[""] * (height - len(right))]
    return [f"{a:<{width}}  {b}".rstrip() for a, b in zip(*padded, strict=True)]


def _plain(cells: Cells) -> list[list[float | None]]:
    """For JSON, which has no nan."""
    return [[None if share != share else round(share, 6) for share in row] for row in cells.shares().tolist()]


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
