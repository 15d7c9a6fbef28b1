"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STEM: Final = 40  # characters of a name in its temporary files, for file systems with short names
# Where a file system has no hard links.
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def write(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Put `content` at `path` in one step; a crash or a second writer leaves one whole file or the other.

    What killed writers of this name left behind is removed first. A file that is replaced keeps its mode.

    Raises:
        FileExistsError: the file is there already and `overwrite` is false.
    """
    _remove_abandoned(path)
    with temporary_file(path, content) as temporary:
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            temporary.replace(path)
        else:
            _place_new(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def temporary_file(path: Path, content: bytes) -> Iterator[Path]:
    """A hidden file beside `path` with `content`, locked for as long as it is in use: the lock dies with its owner."""
    with contextlib.ExitStack() as stack:
        locked = False
        while not locked:
            temporary = path.with_name(f".{path.stem[:_STEM]}.{secrets.token_hex(8)}.tmp")
            with temporary.open("xb") as file:
                stack.callback(temporary.unlink, missing_ok=True)
                if fcntl is not None:
                    # A duplicate holds the lock when the file is closed, which it must be before Windows renames it.
                    stack.callback(os.close, os.dup(file.fileno()))
                    with contextlib.suppress(OSError):  # no locks on this file system: then nobody takes it for stale
                        fcntl.flock(file, fcntl.LOCK_EX)
                # Another writer may have found the file before it was locked, and removed it.
                locked = fcntl is None or temporary.exists()
                if locked:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        yield temporary


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` that nobody holds locked; where there are no locks they stay."""
    if fcntl is None:
        return
    ours = re.compile(rf"\.{re.escape(path.stem[:_STEM])}\.[0-9a-f]{{16}}\.tmp")
    for found in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        try:
            descriptor = os.open(found, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, a link, or not ours to open
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                found.unlink(missing_ok=True)
        except OSError:  # its writer lives, or the file system has no locks
            continue
        finally:
            os.close(descriptor)


def _place_new(temporary: Path, path: Path) -> None:
    """Give the file its name unless that is taken, in one step where the file system has hard links."""
    taken = f"{str(path)!r} exists already; pass overwrite=True to replace it"
    try:
        path.hardlink_to(temporary)
    except FileExistsError as error:
        raise FileExistsError(taken) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(taken) from error
        temporary.replace(path)
