"""Checks of lengths and positions: ragged, unequal, offset, empty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from .case import Subject
from .measure import GRADIENTS, Finding, compare

# Around the powers of two that kernels tile by, and far below them.
RAGGED: Final = (1, 2, 3, 15, 17, 33, 63, 65, 127, 129)
UNEQUAL: Final = ((1, 40), (33, 77), (70, 71), (12, 5))
# Beyond what a kernel might hold of a row at once: more than 1,024 keys, and no multiple of a tile.
LONG: Final = 1100
OFFSETS: Final = ((40, 40, 3, 3), (40, 40, 1000, 1000), (37, 64, 30, 0), (64, 37, 5, 17), (20, 50, -7, -4))

# Sequences of one call, few and many, alike and not: places before the tokens and tokens of each row, and lengths.
PLACES: Final = 40
PADDED: Final = ((0, 40), (7, 33), (16, 24), (9, 24), (2, 24), (0, 0), (0, 31))
PACKED: Final = (0, 37, 16, 16, 16, 1, 0, 23)


def ragged(subject: Subject) -> Iterator[Finding]:
    """Lengths that are a multiple of nothing."""
    for length in RAGGED:
        yield from _compared(subject.at(q_len=length, kv_len=length), f"at length {length}")


def long_rows(subject: Subject) -> Iterator[Finding]:
    """One head's rows of more than 1,024 keys, every one of which counts."""
    bounds, results = subject.bounds_on(subject.inputs), subject.results
    for name, x in results.items():
        yield compare(name, x, subject.expected[name], bounds[name])


def unequal_lengths(subject: Subject) -> Iterator[Finding]:
    """Queries and keys of different lengths, the last query at the last key."""
    for q_len, kv_len in UNEQUAL:
        yield from _compared(subject.at(q_len=q_len, kv_len=kv_len), f"of {q_len} queries and {kv_len} keys")


def offsets(subject: Subject) -> Iterator[Finding]:
    """Positions are absolute, for the pattern and for causality alike."""
    for q_len, kv_len, q_offset, kv_offset in OFFSETS:
        if q_len == kv_len or subject.takes("unequal_lengths"):
            placed = subject.at(q_len=q_len, kv_len=kv_len, q_offset=q_offset, kv_offset=kv_offset)
            where = f"at offsets {q_offset} and {kv_offset} ({q_len} queries, {kv_len} keys)"
            yield from _compared(placed, where)


def decoding(subject: Subject) -> Iterator[Finding]:
    """Token by token, with a cache that drops what no later token reaches, each row is as at once."""
    case, inputs = subject.case, subject.inputs
    with torch.no_grad():
        cache = subject.attention.make_cache(case.batch)
        rows = [subject.attention.step(*(x[:, i : i + 1] for x in inputs), cache) for i in range(case.q_len)]
    yield compare("out", torch.cat(rows, dim=1), subject.expected["out"], subject.bounds["out"])


def empty_rows(subject: Subject) -> Iterator[Finding]:
    """A row without keys gives 0 and -inf and has no gradient; a call without keys or queries is answered."""
    if subject.takes("offsets"):
        yield from _empty(subject.at(q_offset=0, kv_offset=30), "before all keys")
    if subject.takes("unequal_lengths"):
        yield from _empty(subject.at(q_len=40, kv_len=10), "of 40 queries and 10 keys")
        yield from _empty(subject.at(q_len=5, kv_len=0), "without keys")
    yield from _empty(subject.at(q_len=0, kv_len=0), "of no queries")
    yield from _empty(subject.at(batch=0), "of no batch rows")


def _empty(subject: Subject, where: str) -> Iterator[Finding]:
    yield from _compared(subject, where)
    results = subject.results
    none = ~subject.sees.any(dim=-1).to(results["out"].device)  # (H, S)
    rows = {"out": results["out"].transpose(1, 2), "lse": results["lse"]}
    if "dq" in results:
        rows["dq"] = results["dq"].transpose(1, 2)
    for name, x in rows.items():
        wanted = -torch.inf if name == "lse" else 0.0
        wrong = int((x[:, none] != wanted).sum())
        problem = f"{wrong} numbers of rows without keys are not {wanted}" if wrong else ""
        yield Finding(what=f"{name} {where}", problem=problem)


def documents(subject: Subject) -> Iterator[Finding]:
    """Padded rows and packed documents: each sequence is alone, and what is padding takes no part."""
    device, length = subject.case.device, sum(PACKED)
    place = torch.arange(PLACES, device=device)
    mask = torch.stack([(place < before) | (place >= before + tokens) for before, tokens in PADDED])
    ends = torch.tensor([0, *PACKED], device=device).cumsum(0)
    padded = subject.at(batch=len(PADDED), q_len=PLACES, kv_len=PLACES)
    packed = subject.at(batch=1, q_len=length, kv_len=length)
    yield from _as_alone(padded, "of padded rows", key_padding_mask=mask)
    if subject.case.is_causal and subject.takes("unequal_lengths"):  # as with a cache: the last places have queries
        last = subject.at(batch=len(PADDED), q_len=PLACES // 2, kv_len=PLACES)
        yield from _as_alone(last, "of padded rows with fewer queries", key_padding_mask=mask)
    yield from _as_alone(packed, "of packed documents", cu_seqlens=ends)


def _as_alone(subject: Subject, where: str, **given: Any) -> Iterator[Finding]:
    results = subject.run(subject.inputs, **given)
    expected = subject.oracle(subject.inputs, through_lse=False, **given)
    yield from subject.compared(results, expected, where)


def refused_calls(subject: Subject) -> Iterator[Finding]:
    """Lengths, offsets and documents that the backend does not declare are an error, not a result."""
    from ...core.errors import ConfigError

    wanted = {"unequal_lengths": {"q_len": 5}, "offsets": {"q_offset": 3, "kv_offset": 3}, "varlen": {"batch": 1}}
    for axis, changes in wanted.items():
        if subject.takes(axis):
            continue
        other = subject.at(**changes)
        ends = torch.tensor([0, other.case.kv_len], device=other.case.device) if axis == "varlen" else None
        try:
            other.run(other.inputs, cu_seqlens=ends)
        except ConfigError:
            yield Finding(what=axis)
        else:
            yield Finding(what=axis, problem="is not declared, and a call that needs it is answered all the same")


def _compared(subject: Subject, where: str) -> Iterator[Finding]:
    results = subject.run(subject.inputs)
    names = ("out", "lse", *(GRADIENTS if subject.case.requires_grad else ()))
    yield from subject.compared({name: results[name] for name in names}, subject.expected, where)
