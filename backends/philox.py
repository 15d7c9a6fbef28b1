"""Dropout inside PyTorch's fused kernels for CUDA, which take their random numbers from its generator of the device.

Their backward is told the state that the forward began with: a seed of Philox, and an offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import attrs
import torch
from torch import Tensor

from ..core.draws import for_each_gradient

_SEEDS = 1 << 62
_TURN = Lock()  # of those who give a device's generator another state


@attrs.frozen(eq=False)
class PhiloxDraws:
    """The draws of one pass: each call has a state of its own, the n-th of both passes the same.

    Attributes:
        dropout_p: as the kernel takes it.
    """

    dropout_p: float
    _seeds: torch.Generator  # on the CPU

    @classmethod
    def of(cls, dropout_p: float, seed: Tensor) -> PhiloxDraws:
        """Those that a seed, an int64 scalar on the CPU, determines."""
        return cls(dropout_p, torch.Generator("cpu").manual_seed(int(seed)))

    @contextmanager
    def forward(self, device: torch.device) -> Iterator[None]:
        """The next call, of a forward pass: the device's generator has its state, and the one it had before after."""
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        own = torch.Generator(device).manual_seed(self.next_seed())
        with _TURN:
            kept = generator.graphsafe_get_state()
            generator.graphsafe_set_state(own)
            try:
                yield
            finally:
                generator.graphsafe_set_state(kept)

    def next_seed(self) -> int:
        """That of the next call; its offset is 0."""
        with for_each_gradient():
            return int(torch.randint(_SEEDS, (), generator=self._seeds, device="cpu"))
