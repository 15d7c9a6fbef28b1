"""The oracle: attention by its definition, in float64, on dense masks. Obviously right, and slow.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim, E value head_dim. It uses
nothing of a pattern but `Pattern.multiplicity`, so that every faster path can be held against it.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import attrs
import numpy as np
import torch
from torch import Tensor

from .checks import require_choice, require_counts
from .errors import ConfigError
from .geometry import Geometry
from .pattern import Full, Pattern

MOST_MASK_BYTES: Final = 16 << 30  # 8 heads over 16,384 tokens; several tensors of this size follow


def mask_bytes(geometry: Geometry) -> int:
    """Bytes of the dense multiplicity (num_heads, q_len, kv_len) in float64."""
    return 8 * geometry.num_heads * geometry.q_len * geometry.kv_len


def multiplicity(pattern: Pattern, geometry: Geometry, *, limit_bytes: int = MOST_MASK_BYTES) -> Tensor:
    """How often each query counts each key, causality included: (H, S, T) int64, on the CPU.

    Raises:
        ConfigError: what is no pattern, one that does not take these heads, or more than `limit_bytes`.
    """
    if not isinstance(pattern, Pattern):
        raise ConfigError(
            f"pattern must be a pattern such as Full(), got {pattern!r} ({type(pattern).__name__}); of a mapping with "
            "'kind' dilated_attention.resolve_pattern(mapping) makes one"
        )
    pattern.validate(geometry.num_heads, geometry.num_kv_heads)
    _check_mask(geometry, limit_bytes)
    query = np.arange(geometry.q_len, dtype=np.int64)[None, :, None] + geometry.q_offset
    key = np.arange(geometry.kv_len, dtype=np.int64)[None, None, :] + geometry.kv_offset
    head = np.arange(geometry.num_heads, dtype=np.int64)[:, None, None]
    counts = np.asarray(pattern.multiplicity(query, key, head, geometry))
    shape = geometry.num_heads, geometry.q_len, geometry.kv_len
    require_counts(pattern.kind, counts, shape, pattern.max_multiplicity)
    allowed = (key <= query) if geometry.is_causal else np.ones((1, 1, 1), dtype=np.int64)
    dense = np.broadcast_to(counts * allowed, (geometry.num_heads, geometry.q_len, geometry.kv_len))
    return torch.from_numpy(np.array(dense, dtype=np.int64))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int | None = None,
    kv_offset: int = 0,
    whole_len: int = 0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tensor_layout: str = "bshd",
    limit_bytes: int = MOST_MASK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Attention over the multiset of keys that `pattern` names, differentiable by autograd through both results.

        out_p = sum_q m(p,q) exp(s_pq) v_q / sum_q m(p,q) exp(s_pq)       lse_p = log sum_q m(p,q) exp(s_pq)

    Args:
        query: (B, S, H, D), any floating dtype; computed in float64.
        key: (B, T, K, D), H a multiple of K.
        value: (B, T, K, E).
        pattern: who attends to whom; `Full` by default.
        is_causal: query position p sees key positions q <= p only.
        scale: factor on q·k, 1/sqrt(D) by default.
        q_offset: absolute position of the first query; default: the last query stands at the last key.
        kv_offset: absolute position of the first key.
        whole_len: length of the sequence, where queries and keys are parts of it and others reach further.
        dropout_p: probability with which each counted occurrence is dropped after normalisation; lse is undropped.
        generator: source of the dropout draw; torch's default one if None.
        key_padding_mask: (B, T) bool, True where a key is padding; the tokens left in a row are one sequence with
            positions from 0, its queries the last S of all T places.
        cu_seqlens: (documents + 1,), cumulative lengths of sequences packed in a row, each with positions from 0.
        tensor_layout: "bhsd" for (B, H, S, D), (B, K, T, D), (B, K, T, E), and out likewise.
        limit_bytes: most that the mask may take, 8 a head, query and key (with padding or packed documents, of every
            row of the batch); the computation holds several tensors as large.

    Returns:
        out (B, S, H, E) and lse (B, H, S), both float64; rows without keys give 0 and -inf, and no gradient.

    Raises:
        ConfigError: shapes that do not fit together, a pattern that does not take these heads, or a mask beyond
            `limit_bytes`.
    """
    require_choice("tensor_layout", tensor_layout, ("bshd", "bhsd"))
    swap = tensor_layout == "bhsd"
    if swap and query.dim() == key.dim() == value.dim() == 4:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    geometry = attrs.evolve(_geometry(query, key, value, is_causal, q_offset, kv_offset), whole_len=whole_len)
    chosen = Full() if pattern is None else pattern
    if key_padding_mask is None and cu_seqlens is None:
        counts = multiplicity(chosen, geometry, limit_bytes=limit_bytes)[None]
    elif q_offset is not None or kv_offset or whole_len:
        raise ConfigError(
            "sequences of their own have positions from 0 and no whole_len, "
            f"got offsets {q_offset} and {kv_offset}, whole_len {whole_len}"
        )
    else:
        _check_mask(geometry, limit_bytes, rows=query.shape[0])
        counts = _document_counts(chosen, geometry, query.shape[0], key_padding_mask, cu_seqlens, limit_bytes)
    counts = counts.to(query.device, torch.float64)
    q_bhsd, k_bhtd, v_bhte = (x.to(torch.float64).transpose(1, 2) for x in (query, key, value))
    k_bhtd, v_bhte = (x.repeat_interleave(geometry.group_size, dim=1) for x in (k_bhtd, v_bhte))
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (factor * q_bhsd @ k_bhtd.mT).masked_fill(counts == 0, -torch.inf)
    empty = counts.sum(-1) == 0
    peak = scores.detach().amax(-1) if geometry.kv_len else counts.new_zeros(scores.shape[:-1])
    peak = peak.masked_fill(empty, 0.0)
    weights = counts * torch.exp(scores - peak[..., None])
    total = weights.sum(-1).masked_fill(empty, 1.0)
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf)
    shares = weights / total[..., None]
    if dropout_p > 0:
        kept = torch.binomial(
            counts.expand_as(shares).contiguous(), torch.full_like(shares, 1 - dropout_p), generator=generator
        )
        shares = shares * kept / (counts.clamp(min=1) * (1 - dropout_p) if dropout_p < 1 else 1.0)
    out_bhse = shares @ v_bhte
    return out_bhse if swap else out_bhse.transpose(1, 2), lse


def _check_mask(geometry: Geometry, limit_bytes: int, rows: int = 1) -> None:
    """Raise `ConfigError` before a mask is allocated that is too large, for `rows` rows of a batch."""
    needed = rows * mask_bytes(geometry)
    if needed > limit_bytes:
        raise ConfigError(
            f"the oracle's dense mask of {geometry.num_heads} heads, {geometry.q_len:,} queries and "
            f"{geometry.kv_len:,} keys takes {needed:,} bytes, allowed are {limit_bytes:,} (limit_bytes); shorten the "
            "sequence, or take fewer heads at once"
        )


def _document_counts(
    pattern: Pattern,
    geometry: Geometry,
    batch: int,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    limit_bytes: int,
) -> Tensor:
    """How often each query counts each key of its own sequence: (B, H, S, T) int64, 0 for everything else."""
    counts = torch.zeros(batch, geometry.num_heads, geometry.q_len, geometry.kv_len, dtype=torch.int64, device="cpu")
    if key_padding_mask is not None:
        documents = [(row, torch.nonzero(~key_padding_mask[row].cpu())[:, 0]) for row in range(batch)]
    else:
        assert cu_seqlens is not None
        ends = cu_seqlens.tolist()
        documents = [
            (row, torch.arange(*pair, device="cpu")) for row in range(batch) for pair in itertools.pairwise(ends)
        ]
    for row, keys in documents:
        queries = keys - (geometry.kv_len - geometry.q_len)
        queries = queries[queries >= 0]
        own = attrs.evolve(geometry, q_len=len(queries), kv_len=len(keys), q_offset=len(keys) - len(queries))
        counts[row][:, queries[:, None], keys] = multiplicity(
            pattern, attrs.evolve(own, kv_offset=0), limit_bytes=limit_bytes
        )
    return counts


def _geometry(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, q_offset: int | None, kv_offset: int
) -> Geometry:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise ConfigError(f"query, key and value must have 4 dimensions (batch, seq, heads, head_dim), got {shapes}")
    (b, s, h, d), (bk, t, k, dk), (bv, tv, kv, _) = shapes
    if not (b == bk == bv and t == tv and k == kv and d == dk):
        raise ConfigError(f"query, key and value do not fit together: {shapes}")
    offset = kv_offset + t - s if q_offset is None else q_offset
    return Geometry(
        q_len=s, kv_len=t, num_heads=h, num_kv_heads=k, is_causal=is_causal, q_offset=offset, kv_offset=kv_offset
    )
