"""What of attention weights is dropped, found from values that name their keys, and what follows from that exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dilated_attention import Attention, Pattern, build_attention
from dilated_attention.core import reference
from dilated_attention.core.geometry import Geometry

from .support import error

TOKENS = 40  # no more than there are columns of head_dim, so that values can name keys
HEADS, KV_HEADS = 4, 2


def build(pattern: Pattern, **fields: Any) -> Attention:
    """On the CPU, in float64, unless the fields say otherwise."""
    given: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": TOKENS, "dtype": "float64"}
    return build_attention(pattern=pattern, **(given | {"device": "cpu", "backend": "math"} | fields))


def drawn(attention: Callable[..., Any], *tensors: Tensor, seed: int, **call: Any) -> Tensor:
    """Out, with the dropout that torch's seed determines."""
    torch.manual_seed(seed)
    out = attention(*tensors, **call)
    assert isinstance(out, Tensor)
    return out


def expected(counts: Tensor, factors: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose weights (B, H, S, T) are multiplied by factors, from the definition, and lse of all weights."""
    k, v = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("bshd,bthd->bhst", query, k) / query.shape[3] ** 0.5 + counts.log()
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhst,bthd->bshd", weights * factors, v), scores.logsumexp(-1)


def check_draws(
    attention: Attention, pattern: Pattern, dropped: float, *, of_weights: float, of_results: float, batch: int = 2
) -> None:
    """What is dropped is dropped with that probability, one by one, scaled exactly, and alike in both passes.

    Args:
        attention: of `build`, with a dropout_p.
        pattern: its pattern.
        dropped: its dropout_p, rounded as its kernel does.
        of_weights: bound on how far a weight is from a multiple of what one occurrence weighs.
        of_results: bound on the relative errors of out and gradients, once it is known what was dropped.
        batch: of the tensors.
    """
    config = attention.config
    geometry = Geometry(q_len=TOKENS, kv_len=TOKENS, num_heads=HEADS, num_kv_heads=KV_HEADS, is_causal=config.is_causal)
    counts = torch.as_tensor(reference.multiplicity(pattern, geometry)).double().to(config.device)
    bounds = {"of_weights": of_weights, "of_results": of_results}
    check_counted(attention, counts, dropped, dtype=getattr(torch, config.dtype), batch=batch, **bounds)


def check_counted(
    attention: Callable[..., Any],
    counts: Tensor,
    dropped: float,
    *,
    dtype: torch.dtype,
    of_weights: float,
    of_results: float,
    batch: int,
) -> None:
    """As `check_draws`, of whatever is called like an attention, whose pairs count so often: (..., S, T) float64."""
    keep, device = 1 - dropped, counts.device
    generator = torch.Generator().manual_seed(5)
    query, key, value, dout = (
        torch.randn(batch, TOKENS, heads, TOKENS, dtype=torch.float64, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    names = torch.eye(TOKENS, dtype=dtype, device=device)[None, :, None].expand(batch, TOKENS, KV_HEADS, TOKENS)
    wide = [x.double() for x in (query, key, value)]
    whole, _ = expected(counts, torch.ones((), device=device), wide[0], wide[1], names.double())
    weights = whole.transpose(1, 2)
    seen = weights > 0
    found = drawn(attention, query, key, names, seed=11)
    kept = torch.where(seen, found.double().transpose(1, 2) / weights, 0.0) * counts * keep  # occurrences of each pair
    assert (kept - kept.round()).abs().max() < of_weights
    kept = kept.round()
    assert bool(((kept >= 0) & (kept <= counts)).all())
    occurrences = counts.expand_as(kept)[seen].sum()
    assert abs(float(kept.sum() / occurrences) - keep) < 4 * (dropped * keep / float(occurrences)) ** 0.5
    spread = float((kept - counts * keep)[seen].square().sum() / occurrences)
    assert abs(spread / (dropped * keep) - 1) < 0.15  # occurrences of a pair are drawn one by one
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.manual_seed(11)  # the same, or what follows would not be exact
    out, lse = attention(*leaves, return_lse=True)
    is_seen = counts.sum(-1) > 0  # of some key, by the query
    dlse = torch.where(is_seen, torch.randn(lse.shape, dtype=torch.float64, generator=generator).to(device), 0.0)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse.to(lse.dtype)))
    exact = [x.requires_grad_() for x in wide]
    factors = torch.where(seen, kept / (counts * keep), 0.0)
    exact_out, exact_lse = expected(counts, factors, exact[0], exact[1], exact[2])
    exact_lse = torch.where(is_seen, exact_lse, 0.0)
    exact_grads = torch.autograd.grad((exact_out, exact_lse), exact, (dout.double(), dlse))
    found_lse = torch.where(is_seen, lse, 0.0)
    for a, b in zip((out, found_lse, *grads), (exact_out, exact_lse, *exact_grads), strict=True):
        assert error(a, b) < of_results
    assert not torch.equal(drawn(attention, query, key, names, seed=12), found)
