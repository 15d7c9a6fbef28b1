"""Named ranges in PyTorch's traces, which cost nothing to speak of while nobody traces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

from torch.autograd import profiler

_NOTHING: Final = nullcontext()


def is_tracing() -> bool:
    """Whether `torch.profiler` or `torch.autograd.profiler.emit_nvtx` records now.

    By the switch that PyTorch's own compiler looks at for its ranges.
    """
    return profiler._is_profiler_enabled


def span(name: str) -> AbstractContextManager[object]:
    """A range of that name in the trace that is being taken.

    Without one it is a context that does nothing: `record_function` itself would cost some 9 us (here 0.2 us).
    """
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING
