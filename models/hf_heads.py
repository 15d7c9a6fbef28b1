"""Which heads of a Hugging Face model a rank computes, where its layers are spread over ranks (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import ConfigError
from ..core.head_shard import HeadShard
from ..core.pattern import Pattern

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Heads = tuple[int | None, int, int]  # the first one's number if it is known, query and key-value heads of the layer


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def heads_of(module: nn.Module, num_heads: int, num_kv_heads: int) -> Heads | None:
    """The heads that a rank's layer has of the whole one, or None where it has all of them.

    Args:
        module: the layer's attention.
        num_heads: query heads of the call.
        num_kv_heads: key-value heads of the call.
    """
    config: Any = getattr(module, "config", None)
    whole = getattr(config, "num_attention_heads", None)
    if whole is None or whole == num_heads:
        return None
    spread = list(_spread(module))
    if not spread:
        return None  # layers of some models have other numbers of heads than the configuration says
    ranks = {mesh.get_local_rank(dim) for mesh, dim in spread if mesh.size(dim) * num_heads == whole}
    first = ranks.pop() * num_heads if len(ranks) == 1 else None
    whole_kv = getattr(config, "num_key_value_heads", None)
    if whole_kv != num_kv_heads:  # else every rank has all of them
        whole_kv = num_kv_heads * max(whole // num_heads, 1)
    return first, whole, whole_kv


def _spread(module: nn.Module) -> Iterator[tuple[DeviceMesh, int]]:
    """The dimensions of meshes over which parameters of a layer are spread."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor, Shard

    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            yield from (
                (parameter.device_mesh, dim)
                for dim, placement in enumerate(parameter.placements)
                if isinstance(placement, Shard)
            )
    for part in module.modules():  # transformers 5.9 keeps plain tensors, and a mesh beside them
        mesh: DeviceMesh | None = getattr(part, "_hf_device_mesh", None)
        if mesh is not None:
            yield from ((mesh, dim) for dim in range(mesh.ndim))


def shard_of(pattern: Pattern, heads: Heads | None) -> Pattern:
    """The pattern of these heads.

    Raises:
        ConfigError: it depends on which heads they are, and that is not known.
    """
    if heads is None:
        return pattern
    first, whole, whole_kv = heads
    if first is not None:
        return HeadShard(pattern, first_head=first, total_heads=whole, total_kv_heads=whole_kv)
    if HeadShard(pattern, first_head=0, total_heads=1).unwrap() == pattern.unwrap():
        return pattern  # all heads are alike
    raise ConfigError(
        f"a layer attends with some of its {whole} heads, and which ones does not follow from how its parameters are "
        f"spread over ranks; spread the projections of queries, keys and values by columns, over one dimension of a "
        f"mesh, or choose a pattern that treats all heads alike"
    )
