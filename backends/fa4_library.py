"""FlashAttention-4's own functions, on the device of their inputs: the backward, and the forward of tables."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .libraries import aligned


@attrs.frozen
class Library:
    """Strided inputs are read where they lie; lse is float32 with natural logarithm.

    Shapes: query (B, S, H, D), key and value (B, T, K, D), out like query, lse and dlse (B, H, S). `how` is handed on:
    what of the scores counts.

    Attributes:
        run_forward: the library's own function.
        run_backward: likewise.
    """

    run_forward: Callable[..., tuple[Tensor, ...]]
    run_backward: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def load(cls) -> Library:
        """The installed one.

        Raises:
            ImportError: it, or what it stands on, cannot be imported.
            OSError: likewise.
        """
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        return cls(_flash_attn_fwd, _flash_attn_bwd)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, how: dict[str, object]
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse. The library launches on the current device, whatever its inputs are on."""
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            out, lse, *_ = self.run_forward(*aligned(query, key, value), softmax_scale=scale, return_lse=True, **how)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        scale: float,
        how: dict[str, object],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv, through lse too where that has a gradient."""
        query, key, value, out, dout = aligned(query, key, value, out, dout)
        dlse = None if dlse is None else dlse.contiguous()
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            dq, dk, dv = self.run_backward(
                query, key, value, out, dout, lse.contiguous(), softmax_scale=scale, dlse=dlse, **how
            )
        return dq, dk, dv
