"""The oracle as a backend: exact float64 attention on dense masks, for comparison and where nothing else fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs
import torch

from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.reference import attention, mask_bytes
from ..core.refusal import Refusal
from .recording import of_part, recording

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.kernel import LayoutPiece
    from ..core.layout import Layout
    from ..registry.specs import Request

_NAME: Final = "dense float64"
_REMEDY: Final = "raise Limits.reference_mask_bytes, shorten the sequence or use another backend"


class ReferenceBackend:
    """Takes every pattern, dtype and length whose dense mask fits `Limits.reference_mask_bytes`."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """The mask of the length that the request names, where it is too large."""
        config = request.config
        if config.seq_len is None:
            return
        length = config.seq_len // config.ring_size  # ranks meet a shard at a time
        needed = mask_bytes(Geometry.self_attention(length, config.num_heads))
        allowed = config.limits.reference_mask_bytes
        if needed > allowed:
            required = f"{needed:,} bytes for the dense mask of {length:,} tokens"
            yield Refusal("reference_mask_bytes", required, f"{allowed:,} bytes", _REMEDY)

    def pin(self, request: Request) -> str:
        """There is one sub-kernel."""
        return _NAME

    def build(self, request: Request) -> ReferenceKernel:
        """The kernel for `request`."""
        return ReferenceKernel(request.config.limits.reference_mask_bytes)


@attrs.frozen
class ReferenceKernel:
    """Computes a `LayoutPiece` from its pattern alone; raises `ConfigError` where the mask is too large."""

    max_mask_bytes: int

    @property
    def name(self) -> str:
        """The same as `ReferenceBackend.pin`."""
        return _NAME

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        with torch.no_grad():
            out, lse = self._attention(query, key, value, piece)
        return out.to(query.dtype), lse if query.dtype == torch.float64 else lse.to(torch.float32)

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: LayoutPiece,
        *,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `LayoutKernel.backward`; computes the forward again, with the same dropout draw, and differentiates it."""
        with recording():
            q, k, v = (x.detach().to(torch.float64).requires_grad_() for x in (query, key, value))
            results = self._attention(q, k, v, piece)
        upstream = (dout.to(torch.float64), None if dlse is None else dlse.to(torch.float64))
        if piece.is_part:
            upstream = of_part(*upstream, out, lse, *(x.detach() for x in results))
        used = [(x, grad) for x, grad in zip(results, upstream, strict=True) if grad is not None]
        dq, dk, dv = torch.autograd.grad([x for x, _ in used], (q, k, v), [grad for _, grad in used])
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """Nothing but the judgement whether the mask fits; raises `ConfigError` where it does not."""
        self._check_mask(layout.geometry)
        return 0

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        geometry = piece.layout.geometry
        self._check_mask(geometry)
        generator = None
        if piece.seed is not None:
            generator = torch.Generator(query.device).manual_seed(int(piece.seed))
        return attention(
            query,
            key,
            value,
            pattern=piece.layout.pattern,
            is_causal=geometry.is_causal,
            scale=piece.scale,
            q_offset=geometry.q_offset,
            kv_offset=geometry.kv_offset,
            whole_len=geometry.whole_len,
            dropout_p=piece.dropout_p,
            generator=generator,
            limit_bytes=self.max_mask_bytes,
        )

    def _check_mask(self, geometry: Geometry) -> None:
        needed = mask_bytes(geometry)
        if needed > self.max_mask_bytes:
            raise ConfigError(
                f"the reference backend needs {needed:,} bytes for the dense mask of {geometry.q_len:,} queries and "
                f"{geometry.kv_len:,} keys, allowed are {self.max_mask_bytes:,}; {_REMEDY}"
            )
