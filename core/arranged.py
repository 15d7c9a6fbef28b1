"""How the documents of a call are computed: together in one go, as a few batches, or one length after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .band_calls import branches_and_bands
from .bands import only_window
from .capture import is_captured
from .documents import Document, Packing, Stack, stacked
from .filled import Filled, filled
from .kernel import Packs, takes_windows
from .lowering import layout_kinds
from .program import keeps_prefixes

if TYPE_CHECKING:
    from torch import Tensor

    from .bands import Band
    from .engine import Engine
    from .pattern import Branch

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
    if not isinstance(engine.kernel, Packs) or not keeps_prefixes(engine.pattern):
        return False
    if is_captured(device):  # a graph would keep tables that are gone when it is replayed
        return False
    if _kinds(engine) == {"branch"}:
        return True
    if any((d.q_start, d.q_len) != (d.kv_start, d.kv_len) for d in documents):
        return False
    return config.is_causal or _parts(engine)[1] is not None


def fills_documents(engine: Engine, device: torch.device) -> bool:
    """Whether a document may be computed as the beginning of a longer one, which saves lowering and launches.

    It costs more than it saves where a document is a single call of a dense kernel, and on a CPU but where lowering
    is slow: with tables of blocks.
    """
    config = engine.config
    if not config.is_causal or config.dropout_p or not keeps_prefixes(engine.pattern):
        return False
    if device.type == "cpu":
        return _parts(engine)[1] is None
    # A CUDA graph would keep copies of places that are gone when it is replayed.
    return not (is_captured(device) or _is_one_call(engine))


def _kinds(engine: Engine) -> frozenset[str]:
    return layout_kinds(engine.pattern, engine.config.one_token)


def _is_one_call(engine: Engine) -> bool:
    """Whether a dense kernel is handed whole sequences, full or with a window."""
    branches, bands = _parts(engine)
    if engine.takes_layout or bands is None:
        return False
    if not bands:
        return [(branch.segment_length, branch.stride) for branch in branches] == [(None, 1)]
    return not branches and only_window(bands) is not None and takes_windows(engine.kernel)


def _parts(engine: Engine) -> tuple[tuple[Branch, ...], tuple[Band, ...] | None]:
    """The branches and bands of its pattern, whatever the length."""
    return branches_and_bands(engine.pattern, engine.config.one_token)
