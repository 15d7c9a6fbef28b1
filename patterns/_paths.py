"""Names and files of a store: what a name may be, where it leads, and reading no more than is allowed."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from ..core.errors import ConfigError, PatternFileError, UnsafePathError

SUFFIX: Final = ".safetensors"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def checked_root(root: str | os.PathLike[str]) -> str:
    """A store's folder as text, or `ConfigError` for what no folder is called."""
    try:
        text: object = os.fspath(root)
        is_name = b"\0" not in os.fsencode(root)
    except (TypeError, UnicodeEncodeError):
        text, is_name = None, False
    if not isinstance(text, str) or not is_name:
        raise ConfigError(f"the root of a store must be the path of a folder, got {root!r} ({type(root).__name__})")
    return str(text)


def checked_name(name: object) -> str:
    """`name` as it is, or `UnsafePathError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UnsafePathError(
            f"a pattern's name is 1 to 120 letters, digits, '.', '_' or '-', begins with a letter or digit and has no "
            f"'..'; got {name!r}"
        )
    if _DEVICES.fullmatch(name):
        raise UnsafePathError(f"{name!r} is the name of a device on some systems; choose another")
    return name


def path_of(root: Path, name: object) -> Path:
    """The file of `name` directly inside `root`; `UnsafePathError` where a link there leads out of the root."""
    path = root / (checked_name(name) + SUFFIX)
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(root)):
            raise UnsafePathError(f"{str(path)!r} is a link to {str(target)!r}, outside the store")
    return path


def read(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most `limit_bytes`."""
    # Non-blocking, so that a pipe with the right name cannot hang us; the checks look at what was opened.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(os.path.realpath(path), flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafePathError(f"{str(path)!r} is a link that leads nowhere") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PatternFileError(f"{str(path)!r} is no regular file")
        if status.st_size > limit_bytes:
            raise PatternFileError(
                f"{str(path)!r} has {status.st_size:,} bytes, allowed are {limit_bytes:,}; "
                f"PatternStore(root, limit_bytes=...) reads more"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit_bytes:
        raise PatternFileError(f"{str(path)!r} grew beyond {limit_bytes:,} bytes while it was read")
    return content
