"""Dropout of attention weights where core composes: of dense pieces by their kernel, of blocks by core's product.

Each draws for itself, from a seed of its own, so that it does not matter which come first. Tensors are compact in both
passes: what is launched together, and so is drawn together, is then alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from .block_product import BlockProduct
from .capture import is_captured
from .draws import Draws
from .errors import ConfigError
from .kernel import DrawsOnDevice, Drops
from .schedule import Schedule
from .transforms import refuse_mapped_dropout

if TYPE_CHECKING:
    from torch import Tensor

    from .composer import Composer
    from .kernel import BlockTable


def draw_seed(kernel: object, device: torch.device, *, has_documents: bool) -> Tensor:
    """A fresh seed for the dropout of a call, from torch's generator; every replay of a CUDA graph draws another.

    That is a seed on the device, which only some kernels take, and of one sequence: documents draw several from it.
    """
    refuse_mapped_dropout()
    on: torch.device | str = "cpu"
    if not (torch.compiler.is_compiling() or has_documents) and is_captured(device):
        on = device if isinstance(kernel, DrawsOnDevice) and kernel.draws_on_device else on
    return torch.randint(1 << 62, (), dtype=torch.int64, device=on)


def refuse_capture(dropout_p: float, seed: Tensor, device: torch.device) -> None:
    """Raise `ConfigError` while a CUDA graph is captured whose replays would drop the same, by a seed that stays."""
    if seed.device.type == "cpu" and is_captured(device):
        raise ConfigError(
            f"dropout_p={dropout_p:g}: every replay of a CUDA graph would drop the same weights; take a "
            "backend that draws anew (docs/configuration.md, dropout_p; none does for documents), call eval() before "
            "the capture, or build with dropout_p=0"
        )


def one_by_one(schedule: Schedule) -> Schedule:
    """The same calls, each as often as its pairs count: occurrences of a pair are dropped one by one."""
    if all(call.weight == 1 for call in schedule.calls):
        return schedule
    once = [attrs.evolve(call, weight=1) for call in schedule.calls]
    more = [one for one, call in zip(once, schedule.calls, strict=True) for _ in range(call.weight - 1)]
    return Schedule((*once, *more), schedule.cover)


def of_one_pass(
    composer: Composer, blocks: BlockTable | None, dropout_p: float, seed: Tensor, device: torch.device
) -> tuple[Composer, BlockTable | None]:
    """What computes dense pieces, and what computes blocks, in one pass of a call that drops.

    Args:
        composer: of a kernel that is `Drops`.
        blocks: core's product, or None.
        dropout_p: above 0.
        seed: int64 scalar that determines the draws of both passes.
        device: of the tensors.
    """
    assert isinstance(composer.kernel, Drops)
    composer = attrs.evolve(composer, kernel=composer.kernel.dropping(dropout_p, seed, device))
    if blocks is None:
        return composer, None
    assert isinstance(blocks, BlockProduct)
    return composer, attrs.evolve(blocks, draws=Draws.of(dropout_p, seed + 1, device))
