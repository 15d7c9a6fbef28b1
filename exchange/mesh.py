"""Rings over a device mesh: which ranks form one, its communicator, and tensors cut into and joined from shards."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from ..core.checks import plain_int, require_int
from ..core.errors import ConfigError
from .communicator import Communicator, Origin
from .setup import compare_plans, connect, refuse
from .shards import shard_length

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

    from ..core.context_parallel import ContextParallel
    from ..core.plan import AttentionPlan


@attrs.define(eq=False)
class _Built:
    """What was built over one process group: how often, and the communicators that are shared while any is used."""

    count: int = 0
    rings: WeakValueDictionary[tuple[object, ...], Communicator] = attrs.field(factory=WeakValueDictionary)


# By torch's group, so that a new one after a failure starts from nothing, on old and new ranks alike.
_BUILT: Final[WeakKeyDictionary[Any, _Built]] = WeakKeyDictionary()
_LOCK: Final = threading.Lock()


@attrs.frozen
class Place:
    """Where this rank stands: ring `ring` of those that the mesh is cut into, at `rank` of `size`."""

    ring: int
    rank: int
    size: int


def check_mesh(mesh: object, size: int | None) -> Place:
    """The place of this rank among rings of `size` consecutive ranks of `mesh`; None: one ring of all.

    Raises:
        ConfigError: no mesh, one of several dimensions or without this rank, or a size that does not divide it.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(
            f"mesh must be a torch DeviceMesh such as init_device_mesh('cpu', (4,)), got {mesh!r} "
            f"({type(mesh).__name__})"
        )
    if mesh.ndim != 1:
        names = ", ".join(repr(name) for name in mesh.mesh_dim_names or ())
        raise ConfigError(
            f"mesh must have one dimension, got {mesh.ndim} ({names or 'unnamed'}); pass one of them, as mesh['name']"
        )
    ranks = mesh.size()
    if size is None:
        size = ranks
    if size > ranks or ranks % size:
        divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"context_parallel.size must divide the {ranks} ranks of the mesh, got {size}; it can be {divisors}"
        )
    if mesh.get_coordinate() is None:
        raise ConfigError(
            f"this rank, {dist.get_rank()}, is not in the mesh, of ranks {', '.join(map(str, mesh.mesh.tolist()))}: "
            "call this on those alone"
        )
    return Place(mesh.get_local_rank() // size, mesh.get_local_rank() % size, size)


def _built_over(mesh: DeviceMesh) -> _Built:
    with _LOCK:
        return _BUILT.setdefault(mesh.get_group(), _Built())


def _next_build(mesh: DeviceMesh, generation: int) -> tuple[int, Store]:
    """The number of a build that all ranks of `mesh` take part in, and a store of its generation."""
    built = _built_over(mesh)
    with _LOCK:
        built.count += 1
        return built.count, PrefixStore(f"dilated_attention/generation-{generation}", _store_of(mesh.get_group()))


@contextmanager
def refusals_told(mesh: object, *, generation: int = 0) -> Iterator[None]:
    """Tell the other ranks of `mesh` what this one cannot build: they are about to wait for it.

    So all of them count the build, and the next one finds them together. Of an unusable mesh nobody is told.
    """
    try:
        check_mesh(mesh, None)
    except ConfigError:
        yield  # which finds the same
        return
    usable: Any = mesh
    built = _built_over(usable)
    before = built.count
    try:
        yield
    except Exception as error:
        if built.count == before:  # else they have all been waited for
            number, store = _next_build(usable, generation)
            with suppress(RuntimeError):  # a store that has failed, of which the others hear as well
                refuse(PrefixStore(f"build-{number}", store), usable.get_local_rank(), error)
        raise


def plan_facts(plan: AttentionPlan) -> dict[str, Any]:
    """What must be equal on all ranks of a mesh, as plain values."""
    facts = {f"config.{name}": value for name, value in plan.config.items() if name != "device"}
    facts |= {"device type": plan.device["type"], "backend": plan.backend, "kernel": plan.kernel}
    if plan.exchange is not None and plan.exchange.companion is not None:
        facts |= {"companion": plan.exchange.companion, "companion's kernel": plan.exchange.companion_kernel}
    return facts | {f"version of {name}": version for name, version in plan.versions.items() if name != "python"}


def ring_of(
    mesh: DeviceMesh, parallel: ContextParallel, facts: Mapping[str, Any], *, transport: str, generation: int
) -> tuple[Communicator, Origin]:
    """The communicator of this rank's ring and the number of this build.

    All ranks of the mesh have then found that they build the same.

    Attentions that are built alike over one mesh share a communicator. It is a group of its own: torch's groups stay
    their owner's.

    Args:
        mesh: one-dimensional.
        parallel: what was asked for.
        facts: plain values that must be equal on all ranks.
        transport: "gloo_cpu" or "ring_nccl".
        generation: 0 for a first build.

    Raises:
        ConfigError: `check_mesh`'s, or the ranks build different things.
        RingBroken: a rank did not build with the others, or could not be connected in time.
    """
    place = check_mesh(mesh, parallel.size)
    key = (parallel, transport, generation)
    built = _built_over(mesh)
    with _LOCK:
        ring = built.rings.get(key)
    if ring is not None and ring.broken is not None:
        ring = None
    number = 0 if ring is None else ring.number
    try:
        count, prefix, numbers = compare(mesh, parallel, facts, transport=transport, generation=generation, ring=number)
    except BaseException:
        ring = None  # the error's traceback keeps what is here
        raise
    # Another rank may have dropped the ring already, or know that it is broken.
    if ring is None or any(theirs != number for theirs in numbers[place.ring * place.size :][: place.size]):
        ring = connect(
            PrefixStore(f"ring-{count}-{place.ring}", prefix),
            place.rank,
            place.size,
            transport=transport,
            generation=generation,
            timeout_s=parallel.timeout_s,
            number=count,
        )
        with _LOCK:
            built.rings[key] = ring
    return ring, Origin(count)


def compare(
    mesh: DeviceMesh,
    parallel: ContextParallel,
    facts: Mapping[str, Any],
    *,
    transport: str | None,
    generation: int,
    ring: int = 0,
) -> tuple[int, Store, list[int]]:
    """`_next_build`, once all ranks of the mesh have found that they build the same, and every rank's `ring`.

    Arguments and errors as of `ring_of`; no transport where no ranks share a sequence; `ring` is the number of one that
    this rank has for it, or 0.
    """
    count, store = _next_build(mesh, generation)
    told = dict(facts) | {"mesh": mesh.size(), "generation": generation, "transport": transport}
    place = PrefixStore(f"build-{count}", store), mesh.get_local_rank(), mesh.size()
    return count, store, compare_plans(*place, told, parallel.timeout_s, generation=generation, ring=ring)


def _store_of(group: Any) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


def shard_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1, *, size: int | None = None) -> Tensor:
    """The contiguous shard of this rank, of a tensor that every rank has whole.

    Args:
        x: with the sequence along `dim`; its length is a multiple of the ring's size.
        mesh: one-dimensional.
        dim: the sequence's dimension; below 0 counted from the last.
        size: ranks that share a sequence, where they are not all of the mesh (`ContextParallel.size`).

    Raises:
        ConfigError: no tensor, a length that cannot be cut, naming the nearest ones, a dimension that `x` has not, or a
            mesh that does not fit.
    """
    place, dim = check_mesh(mesh, size), _dimension(_tensor(x), dim)
    length = shard_length(x.shape[dim], place.size)
    return x.narrow(dim, place.rank * length, length).contiguous()


def unshard_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1, *, size: int | None = None) -> Tensor:
    """The whole tensor from the ranks' shards, on every rank; collective over the mesh, with its own group.

    Args:
        x: this rank's shard, as long as the others'; detached, since a loss belongs on the shards.
        mesh: one-dimensional.
        dim: the sequence's dimension; below 0 counted from the last.
        size: ranks that share a sequence, where they are not all of the mesh.

    Raises:
        ConfigError: `x` requires a gradient, which would be lost, ranks have shards of different shapes or dtypes, a
            dimension that `x` has not, or a mesh that does not fit.
    """
    if _tensor(x).requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "unshard_sequence gathers values, not gradients: compute the loss on the shards, or pass x.detach()"
        )
    place, dim = check_mesh(mesh, size), _dimension(x, dim)
    _check_alike(x, mesh)
    parts = _gathered(x, mesh)
    return torch.cat(parts[place.ring * place.size :][: place.size], dim)


def _tensor(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise ConfigError(
            f"what ranks share must be a tensor, got {x!r} ({type(x).__name__}); torch.as_tensor makes one"
        )
    return x


def _dimension(x: Tensor, dim: int) -> int:
    plain = plain_int(dim)
    if not isinstance(plain, int) or not -x.dim() <= plain < x.dim():
        raise ConfigError(
            f"dim must be one of the {x.dim()} dimensions of a tensor of shape {tuple(x.shape)}, got {dim!r}"
        )
    return plain


def _check_alike(x: Tensor, mesh: DeviceMesh) -> None:
    """What is gathered is of one shape and dtype; else some rank would be given other numbers, or wait for ever."""
    words = f"{tuple(x.shape)} {x.dtype}".encode().ljust(256)
    told = _gathered(torch.tensor([*words], dtype=torch.uint8, device=x.device), mesh)
    said = [bytes(part.tolist()).decode().strip() for part in told]
    if len(set(said)) > 1:
        sides = [
            f"{each} on rank {', '.join(str(i) for i, one in enumerate(said) if one == each)}" for each in set(said)
        ]
        raise ConfigError(f"shards must be of one shape and dtype on all ranks, got {'; '.join(sorted(sides))}")


def _gathered(x: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """`x` of all ranks of the mesh."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(parts, x, group=mesh.get_group())
    return parts


def local_positions(seq_len: int, mesh: DeviceMesh, *, size: int | None = None) -> Tensor:
    """Absolute positions of this rank's shard, (seq_len / size,) int64 on the mesh's device.

    Args:
        seq_len: of the whole sequence.
        mesh: one-dimensional.
        size: ranks that share a sequence, where they are not all of the mesh.

    Raises:
        ConfigError: a length that cannot be cut, naming the nearest ones, or a mesh that does not fit.
    """
    require_int("seq_len", seq_len, minimum=0)
    place = check_mesh(mesh, size)
    length = shard_length(seq_len, place.size)
    return torch.arange(place.rank * length, (place.rank + 1) * length, device=mesh.device_type)
