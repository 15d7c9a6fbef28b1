"""After a failure, or to change the number of ranks: agree who is there, then rebuild a model's rings over them.

A transaction of the caller's: a broken pass is never retried. Survivors (and newcomers) agree on members and
generation, the caller makes a new process group and mesh from that, `rebuild` rebinds the model's attentions, and the
whole step is run again on shards cut anew. Nothing of this touches parameters.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import attrs
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..core.attention import Attention
from ..core.checks import require_int
from ..core.config import AttentionConfig
from ..core.context_parallel import require_wait
from ..core.engine import Engine
from ..core.errors import ConfigError, RingBroken
from ..core.plan import AttentionPlan, ExchangeSummary
from .deadlines import read_store
from .engine import RingEngine
from .mesh import check_mesh, plan_facts, refusals_told, ring_of
from .ring_kernel import RingKernel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ROOM: Final = "dilated_attention/agreement"
_LOOK_EVERY_S: Final = 0.02


@attrs.frozen(kw_only=True)
class Membership:
    """Who forms a generation.

    Attributes:
        generation: its number.
        rank: this process's number among the members.
        size: how many they are.
        members: their identities, sorted; a member's rank is its place here.
        local: all have agreed that each computes whole sequences by itself.
        store: for `torch.distributed.init_process_group(store=..., rank=rank, world_size=size)`.
    """

    generation: int
    rank: int
    size: int
    members: tuple[str, ...]
    local: bool
    store: Store = attrs.field(eq=False, repr=False)


def agree(
    store: Store,
    *,
    identity: str,
    generation: int | None = None,
    size: int | None = None,
    local: bool = False,
    settle_s: float = 2.0,
    timeout_s: float = 30.0,
) -> Membership:
    """Find out, with all others that call this for the same generation, who they are.

    Args:
        store: a torch store that outlives every rank (a TCPStore of its own process, torchrun's, or a FileStore).
        identity: a name that this process keeps, different from all others'.
        generation: the one to form; survivors give `error.generation + 1`. None: the next after the last one formed,
            for newcomers.
        size: how many must come; None: whoever comes until nobody new has come for `settle_s`.
        local: agree that each computes whole sequences by itself from now on; all must say so.
        settle_s: see `size`.
        timeout_s: longest wait for the outcome, at most a week.

    Raises:
        ConfigError: the participants want different things, or two have one identity.
        RingBroken: fewer than `size` came, the outcome was not there in time, or it was settled without this call,
            also where an earlier call of this process took part; `error.generation + 1` is the one to form then.
    """
    require_wait("timeout_s", timeout_s)
    formed = PrefixStore(_ROOM, store)
    last = _last_formed(formed)
    if generation is None:
        generation = last + 1
    require_int("generation", generation, minimum=1)
    if generation <= last:  # its members may be gone, and are not waiting
        raise RingBroken(last, 0, None, f"generation {generation} is over: agree on generation {last + 1}")
    deadline = time.monotonic() + timeout_s
    room = PrefixStore(f"{_ROOM}/{generation}", store)
    number = room.add("count", 1)
    room.set(f"joined/{number}", json.dumps({"identity": identity, "size": size, "local": local}))
    if number == 1:  # the first to come waits for the others and writes down who is in
        room.set("verdict", json.dumps(_verdict(room, size, settle_s, deadline)))
        formed.set("generation", str(max(generation, _last_formed(formed))))
    hint = f"agree on generation {generation + 1}"
    try:
        verdict = json.loads(read_store(room, "verdict", deadline + 1.0))
    except RuntimeError as error:
        reason = f"its members were not settled within {timeout_s:g} s; {hint}"
        raise RingBroken(generation, 0, None, reason) from error
    if verdict["conflict"]:
        raise ConfigError(f"{verdict['error']}; make them alike, and {hint}")
    if verdict["error"]:
        raise RingBroken(generation, 0, None, f"{verdict['error']}; {hint}")
    members = verdict["members"]
    if number > verdict["count"]:  # also one that has the name of a member
        reason = f"{identity!r} came after its members were settled ({', '.join(members)}); {hint}"
        raise RingBroken(generation, 0, None, reason)
    return Membership(
        generation=generation,
        rank=members.index(identity),
        size=len(members),
        members=tuple(members),
        local=local,
        store=PrefixStore(f"dilated_attention/members-{generation}", store),
    )


def _last_formed(formed: Store) -> int:
    return int(formed.get("generation")) if formed.check(["generation"]) else 0


def _verdict(room: Store, size: int | None, settle_s: float, deadline: float) -> dict[str, Any]:
    """Wait until enough have come, or nobody new for `settle_s`, and judge what they want."""
    count, changed = 1, time.monotonic()
    while (now := time.monotonic()) < deadline:
        found = room.add("count", 0)
        if found != count:
            count, changed = found, now
        if count >= size if size is not None else now - changed >= settle_s:
            break
        time.sleep(_LOOK_EVERY_S)
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    room.wait([f"joined/{number}" for number in range(1, count + 1)], left)
    said = [json.loads(room.get(f"joined/{number}")) for number in range(1, count + 1)]
    members = sorted(record["identity"] for record in said)
    if len(set(members)) < len(members):
        return {"error": f"two participants have the same identity among {members}", "conflict": True}
    for wish in ("size", "local"):
        wishes = {record["identity"]: record[wish] for record in said}
        if len(set(wishes.values())) > 1:
            return {"error": f"the participants want different things, {wish} by identity: {wishes}", "conflict": True}
    if size is not None and count != size:
        return {"error": f"{count} came where {size} were to: {', '.join(members)}", "conflict": False}
    return {"error": "", "conflict": False, "members": members, "count": count}


def rebuild(model: nn.Module, *, mesh: DeviceMesh | None, generation: int) -> None:
    """Rebind every context-parallel attention of `model` to a ring over all ranks of `mesh`; collective over it.

    Either all of them are rebound or none, and then nothing of the new ring is left. A ring is closed with the last
    attention that uses it. Attentions built with `ContextParallel(size=1)` take part too, so that newcomers can build a
    model before they know their ring.

    Args:
        model: with `Attention` modules, or one itself.
        mesh: one-dimensional, over the members of the generation; None where they have agreed on `local`: each rank
            then computes whole sequences by itself, with the results that the ring gave.
        generation: from `agree`.

    Raises:
        ConfigError: nothing to rebind, a mesh that does not fit, or a configured seq_len that the new size does not
            divide.
        RingBroken: a rank did not take part, or could not be connected. `error.generation + 1` is the one to agree on.
    """
    require_int("generation", generation, minimum=1)
    rebound: list[tuple[Attention, AttentionPlan, Engine]] = []
    try:
        with nullcontext() if mesh is None else refusals_told(mesh, generation=generation):
            found = [m for m in model.modules() if isinstance(m, Attention) and m.config.context_parallel is not None]
            if not found:
                raise ConfigError(
                    "rebuild found no attention that was built with context_parallel=ContextParallel(size=...)"
                )
            size = 1 if mesh is None else check_mesh(mesh, None).size
            configs = [_config(attention, size) for attention in found]
            plans = [_evolved(attention, config) for attention, config in zip(found, configs, strict=True)]
            for attention, config, plan in zip(found, configs, plans, strict=True):
                rebound.append((attention, plan, _engine(attention, config, plan, mesh, generation)))
    except BaseException as error:
        rebound.clear()  # closes what they alone have, which the error's traceback would keep
        if not isinstance(error, RingBroken):
            raise
        reason = f"{error.reason}; nothing was rebuilt: agree on generation {generation + 1}, and rebuild for that"
        raise RingBroken(generation, error.step, error.peer, reason) from error
    for attention, plan, engine in rebound:
        attention._rebind(engine.config, plan, engine)


def _config(attention: Attention, size: int) -> AttentionConfig:
    """The attention's configuration for another number of ranks, of which it judges seq_len."""
    assert attention.config.context_parallel is not None
    return attrs.evolve(attention.config, context_parallel=attrs.evolve(attention.config.context_parallel, size=size))


def _evolved(attention: Attention, config: AttentionConfig) -> AttentionPlan:
    """The attention's plan for that."""
    parallel, exchange = config.context_parallel, None
    if parallel is not None and parallel.size > 1:
        transport = parallel.transport_for(attention.plan.device["torch_name"].partition(":")[0])
        exchange = ExchangeSummary(transport=transport, size=parallel.size, timeout_s=float(parallel.timeout_s))
        kernel = attention._engine.kernel
        if isinstance(kernel, RingKernel):
            exchange = attrs.evolve(exchange, companion=kernel.companion, companion_kernel=kernel.dense.name)
    return attrs.evolve(attention.plan, config=config.to_dict(), exchange=exchange)


def _engine(
    attention: Attention, config: AttentionConfig, plan: AttentionPlan, mesh: DeviceMesh | None, generation: int
) -> Engine:
    old, parallel = attention._engine, config.context_parallel
    axes = old.local_axes if isinstance(old, RingEngine) else old.call_axes
    names = {"backend": old.backend, "kernel_name": old.kernel_name, "plan": plan.digest}
    traits: dict[str, Any] = {"has_dlse": old.has_dlse, "call_axes": axes, **names}
    if plan.exchange is None or mesh is None or parallel is None:
        takes_layout = isinstance(old.kernel, RingKernel)
        return Engine(config, old.pattern, old.kernel, takes_layout=takes_layout, **traits)
    ring = ring_of(mesh, parallel, plan_facts(plan), transport=plan.exchange.transport, generation=generation)
    return RingEngine(config, old.pattern, old.kernel, ring=ring, **traits)  # type: ignore[arg-type]
