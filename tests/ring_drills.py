"""What ranks do in the drills: steps of attention that must stay equal, faults, training that goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    ContextParallel,
    Dilated,
    Local,
    RingBroken,
    agree,
    build_attention,
    rebuild,
    shard_sequence,
)  # fmt: skip
from dilated_attention.core.attention import Attention
from dilated_attention.exchange.compute import RankProgram

from .ring_cases import ring_engine, run_shard, tensors_of

NEAR = Local(4)  # a shard's queries meet the next shard's keys at most
FAR = Dilated((16, 96), (1, 2))


def config_of(size: int, timeout_s: float, pattern: Any = FAR, **fields: Any) -> AttentionConfig:
    parallel = ContextParallel(size=size, timeout_s=timeout_s)
    defaults = {"pattern": pattern, "num_heads": 2, "head_dim": 8, "is_causal": True, "seq_len": 96}
    return AttentionConfig(**{**defaults, **fields, "context_parallel": parallel})


@contextmanager
def group(where: str, rank: int, size: int) -> Iterator[DeviceMesh]:
    """A process group over the file `where`, or over the TCP store of a `host:port`."""
    dist.init_process_group("gloo", store=store_at(where), rank=rank, world_size=size, timeout=timedelta(seconds=60))
    yield DeviceMesh("cpu", list(range(size)))


def store_at(where: str) -> Any:
    host, _, port = where.rpartition(":")
    if port.isdigit():
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))  # type: ignore[attr-defined]
    return dist.FileStore(where, -1)  # type: ignore[attr-defined]


class FailingKernel:
    """The kernel of a rank whose card has failed."""

    name = "failing"

    def forward(self, *rest: object) -> tuple[Tensor, Tensor]:
        raise MemoryError("the device is out of memory")

    backward = forward


def fault(kind: str, attention: Attention, seconds: float) -> None:
    """Fail in some way."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(seconds)
    if kind == "raise":
        object.__setattr__(ring_engine(attention)._composer, "kernel", FailingKernel())
    if kind == "raise before sending":
        RankProgram.pack = FailingKernel().forward  # type: ignore[method-assign, assignment]


def drill(
    where: str, rank: int, size: int, kind: str, culprit: int, at: int, timeout_s: float, near: bool
) -> dict[str, Any]:
    """Steps until the ring breaks: when it did for this rank, what was said, and whether any step was wrong."""
    with group(where, rank, size) as mesh:
        config = config_of(size, timeout_s, NEAR if near else FAR)
        attention = build_attention(config, mesh=mesh)
        whole = tensors_of(config, 1)
        first, failed_at = None, 0.0
        for step in range(at + 20):
            if rank == culprit and step == at:
                store_at(where).set("fault", repr(time.time()))
                failed_at = time.time()
                fault(kind, attention, 2 * timeout_s)
            try:
                found = run_shard(attention, mesh, whole)
            except RingBroken as error:
                seen = time.time()
                retry, took = retried(attention, mesh, whole)
                said = {"generation": error.generation, "step": error.step, "peer": error.peer, "reason": error.reason}
                fault_time = failed_at or float(store_at(where).get("fault"))
                return said | {"after": seen - fault_time, "retry": retry, "retry_took": took, "steps": step}
            first = first or found
            if not all(torch.equal(a, b) for a, b in zip(found, first, strict=True)):
                return {"wrong": step}
    return {"survived": True}


def retried(attention: Attention, mesh: DeviceMesh, whole: list[Tensor]) -> tuple[str, float]:
    """What a retry in place says, and how long it takes to say so."""
    before = time.perf_counter()
    try:
        run_shard(attention, mesh, whole)
    except RingBroken as error:
        return str(error), time.perf_counter() - before
    return "", 0.0


def mismatched(where: str, rank: int, size: int) -> str:
    """Build with one rank's scale and another's pattern different; what is said."""
    with group(where, rank, size) as mesh:
        odd: dict[int, dict[str, Any]] = {2: {"scale": 0.5}, 3: {"pattern": NEAR}}
        try:
            build_attention(config_of(size, 20, **odd.get(rank, {})), mesh=mesh)
        except ConfigError as error:
            return str(error)
    return ""


def astray(where: str, rank: int, size: int) -> tuple[int | None, str]:
    """One rank passes a shard of another length; whom each rank blames, and of what."""
    with group(where, rank, size) as mesh:
        config = config_of(size, 20)
        attention = build_attention(config, mesh=mesh)
        length = 24 if rank != 2 else 12
        x = torch.zeros(1, length, 2, 8)
        try:
            attention(x, x, x)
        except RingBroken as error:
            return error.peer, error.reason
    return None, ""


def absent(where: str, rank: int, size: int) -> tuple[int | None, str, float]:
    """One rank does not build; whom the others miss, and after how long."""
    with group(where, rank, size) as mesh:
        before = time.perf_counter()
        try:
            if rank != 1:
                build_attention(config_of(size, 1.5), mesh=mesh)
        except RingBroken as error:
            return error.peer, error.reason, time.perf_counter() - before
    return None, "", 0.0


class Model(nn.Module):
    """A projection, the attention and a projection."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        generator = torch.Generator().manual_seed(3)
        self.into = nn.Parameter(torch.randn(16, 48, generator=generator, dtype=torch.float64) / 4)
        self.out = nn.Parameter(torch.randn(16, 16, generator=generator, dtype=torch.float64) / 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (torch.unflatten(part, -1, (2, 8)) for part in (x @ self.into).chunk(3, dim=-1))
        mixed: Tensor = self.attention(query, key, value)
        return mixed.flatten(2) @ self.out


def training_config(size: int) -> AttentionConfig:
    return config_of(size, 10, dtype="float64")


def data(step: int) -> tuple[Tensor, Tensor]:
    """Whole inputs and targets of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(1, 96, 16, generator=generator, dtype=torch.float64)
    return x, x.cumsum(1).tanh()


def train_step(model: Model, step: int, mesh: DeviceMesh | None) -> float:
    """One step of gradient descent over the whole sequence, this rank's shard of it here; the whole loss."""
    x, target = data(step)
    whole = target.numel()
    if mesh is not None:
        x, target = shard_sequence(x, mesh), shard_sequence(target, mesh)
    loss = (model(x) - target).square().sum() / whole
    parameters = list(model.parameters())
    grads = [*torch.autograd.grad(loss, parameters), loss.detach().clone()]
    if mesh is not None:
        for grad in grads:
            dist.all_reduce(grad)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=False):
            parameter.sub_(grad, alpha=0.1)
    return float(grads[-1])


def single(steps: int) -> list[float]:
    """The losses of one process."""
    model = Model(build_attention(training_config(1)))
    return [train_step(model, step, None) for step in range(steps)]


def form(store: Any, identity: str, generation: int | None, size: int | None, model: Model) -> tuple[DeviceMesh, int]:
    """Agree, make torch's group anew, rebuild, and give newcomers the weights of rank 0."""
    if dist.is_initialized():
        dist.destroy_process_group()
    members = agree(store, identity=identity, generation=generation, size=size, settle_s=1.0)
    dist.init_process_group("gloo", store=members.store, rank=members.rank, world_size=members.size)
    mesh = DeviceMesh("cpu", list(range(members.size)))
    rebuild(model, mesh=mesh, generation=members.generation)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    return mesh, members.generation


def elastic(where: str, rank: int, size: int, dies_at: int, grows_at: int, steps: int) -> dict[str, Any]:
    """Train; rank 1 is killed at one step, and at a later one a newcomer is let in. The losses by step."""
    store, losses, sizes = store_at(where), {}, {}
    dist.init_process_group("gloo", store=dist.PrefixStore("first", store), rank=rank, world_size=size)  # type: ignore[attr-defined]
    mesh, generation = DeviceMesh("cpu", list(range(size))), 0
    model = Model(build_attention(training_config(size), mesh=mesh))
    pause, step = 0.0, 0
    while step < steps:
        if step == grows_at and mesh.size() < size:
            mesh, generation = form(store, f"rank-{rank}", generation + 1, size, model)
            store.set("resume", str(step)) if dist.get_rank() == 0 else None
        if step == dies_at and rank == 1 and generation == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            losses[step] = train_step(model, step, mesh)
        except RingBroken as error:
            before = time.perf_counter()
            mesh, generation = form(store, f"rank-{rank}", error.generation + 1, None, model)
            pause = time.perf_counter() - before
            continue  # the same step again, on shards cut anew
        sizes[step] = mesh.size()
        step += 1
    return {"losses": losses, "sizes": sizes, "generation": generation, "pause": pause}


def newcomer(where: str, steps: int) -> dict[str, Any]:
    """Join the generation after the last one formed, and train along."""
    store = store_at(where)
    model = Model(build_attention(training_config(1)))
    while not store.check(["dilated_attention/agreement/generation"]):
        time.sleep(0.02)
    mesh, generation = form(store, "rank-4", None, 4, model)  # sorted last: rank 0 has the weights
    store.wait(["resume"], timedelta(seconds=20))
    losses = {step: train_step(model, step, mesh) for step in range(int(store.get("resume")), steps)}
    return {"losses": losses, "generation": generation}


def fall_back(where: str, rank: int, size: int) -> dict[str, Any]:
    """Agree to compute whole sequences alone; how far that is from what the ring gave."""
    with group(where, rank, size) as mesh:
        config = config_of(size, 10, dtype="float64")
        attention = build_attention(config, mesh=mesh)
        whole = tensors_of(config, 1)
        ring = run_shard(attention, mesh, whole)
        members = agree(store_at(where), identity=f"rank-{rank}", generation=1, size=size, local=True)
        rebuild(attention, mesh=None, generation=members.generation)
        leaves = [x.requires_grad_() for x in whole[:3]]
        out, lse = attention(*leaves, return_lse=True)
        alone = (out, lse, *torch.autograd.grad(out, leaves, whole[3]))
        parts = [shard_sequence(x.detach(), mesh, dim) for x, dim in zip(alone, (1, 2, 1, 1, 1), strict=True)]
        apart = max(float((a - b).abs().max()) for a, b in zip(ring, parts, strict=True))
        return {"apart": apart, "local": members.local, "backend": repr(type(attention._engine).__name__)}
