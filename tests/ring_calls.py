"""Ranks that do not make the same calls in the same order, and ranks that do in ways of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from dilated_attention import ConfigError, ContextParallel, Dilated, Local, RingBroken, build_attention, shard_sequence
from dilated_attention.core.attention import Attention

from .ring_cases import mesh_of

FIELDS: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "is_causal": True, "dtype": "float64"}


def built(count: int = 1, *, timeout_s: float = 20, **fields: Any) -> list[Attention]:
    """Attentions that are built alike, over all ranks."""
    size = dist.get_world_size()
    parallel = ContextParallel(size=size, timeout_s=timeout_s)
    fields = FIELDS | {"pattern": Dilated((16, 64), (1, 2))} | fields
    return [build_attention(fields, context_parallel=parallel, mesh=mesh_of(size)) for _ in range(count)]


def leaf(seed: int = 0, length: int = 64) -> Tensor:
    """This rank's shard of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, 2, 8, generator=generator, dtype=torch.float64)
    return shard_sequence(x, mesh_of(dist.get_world_size())).requires_grad_()


def told(call: Callable[[], object]) -> str:
    """What a ring that breaks in `call` says; "" where nothing is noticed."""
    try:
        call()
    except RingBroken as broken:
        return broken.reason
    return ""


def swapped() -> str:
    """Two attentions in another order on rank 1."""
    found, x = built(2), leaf()
    return told(lambda: [attention(x, x, x) for attention in found[:: 1 - 2 * dist.get_rank()]])


def dropped(compiled: bool) -> str:
    """Each rank leaves out another layer."""
    model, x = Layers(2), leaf()
    kept = model.layers[dist.get_rank()]
    call = torch.compile(kept, backend="aot_eager") if compiled else kept
    return told(lambda: call(x))


def mixed(fields: dict[str, Any], recomputed: bool, shared: bool) -> str:
    """Rank 1 goes back through another call than rank 0."""
    found, x, y = built(2, **fields), leaf(0), leaf(1)
    first, second = found[0], found[0] if shared else found[1]
    if recomputed:
        outs = [checkpoint(a, z, z, z, use_reentrant=False) for a, z in ((first, x), (second, y))]
    else:
        outs = [first(x, x, x), second(y, y, y)]
    return told(outs[dist.get_rank()].sum().backward)


def evaluated() -> str:
    """Rank 0 alone calls once more, without gradients."""
    (attention,), x = built(), leaf()

    def step() -> None:
        if dist.get_rank() == 0:
            with torch.no_grad():
                attention(x, x, x)
        attention(x, x, x).sum().backward()

    return told(step)


def shapes() -> list[str]:
    """Other batches, and another pattern; all ranks are told each time."""
    first, second, x = built()[0], built(pattern=Local(4))[0], leaf()
    rank = dist.get_rank()
    said = [told(lambda: (first, second)[rank](x, x, x))]
    (first,), batch = built(), x.expand(1 + rank, -1, -1, -1)
    return [*said, told(lambda: first(batch, batch, batch))]


def traced() -> dict[str, str]:
    """Rank 0 alone traces a call in several ways, which it is refused; then both call."""
    (attention,), x = built(), leaf().detach()
    out, said = attention(leaf(), x, x), {}

    def call(x: Tensor) -> Tensor:
        found: Tensor = attention(x, x, x)
        return found

    def fake(inside: bool) -> None:
        with FakeTensorMode() as mode:
            shard = mode.from_tensor(x)
            if inside:
                call(shard)
        call(shard)

    def back() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out.backward(mode.from_tensor(out.detach()))

    model = nn.Module()
    model.forward = call
    ways: dict[str, Callable[[], object]] = {
        "fake inside": lambda: fake(True),
        "fake": lambda: fake(False),
        "backward": back,
        "make_fx": lambda: make_fx(call)(x),
        "export": lambda: torch.export.export(model, (x,), strict=False),
    }
    for name, trace in ways.items() if dist.get_rank() == 0 else ():
        try:
            trace()
        except ConfigError as error:
            said[name] = str(error)
    dist.barrier()
    return said | {"after": told(lambda: out.sum().backward()) + told(lambda: call(x))}


def without_tokens() -> dict[str, Any]:
    """A sequence of no tokens, forward and back; then rank 0 alone has none."""
    (attention,), x = built(), leaf(length=0)
    attention.prepare(0)
    out, lse = attention(x, x, x, return_lse=True)
    (out.sum() + lse.sum()).backward()
    said: dict[str, Any] = {"shapes": (out.shape, lse.shape, None if x.grad is None else x.grad.shape)}
    (recomputing,) = built(activation_checkpointing=True)
    said["recomputed"] = told(recomputing(x, x, x).sum().backward)
    x = leaf() if dist.get_rank() else leaf(length=0)
    said["uneven"] = told(lambda: attention(x, x, x))
    return said


class Layer(nn.Module):
    """A projection and an attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.into = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).chunk(3, dim=-1)
        mixed: Tensor = self.attention(query, key, value)
        return x + mixed


class Layers(nn.Module):
    """Some of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(attention) for attention in built(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def alike(count: int) -> dict[str, Any]:
    """Gradients of layers that are compiled, checkpointed, both, or copied, against those of plain calls."""
    model, x = Layers(count), leaf()

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(call(x).sin().sum(), x)
        return found

    def kept(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    expected = gradient(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = gradient(torch.compile(model, backend="aot_eager"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ways = {
        "compiled": compiled,
        "kept": gradient(kept),
        "both": gradient(torch.compile(kept, backend="aot_eager")),
        "copied": gradient(copy.deepcopy(model)),
    }
    return {name: torch.equal(found, expected) for name, found in ways.items()} | {"graphs": graphs}
