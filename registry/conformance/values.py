"""Checks of values: every result against the oracle, and what must hold without one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import attrs
import torch
from torch import Tensor

from .case import Subject
from .measure import FLOAT_BOUNDS, GRADIENTS, Finding, compare, lse_form

# Scores whose exponentials overflow, and with the other sign vanish or lose their digits: half precision is summed in
# float32 too.
PEAKS: Final = {"float64": 768.0, "float32": 96.0}
# Such scores, their lse and both times log2(e) are each rounded by up to eps / 2 of themselves, and weights with them.
ROUNDINGS: Final = 4.0
# And where dk nearly vanishes, the rounding of sums over head_dim, times such queries, is measured against 0.1.
VANISHING: Final = 32.0


def forms(subject: Subject) -> Iterator[Finding]:
    """Shapes, dtypes and devices of the results: those of the inputs; lse (B, H, S) in float32, or float64."""
    query, key, value = subject.inputs
    wanted = {"out": (query.shape, query.dtype), "lse": lse_form(query)}
    wanted |= {name: (x.shape, x.dtype) for name, x in zip(GRADIENTS, (query, key, value), strict=True)}
    for name, x in subject.results.items():
        shape, dtype = wanted[name]
        found = (tuple(x.shape), x.dtype, x.device)
        right = found == (tuple(shape), dtype, query.device)
        problem = f"has {found}, not {(tuple(shape), dtype, query.device)}"
        yield Finding(what=name, problem="" if right else problem)


def out(subject: Subject) -> Iterator[Finding]:
    """The output against the oracle."""
    yield _result(subject, "out")


def lse(subject: Subject) -> Iterator[Finding]:
    """The log-sum-exp of each row, weights included, against the oracle."""
    yield _result(subject, "lse")


def dq(subject: Subject) -> Iterator[Finding]:
    """The gradient of the queries against the oracle's."""
    yield _result(subject, "dq")


def dk(subject: Subject) -> Iterator[Finding]:
    """The gradient of the keys against the oracle's."""
    yield _result(subject, "dk")


def dv(subject: Subject) -> Iterator[Finding]:
    """The gradient of the values against the oracle's."""
    yield _result(subject, "dv")


def _result(subject: Subject, name: str) -> Finding:
    return compare(name, subject.results[name], subject.expected[name], subject.bounds[name])


def through_lse(subject: Subject) -> Iterator[Finding]:
    """dq, dk and dv of a loss that uses the returned lse as well."""
    actual = subject.run(subject.inputs, through_lse=True)
    expected = subject.oracle(subject.inputs, through_lse=True)
    grads = {name: actual[name] for name in GRADIENTS}
    yield from subject.compared(grads, expected)


def lse_base(subject: Subject) -> Iterator[Finding]:
    """The logarithm is the natural one: lse grows with the scores as the oracle's does."""
    query, key, value = subject.inputs
    larger = query * 2
    _, low = subject.call(query, key, value)
    _, high = subject.call(larger, key, value)
    exact_low = subject.oracle((query, key, value), through_lse=False)["lse"]
    exact_high = subject.oracle((larger, key, value), through_lse=False)["lse"]
    seen = torch.isfinite(exact_low)
    actual, expected = (high.double() - low.double())[seen], (exact_high - exact_low)[seen]
    slope = float(actual @ expected / (expected @ expected))
    bases = {"2": 1 / math.log(2), "10": 1 / math.log(10)}
    base = next((name for name, value in bases.items() if abs(slope - value) < 0.02), None)
    is_natural = abs(slope - 1) < 0.01  # NaN is not
    guess = f", so its logarithm is to base {base}; multiply it by ln({base})" if base else ""
    problem = "" if is_natural else f"grows {slope:.4f} times as fast as the natural logarithm{guess}"
    yield Finding(what="lse", problem=problem)


def large_scores(subject: Subject) -> Iterator[Finding]:
    """Scores whose exponentials leave the range of what they are summed in, above and below."""
    inputs = _large(subject.inputs)
    bounds, results = subject.bounds_on(inputs), subject.run(inputs)
    expected = subject.oracle(inputs, through_lse=False)
    peak = float(expected["lse"].abs().nan_to_num(posinf=0.0).max())  # without keys it is -inf
    roundings = VANISHING if subject.nearly_vanish else ROUNDINGS
    rounding = roundings * torch.finfo(results["lse"].dtype).eps * peak
    for name, x in results.items():
        bound = bounds[name] if name == "lse" else max(bounds[name], rounding)
        yield compare(name, x, expected[name], bound)


def _large(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose scores lie around `PEAKS` in rows of even number and around its negative in the others.

    Queries and keys are whole multiples of powers of two, so that products and their sums are exact in float32: scores
    are rounded once, by the scale. Keys share one coordinate, so that those of a row still differ by what is usual.
    """
    query, key = (((x * 4).round() / 4).clamp(-3, 3) for x in inputs[:2])
    peak = PEAKS.get(str(query.dtype).removeprefix("torch."), PEAKS["float32"])
    signs = 1 - 2 * (torch.arange(query.shape[1], device=query.device) % 2)
    query[..., 0] = signs[:, None] * 32 * math.ceil(peak * math.sqrt(query.shape[-1]) / 32)
    key[..., 0] = 1
    return query, key, inputs[2]


def scale(subject: Subject) -> Iterator[Finding]:
    """Scores are scaled by what the configuration says, whatever head_dim is."""
    yield from _scaled(subject, "if `{}` passes, take piece.scale, not 1/sqrt(head_dim)")


def negative_scale(subject: Subject) -> Iterator[Finding]:
    """A negative scale, which reaches dense kernels as negated queries, layout kernels and tables as it is."""
    yield from _scaled(subject, "if `scale` passes, take negative ones too: scale before masking")


def _scaled(subject: Subject, remedy: str) -> Iterator[Finding]:
    through_lse = subject.case.requires_grad and subject.attention._engine.has_dlse
    actual = subject.run(subject.inputs, through_lse=through_lse)
    for finding in subject.compared(actual, subject.oracle(subject.inputs, through_lse=through_lse)):
        off = str(finding).removeprefix(f"{finding.what}: ")
        problem = "" if finding.passed else f"{off}; {remedy.format(finding.what)}"
        yield attrs.evolve(finding, problem=problem)


def ones(subject: Subject) -> Iterator[Finding]:
    """Values of one give one: the weights of a row add up to 1."""
    query, key, value = subject.inputs
    result, _ = subject.call(query, key, torch.ones_like(value))
    seen = subject.sees.any(dim=-1).T.to(result.device)
    expected = seen[None, :, :, None].expand_as(result).double()
    yield compare("out", result, expected, FLOAT_BOUNDS.get(subject.case.dtype, 2 * torch.finfo(result.dtype).eps))


def future(subject: Subject) -> Iterator[Finding]:
    """Changing every token from a position on leaves the rows before it as they were, to the bit."""
    query, key, value = (_gentle(subject.inputs[0]), *subject.inputs[1:])
    before, before_lse = subject.call(query, key, value)
    geometry = subject.case.geometry
    for start in _some(geometry.kv_len):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, start:] = other_key[:, start:] * 1.5 + 0.5
        other_value[:, start:] += 64.0
        after, after_lse = subject.call(query, other_key, other_value)
        rows = torch.arange(geometry.q_len, device=query.device) + geometry.q_offset
        earlier = rows < start + geometry.kv_offset
        moved = _moved(before[:, earlier], after[:, earlier]) + _moved(
            before_lse[:, :, earlier], after_lse[:, :, earlier]
        )
        problem = f"{moved} numbers of earlier rows changed with the keys from {start} on" if moved else ""
        yield Finding(what=f"rows before {start}", problem=problem)


def one_token(subject: Subject) -> Iterator[Finding]:
    """Changing one key-value head of one token moves exactly the rows that see it, in the heads that read it."""
    query, key, value = (_gentle(subject.inputs[0]), *subject.inputs[1:])
    before, before_lse = subject.call(query, key, value)
    group, readers = subject.case.geometry.group_size, torch.arange(subject.case.num_heads)
    for token in _some(subject.case.kv_len):
        head = token % subject.case.num_kv_heads
        other_key, other_value = key.clone(), value.clone()
        other_key[:, token, head] = -other_key[:, token, head]
        other_value[:, token, head] += 64.0
        after, after_lse = subject.call(query, other_key, other_value)
        moved = ~(after == before).all(dim=-1).transpose(1, 2)  # (B, H, S); a NaN has moved
        lse_moved = ~(after_lse == before_lse)
        sees = (subject.sees[:, :, token] & (readers // group == head)[:, None]).to(moved.device)
        extra = int(((moved | lse_moved) & ~sees).sum())
        missing = int((~moved & sees).sum())
        problem = f"{extra} rows moved that do not see it, {missing} that see it did not" if extra or missing else ""
        yield Finding(what=f"key {token} of head {head}", problem=problem)


def chosen_blocks(subject: Subject) -> Iterator[Finding]:
    """Blocks that a gate chooses at the call: the results are those of the fixed pattern that it chose."""
    query, key, _ = subject.inputs
    frozen = subject.attention.gate.freeze(query, key)
    fixed = Subject(attrs.evolve(subject.case, pattern=frozen), subject.attention, subject.capabilities)
    yield from fixed.compared(subject.results, fixed.expected)


def _gentle(query: Tensor) -> Tensor:
    """Queries so small that every key has a share worth seeing, in half precision too."""
    return query * 0.25


def _some(length: int) -> list[int]:
    """The first and the last position and two between."""
    return sorted({0, length // 3, (2 * length) // 3, length - 1} & set(range(length)))


def _moved(before: Tensor, after: Tensor) -> int:
    return int((~(before == after)).sum())
