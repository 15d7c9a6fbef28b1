"""From a configuration to a plan, and from a plan to an attention: the one place where a backend is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Unpack

import attrs

from ..core.config import AttentionConfig, check_fields
from ..core.errors import ConfigError, NoBackendError, PluginError
from ..core.kernel import CALL_AXES, WIDENING, ForOneLength, takes_dlse, takes_dropout
from ..core.pattern import Pattern
from ..core.plan import AttentionPlan
from .capabilities import make_request
from .device import describe_card, describe_device
from .discovery import Registry, default_registry
from .patterns import resolve_pattern
from .planning import is_blocks_alone, plan_of
from .plugins import PLUGIN_FAULTS, describe
from .selection import Selection, Verdict, judge, select, takes_dense
from .specs import Device, Request

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.attention import Attention
    from ..core.config_fields import ConfigFields
    from ..core.engine import Engine
    from ..core.kernel import DenseKernel, LayoutKernel
    from ..exchange.preflight import Preflight
    from ..exchange.ring_kernel import RingKernel


def build_attention(
    config: AttentionConfig | Mapping[str, Any] | None = None,
    /,
    *,
    like: Tensor | None = None,
    mesh: object = None,
    **fields: Unpack[ConfigFields],
) -> Attention:
    """Choose a backend and build the attention. Nothing is chosen later: forward is one bound call.

        attention = build_attention(pattern=Local((255, 0)), num_heads=8, head_dim=64, is_causal=True)
        out = attention(query, key, value)  # each (batch, seq_len, num_heads, head_dim)
        print(attention.plan.explain())

    Args:
        config: the configuration, or a mapping of it.
        like: queries to build for, (batch, seq_len, num_heads, head_dim) or as `tensor_layout` says; gives num_heads,
            head_dim, dtype and device to those of `fields` that do not.
        mesh: a torch DeviceMesh of one dimension (of a larger one: `mesh["name"]`), where `context_parallel` asks for
            ranks that share a sequence. All its ranks build at once, and alike.
        fields: fields of `AttentionConfig`; beside `config` they replace its own.

    Returns:
        An `nn.Module` called with query, key and value; its `plan` says what was chosen and why.

    Raises:
        ConfigError: for an input that no backend could honour.
        NoBackendError: when no backend, or not the one asked for by name, takes the request; the message is the table.
        PluginError: when the chosen backend breaks its contract while building.
        RingBroken: when not all ranks of the mesh build, or can be connected, in time.
    """
    with nullcontext() if mesh is None else _refusals_told(mesh):
        given: Mapping[str, object] = fields if like is None else {**_fields_of(like, config, fields), **fields}
        return build_from(_config(config, given), default_registry(), mesh=mesh)


def _refusals_told(mesh: object) -> AbstractContextManager[None]:
    """Whatever cannot be built is told to all ranks of the mesh."""
    from ..exchange.mesh import refusals_told

    return refusals_told(mesh)


def build_from(config: AttentionConfig, registry: Registry, *, mesh: object = None) -> Attention:
    """`build_attention` with the backends and patterns of `registry`."""
    from ..core.attention import Attention
    from ..core.engine import Engine

    _check_parallel(config, mesh)
    config, request, selection = _select(config, describe_device(config.device), registry)
    plan = plan_of(config, request, selection)
    if selection.chosen is None:
        raise NoBackendError(plan.explain())
    capabilities = selection.chosen.registered.spec.capabilities
    kernel = _kernel(selection.chosen, request)
    has_dlse = takes_dlse(kernel) or _has_dlse(selection.chosen, request)
    if selection.companion is not None:
        dense: Any = _kernel(selection.companion, request)
        has_dlse = has_dlse and (takes_dlse(dense) or _has_dlse(selection.companion, request))
        kernel = _ring_kernel(kernel, dense, selection.chosen, selection.companion)
    traits: dict[str, Any] = {
        "has_dlse": has_dlse,
        "call_axes": frozenset(axis for axis in CALL_AXES if capabilities.get(axis, False)),
        "backend": plan.backend,
        "kernel_name": plan.kernel,
        "plan": plan.digest,
    }
    if config.ring_size > 1:
        return Attention(config, plan, _ring_engine(config, request, plan, kernel, mesh, traits))
    if mesh is not None:
        _compare(config, plan, mesh)
    takes_layout = not takes_dense(selection.chosen.registered.spec)
    return Attention(config, plan, Engine(config, request.pattern, kernel, takes_layout=takes_layout, **traits))


def _check_parallel(config: AttentionConfig, mesh: object) -> None:
    """A mesh exactly where ranks share a sequence, and fit for it."""
    if config.context_parallel is None:
        if mesh is not None:
            raise ConfigError(
                f"mesh is for context_parallel=ContextParallel(size=...), which the config has not, got {mesh!r}"
            )
        return
    if config.ring_size == 1 and mesh is None:
        return
    from ..exchange.mesh import check_mesh

    check_mesh(mesh, config.ring_size)


def _ring_kernel(kernel: Any, dense: Any, chosen: Verdict, companion: Verdict) -> RingKernel:
    """The chosen kernel, for whole layouts, with its companion's."""
    from ..exchange.ring_kernel import RingKernel

    takes_staged = bool(chosen.registered.spec.capabilities.get("staged_blocks", False))
    return RingKernel(kernel, dense, companion.registered.spec.name, takes_staged)


def _ring_engine(
    config: AttentionConfig, request: Request, plan: AttentionPlan, kernel: Any, mesh: Any, traits: dict[str, Any]
) -> Engine:
    """The chosen kernel inside the ring that this rank belongs to."""
    from ..exchange.engine import RingEngine
    from ..exchange.mesh import plan_facts, ring_of

    assert config.context_parallel is not None
    assert plan.exchange is not None
    transport = plan.exchange.transport
    ring = ring_of(mesh, config.context_parallel, plan_facts(plan), transport=transport, generation=0)
    return RingEngine(config, request.pattern, kernel, ring=ring, **traits)


def _compare(config: AttentionConfig, plan: AttentionPlan, mesh: Any) -> None:
    """Ranks that share no sequence are asked too: others may be about to wait for them."""
    from ..exchange.mesh import compare, plan_facts

    assert config.context_parallel is not None
    compare(mesh, config.context_parallel, plan_facts(plan), transport=None, generation=0)


def explain(
    config: AttentionConfig | Mapping[str, Any] | None = None,
    /,
    *,
    like: Tensor | None = None,
    arch: str | None = None,
    registry: Registry | None = None,
    **fields: Unpack[ConfigFields],
) -> AttentionPlan:
    """The plan that `build_attention` would freeze, without building a kernel or allocating a tensor.

    Where no backend fits, the plan's `backend` is None and its rows say why; nothing is raised for that.

    Args:
        config: the configuration, or a mapping of it.
        like: as `build_attention` takes it; beside `arch` its device is not looked at.
        arch: the CUDA card to judge for, "sm_90", whether it is here or not; the device is "cuda" then. For one that is
            not here the plan is an estimate, and its `premises` say what it rests on. If torch's current card is of
            that architecture, this is the plan for it as without `arch`.
        registry: where backends are looked up; by default the process's own.
        fields: fields of `AttentionConfig`; beside `config` they replace its own.

    Raises:
        ConfigError: for an input that no backend could honour, and an arch that is none.
    """
    given: Mapping[str, object] = fields
    if like is not None:
        said = _fields_of(like, config, fields)
        if arch is not None:
            del said["device"]
        given = {**said, **fields}
    config = _config(config, given)
    if arch is None:
        device = describe_device(config.device)
    else:
        device, config = describe_card(arch, config.device), attrs.evolve(config, device="cuda")
    return plan_of(*_select(config, device, registry or default_registry()))


def preflight(
    config: AttentionConfig | Mapping[str, Any] | None = None,
    /,
    *,
    ranks: int,
    batch: int = 1,
    registry: Registry | None = None,
    **fields: Unpack[ConfigFields],
) -> Preflight:
    """What sharing a sequence between `ranks` ranks will cost each of them; nothing is built and none is needed.

    Args:
        config: the configuration, or a mapping of it, with a seq_len; its context_parallel is not looked at.
        ranks: any number up to 1,048,576 that divides the length.
        batch: batch size.
        registry: where patterns are looked up; by default the process's own.
        fields: fields of `AttentionConfig`; beside `config` they replace its own.

    Raises:
        ConfigError: a length that cannot be shared so, or an input that no backend could honour.
    """
    from ..exchange.preflight import preflight as simulate

    resolved = _config(config, {**fields, "context_parallel": None})
    return simulate(resolved, resolve_pattern(resolved.pattern, registry or default_registry()), ranks, batch=batch)


def _config(config: AttentionConfig | Mapping[str, Any] | None, fields: Mapping[str, object]) -> AttentionConfig:
    if config is None:
        return AttentionConfig.from_dict(fields)
    if isinstance(config, Mapping):
        return AttentionConfig.from_dict({**config, **fields})
    if not isinstance(config, AttentionConfig):
        hint = "; AttentionConfig.from_file reads a file" if isinstance(config, str | PurePath) else ""
        if isinstance(config, Pattern):
            hint = "; a pattern is a field: pattern=..."
        raise ConfigError(
            f"config must be an AttentionConfig or a mapping, got {config!r} ({type(config).__name__}){hint}"
        )
    check_fields(fields)
    known: dict[str, Any] = dict(fields)
    return attrs.evolve(config, **known) if known else config


def _fields_of(like: Tensor, config: object, fields: Mapping[str, object]) -> dict[str, Any]:
    """What a tensor says about a configuration."""
    if config is not None:
        raise ConfigError("give either a config or like=: both say num_heads, head_dim, dtype and device")
    layout = fields.get("tensor_layout", "bshd")
    shape = getattr(like, "shape", None)
    if shape is None or len(shape) != 4:
        found = f"shape {tuple(shape)}" if shape is not None else f"{like!r}"
        raise ConfigError(f"like must be a tensor with the four dimensions {layout!r}, got {found}")
    heads = like.shape[1] if layout == "bhsd" else like.shape[2]
    return {"num_heads": heads, "head_dim": like.shape[3], "dtype": like.dtype, "device": like.device}


def _select(config: AttentionConfig, device: Device, registry: Registry) -> tuple[AttentionConfig, Request, Selection]:
    pattern = resolve_pattern(config.pattern, registry)
    config = attrs.evolve(config, pattern=pattern)  # validates the pattern against the heads
    request = make_request(config, pattern, device)
    return config, request, select(request, registry)


def _has_dlse(chosen: Verdict, request: Request) -> bool:
    """Whether a gradient through the returned lse reaches the inputs.

    A kernel for layouts says so itself, and whatever computes tables of blocks for dense kernels does it. Dense pieces
    carry it in `WIDENING` more columns, so the backend must take that head_dim with the very kernel that was pinned.
    """
    if not takes_dense(chosen.registered.spec):
        return bool(chosen.registered.spec.capabilities.get("dlse", False))
    if is_blocks_alone(request):
        return True
    wider = attrs.evolve(request.config, head_dim=request.config.head_dim + WIDENING)
    verdict = judge(chosen.registered, make_request(wider, request.pattern, request.device))
    return verdict.accepts and verdict.kernel == chosen.kernel


def _kernel(chosen: Verdict, request: Request) -> DenseKernel | LayoutKernel:
    """The chosen backend's kernel."""
    registered = chosen.registered
    assert chosen.backend is not None
    try:
        kernel = chosen.backend.build(request)
    except ConfigError:
        raise
    except PLUGIN_FAULTS as error:  # said with its origin; another backend is not tried in its place
        name, origin = registered.spec.name, registered.source.origin
        raise PluginError(f"backend {name!r} of {origin} failed while building: {describe(error)}") from error
    parts = ("name", "forward", "backward")
    lacking = [part for part in parts if not hasattr(kernel, part)]
    if request.config.dropout_p and takes_dense(registered.spec) and not takes_dropout(kernel):
        lacking.append("dropping")
    if isinstance(kernel, ForOneLength):
        lacking += [f"other_lengths.{part}" for part in parts if not hasattr(kernel.other_lengths, part)]
    if lacking:
        name, origin = registered.spec.name, registered.source.origin
        made = f"{type(kernel).__module__}.{type(kernel).__qualname__}"
        remedy = "; add it, or declare no dropout" if lacking == ["dropping"] else ""
        raise PluginError(f"backend {name!r} of {origin} built {made}, a kernel without {', '.join(lacking)}{remedy}")
    return kernel
