"""What a scaling run measures: the same values in the process that starts ranks and in every rank. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

import attrs

from ..core.checks import positive_int, require_choice
from ..core.config import AttentionConfig
from ..core.context_parallel import ContextParallel
from ..core.errors import ConfigError
from ..core.limits import Limits
from ..core.pattern import Pattern
from ..core.structure import from_mapping
from ..patterns.dilated import Dilated
from ..patterns.global_tokens import Global
from ..patterns.local import Local

PATTERNS: Final = ("longnet", "local-global")
_BRANCHES: Final = 5


def _as_tuple(value: Iterable[int]) -> tuple[int, ...]:
    return tuple(value)


def _sizes(_: object, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
    if not value or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value):
        raise ConfigError(f"--gpus must be numbers of ranks with commas between them, such as 1,2,4; got {value!r}")


def _device(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    require_choice("--device", value, ("cpu", "cuda"))


@attrs.frozen(kw_only=True)
class RingSettings:
    """A scaling run.

    Attributes:
        sizes: numbers of ranks.
        device: "cpu" (over Gloo) or "cuda" (over NCCL).
        weak_tokens: tokens a rank, where the sequence grows with the ranks.
        strong_tokens: tokens in all, where it does not; every size divides it.
        num_heads: heads.
        head_dim: width of a head.
        dtype: of the tensors.
        first: LongNet's shortest segment: w = first · 2^i with r = 2^i for i < 5, and w = N with r = N / first. The
            window of Local|Global is half of it.
        rounds: timed steps; fewer, but not below three, where they would take more than `seconds` for one case.
        seconds: see there.
        timeout_s: longest wait in a pass.
        longest: also double a LongNet layer's sequence at the largest size until memory is full.
        longest_limit: tokens at which that stops in any case; a CPU needs one.
        trace: also write a profile of a step a rank.
    """

    sizes: tuple[int, ...] = attrs.field(converter=_as_tuple, validator=_sizes)
    device: str = attrs.field(validator=_device)
    weak_tokens: int = attrs.field(validator=positive_int)
    strong_tokens: int = attrs.field(validator=positive_int)
    num_heads: int = attrs.field(default=16, validator=positive_int)
    head_dim: int = attrs.field(default=64, validator=positive_int)
    dtype: str = "bfloat16"
    first: int = attrs.field(default=2048, validator=positive_int)
    rounds: int = attrs.field(default=7, validator=positive_int)
    seconds: float = 4.0
    timeout_s: float = 120.0
    longest: bool = False
    longest_limit: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive_int))
    trace: str | None = None

    def __attrs_post_init__(self) -> None:
        for size in self.sizes:
            if self.strong_tokens % size:
                raise ConfigError(
                    f"--strong-tokens must be a multiple of every number of ranks, got {self.strong_tokens} and {size}"
                )
        if self.longest and self.device == "cpu" and self.longest_limit is None:
            raise ConfigError(
                "--longest on a CPU needs --longest-limit TOKENS: an operating system that runs out of memory ends "
                "processes that have nothing to do with this one"
            )

    def to_json(self) -> str:
        """For the ranks."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RingSettings:
        """What `to_json` gave."""
        return from_mapping(cls, json.loads(text), name="the settings")

    def pattern(self, kind: str, tokens: int, first: int | None = None) -> Pattern:
        """The pattern `kind` for a whole sequence of `tokens`."""
        first = self.first if first is None else first
        if kind == "local-global":
            return Local((max(1, first // 2) - 1, 0)) | Global(min(128, first))
        widths = (*(first << i for i in range(_BRANCHES)), tokens)
        rates = (*(1 << i for i in range(_BRANCHES)), max(1, tokens // first))
        return Dilated(widths, rates)

    def config(
        self, kind: str, tokens: int, size: int, *, backend: str = "auto", hops: bool = False, first: int | None = None
    ) -> AttentionConfig:
        """What is built: over `size` ranks, or alone where it is 1; `hops` forces the ring in which all keys travel."""
        return AttentionConfig(
            pattern=self.pattern(kind, tokens, first),
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            is_causal=True,
            seq_len=tokens,
            backend=backend,
            context_parallel=ContextParallel(size=size, timeout_s=self.timeout_s),
            limits=Limits(exchange_buffer_bytes=1) if hops else Limits(),
        )
