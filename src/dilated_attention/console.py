"""What every command of `dilated-attention` shares: its `--json`, the registry with its warnings, and how to print."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NoReturn, TypeAlias

import typer

from .core.errors import ConfigError
from .registry.discovery import Registry, default_registry
from .report import paint
from .writing import check_writable

# Flags that are shorter than the fields of a configuration that they set, by those: both are understood.
_SHORTER: Final = {
    "num-heads": "heads",
    "num-kv-heads": "kv-heads",
    "is-causal": "causal",
    "no-is-causal": "no-causal",
    "dropout-p": "dropout",
    "requires-grad": "grad",
    "no-requires-grad": "no-grad",
}
# Of every group of commands.
CONTEXT: Final = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: _SHORTER.get(name, name),
}
FAILED: Final = 1  # an exit status; `cli` says what each means
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def as_path(text: str | Path) -> Path:
    """The parser of options and arguments that are paths: pathlib takes an empty text for the current folder."""
    if not str(text):
        raise typer.BadParameter("must be the name of a file or folder, got ''")
    return Path(text)


def given(**fields: object) -> dict[str, object]:
    """Those of flags that were given."""
    return {name: value for name, value in fields.items() if value is not None}


def registry() -> Registry:
    """The registry of this process; what is odd about the environment is said on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = default_registry()
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    return found


def show(text: str, data: object, *, as_json: bool) -> None:
    """Print `data` as JSON, or `text`, coloured on a terminal."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False) if as_json else paint(text))


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within it SIGTERM ends the command as an error would, so that its processes and temporary folders go with it."""

    def end(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_folder(path: Path, names: Iterable[str]) -> None:
    """Make the folder that results go to as files of these names, if it is missing, before time is spent on them.

    Raises:
        ConfigError: it cannot be made, is a file, or one of these cannot be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make the folder {str(path)!r}: {error.strerror or error}") from error
    for name in names:
        check_writable(path / name, option="--output")
