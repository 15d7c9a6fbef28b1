"""The longest sequence that trains one LongNet layer: doubled until memory is full."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core.config import AttentionConfig
from ..core.errors import RingBroken
from ..models.built import BuiltAttention
from ..models.layers import LongNetDecoderLayer
from ..models.longnet_config import LongNetConfig
from ..registry.build import build_attention
from .ring_settings import RingSettings

LOG = "longest.jsonl"


class _OverRing(BuiltAttention):
    """A layer's attention, over the ring of a mesh."""

    def __init__(self, config: AttentionConfig, mesh: DeviceMesh) -> None:
        super().__init__(config.to_dict())
        self.over = build_attention(config, mesh=mesh if mesh.size() > 1 else None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Shards (B, S, H, D), causal as configured."""
        out: Tensor = self.over(query, key, value)
        return out


def make_layer(settings: RingSettings, mesh: DeviceMesh, tokens: int) -> LongNetDecoderLayer:
    """A causal layer of LongNet's: norms, projections, attention over the ring, a feed-forward part."""
    config = LongNetConfig(
        embed_dim=settings.num_heads * settings.head_dim,
        num_layers=1,
        num_heads=settings.num_heads,
        pattern=settings.pattern("longnet", tokens),
        norm="pre",
    )
    torch.manual_seed(0)
    layer = LongNetDecoderLayer(config, device=settings.device, dtype=getattr(torch, settings.dtype))
    layer.self_attn.attention = _OverRing(settings.config("longnet", tokens, mesh.size()), mesh)
    return layer


def longest_layer(settings: RingSettings, mesh: DeviceMesh, folder: Path) -> None:
    """Write a line for each length that was trained, beginning with the weak-scaling share of every rank.

    A rank that runs out of memory says so in the file and ends at once: its peers then have nobody to go on with, and
    whoever started the ranks ends them.
    """
    tokens = settings.weak_tokens * mesh.size()
    log = folder / LOG
    while settings.longest_limit is None or tokens <= settings.longest_limit:
        try:
            line = _train(settings, mesh, tokens)
        except (torch.OutOfMemoryError, RingBroken) as error:
            cause = error.__cause__ if isinstance(error, RingBroken) else error
            if isinstance(cause, torch.OutOfMemoryError):
                _append(log, {"tokens": tokens, "out_of_memory": str(cause).splitlines()[0], "rank": mesh.get_rank()})
            os._exit(1)
        if mesh.get_rank() == 0:
            _append(log, line)
        tokens *= 2


def _train(settings: RingSettings, mesh: DeviceMesh, tokens: int) -> dict[str, Any]:
    """One forward and backward pass of the layer over the whole sequence."""
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layer = make_layer(settings, mesh, tokens)
    shape = (1, tokens // mesh.size(), settings.num_heads * settings.head_dim)
    x = torch.randn(shape, device=settings.device).to(getattr(torch, settings.dtype)).requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    out: Tensor = layer(x)
    torch.autograd.backward(out, torch.ones_like(out))
    assert x.grad is not None
    finite = torch.isfinite(x.grad).all().int()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return {
        "tokens": tokens,
        "ranks": mesh.size(),
        "seconds": time.perf_counter() - start,
        "finite": bool(finite),
        "peak_bytes": torch.cuda.max_memory_allocated() if settings.device == "cuda" else None,
    }


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
