"""Hugging Face models whose heads are spread over ranks (tensor parallelism) give what the whole model gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dilated_attention import Dilated, Global, Local, Pattern, Random
from dilated_attention.errors import ConfigError
from dilated_attention.models import register_with_transformers
from dilated_attention.models.hf_heads import heads_of, shard_of

from .hf_kit import DILATED, H, model, tokens
from .ring_ranks import Ranks
from .support import error

LENGTH = 48
PATTERNS: list[Pattern] = [
    Dilated((8, 32), (1, 4)),
    Dilated((8, 32), (2, 2), offsets="blocked"),
    Random(2, 8),
    Local((9, 0)) | Dilated((32,), (4,)),
    Local((9, 0)) | Global(2),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def by_tensors(layer: nn.Module, mesh: DeviceMesh) -> None:
    """As PyTorch and newer transformers do it: DTensors."""
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    parallelize_module(layer, mesh, {**columns, "o_proj": RowwiseParallel()})


def by_hand(layer: Any, mesh: DeviceMesh) -> None:
    """As transformers 5.9 does it: plain tensors, and the mesh beside them."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        part = getattr(layer, name)
        own = part.weight.detach().chunk(mesh.size(), dim=1 if name == "o_proj" else 0)[mesh.get_local_rank()]
        part.weight = nn.Parameter(own.clone())
        part._hf_device_mesh = mesh

    def summed(module: nn.Module, given: object, out: Tensor) -> Tensor:
        dist.all_reduce(out)
        return out

    layer.o_proj.register_forward_hook(summed)


def compare(spread: Any, patterns: list[Pattern]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    whole, parallel = model(), model()
    for layer in parallel.model.layers:
        spread(layer.self_attn, mesh)
    seen = tokens(length=LENGTH)
    with torch.no_grad():
        for pattern in patterns:
            register_with_transformers(whole, pattern)
            register_with_transformers(parallel, pattern)
            assert error(parallel(seen).logits, whole(seen).logits) < 1e-5, pattern
        register_with_transformers(whole, patterns[0])
        register_with_transformers(parallel, patterns[0])
        settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(parallel.generate(seen, **settings), whole.generate(seen, **settings))


@pytest.mark.parametrize(("spread", "patterns"), [(by_tensors, PATTERNS), (by_hand, PATTERNS[:1])])
def test_a_model_over_two_ranks(ranks: Ranks, spread: Any, patterns: list[Pattern]) -> None:
    """Its heads are two to a rank, and the dilation rate 4 has an offset for each of the four."""
    for rank in range(2):
        ranks.send(rank, compare, spread, patterns)
    for rank in range(2):
        ranks.receive(rank, 120)


def test_layers_that_are_not_spread_have_all_heads() -> None:
    layer = model().model.layers[0].self_attn
    assert heads_of(layer, H, 2) is None
    assert heads_of(layer, 2, 1) is None  # a layer with fewer heads than its configuration says
    assert heads_of(nn.Linear(2, 2), 2, 1) is None


def test_heads_that_cannot_be_told_are_an_error_where_they_matter() -> None:
    assert shard_of(Local(9), (None, 8, 3)) == Local(9)
    with pytest.raises(ConfigError, match=r"some of its 8 heads.*by columns"):
        shard_of(DILATED, (None, 8, 3))
