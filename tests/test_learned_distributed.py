"""Models with a learned pattern over several ranks: gates learn as they would in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dilated_attention import Learned
from dilated_attention.core.gate import Gate
from dilated_attention.models import LongNetConfig, LongNetLM

from .ring_ranks import RankError, Ranks
from .support import error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def language_model() -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig(embed_dim=32, num_layers=2, num_heads=4, vocab_size=64, pattern=Learned(2, 8)))


def gates(model: nn.Module) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


@contextmanager
def seen(model: LongNetLM) -> Iterator[list[tuple[Gate, Tensor, Tensor]]]:
    """Gates with the queries and keys that they choose for, filled by each call of the model."""
    kept: list[tuple[Gate, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, given: kept.append((module.gate, given[0], given[1])))
        for module in model.modules()
        if isinstance(getattr(module, "gate", None), Gate)
    ]
    yield kept
    for hook in hooks:
        hook.remove()


def losses(model: LongNetLM, tokens: Tensor, call: nn.Module | None = None) -> Tensor:
    """The model's and its gates'; `call` is what wraps it."""
    with seen(model) as kept:
        logits: Callable[[Tensor], Tensor] = model if call is None else call
        loss = cross_entropy(logits(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
    assert len(kept) == 2
    return loss + torch.stack([gate.distillation_loss(query, key) for gate, query, key in kept]).sum()


def rows() -> list[Tensor]:
    """One for each rank."""
    both = torch.randint(64, (2, 41), generator=torch.Generator().manual_seed(1))
    return [both[:1], both[1:]]


def worst(model: nn.Module, single: nn.Module) -> float:
    """The largest error of a gradient."""
    found = []
    for p, e in zip(model.parameters(), single.parameters(), strict=True):
        assert p.grad is not None
        assert e.grad is not None
        found.append(error(whole(p.grad), e.grad))
    return max(found)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded_in_half_precision() -> float:
    """The largest error of a gradient of a step under FSDP2's mixed precision."""
    model, mesh = language_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    single = copy.deepcopy(model).bfloat16()
    for row in rows():
        torch.autograd.backward(losses(single, row) / 2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for gate in gates(model):
        fully_shard(gate, mesh=mesh, mp_policy=policy)
        for name in ("distillation_loss", "kept_mass", "freeze"):
            register_fsdp_forward_method(gate, name)
    for module in (*model.stack.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(losses(model, rows()[dist.get_rank()]))
    largest = worst(model, single)
    before = [whole(gate.get_parameter("query_mix")).clone() for gate in gates(model)]
    optimizer.step()
    after = [whole(gate.get_parameter("query_mix")) for gate in gates(model)]
    assert all(bool((a != b).any() and a.isfinite().all()) for a, b in zip(after, before, strict=True))
    alike = language_model().bfloat16()
    alike.load_state_dict({name: whole(x) for name, x in model.state_dict().items()})
    query, key = torch.randn(2, 1, 64, 4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    for gate, single_gate in zip(gates(model), gates(alike), strict=True):
        assert torch.equal(gate.kept_mass(query, key), single_gate.kept_mass(query, key))
        assert gate.freeze(query, key) == single_gate.freeze(query, key)
    return largest


def mean_lse(model: nn.Module, tokens: Tensor) -> Tensor:
    """What teaches a gate nothing."""
    lse: Tensor = model(tokens).logsumexp(-1)
    return lse.mean()


def replicated(how: dict[str, Any], inside: bool, learns: bool) -> float:
    """The largest error of a gradient of two steps under DistributedDataParallel."""

    class Both(nn.Module):
        """A model whose forward returns its loss and its gates'."""

        def __init__(self, model: LongNetLM) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return losses(self.model, tokens)

    model = language_model()
    single = copy.deepcopy(model)
    for row in rows():
        torch.autograd.backward((losses(single, row) if learns else mean_lse(single, row)) / 2)
    wrapped: nn.Module = DistributedDataParallel(Both(model) if inside else model, **how)
    own = rows()[dist.get_rank()]
    for _ in range(2):
        wrapped.zero_grad()
        if inside:
            loss = wrapped(own)
        elif learns:
            loss = losses(model, own, call=wrapped)
        else:
            loss = mean_lse(wrapped, own)
        torch.autograd.backward(loss)
    if not learns:
        assert all(p.grad is None or not p.grad.any() for gate in gates(model) for p in gate.parameters())
        for p in (p for whole in (model, single) for gate in gates(whole) for p in gate.parameters()):
            p.grad = torch.zeros_like(p)
    return worst(model, single)


@pytest.mark.parametrize(
    ("how", "inside", "learns"),
    [
        ({"static_graph": True}, False, True),
        ({}, True, True),
        ({"find_unused_parameters": True}, False, False),
    ],
    ids=["loss outside", "loss inside", "no loss"],
)
def test_what_the_docs_say_of_distributed_data_parallel(
    ranks: Ranks, how: dict[str, bool], inside: bool, learns: bool
) -> None:
    assert max(ranks.run(replicated, how, inside, learns)) < 1e-5


def test_fsdp_with_mixed_precision_trains_model_and_gates(ranks: Ranks) -> None:
    assert max(ranks.run(sharded_in_half_precision)) < 0.03


def test_unused_parameters_are_not_what_a_gates_loss_needs(ranks: Ranks) -> None:
    """As the docs say; where torch takes it one day, they may be shorter."""
    with pytest.raises(RankError, match="mark a variable ready only once"):
        ranks.run(replicated, {"find_unused_parameters": True}, False, True)
