"""PyTorch's own attention kernels as dense kernels, called below `scaled_dot_product_attention`.

Only those that return lse and whose backward takes out and lse: aten's flash kernel for CPUs, and on CUDA its
FlashAttention-2, cuDNN and memory-efficient kernels. All take strided views. FlashAttention-2 and the memory-efficient
kernel drop weights themselves; where the CPU's would, matrix products do, and FlashAttention-2 for cuDNN's.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from ..core.draws import dropped_parts
from ..core.groups import repeated_heads, summed_groups
from ..core.kernel import DenseKernel, DensePiece
from ..core.limits import Limits
from .dense_products import DenseProducts
from .philox import PhiloxDraws

_aten = torch.ops.aten
_Grads = tuple[Tensor, Tensor, Tensor]
_LONGEST_VECTOR = 16  # numbers in a vector register of any processor
_STEPS = 256  # in which FlashAttention-2 counts probabilities
_MOST_DRAWN = 65_535  # batch rows that the memory-efficient kernel launches at once, as it has to where it drops


def _with_nans(out: Tensor, lse: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose scores all are NaN, of which aten's kernel makes zeros where the keys do not fill a vector.

    Every row sees the first key, so where that score is NaN the row is.
    """
    q, k = (x.to(lse.dtype) for x in (query, key[:, :1]))
    nothing = (torch.unflatten(q, 2, (key.shape[2], -1)) * k.unsqueeze(3)).sum(-1).flatten(2) * 0  # (B, S, H)
    return (out + nothing.unsqueeze(-1)).to(out.dtype), lse + nothing.transpose(1, 2)


def _bhsd(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


@attrs.frozen
class CpuFlash:
    """aten's flash attention for CPUs: float64, float32, bfloat16, float16, any head_dim, grouped queries."""

    name: str = "aten flash for CPU"
    workspace_bytes: int = Limits().workspace_bytes  # bound on the temporaries of a pass that drops
    takes_dropout: bool = True

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> DenseProducts:
        """See `Drops`."""
        return DenseProducts(workspace_bytes=self.workspace_bytes).dropping(dropout_p, seed, device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(
            *_bhsd(query, key, value), 0.0, piece.is_causal, scale=piece.scale
        )
        out = out.transpose(1, 2)
        if key.shape[1] < _LONGEST_VECTOR and bool((lse == 0).any()):
            return _with_nans(out, lse, query, key)
        return out, lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> _Grads:
        """See `DenseKernel`."""
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            *_bhsd(dout, query, key, value, out), lse, 0.0, piece.is_causal, scale=piece.scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@attrs.frozen
class CudaFlash:
    """FlashAttention-2 as compiled into PyTorch: bfloat16 and float16, head_dim a multiple of 8 up to 256, windows.

    Called below PyTorch's `scaled_dot_product` operators, which pass no window on.
    """

    name: str = "flash"
    takes_windows: bool = True
    takes_dropout: bool = True
    draws: PhiloxDraws | None = None  # of the one pass that it is for

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> CudaFlash:
        """See `Drops`; dropout_p is rounded to 256ths.

        The kernel keeps a pair if a byte is at most 255 keep, rounded down, and scales by 1 / keep: of 256ths that is
        how often it keeps one.
        """
        return attrs.evolve(self, draws=PhiloxDraws.of(dropped_parts(dropout_p, _STEPS) / _STEPS, seed))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        if self.draws is None:
            return self._forward(query, key, value, piece, 0.0)
        with self.draws.forward(query.device):
            return self._forward(query, key, value, piece, self.draws.dropout_p)

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        left, right = piece.window or (None, None)
        out, lse, *_ = _aten._flash_attention_forward.default(
            query,
            key,
            value,
            None,
            None,
            query.shape[1],
            key.shape[1],
            dropout_p,
            piece.is_causal,
            False,
            scale=piece.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> _Grads:
        """See `DenseKernel`."""
        dropout_p, state = 0.0, torch.zeros(2, dtype=torch.uint64, device=query.device)  # never read without dropout
        if self.draws is not None:
            dropout_p = self.draws.dropout_p
            state.view(torch.int64)[0].fill_(self.draws.next_seed())  # no copy that the device is waited for
        left, right = piece.window or (None, None)
        dq, dk, dv = _aten._flash_attention_backward.default(
            dout,
            query,
            key,
            value,
            out,
            lse.contiguous(),
            None,
            None,
            query.shape[1],
            key.shape[1],
            dropout_p,
            piece.is_causal,
            state,
            state,
            scale=piece.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return dq, dk, dv


@attrs.frozen
class CudaCudnn:
    """cuDNN's fused attention: bfloat16 and float16 on sm_90 and newer, head_dim a multiple of 8 up to 128.

    It does not take a single query with a single key, as ragged segments may end in, and PyTorch passes it no window:
    those go to FlashAttention-2.
    """

    name: str = "cudnn"
    takes_windows: bool = True
    takes_dropout: bool = True

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> CudaFlash:
        """See `Drops`."""
        return CudaFlash().dropping(dropout_p, seed, device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        if piece.window is not None or query.shape[1] == key.shape[1] == 1:
            return CudaFlash().forward(query, key, value, piece)
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention.default(
            *_bhsd(query, key, value), None, True, 0.0, piece.is_causal, False, scale=piece.scale
        )
        return out.transpose(1, 2), lse.squeeze(-1)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> _Grads:
        """See `DenseKernel`."""
        if piece.window is not None or query.shape[1] == key.shape[1] == 1:
            return CudaFlash().backward(dout, query, key, value, out, lse, piece)
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward.default(
            *_bhsd(dout, query, key, value, out),
            lse.contiguous().unsqueeze(-1),
            state,
            state,
            None,
            None,
            None,
            query.shape[1],
            key.shape[1],
            0.0,
            piece.is_causal,
            scale=piece.scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@attrs.frozen
class CudaCudnnForOneLength(CudaCudnn):
    """cuDNN's for the length that an attention is built for, FlashAttention-2 for others.

    For all sizes and strides that it has not met cuDNN plans first, for 30 to 70 ms: generation would wait for that at
    every token.
    """

    other_lengths: DenseKernel = CudaFlash()


@attrs.frozen
class CudaEfficient:
    """The memory-efficient (CUTLASS) kernel: float32, bfloat16 and float16, head_dim a multiple of 4 (8 for halves)."""

    name: str = "efficient"
    takes_dropout: bool = True
    draws: PhiloxDraws | None = None  # of the one pass that it is for

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> CudaEfficient:
        """See `Drops`."""
        return attrs.evolve(self, draws=PhiloxDraws.of(dropout_p, seed))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        if self.draws is None:
            return self._forward(query, key, value, piece, 0.0)
        found = []
        for q, k, v in zip(*_parts(query, key, value), strict=True):
            with self.draws.forward(query.device):
                found.append(self._forward(q, k, v, piece, self.draws.dropout_p))
        if len(found) == 1:
            return found[0]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        heads = query.shape[2]
        key, value = repeated_heads(key, heads), repeated_heads(value, heads)
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention.default(
            *_bhsd(query, key, value), None, True, dropout_p, piece.is_causal, scale=piece.scale
        )
        return out.transpose(1, 2), lse[:, :, : query.shape[1]]

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> _Grads:
        """See `DenseKernel`.

        The kernel reads lse in aligned groups of 32 rows (those added here hold +inf, so that they weigh nothing) and,
        in half precision, takes out to be compact whatever its strides say.
        """
        if self.draws is not None and query.shape[0] > _MOST_DRAWN:
            parts = zip(*_parts(dout, query, key, value, out, lse), strict=True)
            found = [self.backward(do, q, k, v, o, of_rows, piece) for do, q, k, v, o, of_rows in parts]
            dqs, dks, dvs = zip(*found, strict=True)
            return torch.cat(dqs), torch.cat(dks), torch.cat(dvs)
        kv_heads = key.shape[2]
        batch, heads, length = lse.shape
        aligned = lse.new_full((batch, heads, -(-length // 32) * 32), math.inf)
        aligned[:, :, :length] = lse
        dropout_p, seed = 0.0, torch.zeros((), dtype=torch.int64, device=query.device)  # never read without dropout
        offset = seed
        if self.draws is not None:  # both are read on the host
            dropout_p, offset = self.draws.dropout_p, torch.zeros((), dtype=torch.int64, device="cpu")
            seed = torch.full_like(offset, self.draws.next_seed())
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward.default(
            *_bhsd(dout, query, repeated_heads(key, heads), repeated_heads(value, heads)),
            None,
            out.contiguous().transpose(1, 2),
            aligned,
            seed,
            offset,
            dropout_p,
            [True, True, True, False],
            piece.is_causal,
            scale=piece.scale,
        )
        dq, dk, dv = _bhsd(dq, dk, dv)
        return dq, summed_groups(dk, kv_heads), summed_groups(dv, kv_heads)


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The batch rows of each tensor, as many at once as are drawn for together."""
    return [torch.split(x, _MOST_DRAWN) for x in tensors]
