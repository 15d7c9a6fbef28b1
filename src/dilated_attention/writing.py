"""Files that the commands write: whole or not at all, and refused before time is spent on what goes into them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .core.errors import ConfigError
from .core.files import temporary_file, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_writable(path: Path, *, option: str, inputs: Iterable[Path | None] = ()) -> None:
    """Raise `ConfigError` where `write_whole` could not write; what is there stays as it is, and nothing is left.

    Args:
        path: the file.
        option: what named it, for messages.
        inputs: files that are read, which it must not be.
    """
    target = _target(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"{option} must be a file in a folder that exists, got {str(path)!r}")
    if os.path.lexists(target):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise ConfigError(f"{option} must be a file, but {str(path)!r} is there and is no regular one")
        if not os.access(target, os.W_OK):
            raise ConfigError(f"{option}: cannot write {str(path)!r}: it is read-only")
        for read in inputs:
            if read is not None and read.exists() and target.samefile(read):
                raise ConfigError(f"{option} must be another file than {str(read)!r}, which is read")
    check_folder(target.parent, option=option)


def check_folder(folder: Path, *, option: str) -> None:
    """Raise `ConfigError` where no file can be made in `folder`; nothing is left there."""
    try:
        with temporary_file(folder / "any", b""):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: cannot write to {str(folder)!r}: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes, *, option: str) -> None:
    """`core.files.write`, which follows a link.

    Raises:
        ConfigError: the system refuses; the message names `option`.
    """
    try:
        write(_target(path), content, overwrite=True)
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {str(path)!r}: {error.strerror or error}") from error


def save_figure(figure: Figure, path: Path, *, option: str) -> None:
    """`write_whole` of a figure, in the format that the suffix names."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    write_whole(path, content.getvalue(), option=option)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))
