"""What the tests of Hugging Face models share: small models, tokens, and a pattern as an additive mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from dilated_attention import Dilated, Full, Pattern
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.reference import multiplicity
from dilated_attention.models import register_with_transformers

from .model_kit import gradients, padding
from .support import error

VOCAB, S, H = 40, 21, 4
DILATED = Dilated((4, 8, 16), (1, 2, 4))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}


def model(kind: str = "Llama", **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**SIZES | fields)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tokens(batch: int = 2, length: int = S, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def log_multiplicity(pattern: Pattern, length: int) -> Tensor:
    """The additive mask (1, H, S, S) that makes dense attention the causal pattern's."""
    counts = multiplicity(pattern, Geometry.self_attention(length, H, is_causal=True))
    return torch.as_tensor(counts, dtype=torch.float32).log().clamp(min=torch.finfo(torch.float32).min)[None]


def check_eager(mine: Any, output: str, leaves: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Switches a model from eager attention to `Full()`, which gives the same for a padded batch, gradients too.

    Returns the tokens, where they are no padding, and what eager attention gave there.
    """
    seen, mask = tokens(), ~padding(S, 9, length=S, left=left)

    def there() -> Tensor:
        found: Tensor = mine(seen, attention_mask=mask.long())[output]
        return found[mask]

    expected = there()
    wanted = gradients(expected, *leaves)
    register_with_transformers(mine, Full())
    actual = there()
    assert error(actual, expected) < 1e-5
    assert max(error(a, e) for a, e in zip(gradients(actual, *leaves), wanted, strict=True)) < 1e-4
    return seen, mask, expected
