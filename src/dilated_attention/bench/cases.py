"""The named cases: what is computed, on which kind of device, and a small likeness of it that the oracle can check."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
from torch import Tensor

from ..core.checks import did_you_mean
from ..core.config import AttentionConfig, named_values
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import Pattern, Union
from ..patterns.dilated import Dilated
from ..patterns.global_tokens import Global
from ..patterns.local import Local
from ..patterns.random import Random
from .timing import random_inputs

GATE_TOKENS: Final = 1024

_CPU_LENGTHS: Final = (1024, 2048, 4096, 8192)
_LENGTHS: Final = (2048, 4096, 8192, 16384, 32768)
_GIGAPATH: Final = (1024, 5792, 32768, 185363, 1048576)
_GIGAPATH_RATES: Final = (1, 2, 4, 8, 16)


def backend_options(backend: str, option: str) -> dict[str, dict[str, Any]]:
    """The field of a configuration that `option`, NAME=VALUE or the name of a kernel, stands for; of "" none."""
    named = option if "=" in option else f"kernel={option}"
    return {backend: named_values([named], flag="--backend")} if option else {}


@attrs.frozen(kw_only=True)
class BenchCase:
    """One batch row of attention.

    Attributes:
        name: what the command line calls it.
        pattern: who attends to whom.
        seq_len: tokens.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        head_dim: width of a head.
        dtype: of the tensors.
        is_causal: whether later keys are hidden.
        device: "cpu" or "cuda", which it was chosen for.
        gate_pattern: the pattern, scaled down to `gate_len` tokens, where a dense mask fits.
        gate_len: tokens of the comparison with the oracle.
        is_default: whether it is measured when no case is named.
    """

    name: str
    pattern: Pattern
    seq_len: int
    num_heads: int
    head_dim: int
    dtype: str
    is_causal: bool
    device: str
    gate_pattern: Pattern
    gate_len: int = GATE_TOKENS
    is_default: bool = True
    num_kv_heads: int = attrs.field(default=attrs.Factory(lambda case: case.num_heads, takes_self=True))

    def small(self) -> BenchCase:
        """The likeness that is compared with the oracle."""
        return attrs.evolve(self, pattern=self.gate_pattern, seq_len=self.gate_len)

    def config(self, backend: str, option: str = "", *, device: str) -> AttentionConfig:
        """What is built; `option` of the backend is NAME=VALUE, or the name of a kernel."""
        return AttentionConfig(
            pattern=self.pattern,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=device,
            is_causal=self.is_causal,
            backend=backend,
            backend_options=backend_options(backend, option),
            seq_len=self.seq_len,
        )

    @property
    def geometry(self) -> Geometry:
        """Of its one call."""
        return Geometry(
            q_len=self.seq_len,
            kv_len=self.seq_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            is_causal=self.is_causal,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of query and out."""
        return (1, self.seq_len, self.num_heads, self.head_dim)

    def inputs(self, device: str, *, seed: int = 0) -> list[Tensor]:
        """Random query, key, value and gradient of out."""
        return random_inputs(self.shape, self.dtype, device, seed=seed, kv_heads=self.num_kv_heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what a worker of another version of this package needs to compute the case."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        config = heads | {"head_dim": self.head_dim, "dtype": self.dtype}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "config": config | {"is_causal": self.is_causal, "pattern": self.pattern.to_dict()},
        }

    def cells(self) -> tuple[str, ...]:
        """Tokens, heads, dtype, causal or not, pattern: of a row in a table."""
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        causal = "yes" if self.is_causal else "no"
        return f"{self.seq_len:,}", f"{heads} of {self.head_dim}", self.dtype, causal, _brief(self.pattern)

    def __str__(self) -> str:
        causal = "causal" if self.is_causal else "not causal"
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        return (
            f"{self.name}: {_brief(self.pattern)}, {self.seq_len:,} tokens, {heads} heads of {self.head_dim}, "
            f"{self.dtype}, {causal}"
        )


def _brief(pattern: Pattern) -> str:
    """A pattern as one would write it: what has its default is left out."""
    if isinstance(pattern, Union):
        return " | ".join(map(_brief, pattern.of))
    said = []
    for field in attrs.fields(type(pattern)):  # type: ignore[arg-type]  # a Pattern, which is an attrs class
        value = getattr(pattern, field.name)
        if field.default is attrs.NOTHING:
            said.append(repr(value))
        elif value != field.default:
            said.append(f"{field.name}={value!r}")
    return f"{type(pattern).__name__}({', '.join(said)})"


def _dilated(name: str, lengths: Sequence[int], seq_len: int, *, offsets: Any, **fields: Any) -> BenchCase:
    """LongNet's attention; the segments of its likeness are shorter in proportion."""
    rates = tuple(1 << i for i in range(len(lengths)))
    shrink = max(1, max(lengths) // (GATE_TOKENS // 2))
    small = tuple(max(rate, width // shrink) for width, rate in zip(lengths, rates, strict=True))
    return BenchCase(
        name=name,
        pattern=Dilated(tuple(lengths), rates, offsets=offsets),
        gate_pattern=Dilated(small, rates, offsets=offsets),
        seq_len=seq_len,
        **fields,
    )


def _on_cpu() -> Iterator[BenchCase]:
    shape: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": "float32", "device": "cpu"}
    for length, is_default in ((4, True), (16, False), (64, False)):
        # The offsets of the official code, so that its results can be compared.
        yield _dilated(
            f"longnet-{length}k", _CPU_LENGTHS, length << 10,
            offsets="blocked", is_causal=True, is_default=is_default, **shape,
        )  # fmt: skip
    yield _dilated(
        "longnet-1k", [width // 8 for width in _CPU_LENGTHS], 1024, offsets="blocked", is_causal=True,
        is_default=False, **shape,
    )  # fmt: skip
    for name, pattern, small, is_causal in (
        ("random-4k", Random(density=0.1), Random(density=0.3), False),
        ("local-global-4k", Local((511, 0)) | Global(16), Local((127, 0)) | Global(16), True),
    ):
        yield BenchCase(
            name=name, pattern=pattern, gate_pattern=small, seq_len=4096, is_causal=is_causal, **shape
        )  # fmt: skip


def _on_cuda() -> Iterator[BenchCase]:
    shape: dict[str, Any] = {"num_heads": 16, "dtype": "bfloat16", "device": "cuda"}
    for words, length in (("32k", 1 << 15), ("128k", 1 << 17), ("1m", 1 << 20)):
        for head_dim in (64, 128):
            for is_causal in (True, False):
                wide = "" if head_dim == 64 else f"-d{head_dim}"
                yield _dilated(
                    f"longnet-{words}{wide}{'' if is_causal else '-full'}", _LENGTHS, length, offsets="interleaved",
                    head_dim=head_dim, is_causal=is_causal, is_default=length <= 1 << 17, **shape,
                )  # fmt: skip
    yield _dilated(
        "longnet-32k-d256", _LENGTHS, 1 << 15, offsets="interleaved", head_dim=256, is_causal=True, **shape
    )  # fmt: skip
    yield _dilated(
        "longnet-128k-blocked", _LENGTHS, 1 << 17, offsets="blocked", head_dim=64, is_causal=True, **shape
    )  # fmt: skip
    for name, density, length, head_dim, more in (
        ("random-32k-10", 0.1, 1 << 15, 64, {}),
        ("random-32k-3", 0.027, 1 << 15, 64, {}),
        ("random-32k-3-d256", 0.027, 1 << 15, 256, {}),
        ("random-32k-3-fp32", 0.027, 1 << 15, 64, {"dtype": "float32", "is_default": False}),
        ("random-128k-10", 0.1, 1 << 17, 64, {}),
        ("random-128k-2", 0.02, 1 << 17, 64, {}),
        ("random-128k-2-d128", 0.02, 1 << 17, 128, {}),
    ):
        yield BenchCase(
            name=name, pattern=Random(density=density), gate_pattern=Random(density=0.3), seq_len=length,
            head_dim=head_dim, is_causal=False, **shape | more,
        )  # fmt: skip
    # Blocks of 64, four query heads to a key-value head.
    yield BenchCase(
        name="random-32k-10-gqa", pattern=Random(density=0.1, block_size=64),
        gate_pattern=Random(density=0.3, block_size=64), seq_len=1 << 15, head_dim=64, num_kv_heads=4,
        is_causal=False, **shape,
    )  # fmt: skip
    for name, length in (("gigapath-10k", 10_000), ("gigapath-100k", 100_000)):
        yield BenchCase(
            name=name,
            pattern=Dilated(_GIGAPATH, _GIGAPATH_RATES, offsets="blocked"),
            # As in the case itself, some segments are longer than the sequence, and none divides it.
            gate_pattern=Dilated((64, 362, 2048, 11585, 65536), _GIGAPATH_RATES, offsets="blocked"),
            gate_len=1000,
            seq_len=length,
            head_dim=48,
            is_causal=False,
            **shape,
        )
    for wide, head_dim in (("", 64), ("-d128", 128)):
        yield BenchCase(
            name=f"local-128k{wide}", pattern=Local((1023, 0)), gate_pattern=Local((127, 0)), seq_len=1 << 17,
            head_dim=head_dim, is_causal=True, **shape,
        )  # fmt: skip
    for name, length in (("local-global-32k", 1 << 15), ("local-global-128k", 1 << 17)):
        yield BenchCase(
            name=name, pattern=Local((4095, 0)) | Global(128), gate_pattern=Local((127, 0)) | Global(16),
            seq_len=length, head_dim=64, is_causal=True, **shape,
        )  # fmt: skip


CASES: Final[dict[str, BenchCase]] = {case.name: case for case in (*_on_cpu(), *_on_cuda())}


def named_cases(names: Sequence[str], device_type: str) -> list[BenchCase]:
    """The cases that `names` (with `*` for any letters) mean, or the default ones of the kind of device.

    Raises:
        ConfigError: a name that fits no case.
    """
    if not names:
        return [case for case in CASES.values() if case.device == device_type and case.is_default]
    found: dict[str, BenchCase] = {}
    for name in names:
        fitting = fnmatch.filter(CASES, name)
        if not fitting:
            raise ConfigError(f"no case is called {name!r}{did_you_mean(name, CASES)}; there are {', '.join(CASES)}")
        found |= {fit: CASES[fit] for fit in fitting}
    return list(found.values())
