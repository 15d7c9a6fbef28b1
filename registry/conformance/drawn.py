"""Cases that are drawn at random, beside the grid: patterns, lengths and heads that nobody thought of.

A seed and a number give the same case on every machine, however many others are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, Final

from ..capabilities import covers
from ..discovery import Registry
from ..patterns import resolve_pattern
from ..specs import BackendSpec
from .case import Case
from .grid import DTYPES, HEADS, declared_head_dims

# More than four blocks of 128, and few enough for the oracle.
LONGEST: Final = 700
_GENERATORS: Final = ("full", "dilated", "dilated", "local", "global", "strided", "random")
_DEEPEST: Final = 2  # patterns made of patterns made of generators
_LARGE: Final = {"total_heads": 12, "total_kv_heads": 1}  # the whole model that a shard is of


def drawn_cases(
    spec: BackendSpec, devices: Sequence[str], registry: Registry, *, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Case]:
    """As many cases as `count`, declared or not but for their dtype and head_dim."""
    dtypes = [dtype for dtype in DTYPES if covers(spec.capabilities.get("dtypes", ()), dtype)]
    head_dims = declared_head_dims(spec)
    kinds = [*registry.patterns]
    is_any = dtypes and head_dims and not {*_GENERATORS}.isdisjoint(kinds)
    for number in range(count if is_any else 0):
        random = Random(f"{seed}/{number}")
        num_heads, num_kv_heads = random.choice(HEADS)
        mapping = _pattern(random, kinds, num_heads)
        length = random.choice((random.randint(1, LONGEST), _size(random, LONGEST)))
        yield Case(
            pattern_name=f"drawn {number} of seed {seed}",
            pattern=resolve_pattern(mapping, registry),
            device=devices[number % len(devices)],
            dtype=random.choice(dtypes),
            is_causal=random.random() < 0.5,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=random.choice(head_dims),
            q_len=length,
            kv_len=length,
            batch=random.randint(1, 3),
            requires_grad=covers(spec.capabilities.get("backward", False), True),
            options=options,
        )


def _size(random: Random, most: int) -> int:
    """From 1 to `most`, small ones as often as large ones: its logarithm is uniform."""
    return round(math.exp(random.uniform(0.0, math.log(most))))


def _pattern(random: Random, kinds: Sequence[str], num_heads: int) -> dict[str, Any]:
    """A pattern of registered kinds, of all heads or of those of a larger model."""
    found = _made_of(random, kinds, num_heads, _DEEPEST)
    if random.random() > 0.1:
        return found
    first = random.randint(0, _LARGE["total_heads"] - num_heads)
    return {"kind": "head_shard", "of": found, "first_head": first, **_LARGE}


def _made_of(random: Random, kinds: Sequence[str], num_heads: int, depth: int) -> dict[str, Any]:
    if not depth or random.random() > 0.4:
        return _generator(random, kinds, num_heads)
    of = [_made_of(random, kinds, num_heads, depth - 1) for _ in range(random.randint(2, 3))]
    return {"kind": random.choice(("union", "sum")), "of": of}


def _generator(random: Random, kinds: Sequence[str], num_heads: int) -> dict[str, Any]:
    """A pattern that is made of no others."""
    made: dict[str, dict[str, Any]] = {
        "full": {},
        "dilated": _dilated(random, num_heads),
        "local": {"window_size": [_size(random, 200) - 1, _size(random, 200) - 1]},
        "global": {"tokens": _size(random, 150)},
        "strided": {"stride": _size(random, 40)},
        "random": {"blocks_per_row": random.randint(1, 5), "block_size": _size(random, 150)}
        | {"seed": random.randint(0, 9)},
    }
    kind = random.choice([kind for kind in _GENERATORS if kind in kinds])
    return {"kind": kind, **made[kind]}


def _dilated(random: Random, num_heads: int) -> dict[str, Any]:
    branches = random.randint(1, min(4, num_heads))
    found: dict[str, Any] = {
        "segment_lengths": [random.choice((_size(random, 300), 64, 128, 256)) for _ in range(branches)],
        "dilation_rates": [random.choice((_size(random, 20), 1, 2, 4)) for _ in range(branches)],
    }
    if random.random() < 0.2:
        return found | {"heads": "split"}
    offsets = {
        "offsets": random.choice(("interleaved", "blocked")),
        "offsets_by": random.choice(("query_head", "kv_head")),
    }
    return found | offsets
