"""Source code that a machine with Python and PyTorch has already: text to learn from, and other files to be tested on.

The standard library's sources and those in site-packages (.py, .pyx, .h), each content once, in a fixed order. Files
are split by directory, so that no file and no neighbour of one is on both sides.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

SUFFIXES = frozenset({".py", ".pyx", ".h"})
LARGEST_FILE = 256 << 10  # what is longer is a table that a generator wrote
HELD_OUT_EVERY = 32  # one directory of so many, by the hash of its name
_INSTALLED = frozenset({"site-packages", "dist-packages"})


@attrs.frozen(eq=False)
class SourceText:
    """Bytes of source files, neighbours in a directory following one another.

    Attributes:
        files: how many there are on both sides.
        train, held_out: (bytes,) uint8.
    """

    files: int
    train: Tensor
    held_out: Tensor

    def stretches(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` stretches of `length` + 1 bytes from random places of the training text, (count, length + 1)."""
        if self.train.numel() <= length:
            sys.exit(f"{self.train.numel():,} bytes are there to learn from, fewer than a stretch of {length:,} takes")
        starts = torch.randint(self.train.numel() - length, (count, 1), generator=generator)
        return self.train[(starts + torch.arange(length + 1)).to(self.train.device)]

    def held_out_stretches(self, count: int, length: int) -> Tensor:
        """`count` stretches of `length` + 1 bytes evenly over the held-out text, (count, length + 1).

        Only the last byte of one may be the first of the next, so each byte is predicted once at most.
        """
        if self.held_out.numel() <= count * length:
            sys.exit(f"{self.held_out.numel():,} bytes are held out, fewer than {count:,} stretches of {length:,} take")
        starts = torch.linspace(0, self.held_out.numel() - length - 1, count, dtype=torch.float64).long()
        return self.held_out[(starts[:, None] + torch.arange(length + 1)).to(self.held_out.device)]

    def to(self, device: str) -> SourceText:
        """The same on `device`."""
        return attrs.evolve(self, train=self.train.to(device), held_out=self.held_out.to(device))


def windows(stretches: Tensor, length: int) -> Tensor:
    """Stretches cut into windows of `length` + 1 bytes that share their ends, (windows, length + 1) int64."""
    return stretches.unfold(1, length + 1, length).flatten(0, 1).long()


def xz_bits_per_byte(text: Tensor) -> float:
    """What xz makes of it, a mark to judge a model by."""
    return 8 * len(lzma.compress(text.cpu().numpy().tobytes(), preset=9)) / text.numel()


def installed_roots() -> list[Path]:
    """The standard library, and where packages (this PyTorch among them) are installed."""
    paths = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return list(dict.fromkeys(path.resolve() for path in [*paths, Path(torch.__file__).parents[1]]))


def read(roots: list[Path], most_bytes: int) -> SourceText:
    """The sources under `roots`, up to `most_bytes` of them."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    left = most_bytes
    for path, directory in _paths(roots):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or len(content) > left:
            continue
        seen.add(digest)
        left -= len(content)
        parts[_is_held_out(directory)].append(content)
    train, held_out = (
        torch.from_numpy(np.frombuffer(b"".join(part), dtype=np.uint8).copy()) for part in parts.values()
    )
    return SourceText(len(seen), train, held_out)


def _paths(roots: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files by root and path, with their directory inside the root, which is the same on machines that differ."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            is_source = path.suffix in SUFFIXES and not _INSTALLED.intersection(inside.parts) and path.is_file()
            if is_source and 0 < path.stat().st_size <= LARGEST_FILE:
                yield path, inside.parent.as_posix()


def _is_held_out(directory: str) -> bool:
    return int.from_bytes(hashlib.sha256(directory.encode()).digest()[:8]) % HELD_OUT_EVERY == 0
