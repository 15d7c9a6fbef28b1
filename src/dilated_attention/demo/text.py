"""Text that every machine with Python has: the sources of its standard library, as bytes."""

from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import attrs
import torch
from torch import Tensor

from ..core.errors import DilatedAttentionError

# Not the library itself, or generated tables that a model would only learn by heart.
LEFT_OUT = frozenset({"__pycache__", "dist-packages", "encodings", "idlelib", "pydoc_data", "site-packages", "test"})
HELD_OUT_EVERY = 20


@attrs.frozen(eq=False)
class Corpus:
    """Bytes to learn from, and bytes of other files to be tested on.

    Attributes:
        root: where the files were found.
        files: how many.
        train, held_out: (bytes,) uint8.
    """

    root: Path
    files: int
    train: Tensor
    held_out: Tensor

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """`size` windows of `length` + 1 bytes at random places of the training text, int64."""
        starts = torch.randint(self.train.numel() - length - 1, (size, 1), generator=generator)
        return self.train[starts + torch.arange(length + 1)].long()

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """`count` windows of `length` + 1 bytes spread evenly over the held-out text, int64."""
        starts = torch.linspace(0, self.held_out.numel() - length - 1, count).long()
        return self.held_out[starts[:, None] + torch.arange(length + 1)].long()

    def compressed_bits_per_byte(self) -> float:
        """What xz makes of the held-out text: a mark to judge a model's bits per byte by."""
        return 8 * len(lzma.compress(self.held_out.numpy().tobytes(), preset=9)) / self.held_out.numel()


def standard_library(root: Path | None = None) -> Corpus:
    """Read the sources under `root` (this Python's standard library); every twentieth file is held out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT.intersection(path.relative_to(root).parts)]
    if len(paths) < HELD_OUT_EVERY:
        raise DilatedAttentionError(
            f"the demo learns from the standard library's sources, and {root} holds {len(paths)} of them"
        )
    held_out = paths[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    train = sorted(set(paths) - set(held_out))
    return Corpus(root, len(paths), _read(train), _read(held_out))


def _read(paths: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)
