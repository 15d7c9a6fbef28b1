"""The plan of a selection: what was chosen, what it computes, and what it costs; nothing is built."""

from __future__ import annotations

import platform
from typing import Any

import attrs

from ..core.bands import bands_of
from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.pattern import LearnedPattern, Pattern
from ..core.plan import MATRIX_PRODUCTS, AttentionPlan, ExchangeSummary, LayoutSummary
from ..core.version import VERSION
from .device import premises_of
from .selection import Selection, Verdict, takes_dense
from .specs import Request


def plan_of(config: AttentionConfig, request: Request, selection: Selection) -> AttentionPlan:
    """The plan of what was selected for a request, or of why nothing was."""
    import torch

    chosen = selection.chosen
    compiles = str(chosen.registered.spec.capabilities.get("compile", "none")) if chosen else "none"
    exchange = _exchange_summary(config, request, selection.companion)
    rows = selection.rows
    if exchange is None and is_blocks_alone(request):
        rows = tuple(
            attrs.evolve(row, kernel=MATRIX_PRODUCTS) if row.kernel and row.blocks_by_core else row for row in rows
        )
    return AttentionPlan(
        config=config.to_dict(),
        device=attrs.asdict(request.device),
        backend=chosen.registered.spec.name if chosen else None,
        kernel=next((row.kernel for row in rows if row.status == "chosen"), ""),
        rows=rows,
        layout=_layout_summary(config, request, chosen),
        compile_class="none" if config.ring_size > 1 else compiles,
        exchange=exchange,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "dilated_attention": VERSION,
        },
        premises=premises_of(request.device),
    )


def is_blocks_alone(request: Request) -> bool:
    """Whether the pattern has nothing for a kernel of dense pieces: neither branches nor bands."""
    return request.needs["layouts"] == ("block",) and bands_of(request.pattern) is None


def _exchange_summary(config: AttentionConfig, request: Request, companion: Verdict | None) -> ExchangeSummary | None:
    if config.context_parallel is None or config.ring_size == 1:
        return None
    if isinstance(request.pattern.unwrap(), LearnedPattern):
        raise ConfigError(
            f"a {request.pattern.kind} pattern chooses its blocks from the whole sequence, which no rank of a "
            "context_parallel ring has; use what attention.gate.freeze(query, key) returns"
        )
    device_type = request.device.torch_name.partition(":")[0]
    return ExchangeSummary(
        transport=config.context_parallel.transport_for(device_type),
        size=config.ring_size,
        timeout_s=float(config.context_parallel.timeout_s),
        companion=companion.registered.spec.name if companion else None,
        companion_kernel=companion.kernel if companion else "",
    )


def _layout_summary(config: AttentionConfig, request: Request, chosen: Verdict | None) -> LayoutSummary:
    """Of what the chosen backend computes: dense kernels take bands as they are, but on ranks of a ring."""
    pattern, kinds = request.pattern, request.needs["layouts"]
    if isinstance(pattern.unwrap(), LearnedPattern):
        return LayoutSummary(kinds=("dynamic",))
    from ..core.band_calls import branches_and_bands
    from ..core.layout import Layout
    from ..core.lowering import lower

    has_bands = False
    if chosen is not None and takes_dense(chosen.registered.spec) and config.ring_size == 1:
        has_bands = bool(branches_and_bands(pattern, config.one_token)[1])
    if has_bands:
        kinds = tuple("band" if kind == "block" else kind for kind in kinds)
    if config.seq_len is None:
        return LayoutSummary(kinds=kinds)
    geometry = config.geometry(config.seq_len)
    try:
        layout = lower(pattern, geometry, limit_bytes=config.limits.layout_bytes)
    except ConfigError:
        if config.ring_size > 1:
            return LayoutSummary(kinds=kinds)  # of the whole; each rank lowers its own rows, which may be as allowed
        if not has_bands:
            raise
        return _counted_in_bands(kinds, config, pattern)
    kept = Layout(pattern, geometry, layout.branches, None) if has_bands else layout
    return LayoutSummary(
        kinds=kinds,
        seq_len=config.seq_len,
        digest=layout.digest,
        nbytes=kept.nbytes,
        density=layout.density,
        keyless_queries=layout.keyless_queries,
        **_work(config, layout.pairs, layout.distinct_pairs),
    )


def _work(config: AttentionConfig, pairs: int, distinct: int | None) -> dict[str, Any]:
    """Fields of a `LayoutSummary`."""
    each = 4 * config.head_dim  # of a pair: two products, of a multiplication and an addition for each column
    distinct_flops = None if distinct is None else each * distinct
    return {"pairs": pairs, "distinct_pairs": distinct, "flops": each * pairs, "distinct_flops": distinct_flops}


def _counted_in_bands(kinds: tuple[str, ...], config: AttentionConfig, pattern: Pattern) -> LayoutSummary:
    """Without what only a table tells, which is larger than allowed and which no dense kernel needs."""
    from ..core.band_calls import dense_form
    from ..core.counting import allowed_pairs
    from ..core.layout import Layout

    assert config.seq_len is not None
    geometry = config.geometry(config.seq_len)
    dense = dense_form(pattern, geometry, windows=True) or dense_form(pattern, geometry, windows=False)
    assert dense is not None
    pairs = dense.schedule.pairs
    distinct = pairs if pattern.max_multiplicity == 1 else None
    return LayoutSummary(
        kinds=kinds,
        seq_len=config.seq_len,
        nbytes=Layout(pattern, geometry, dense.branches, None).nbytes,
        density=None if distinct is None else distinct / allowed_pairs(geometry),
        **_work(config, pairs, distinct),
    )
