"""The official LongNet's way of computing dilated attention, written again as a baseline (arXiv 2307.02486).

Each branch pads, reshapes into segments, gathers the kept rows into compact tensors, runs one dense kernel, scatters
its output and lse into dense tensors, and the branches are mixed with weights through which no gradient flows (as
there).

    dilated-attention bench --case 'longnet-16k' --peer benchmarks.torchscale_algorithm:official
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dilated_attention import Dilated
from dilated_attention.bench.cases import BenchCase
from dilated_attention.bench.peers import Peer

# (query, key, value) in (batch, heads, seq, head_dim), is_causal -> (out, lse (batch, heads, seq)); differentiable
Kernel = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

_EMPTY = -1e8  # lse of a row that a branch does not keep


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool,
    kernel: Kernel,
) -> Tensor:
    """Attention over (batch, seq_len, heads, head_dim), heads' offsets in blocks (head // (heads / rate))."""
    outs, lses = [], []
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        # One segment beyond the sequence is cut to it, and padded again to a multiple of the rate.
        longest = -(-query.shape[1] // rate) * rate
        out, lse = _branch(query, key, value, min(width, longest), rate, is_causal, kernel)
        outs.append(out)
        lses.append(lse)
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), dim=0).to(query.dtype)
    total = outs[0] * weights[0].unsqueeze(-1)
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total = total + out * weight.unsqueeze(-1)
    return total


def _branch(
    query: Tensor, key: Tensor, value: Tensor, width: int, rate: int, is_causal: bool, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = query.shape
    sparse = [_gather(x, width, rate) for x in (query, key, value)]
    out, lse = kernel(sparse[0], sparse[1], sparse[2], is_causal)
    rows = out.shape[2]
    per_offset = heads // rate
    # (batch * segments, offset, heads of the offset, rows, ...) -> the diagonal of (row in its group, offset)
    dense = out.new_zeros((out.shape[0], rows, rate, rate, per_offset, head_dim))
    dense_lse = lse.new_full((out.shape[0], rows, rate, rate, per_offset), _EMPTY)
    picked = out.view(out.shape[0], rate, per_offset, rows, head_dim)
    diagonal = torch.diagonal(dense, dim1=2, dim2=3)  # (segments, rows, per_offset, head_dim, rate)
    diagonal.copy_(picked.permute(0, 3, 2, 4, 1))
    picked_lse = lse.detach().view(out.shape[0], rate, per_offset, rows)
    torch.diagonal(dense_lse, dim1=2, dim2=3).copy_(picked_lse.permute(0, 3, 2, 1))
    out = dense.reshape(batch, -1, heads, head_dim)[:, :length]
    return out, dense_lse.reshape(batch, -1, heads)[:, :length]


def _gather(x: Tensor, width: int, rate: int) -> Tensor:
    """The kept rows of each head, compact: (batch * segments, heads, width / rate, head_dim)."""
    _, length, heads, head_dim = x.shape
    x = functional.pad(x, (0, 0, 0, 0, 0, -length % width))
    x = x.reshape(-1, width // rate, rate, rate, heads // rate, head_dim)
    kept = torch.diagonal(x, dim1=2, dim2=3)  # (segments, rows, per_offset, head_dim, rate)
    return kept.permute(0, 4, 2, 1, 3).reshape(kept.shape[0], heads, width // rate, head_dim).contiguous()


def aten_kernel(name: str) -> Kernel:
    """aten's differentiable dense kernel: "cudnn", "flash" (FlashAttention-2), or "cpu"."""

    def run(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        if name == "cpu":
            op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            out, lse = op(query, key, value, 0.0, is_causal)
        elif name == "cudnn":
            op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
            out, lse, *_ = op(query, key, value, None, True, 0.0, is_causal, False)
            lse = lse.squeeze(-1)
        else:
            op = torch.ops.aten._scaled_dot_product_flash_attention.default
            out, lse, *_ = op(query, key, value, 0.0, is_causal, False)
        return out, lse

    return run


def official(case: BenchCase, device: str) -> Peer | None:
    """For `--peer benchmarks.torchscale_algorithm:official`: over FlashAttention-2, or aten's kernel for CPUs."""
    return _peer(case, "flash" if device.startswith("cuda") else "cpu")


def official_cudnn(case: BenchCase, device: str) -> Peer | None:
    """The same over cuDNN's kernel; on a GPU only."""
    return _peer(case, "cudnn") if device.startswith("cuda") else None


def _peer(case: BenchCase, kernel: str) -> Peer | None:
    pattern = case.pattern
    if not isinstance(pattern, Dilated) or pattern.offsets != "blocked" or pattern.heads != "all":
        return None
    branches = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    for width, rate in branches:
        cut = min(width, case.seq_len)
        if case.seq_len % cut or cut % rate or case.num_heads % rate:
            return None  # it pads, and attends to what it pads with
    run = aten_kernel(kernel)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lengths, rates = zip(*branches, strict=True)
        return dilated_attention(query, key, value, lengths, rates, is_causal=case.is_causal, kernel=run)

    return Peer("official algorithm", attend, kernel=kernel, has_exact_gradients=False)
