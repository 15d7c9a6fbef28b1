"""A plan as text for people: aligned columns, every reason on a line of its own, nothing wrapped or cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from .plan import MATRIX_PRODUCTS

if TYPE_CHECKING:
    from .plan import AttentionPlan, BackendRow, NearMiss

_BLOCKS: Final = {"block", "dynamic"}  # kinds of layouts


def explain_plan(plan: AttentionPlan) -> str:
    """The text of `AttentionPlan.explain`."""
    lines = [_headline(plan), f"  for     {request_words(plan.config, plan.device)}"]
    first, *more = _layout_words(plan)
    lines += [f"  layout  {first}", *(f"          {line}" for line in more)]
    lines += _slow_words(plan)
    if plan.exchange is not None:
        ring = plan.exchange
        lines.append(
            f"  ring    {ring.transport} over {ring.size} ranks, timeout {ring.timeout_s:g} s, around each rank's own"
        )
        if ring.companion is not None:
            kernel = f" ({ring.companion_kernel})" if ring.companion_kernel else ""
            lines.append(
                f"          {plan.backend} over a rank's own keys, {ring.companion}{kernel} over received ones"
            )
    lines += [("  card    " if not i else "          ") + premise for i, premise in enumerate(plan.premises)]
    lines += _open_words(plan)
    releases = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    of_build = "" if plan.premises else f"; plan {plan.digest}"  # no counter or trace ever names an estimate
    lines += [f"  with    {releases}{of_build}", ""]
    header = ("backend", "status", "kernel", "from")
    cells = [(row.name, row.status, row.kernel or "-", _origin(row)) for row in plan.rows]
    table = list(columns([header, *cells]))
    lines.append(table[0])
    for row, line in zip(plan.rows, table[1:], strict=True):
        lines.append(line)
        lines += [f"    {reason}" for reason in row_reasons(row)]
    return "\n".join(lines)


def row_reasons(row: BackendRow) -> Iterator[str]:
    """Every reason for a row's status, and its near miss, a line each."""
    yield from (str(refusal) for refusal in row.refusals)
    if row.detail:
        yield row.detail
    if row.near_miss:
        yield f"-> {row.near_miss}"


def columns(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows of `table` with their cells aligned, two spaces between them, nothing cut."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def counted(number: int, noun: str) -> str:
    """`1 head`, `2 heads`, `16,384 tokens`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def amount(number: float, unit: str, *, base: int = 1000) -> str:
    """`1.2 GB`, `340 MFLOP`: three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if number < base or prefix == "Z":
            break
        number /= base
    return f"{number:.3g} {prefix}{unit}"


def request_words(config: Mapping[str, Any], device: Mapping[str, Any]) -> str:
    """The request of a plan in one line."""
    heads, kv_heads = config["num_heads"], config["num_kv_heads"]
    what = [
        "causal" if config["is_causal"] else "",
        f"{pattern_words(config['pattern'])} attention",
        f"over {counted(config['seq_len'], 'token')}" if config["seq_len"] else "",
    ]
    named = f"{device['arch']}, assumed" if device.get("is_assumed") else device.get("name")  # older records have none
    details = [
        counted(heads, "head") + (f" on {kv_heads} key-value" if kv_heads not in (None, heads) else ""),
        f"head_dim {config['head_dim']}",
        f"{config['dtype']} on {device['torch_name']}" + (f" ({named})" if named else ""),
        "with gradients" if config["requires_grad"] else "without gradients",
        "sequences of several lengths" if config.get("varlen") else "",  # older records have none
        f"dropout {config['dropout_p']:g}" if config["dropout_p"] else "",
        "deterministic" if config["deterministic"] else "",
    ]
    return f"{' '.join(w for w in what if w)}: {', '.join(d for d in details if d)}"


def pattern_words(pattern: Mapping[str, Any]) -> str:
    """The kinds of a pattern in its mapping form: `dilated`, `local | global`, `(local | global) + strided`."""
    kind, members = str(pattern["kind"]), pattern.get("of")
    if kind == "head_shard" and isinstance(members, Mapping):
        return f"{pattern_words(members)} (from head {pattern['first_head']} of {pattern['total_heads']})"
    if kind not in ("union", "sum") or not members:
        return kind
    names = [pattern_words(each) for each in members]
    return {"union": " | ", "sum": " + "}[kind].join(f"({n})" if " " in n else n for n in names)


def _headline(plan: AttentionPlan) -> str:
    asked, unjudged = plan.config["backend"], [row.name for row in plan.rows if row.status == "unjudged"]
    if plan.backend is None and asked in unjudged:
        return f"backend {asked!r}, asked for by name, could not be judged here"
    if plan.backend is None and asked == "auto" and unjudged:
        return "no backend fits that could be judged here"
    if plan.backend is None:
        return "no backend fits" if asked == "auto" else f"backend {asked!r} does not fit, and was asked for by name"
    kernel = f" ({plan.kernel})" if plan.kernel else ""
    how = "chosen" if asked == "auto" else "asked for by name"
    if plan.premises:
        how = f"would be {'chosen' if asked == 'auto' else 'used'} on {plan.device['arch']}"
    return f"{plan.backend}{kernel} {how}; torch.compile: {plan.compile_class}"


def _chosen(plan: AttentionPlan) -> BackendRow | None:
    return next((row for row in plan.rows if row.status == "chosen"), None)


def _has_blocks_by_core(plan: AttentionPlan) -> bool:
    chosen = _chosen(plan)
    return chosen is not None and chosen.blocks_by_core and not _BLOCKS.isdisjoint(plan.layout.kinds)


def _slow_words(plan: AttentionPlan) -> Iterator[str]:
    """That `auto` was left with what is slow, and what would bring back the fastest that takes a little less."""
    chosen = _chosen(plan)
    if chosen is None or plan.config["backend"] != "auto":
        return
    words = chosen.slow
    if not words and _has_blocks_by_core(plan) and plan.device["type"] != "cpu":  # there nothing is faster
        words = f"{chosen.name} leaves blocks to {MATRIX_PRODUCTS}"
    if words:
        near = [(row.name, row.near_miss) for row in plan.rows if row.near_miss is not None and row.near_miss.verified]
        near.sort(key=lambda found: _intrusion(found[1]))
        remedy = f"; {near[0][0]} {near[0][1]}" if near else ""
        yield f"  slow    {words}, as nothing faster takes this{remedy}"


def _intrusion(near: NearMiss) -> tuple[bool, int]:
    """Whether what is asked for would be given up, and how much would be changed."""
    return not near.changes.keys().isdisjoint(("dropout_p", "deterministic", "requires_grad")), len(near.changes)


def _open_words(plan: AttentionPlan) -> Iterator[str]:
    """Which backends might be chosen instead, though nothing here can tell."""
    statuses = [row.status for row in plan.rows]
    ahead = plan.rows[: statuses.index("chosen")] if "chosen" in statuses else ()
    if ahead:
        names = ", ".join(row.name for row in ahead)
        yield f"  open    {names} would rank before {plan.backend} and could not be judged here"


def _layout_words(plan: AttentionPlan) -> Iterator[str]:
    layout, num_heads = plan.layout, plan.config["num_heads"]
    if layout.kinds == ("dynamic",):
        yield "blocks, chosen at every call"
        return
    names = {"branch": "strided branches", "block": "blocks", "band": "windows and rectangles"}
    if plan.config["dropout_p"]:
        names["band"] += " (while weights are dropped blocks, where its kernel has no windows)"
    is_full = plan.config["pattern"]["kind"] == "full"
    kinds = "one dense call" if is_full else " and ".join(names.get(kind, kind) for kind in layout.kinds)
    if layout.flops is None or layout.nbytes is None:
        when = "by each rank for its own rows" if plan.exchange is not None else "when the length is known (seq_len)"
        yield f"{kinds}; lowered {when}"
        return
    overlaps = layout.distinct_flops and layout.distinct_flops != layout.flops
    saved = f", {amount(layout.distinct_flops or 0, 'FLOP')} in distinct pairs" if overlaps else ""
    of_what = "the causal" if plan.config["is_causal"] else "all"
    density = "" if layout.density is None else f", {layout.density:.2%} of {of_what} pairs"
    digest = "" if layout.digest is None else f", digest {layout.digest[:12]}"
    work = f"{amount(layout.flops, 'FLOP')} forward{saved}"
    yield f"{kinds}{density}, {work}, {amount(layout.nbytes, 'B')} of tables{digest}"
    if layout.keyless_queries:
        share = layout.keyless_queries / ((layout.seq_len or 1) * num_heads)
        yield f"{share:.2%} of the queries of all heads see no key: out is 0 there"


def _origin(row: BackendRow) -> str:
    return f"{row.distribution} {row.version}".strip() or "-"
