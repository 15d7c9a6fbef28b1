"""The git checkout that this package runs from, if it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..core.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def checkout_root() -> Path | None:
    """The working tree whose `src/dilated_attention` this is; None for an installed copy or without git."""
    root = _PACKAGE.parent.parent
    if _PACKAGE.parent.name != "src" or not (root / ".git").exists():
        return None
    return root


def git(root: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        ConfigError: git is missing, or refuses; the message is its own.
    """
    command = ["git", "-C", str(root), *arguments]
    try:
        # Not `run`, which kills git where this is interrupted: what git has started itself would go on writing.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            said, failed = process.communicate()
    except FileNotFoundError as error:
        raise ConfigError("git is not installed") from error
    if process.returncode:
        raise ConfigError(f"git {' '.join(arguments)}: {failed.strip() or said.strip()}")
    return said.strip()


def commit_of(root: Path | None) -> tuple[str | None, bool]:
    """The commit of the checkout and whether tracked files differ from it; (None, False) where there is none."""
    if root is None:
        return None, False
    return git(root, "rev-parse", "HEAD"), bool(git(root, "status", "--porcelain", "--untracked-files=no"))
