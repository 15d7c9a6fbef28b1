"""FlashAttention-4's forward of dense pieces, called as it was compiled.

The library's own function prepares every call anew: some 60 us of the host, beside 20 for memory and the launch, which
is as long as a short piece takes. What it prepares depends on few things, so here it is done once for each of them, in
every process: what FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED keeps on a disk is of the library's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from .libraries import aligned

if TYPE_CHECKING:
    from ..core.kernel import DensePiece

_NO_LENGTHS: Final = (None,) * 5  # of documents, and of pages
_NOT_REPEATED: Final = (False,) * 4


def forward(query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
    """Return out and lse, of strided inputs as they lie.

    Shapes: query and out (B, S, H, D), key and value (B, T, K, D), lse (B, H, S) float32 with natural logarithm.
    """
    query, key, value = (x.detach() if x.requires_grad else x for x in aligned(query, key, value))
    batch, length, heads, head_dim = query.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    group, is_local = heads // key.shape[2], piece.window is not None
    repeats = _repeats(query), _repeats(key), _repeats(value)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call] # the launch is on the current one
        run, last = _compiled(query.dtype, head_dim, group, piece.is_causal, is_local, repeats, query.device)
        run(query, key, value, out, lse, piece.scale, *_NO_LENGTHS, *(piece.window or (None, None)), *last)
    return out, lse


def _repeats(x: Tensor) -> tuple[bool, ...]:
    """Along which dimensions all is the same, by a stride of 0: as a rule none."""
    steps = x.stride()
    return tuple(step == 0 for step in steps) if 0 in steps else _NOT_REPEATED


@cache
def _compiled(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    is_causal: bool,
    is_local: bool,
    repeats: tuple[tuple[bool, ...], ...],
    device: torch.device,
) -> tuple[Callable[..., object], tuple[object, ...]]:
    """The kernel, and what its last arguments are.

    A head of keys has `group` heads of queries; `repeats` says of which dimensions of query, key and value the
    stride is 0.
    """
    from cutlass import cute
    from flash_attn.cute import interface as library

    def like(is_repeated: tuple[bool, ...], dtype: torch.dtype, assumed_align: int) -> object:
        # Of a call, lengths and strides may be any others; but a stride of 0 is compiled.
        x = torch.empty((2,) * (len(is_repeated) - 1) + (head_dim,), dtype=dtype, device=device)
        steps = [0 if fixed else step for fixed, step in zip(is_repeated, x.stride(), strict=True)]
        return library.to_cute_tensor(x.as_strided(x.shape, steps), assumed_align=assumed_align)

    tile = library._tile_size_fwd_sm90(head_dim, head_dim, is_causal, is_local)
    kernel = library.FlashAttentionForwardSm90(
        library.torch2cute_dtype_map[dtype],
        head_dim,
        head_dim,
        group,
        is_causal=is_causal,
        is_local=is_local,
        pack_gqa=group > 1,
        tile_m=tile.m_block_size,
        tile_n=tile.n_block_size,
        num_stages=2,
        num_threads=384,
        intra_wg_overlap=tile.intra_wg_overlap,
        mma_pv_is_rs=tile.mma_pv_is_rs,
        paged_kv_non_tma=False,
    )
    inputs = [like(is_repeated, dtype, 16) for is_repeated in repeats]
    results = like(_NOT_REPEATED, dtype, 16), like(_NOT_REPEATED[1:], torch.float32, 4)
    window = (1, 1) if is_local else (None, None)
    last = None, None, library.AuxData(None, None), None, None  # no sink, no table of blocks, nothing of documents
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments = (*inputs, *results, 1.0, *_NO_LENGTHS, *window, *last, stream)
    return cute.compile(kernel, *arguments, options="--enable-tvm-ffi"), last
