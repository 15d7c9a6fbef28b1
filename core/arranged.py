"""How the documents of a call are computed: together in one go, as a few batches, or one length after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .band_calls import bands_beside
from .documents import Document, Packing, Stack, stacked
from .filled import Filled, filled
from .geometry import one_token
from .kernel import Packs, takes_windows
from .lowering import layout_kinds, split
from .program import keeps_prefixes

if TYPE_CHECKING:
    from torch import Tensor

    from .engine import Engine

Arranged = Packing | Sequence[Stack | Filled]


def arranged(documents: Sequence[Document], engine: Engine, query: Tensor, key: Tensor) -> Arranged:
    """The documents of tensors (B, S, H, D) and (B, T, K, D) as the engine computes them."""
    stacks = stacked(documents)
    if len(stacks) < 2:
        return stacks
    if packs(engine, documents, query.device):
        return Packing(tuple(documents), query.shape[0], query.shape[1], key.shape[1])
    return filled(documents) if fills_documents(engine, query.device) else stacks


def packs(engine: Engine, documents: Sequence[Document], device: torch.device) -> bool:
    """Whether its kernel computes all of them in one go, each as the beginning of a longer sequence.

    Patterns that keep prefixes promise that; of blocks it holds where attention is causal, and of bands, whose keys
    depend on no length.
    """
    config = engine.config
    if not isinstance(engine.kernel, Packs) or config.dropout_p or not keeps_prefixes(engine.pattern):
        return False
    if _is_captured(device):  # a graph would keep tables that are gone when it is replayed
        return False
    if _kinds(engine) == {"branch"}:
        return True
    if any((d.q_start, d.q_len) != (d.kv_start, d.kv_len) for d in documents):
        return False
    token = one_token(config.num_heads, config.kv_heads, config.is_causal)
    return config.is_causal or bands_beside(engine.pattern, token) is not None


def fills_documents(engine: Engine, device: torch.device) -> bool:
    """Whether a document may be computed as the beginning of a longer one, which saves lowering and launches.

    It costs more than it saves where a document is a single call of a dense kernel, and on a CPU but where lowering
    is slow: with blocks.
    """
    config = engine.config
    if not config.is_causal or config.dropout_p or not keeps_prefixes(engine.pattern):
        return False
    if device.type == "cpu":
        return "block" in _kinds(engine)
    # A CUDA graph would keep copies of places that are gone when it is replayed.
    return not (_is_captured(device) or _is_one_call(engine))


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _kinds(engine: Engine) -> frozenset[str]:
    config = engine.config
    return layout_kinds(engine.pattern, config.num_heads, config.kv_heads, config.is_causal)


def _is_one_call(engine: Engine) -> bool:
    """Whether a dense kernel is handed whole sequences, full or with a window."""
    config = engine.config
    token = one_token(config.num_heads, config.kv_heads, config.is_causal)
    branches, rest = split(engine.pattern, token)
    if engine.takes_layout:
        return False
    if rest is None:
        return [(branch.segment_length, branch.stride) for branch in branches] == [(None, 1)]
    bands = bands_beside(engine.pattern, token) or ()
    return not branches and len(bands) == 1 and bands[0].is_window and takes_windows(engine.kernel)
