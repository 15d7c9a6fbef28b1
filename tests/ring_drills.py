"""What ranks do in the drills: steps of attention that must stay right, faults, training that goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    ContextParallel,
    Dilated,
    Limits,
    Local,
    Pattern,
    RingBroken,
    agree,
    build_attention,
    explain,
    rebuild,
    shard_sequence,
)  # fmt: skip
from dilated_attention.core import reference
from dilated_attention.core.attention import Attention
from dilated_attention.exchange.communicator import Pass, Posted
from dilated_attention.exchange.compute import RankProgram

from .ring_cases import ring_engine, run_shard, tensors_of
from .support import error

NEAR = Local(4)  # a shard's queries meet the next shard's keys at most
FAR = Dilated((16, 96), (1, 2))
GROUPS = {"cpu": "gloo", "cuda": "nccl"}
# What kernels for dense pieces take, and how exact that is.
EXACT = {"cpu": ("float64", 1e-12), "cuda": ("float32", 1e-5)}
DIMS = (1, 2, 1, 1, 1)  # of the sequence, in out, lse and the gradients


@attrs.frozen
class Seat:
    """A rank's place.

    Attributes:
        where: the file of the ranks' store, or the `host:port` of one over TCP.
        rank: its number, and that of its card.
        size: of the ring.
        device: "cpu", or "cuda" for one card a rank, over NCCL.
    """

    where: str
    rank: int
    size: int
    device: str

    def store(self) -> Any:
        """A new connection to the store."""
        host, _, port = self.where.rpartition(":")
        if port.isdigit():
            return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))  # type: ignore[attr-defined]
        return dist.FileStore(self.where, -1)  # type: ignore[attr-defined]

    def join(self, store: Any, rank: int, size: int) -> DeviceMesh:
        """Make torch's group, and a mesh of all its ranks."""
        dist.init_process_group(
            GROUPS[self.device], store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        return DeviceMesh(self.device, list(range(size)))

    def leave(self) -> None:
        """Drop torch's groups, of which other ranks may be dead."""
        if self.device == "cuda":
            distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def config_of(seat: Seat, timeout_s: float, pattern: Pattern = FAR, **fields: Any) -> AttentionConfig:
    parallel = ContextParallel(size=seat.size, timeout_s=timeout_s)
    defaults = {"pattern": pattern, "num_heads": 2, "head_dim": 8, "is_causal": True, "seq_len": 96}
    return AttentionConfig(**{**defaults, **fields, "device": seat.device, "context_parallel": parallel})


@contextmanager
def group(seat: Seat) -> Iterator[DeviceMesh]:
    """A mesh over all ranks; the rank's tensors go to its card."""
    sit(seat)
    yield seat.join(seat.store(), seat.rank, seat.size)


def sit(seat: Seat) -> None:
    """Take the rank's card."""
    if seat.device == "cuda":
        torch.cuda.set_device(seat.rank)


def whole_of(config: AttentionConfig, seat: Seat) -> list[Tensor]:
    return [x.to(seat.device) for x in tensors_of(config, 1)]


def truth_of(config: AttentionConfig, mesh: DeviceMesh) -> list[Tensor]:
    """What the oracle says of this rank's shard."""
    assert isinstance(config.pattern, Pattern)
    query, key, value, dout, _ = (x.double() for x in tensors_of(config, 1))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = reference.attention(*leaves, pattern=config.pattern, is_causal=config.is_causal)
    found = (out, lse, *torch.autograd.grad(out, leaves, dout))
    return [shard_sequence(x.detach(), mesh, dim) for x, dim in zip(found, DIMS, strict=True)]


class FailingKernel:
    """The kernel of a rank whose card has failed."""

    name = "failing"

    def forward(self, *rest: object) -> tuple[Tensor, Tensor]:
        raise MemoryError("the device is out of memory")

    backward = forward


def fault(kind: str, attention: Attention, seconds: float) -> None:
    """Fail in some way, at once or "before sending": within the next pass, when the others rely on its rows.

    Whoever raises does so once its first messages are under way; "amid hops" others wait for further ones. "once
    launched" is when it has launched its own work and would wait for the others' headers, "while preparing" before any
    of a backward pass.
    """
    sudden: dict[str, Callable[..., Any]] = {
        "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda *_: time.sleep(seconds),
        "raise": FailingKernel().forward,
    }
    how, _, late = kind.partition(" ")
    if late == "before sending":
        pack = RankProgram.pack

        def failing(*rest: Any) -> tuple[Tensor, ...]:
            RankProgram.pack = pack  # type: ignore[method-assign]
            sudden[how]()
            return pack(*rest)

        RankProgram.pack = failing  # type: ignore[method-assign, assignment]
    elif late == "once launched":
        post = Pass.post

        def failing_post(*rest: Any, **named: Any) -> Posted:
            Pass.post = post  # type: ignore[method-assign]
            sudden[how]()
            return post(*rest, **named)

        Pass.post = failing_post  # type: ignore[method-assign]
    elif late == "while preparing":
        RankProgram.read = sudden[how]  # type: ignore[method-assign]
    elif how == "raise":
        composers = ring_engine(attention)._composers
        assert composers is not None
        for composer in (composers.own, composers.others):
            object.__setattr__(composer, "_kernel", FailingKernel())
    else:
        sudden[how]()


def block_in_passes(device: str) -> None:
    """Make this rank wait for its whole device amid every pass, as CUDA's allocator does when memory is short."""
    wait = Pass.wait

    def waiting(current: Pass, posted: Posted) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        wait(current, posted)

    Pass.wait = waiting  # type: ignore[method-assign, assignment]


def drill(seat: Seat, kind: str, culprit: int, at: int, timeout_s: float, near: bool, blocks: bool) -> dict[str, Any]:
    """Steps until the ring breaks: when it did for this rank, what was said, and whether any step was wrong."""
    with group(seat) as mesh:
        fields = {"limits": Limits(exchange_buffer_bytes=1)} if kind == "raise amid hops" else {}
        config = config_of(seat, 40, NEAR if near else FAR, **fields)
        attention = build_attention(config, mesh=mesh)
        if kind.endswith("once launched"):  # Gloo's ranks too then launch first, and wait for each other after
            ring_engine(attention).communicator.transport.launches_first = True  # type: ignore[misc]
        whole, truth = whole_of(config, seat), truth_of(config, mesh)
        failed_at = 0.0
        for step in range(at + 20):
            if step == at:
                ring_engine(attention).communicator.timeout_s = timeout_s
                if seat.rank == culprit:
                    seat.store().set("fault", repr(time.time()))
                    failed_at = time.time()
                    fault(kind, attention, timeout_s + 1)
                elif blocks:
                    block_in_passes(seat.device)
            try:
                found = run_shard(attention, mesh, whole)
            except RingBroken as broken:
                seen = time.time()
                retry, took = retried(attention, mesh, whole)
                said = {"generation": broken.generation, "step": broken.step, "peer": broken.peer}
                fault_time = failed_at or float(seat.store().get("fault"))
                told = {"reason": broken.reason, "retry": retry, "retry_took": took, "steps": step}
                return said | told | {"after": seen - fault_time, "device_took": device_time(seat.device)}
            worst = max(error(a.cpu(), e) for a, e in zip(found, truth, strict=True))
            if not worst < 1e-5:
                return {"wrong": step, "error": worst}
    return {"survived": True}


def retried(attention: Attention, mesh: DeviceMesh, whole: list[Tensor]) -> tuple[str, float]:
    """What a retry in place says, and how long it takes to say so."""
    before = time.perf_counter()
    try:
        run_shard(attention, mesh, whole)
    except RingBroken as broken:
        return str(broken), time.perf_counter() - before
    return "", 0.0


def device_time(device: str) -> float:
    """How long the rank's device takes to be done with all it has been given, and with something new."""
    before = time.perf_counter()
    assert float(torch.ones(3, device=device).sum()) == 3
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def mismatched(seat: Seat) -> str:
    """Build with the last but one rank's scale and the last one's pattern different; what is said."""
    with group(seat) as mesh:
        odd: dict[int, dict[str, Any]] = {seat.size - 2: {"scale": 0.5}, seat.size - 1: {"pattern": NEAR}}
        try:
            build_attention(config_of(seat, 20, **odd.get(seat.rank, {})), mesh=mesh)
        except ConfigError as refusal:
            return str(refusal)
    return ""


def astray(seat: Seat) -> tuple[int | None, str]:
    """The rank in the middle passes a shard of another length; whom each rank blames, and of what."""
    with group(seat) as mesh:
        attention = build_attention(config_of(seat, 40), mesh=mesh)
        length = 24 if seat.rank != seat.size // 2 else 12
        x = torch.zeros(1, length, 2, 8, device=seat.device)
        try:
            attention(x, x, x)
        except RingBroken as broken:
            return broken.peer, broken.reason
    return None, ""


def absent(seat: Seat) -> tuple[int | None, str, float]:
    """One rank does not build; whom the others miss, and after how long."""
    with group(seat) as mesh:
        explain(config_of(seat, 1.5))  # imports and discovery, which are not what is timed
        before = time.perf_counter()
        try:
            if seat.rank != 1:
                build_attention(config_of(seat, 1.5), mesh=mesh)
        except RingBroken as broken:
            return broken.peer, broken.reason, time.perf_counter() - before
    return None, "", 0.0


class Model(nn.Module):
    """A projection, the attention and a projection."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        generator = torch.Generator().manual_seed(3)
        self.into = nn.Parameter(torch.randn(16, 48, generator=generator, dtype=torch.float64) / 4)
        self.out = nn.Parameter(torch.randn(16, 16, generator=generator, dtype=torch.float64) / 4)
        self.to(attention.plan.device["torch_name"], getattr(torch, attention.config.dtype))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (torch.unflatten(part, -1, (2, 8)) for part in (x @ self.into).chunk(3, dim=-1))
        mixed: Tensor = self.attention(query, key, value)
        return mixed.flatten(2) @ self.out


def training_config(seat: Seat) -> AttentionConfig:
    return config_of(seat, 40, dtype=EXACT[seat.device][0])


def data(step: int) -> tuple[Tensor, Tensor]:
    """Whole inputs and targets of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(1, 96, 16, generator=generator, dtype=torch.float64)
    return x, x.cumsum(1).tanh()


def train_step(model: Model, step: int, mesh: DeviceMesh | None) -> float:
    """One step of gradient descent over the whole sequence, this rank's shard of it here; the whole loss."""
    x, target = (part.to(model.into) for part in data(step))
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
    model = Model(build_attention(training_config(Seat("", 0, 1, "cpu"))))
    return [train_step(model, step, None) for step in range(steps)]


def form(seat: Seat, identity: str, generation: int | None, size: int | None, model: Model) -> tuple[DeviceMesh, int]:
    """Agree, make torch's group anew, rebuild, and give newcomers the weights of rank 0."""
    if dist.is_initialized():
        seat.leave()
    members = agree(seat.store(), identity=identity, generation=generation, size=size, settle_s=1.0)
    mesh = seat.join(members.store, members.rank, members.size)
    rebuild(model, mesh=mesh, generation=members.generation)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    return mesh, members.generation


def elastic(seat: Seat, dies_at: int, grows_at: int, steps: int) -> dict[str, Any]:
    """Train; rank 1 is killed at one step, and at a later one a newcomer is let in. The losses by step."""
    sit(seat)
    store, losses, sizes = seat.store(), {}, {}
    mesh = seat.join(dist.PrefixStore("first", store), seat.rank, seat.size)  # type: ignore[attr-defined]
    identity, generation = f"rank-{seat.rank}", 0
    model = Model(build_attention(training_config(seat), mesh=mesh))
    pause, step = 0.0, 0
    while step < steps:
        if step == grows_at and mesh.size() < seat.size:
            mesh, generation = form(seat, identity, generation + 1, seat.size, model)
            store.set("resume", str(step)) if dist.get_rank() == 0 else None
        if step == dies_at and seat.rank == 1 and generation == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            losses[step] = train_step(model, step, mesh)
        except RingBroken as broken:
            before = time.perf_counter()
            mesh, generation = form(seat, identity, broken.generation + 1, None, model)
            pause = time.perf_counter() - before
            continue  # the same step again, on shards cut anew
        sizes[step] = mesh.size()
        step += 1
    return {"losses": losses, "sizes": sizes, "generation": generation, "pause": pause}


def newcomer(seat: Seat, steps: int) -> dict[str, Any]:
    """Join the generation after the last one formed, and train along, on the card of the rank that died."""
    sit(seat)
    store = seat.store()
    model = Model(build_attention(training_config(attrs.evolve(seat, size=1))))
    while not store.check(["dilated_attention/agreement/generation"]):
        time.sleep(0.02)
    mesh, generation = form(seat, "rank-4", None, seat.size, model)  # sorted last: rank 0 has the weights
    store.wait(["resume"], timedelta(seconds=20))
    losses = {step: train_step(model, step, mesh) for step in range(int(store.get("resume")), steps)}
    return {"losses": losses, "generation": generation}


def fall_back(seat: Seat) -> dict[str, Any]:
    """Agree to compute whole sequences alone; how far that is from what the ring gave."""
    with group(seat) as mesh:
        config = config_of(seat, 40, dtype=EXACT[seat.device][0])
        attention = build_attention(config, mesh=mesh)
        whole = whole_of(config, seat)
        ring = run_shard(attention, mesh, whole)
        members = agree(seat.store(), identity=f"rank-{seat.rank}", generation=1, size=seat.size, local=True)
        rebuild(attention, mesh=None, generation=members.generation)
        leaves = [x.requires_grad_() for x in whole[:3]]
        out, lse = attention(*leaves, return_lse=True)
        alone = (out, lse, *torch.autograd.grad(out, leaves, whole[3]))
        parts = [shard_sequence(x.detach(), mesh, dim) for x, dim in zip(alone, DIMS, strict=True)]
        apart = max(float((a - b).abs().max()) for a, b in zip(ring, parts, strict=True))
        return {"apart": apart, "local": members.local, "backend": repr(type(attention._engine).__name__)}
