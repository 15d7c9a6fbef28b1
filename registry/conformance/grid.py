"""The cases of the kit: the grid over patterns, causality, dtypes, heads and head_dims that a backend declares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ...core.errors import ConfigError
from ...core.pattern import Pattern
from ...core.refusal import Refusal
from ..capabilities import capability_refusals, covers, make_request
from ..device import describe_device, device_type_of_torch, local_device_types
from ..discovery import RegisteredBackend, Registry
from ..patterns import resolve_pattern
from ..selection import judge
from ..specs import BackendSpec, Request
from .case import Case

DTYPES: Final = ("float64", "float32", "bfloat16", "float16")
# The first that is declared is the one of the quick grid's checks of few cases.
USUAL_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
# What people use; those that a backend does not declare fall away.
HEAD_DIMS: Final = (24, 48, 64, 8, 16, 32, 80, 96, 128, 192, 256)
QUICK_HEAD_DIMS: Final = (24, 48, 64)
# Multiples of nothing, for those that declare any such: what works by pairs or vectors of columns must not lose one.
ODD_HEAD_DIMS: Final = (33, 7)
# Where the quick grid has one: a pattern, and whether it is causal.
QUICK_ODD: Final = (("full", False), ("dilated", True))
HEADS: Final = ((4, 4), (4, 2), (6, 2), (4, 1))
LENGTH: Final = 131
LONGER: Final = 389

# Branches that tile and branches that do not, repetitions that become weights, blocks and rows of both.
PATTERNS: Final[Mapping[str, Mapping[str, Any]]] = {
    "full": {"kind": "full"},
    "dilated": {"kind": "dilated", "segment_lengths": [32, 64, 128], "dilation_rates": [1, 2, 4]},
    "local|global": {"kind": "union", "of": [{"kind": "local", "window_size": 19}, {"kind": "global", "tokens": 5}]},
    "repeated": {"kind": "dilated", "segment_lengths": [40, 80, 40], "dilation_rates": [1, 2, 1]},
    "ragged": {"kind": "dilated", "segment_lengths": [45, 70, 100], "dilation_rates": [2, 3, 5], "offsets": "blocked"},
    "local": {"kind": "local", "window_size": [30, 12]},
    "local+dilated": {
        "kind": "sum",
        "of": [
            {"kind": "local", "window_size": 16},
            {"kind": "dilated", "segment_lengths": [32, 64], "dilation_rates": [1, 2]},
        ],
    },
    "random": {"kind": "random", "blocks_per_row": 3, "block_size": 16, "seed": 1},
    "strided": {"kind": "strided", "stride": 3},
    "split": {"kind": "dilated", "segment_lengths": [32, 64], "dilation_rates": [1, 2], "heads": "split"},
    "shard": {
        "kind": "head_shard",
        "of": {"kind": "dilated", "segment_lengths": [32, 64, 128], "dilation_rates": [1, 2, 16]},
        "first_head": 6,
        "total_heads": 12,
        "total_kv_heads": 1,
    },
}
# Left out of the quick grid: the first draw is compiled, which takes seconds.
SLOW: Final = ("random",)
# The patterns of the checks that take several lengths or forms of one case each.
FEW: Final = ("full", "dilated", "local|global")


def devices_of(spec: BackendSpec, device: str | None) -> tuple[str, ...]:
    """The devices to test on: `device`, or one of each type that is declared and is here.

    Raises:
        ConfigError: when there is none.
    """
    declared = spec.capabilities.get("device_types", ())
    if device is not None:
        found = describe_device(device)
        if not covers(declared, found.type):
            raise ConfigError(f"backend {spec.name!r} declares {', '.join(declared) or 'no device'}, not {device!r}")
        if not found.available:
            raise ConfigError(f"device {device!r}: there is none on this machine")
        return (found.torch_name,)
    local = tuple(name for name in local_device_types() if covers(declared, device_type_of_torch(name)))
    if not local:
        raise ConfigError(
            f"backend {spec.name!r} runs on {', '.join(declared) or 'no device'}, and this machine has "
            f"{', '.join(local_device_types())}; run the kit where one of them is"
        )
    return tuple(describe_device(name).torch_name for name in local)


def patterns_of(registry: Registry, more: Sequence[Pattern | Mapping[str, Any]]) -> dict[str, Pattern]:
    """The kit's patterns whose kinds are registered, and `more`, by name."""
    found = {name: resolve_pattern(m, registry) for name, m in PATTERNS.items() if _kinds(m) <= {*registry.patterns}}
    resolved = [(m, resolve_pattern(m, registry)) for m in more]
    return found | {_name(m.to_dict() if isinstance(m, Pattern) else m): pattern for m, pattern in resolved}


def _kinds(mapping: Mapping[str, Any]) -> set[str]:
    """The kinds that a mapping needs, those of its members included."""
    of = mapping.get("of", ())
    return set().union(*map(_kinds, [of] if isinstance(of, Mapping) else of)) or {mapping["kind"]}


def _name(mapping: Mapping[str, Any]) -> str:
    parameters = ",".join(f"{name}={value}" for name, value in mapping.items() if name != "kind")
    return f"{mapping['kind']}({parameters.replace(' ', '')})" if parameters else str(mapping["kind"])


def request_of(case: Case, backend: str) -> Request:
    """The request that the case's configuration makes."""
    return make_request(case.config(backend), case.pattern, describe_device(case.device))


def candidates(
    spec: BackendSpec,
    devices: Sequence[str],
    patterns: Mapping[str, Pattern],
    *,
    quick: bool,
    options: Mapping[str, Any],
) -> Iterator[Case]:
    """Every point of the grid, declared or not."""
    declared = spec.capabilities.get("head_dims", ())
    head_dims = declared_head_dims(spec)
    if quick:
        head_dims = [d for d in QUICK_HEAD_DIMS if covers(declared, d)] or head_dims[:1]
    odd = [d for d in _odd_of(declared) if d not in head_dims]
    heads = [pair for pair in HEADS if pair[0] == pair[1] or covers(spec.capabilities.get("gqa", False), True)]
    backward = covers(spec.capabilities.get("backward", False), True)
    widths, pairs = itertools.cycle(head_dims), itertools.cycle(heads)
    # An added pattern may go wrong from block to block: the quick grid has it at three whole ones too, in one dtype.
    usual_dtype = next((d for d in USUAL_DTYPES if covers(spec.capabilities.get("dtypes", ()), d)), None)
    combinations = itertools.product(devices, DTYPES, patterns.items(), (False, True))
    for device, dtype, (name, pattern), is_causal in combinations:
        if quick and (name in SLOW or (dtype != "float32" and name in PATTERNS and name not in FEW)):
            continue
        usual = [next(widths)] if quick else head_dims
        for head_dim in (*usual, *(odd if not quick else odd[:1] if (name, is_causal) in QUICK_ODD else ())):
            num_heads, num_kv_heads = next(pairs)
            is_short = (name in PATTERNS or dtype != usual_dtype) if quick else head_dim > 64
            length = LENGTH if is_short else LONGER
            yield Case(
                pattern_name=name,
                pattern=pattern,
                device=device,
                dtype=dtype,
                is_causal=is_causal,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_len=length,
                kv_len=length,
                requires_grad=backward,
                options=options,
            )


def declared_head_dims(spec: BackendSpec) -> list[int]:
    """The usual head_dims that are declared, or one other."""
    declared = spec.capabilities.get("head_dims", ())
    return [d for d in HEAD_DIMS if covers(declared, d)] or _some_of(declared)


def _some_of(declared: Any, step: int = 1) -> list[int]:
    """A declared head_dim, of every `step`th, where none of the usual ones is."""
    return next(([d] for d in range(1, 1025, step) if covers(declared, d)), [])


def _odd_of(declared: Any) -> list[int]:
    """Odd head_dims that are declared, if any are."""
    return [d for d in ODD_HEAD_DIMS if covers(declared, d)] or _some_of(declared, 2)


def admitted(registered: RegisteredBackend, case: Case) -> tuple[bool, tuple[Refusal, ...]]:
    """Whether the case belongs to the grid, and the backend's own refusals where it declares the case.

    A fault of the backend is left for the checks to find: the case stays in.
    """
    request = request_of(case, registered.spec.name)
    if capability_refusals(request, registered.spec):
        return False, ()
    verdict = judge(registered, request)
    return not verdict.refusals, verdict.refusals
