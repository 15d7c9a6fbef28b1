"""Continuing prompts with a language model, token by token.

Shapes: B batch, S prompt length, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.checks import require_int
from ..core.errors import ConfigError
from .requirements import require_tokens

if TYPE_CHECKING:
    from .longnet import LongNetLM


@torch.no_grad()
def generate(
    model: LongNetLM,
    tokens_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    stop_token: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Prompts with their continuations, (B, S + new tokens) int64.

    Args:
        model: causal, in evaluation mode.
        tokens_BS: prompts of one length, at least one token.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among that many of the likeliest.
        stop_token: a row that has it repeats it from there; generation ends when all rows have.
        generator: for the draws; by default torch's own.

    Raises:
        ConfigError: for what cannot be drawn, and as `LongNetLM.step`.
    """
    require_tokens(tokens_BS)
    if tokens_BS.shape[1] < 1:
        raise ConfigError(f"prompts must be (batch, seq_len) with at least one token, got {tuple(tokens_BS.shape)}")
    require_int("max_new_tokens", max_new_tokens, minimum=1)
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be a number of at least 0 and finite, got {temperature!r}")
    if top_k is not None:
        require_int("top_k", top_k, minimum=1)
        if temperature == 0:
            raise ConfigError(
                f"top_k={top_k} is for draws, and temperature 0 takes the likeliest token; give a temperature"
            )
    if stop_token is not None:
        require_int("stop_token", stop_token, minimum=0, maximum=model.embedding.num_embeddings - 1)
    batch, length = tokens_BS.shape
    cache = model.make_cache(batch, length + max_new_tokens)
    logits_BV = model.step(tokens_BS, cache)[:, -1]
    ended_B = torch.zeros(batch, dtype=torch.bool, device=tokens_BS.device)
    for index in range(max_new_tokens):
        next_B = _choose(logits_BV.float(), temperature, top_k, generator)
        if stop_token is not None:
            next_B = torch.where(ended_B, stop_token, next_B)
            ended_B = ended_B | (next_B == stop_token)
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], dim=1)
        if index + 1 == max_new_tokens or (stop_token is not None and bool(ended_B.all())):
            break
        logits_BV = model.step(next_B[:, None], cache)[:, -1]
    return tokens_BS


def _choose(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token a row, (B,) int64."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -math.inf)
    # None is above 0 then, so none overflows; cards multiply by the reciprocal, which has to be finite.
    below = logits_BV.double() - logits_BV.amax(-1, keepdim=True)
    shares = (below / max(temperature, sys.float_info.min)).softmax(-1)
    return torch.multinomial(shares.float(), 1, generator=generator).squeeze(-1)
