"""The manifests that plugins hand in, the request that backends judge, and the vocabulary both are written in.

Nothing here imports torch: listing what is installed stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from ..core.checks import is_int
from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.pattern import Pattern
from ..core.refusal import Refusal

if TYPE_CHECKING:
    from ..core.kernel import DenseKernel, LayoutKernel

API_VERSION: Final = 1

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_TARGET: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_RESERVED: Final = ("auto", "union", "sum", "head_shard")  # what a configuration says of its own accord


@attrs.frozen
class Range:
    """Integers from `min` to `max`, both included, that are multiples of `multiple_of`."""

    min: int
    max: int
    multiple_of: int = 1

    def __attrs_post_init__(self) -> None:
        for name, value in (("min", self.min), ("max", self.max), ("multiple_of", self.multiple_of)):
            if not is_int(value):
                raise ConfigError(f"Range.{name} must be an integer, got {value!r}")
        if self.min > self.max or self.multiple_of < 1:
            raise ConfigError(f"Range needs min <= max and multiple_of >= 1, got {self!r}")

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.min <= value <= self.max and value % self.multiple_of == 0

    def __str__(self) -> str:
        steps = f", multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.min}..{self.max}{steps}"


# What a capability axis means. A spec that does not name an axis does not support it; the axes marked "narrows" limit
# a spec that names them and leave the others alone. A spec may name further axes: they are kept and shown.
AXES: Final[Mapping[str, str]] = {
    "device_types": "device types: cpu, cuda, hip, xpu, mps, ...",
    "arch": "narrows: device architectures such as sm_90; without it every one of its device types",
    "dtypes": "dtypes of queries, keys and values",
    "head_dims": "head_dim of queries, keys and values",
    "gqa": "fewer key-value heads than query heads",
    "causal": "the causal diagonal",
    "unequal_lengths": "queries and keys of different lengths",
    "varlen": "sequences of several lengths in one call: padded rows, packed documents",
    "offsets": "queries and keys at any absolute position",
    "alignment_bytes": "what pointers and strides must be multiples of",
    "window": "a sliding window inside the kernel",
    "mask": "a mask per query and key inside the kernel",
    "bias": "additive biases on the scores",
    "softcap": "tanh-capped scores",
    "sink": "attention sinks",
    "dropout": "dropout of counted occurrences",
    "context_parallel": "parts of rows, for sequences that ranks share; dense pieces have it by core's composing",
    "staged_blocks": "beside it: tables of blocks over keys that were copied together",
    "layouts": "dense (pieces that core composes), branch, block: what a kernel computes in one go",
    "block_sizes": "narrows: block sizes of block layouts; without it every one",
    "repeated_blocks": "a block listed more than once",
    "weights": "integer weights of blocks",
    "per_head": "block tables that differ by head",
    "dynamic_tables": "block tables made on the device, per call",
    "backward": "gradients of queries, keys and values",
    "dlse": "a gradient through the returned lse, inside the kernel",
    "lse": "the log-sum-exp of each row",
    "lse_base": "the base of that logarithm, where it is not e",
    "deterministic": "the same bits on every run: forward, backward",
    "compile": "under torch.compile: fullgraph, opaque (one operator), none",
    "cuda_graph": "capture and replay in CUDA graphs",
    "workspace_bytes": "temporary memory of a call",
    "paged": "paged key-value caches",
    "descale": "per-tensor or per-head scales of 8-bit inputs",
}


def _name(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in _RESERVED:
        raise ConfigError(
            f"{attribute.name} must be lower-case letters, digits, '_', '-' or '.', and none of "
            f"{', '.join(map(repr, _RESERVED))}; got {value!r}"
        )


def _target(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _TARGET.fullmatch(value):
        raise ConfigError(f"target must be 'package.module:attribute', got {value!r}")


def _priority(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    if not is_int(value):
        raise ConfigError(f"priority must be an integer, got {value!r}")


def _capabilities(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"capabilities must map axis names to what is supported, got {value!r}")
    for axis in ("device_types", "dtypes", "layouts"):
        if axis in value and (isinstance(value[axis], str | bytes) or not isinstance(value[axis], Collection)):
            raise ConfigError(f"capabilities[{axis!r}] must be a collection of names, got {value[axis]!r}")


def _requirements(_: object, attribute: attrs.Attribute[Any], value: tuple[object, ...]) -> None:
    if not all(isinstance(requirement, str) for requirement in value):
        raise ConfigError(f"requires must be requirement strings such as 'xformers>=0.0.30', got {value!r}")


def _words(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{attribute.name} must be words, got {value!r}")


def _described(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(word, str) for pair in value.items() for word in pair):
        raise ConfigError(f"{attribute.name} must map the names of options to what they say, got {value!r}")


def _string_tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


@attrs.frozen(kw_only=True)
class BackendSpec:
    """What a plugin says about a backend before anything of it is imported.

    Attributes:
        name: what users write in `backend=`.
        target: "package.module:attribute" of a `Backend`, or of a class that makes one without arguments.
        api_version: the contract that it was written for; this is version 1.
        priority: the higher of two usable backends is chosen; our own stand between -100 and 100.
        capabilities: axis -> what is supported: True, a collection of names, a collection of integers or a `Range`.
            An axis that is not named is unsupported (see `AXES`).
        requires: what must be installed, as PEP 508 strings.
        options: name -> what it says, of all that users may give in `backend_options`; another one is an error.
        slow: what it computes with, in words, if it is for what no other takes; plans then say so, and benchmarks leave
            it out.
    """

    name: str = attrs.field(validator=_name)
    target: str = attrs.field(validator=_target)
    api_version: int = API_VERSION
    priority: int = attrs.field(default=0, validator=_priority)
    capabilities: Mapping[str, Any] = attrs.field(validator=_capabilities, hash=False)
    requires: tuple[str, ...] = attrs.field(default=(), converter=_string_tuple, validator=_requirements)
    options: Mapping[str, str] = attrs.field(factory=dict, validator=_described, hash=False)
    slow: str = attrs.field(default="", validator=_words)


@attrs.frozen(kw_only=True)
class PatternSpec:
    """What a plugin says about a pattern.

    Attributes:
        kind: what users write in `kind = "..."`.
        target: "package.module:attribute" of an attrs class derived from `Pattern`.
        api_version: the contract that it was written for; this is version 1.
    """

    kind: str = attrs.field(validator=_name)
    target: str = attrs.field(validator=_target)
    api_version: int = API_VERSION


def compute_capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90", whatever letter follows; (0, 0) of what is no CUDA architecture."""
    if not arch.startswith("sm_"):
        return 0, 0
    digits = "".join(c for c in arch if c.isdigit())
    return int(digits[:-1]), int(digits[-1])


@attrs.frozen(kw_only=True)
class Device:
    """What was found out, once, about the device that an attention is built for.

    Attributes:
        type: "cpu", "cuda", "hip" (torch calls those devices cuda), "xpu", "mps", ...
        index: its number among those of its type, or None where there is no counting.
        name: as its maker calls it.
        arch: "x86_64", "sm_90", "gfx942", ...
        memory_bytes: its memory, where it is known.
        available: torch can use it here; without it a device is only what a request asks for.
        torch_name: what torch calls it, "cuda:0".
        is_assumed: a card known by its `arch` alone, which `explain` asks about. Nothing is ever built for one.
    """

    type: str
    index: int | None = None
    name: str = ""
    arch: str = ""
    memory_bytes: int | None = None
    available: bool = True
    torch_name: str = ""
    is_assumed: bool = False


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """What a backend is asked for.

    Attributes:
        config: the configuration.
        pattern: its pattern, resolved.
        device: the device, described.
        needs: capability axis -> what is needed of it, derived from the rest. Values are names, integers, True, or a
            tuple of them that are all needed.
    """

    config: AttentionConfig
    pattern: Pattern
    device: Device
    needs: Mapping[str, Any]

    def options(self, name: str) -> Mapping[str, Any]:
        """The options given for the backend `name`: those of its manifest, with values that it has to judge."""
        return self.config.backend_options.get(name, {})


class Backend(Protocol):
    """The target of a `BackendSpec`. It is asked only about requests that its capabilities admit.

    `refusals` and `pin` are asked about others than the user's too: what would be near it and, where no seq_len is
    given, what a length would change. A request may be for a card that is not here (`Device.is_assumed`): judge it by
    `request.device`. What cannot be judged so raises an error, and the plan says that it could not.
    """

    def refusals(self, request: Request) -> Iterable[Refusal]:
        """Every finer reason against this request; none means that it will be computed exactly."""

    def pin(self, request: Request) -> str:
        """The name of the sub-kernel that `build` would use. Allocates no tensor."""

    def build(self, request: Request) -> DenseKernel | LayoutKernel:
        """The kernel: one for dense pieces if the capabilities have the layout "dense", else one for whole layouts."""


class KernelBackend:
    """A `Backend` that is its own kernel and computes whatever its capabilities admit.

    Derive from it and write `forward` and `backward`.

    Attributes:
        name: the backend's name, as in its manifest; also that of the kernel.
    """

    name: str

    def refusals(self, request: Request) -> Iterable[Refusal]:
        """None."""
        return ()

    def pin(self, request: Request) -> str:
        """The backend's own name."""
        return self.name

    def build(self, request: Request) -> Any:
        """Itself."""
        return self
