"""Whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def is_captured(device: torch.device) -> bool:
    """Whether what is queued on a device now goes into a graph: no number may be read, and replays run no Python."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
