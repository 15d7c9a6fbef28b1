"""A case of the kit: one configuration at one geometry, and the attention that a backend makes of it.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from ...core import reference
from ...core.config import AttentionConfig
from ...core.geometry import Geometry
from ...core.pattern import Full, Pattern
from .measure import FLOAT_BOUNDS, NAMES, Finding, compare, gradients, half_bounds, random_like

# The length at which dense attention shows how far off half precision is.
HALF_LENGTH: Final = 131
# Over fewer keys, or where rows see fewer on average, dq and dk nearly vanish, and what is left is one rounding of
# dout·v (eps / 2 of √head_dim, times the scale), which is 5 eps of the 0.1 an element that they are measured against.
SHORT: Final = 15
FEW_KEYS: Final = 4
ROUNDINGS: Final = 5.0


@attrs.frozen(kw_only=True)
class Case:
    """What is asked of the backend.

    Attributes:
        pattern_name: the pattern in a word or two.
        pattern: the pattern itself.
        device: as torch calls it.
        dtype: of queries, keys and values.
        is_causal: no key at a later position.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        head_dim: width of a head.
        q_len: number of queries.
        kv_len: number of keys.
        q_offset: position of the first query; None: the last query stands at the last key.
        kv_offset: position of the first key.
        batch: batch rows.
        requires_grad: gradients are asked for (wherever the backend declares them).
        deterministic: the same bits on every run are asked for.
        dropout_p: dropout that is asked for.
        scale: factor on q·k; None: 1/sqrt(head_dim).
        options: of the backend, by name.
    """

    pattern_name: str
    pattern: Pattern
    device: str
    dtype: str
    is_causal: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    q_offset: int | None = None
    kv_offset: int = 0
    batch: int = 2
    requires_grad: bool = True
    deterministic: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict, eq=False)  # a kit has the same in all of its cases

    def __str__(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        length = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len}x{self.kv_len}"
        placed = self.q_offset is not None or self.kv_offset
        words = [
            self.pattern_name,
            "causal" if self.is_causal else "",
            self.dtype,
            f"heads {heads}",
            f"head_dim {self.head_dim}",
            f"length {length}",
            f"offsets {self.geometry.q_offset},{self.kv_offset}" if placed else "",
            "" if self.scale is None else f"scale {self.scale:g}",
            "" if self.device == "cpu" else self.device,
        ]
        return " ".join(word for word in words if word)

    @property
    def geometry(self) -> Geometry:
        """Lengths, heads, positions and causality."""
        offset = {} if self.q_offset is None else {"q_offset": self.q_offset}
        return Geometry(
            q_len=self.q_len,
            kv_len=self.kv_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            is_causal=self.is_causal,
            kv_offset=self.kv_offset,
            **offset,
        )

    def config(self, backend: str) -> AttentionConfig:
        """The configuration that asks `backend` for it."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            pattern=self.pattern,
            is_causal=self.is_causal,
            dtype=self.dtype,
            device=self.device,
            requires_grad=self.requires_grad,
            deterministic=self.deterministic,
            dropout_p=self.dropout_p,
            scale=self.scale,
            backend=backend,
            backend_options={backend: self.options} if self.options else {},
        )


class Subject:
    """A case with the attention that was built for it, its inputs, its results and the expected ones.

    Everything is computed at its first use and kept.
    """

    def __init__(self, case: Case, attention: Callable[..., Any], capabilities: Mapping[str, Any]) -> None:
        self.case = case
        self.attention: Any = attention
        self.capabilities = capabilities

    def takes(self, axis: str) -> bool:
        """Whether the backend declares `axis`."""
        return bool(self.capabilities.get(axis, False))

    def at(self, **changes: int | None) -> Subject:
        """The same attention at other lengths, offsets or another batch size."""
        return Subject(attrs.evolve(self.case, **changes), self.attention, self.capabilities)  # type: ignore[arg-type]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q (B, S, H, D), k and v (B, T, K, D)."""
        return inputs_of(self.case)

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of these inputs at the case's positions."""
        case = self.case
        out, lse = self.attention(
            query, key, value, return_lse=True, q_offset=case.geometry.q_offset, kv_offset=case.kv_offset
        )
        return out, lse

    def run(
        self,
        inputs: Sequence[Tensor],
        *,
        through_lse: bool = False,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """out and lse, and dq, dk and dv where gradients are asked for."""
        leaves = [x.detach().requires_grad_(self.case.requires_grad) for x in inputs]
        if key_padding_mask is None and cu_seqlens is None:
            out, lse = self.call(leaves[0], leaves[1], leaves[2])
        else:
            out, lse = self.attention(
                *leaves, return_lse=True, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens
            )
        results = {"out": out.detach(), "lse": lse.detach()}
        if self.case.requires_grad:
            results |= gradients(out, lse, leaves, self.torch_dtype, through_lse=through_lse)
        return results

    @cached_property
    def results(self) -> dict[str, Tensor]:
        """What the backend computes."""
        return self.run(self.inputs)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """What the float64 oracle computes from the same values."""
        return self.oracle(self.inputs, through_lse=False)

    def oracle(
        self,
        inputs: Sequence[Tensor],
        *,
        through_lse: bool,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """out, lse, dq, dk and dv by the definition, in float64."""
        case = self.case
        leaves = [x.detach().double().requires_grad_(case.requires_grad) for x in inputs]
        out, lse = reference.attention(
            leaves[0],
            leaves[1],
            leaves[2],
            pattern=case.pattern,
            is_causal=case.is_causal,
            scale=case.scale,
            q_offset=case.q_offset,
            kv_offset=case.kv_offset,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
        )
        results = {"out": out.detach(), "lse": lse.detach()}
        if case.requires_grad:
            results |= gradients(out, lse, leaves, self.torch_dtype, through_lse=through_lse)
        return results

    @cached_property
    def sees(self) -> Tensor:
        """Which query counts which key: (H, S, T) bool, by the definition."""
        return reference.multiplicity(self.case.pattern, self.case.geometry) > 0

    @cached_property
    def nearly_vanish(self) -> bool:
        """Whether dq and dk do, since rows see few keys."""
        if min(self.case.q_len, self.case.kv_len) < SHORT:
            return True
        seen = self.sees.sum(dim=-1)
        return int(seen.sum()) < FEW_KEYS * int((seen > 0).sum())

    @cached_property
    def bounds(self) -> dict[str, float]:
        """The largest relative error that passes, by result."""
        case = self.case
        if case.dtype in FLOAT_BOUNDS:
            return dict.fromkeys(NAMES, FLOAT_BOUNDS[case.dtype])
        length = HALF_LENGTH
        dense = attrs.evolve(case, pattern_name="", pattern=Full(), batch=2, q_len=length, kv_len=length)
        bounds = _half_bounds(attrs.evolve(dense, q_offset=None, kv_offset=0))
        if not self.nearly_vanish:
            return bounds
        usual = case.head_dim**-0.5
        rounding = ROUNDINGS * torch.finfo(self.torch_dtype).eps * max(1.0, abs(case.scale or usual) / usual)
        return bounds | {name: max(bounds[name], rounding) for name in ("dq", "dk")}

    def bounds_on(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """The bounds, or twice the error of PyTorch's dense attention on these inputs of equal lengths, if larger."""
        measured = half_bounds(inputs, is_causal=self.case.is_causal, scale=self.case.scale)
        return {name: bound if name == "lse" else max(bound, measured[name]) for name, bound in self.bounds.items()}

    def compared(self, actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> Iterator[Finding]:
        """A finding for each of the results."""
        for name, tensor in actual.items():
            yield compare(f"{name} {what}".strip(), tensor, expected[name], self.bounds[name])


@lru_cache(maxsize=64)
def _half_bounds(case: Case) -> dict[str, float]:
    return half_bounds(inputs_of(case), is_causal=case.is_causal, scale=case.scale)


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, S, H, D), k and v (B, T, K, D) of a case, the same on every machine."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    shapes = [(case.batch, case.q_len, case.num_heads, case.head_dim)]
    shapes += [(case.batch, case.kv_len, case.num_kv_heads, case.head_dim)] * 2
    query, key, value = (random_like(s, dtype, case.device, seed=10 + i) for i, s in enumerate(shapes))
    return query, key, value
