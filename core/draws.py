"""Dropout of attention weights: which occurrences of pairs are kept, drawn anew by both passes of a call.

Forward and backward compute the same tiles in the same order, so the draws of one are those of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import attrs
import torch

if TYPE_CHECKING:
    from torch import Tensor

_PARTS: Final = 1 << 16  # in which probabilities are counted: four draws are cut from one of a generator's numbers


@contextmanager
def for_each_gradient() -> Iterator[None]:
    """Random numbers may be drawn where torch batches gradients (`is_grads_batched`) and calls a backward for each.

    It forbids them, since those of a vmap would depend on the batch; what a seed determines does not.
    """
    depth = torch._C._vmapmode_increment_nesting()
    for _ in range(depth):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(depth - 1):
            torch._C._vmapmode_increment_nesting()


def dropped_parts(dropout_p: float, parts: int) -> int:
    """How many of so many parts a dropout_p between 0 and 1 is, rounded: at least one is dropped, and one is kept."""
    return min(max(round(dropout_p * parts), 1), parts - 1)


@attrs.frozen(eq=False)
class Draws:
    """The draws of one pass.

    Attributes:
        dropped: of `_PARTS`, how probable it is that an occurrence is dropped.
        generator: of the device that the weights are on.
    """

    dropped: int
    generator: torch.Generator

    @classmethod
    def of(cls, dropout_p: float, seed: Tensor, device: torch.device) -> Draws:
        """Those that a seed (an int64 scalar) determines on a device. dropout_p is rounded to 65536ths, not away."""
        return cls(dropped_parts(dropout_p, _PARTS), torch.Generator(device).manual_seed(int(seed)))

    @property
    def keep(self) -> float:
        """How probable it is that an occurrence is kept."""
        return 1.0 - self.dropped / _PARTS

    def factors(self, like: Tensor, counts: Tensor | None = None) -> Tensor:
        """By what weights shaped and typed as `like` are multiplied: 1 / keep where a pair is kept, else 0.

        Of a pair that counts several times (`counts`) each occurrence is drawn, and the factor is their mean.
        """
        if counts is None:
            return self._kept(like).to(like.dtype).mul_(1 / self.keep)
        with for_each_gradient():
            kept = torch.binomial(counts, torch.full_like(counts, self.keep), generator=self.generator)
        return kept.div_(counts.clamp(min=1).mul_(self.keep))

    def _kept(self, like: Tensor) -> Tensor:
        numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
        with for_each_gradient():
            numbers.random_(-(1 << 63), None, generator=self.generator)
        parts = numbers.view(torch.int16)[: like.numel()].view(like.shape)
        return parts >= self.dropped - _PARTS // 2
