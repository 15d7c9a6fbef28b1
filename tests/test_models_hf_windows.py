"""Hugging Face layers with windows of both sides and with sinks, against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dilated_attention import ConfigError, Full, Local
from dilated_attention.core import reference
from dilated_attention.models import register_with_transformers
from dilated_attention.models.hf_packing import padding_of
from dilated_attention.models.huggingface import _Implementation

from .hf_kit import DILATED, EXPERTS, SIZES, H, S, check_eager, model
from .model_kit import padding
from .support import error


@pytest.mark.parametrize("left", [False, True])
def test_bidirectional_sliding_windows(left: bool) -> None:
    """Of 3 keys on either side, as ModernBERT's configuration has it with 6."""
    torch.manual_seed(0)
    fields = SIZES | {"num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 2}
    config = transformers.ModernBertConfig(**fields | {"cls_token_id": 1, "sep_token_id": 1})
    bert = transformers.ModernBertModel(config).eval()
    assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    leaves = [weight for name, weight in bert.named_parameters() if "Wqkv" in name]
    seen, mask, expected = check_eager(bert, "last_hidden_state", leaves, left=left)
    register_with_transformers(bert, Full(), layers={"sliding_attention": Local((3, 2))})
    assert error(bert(seen, attention_mask=mask.long()).last_hidden_state[mask], expected) > 1e-3
    for pattern in (DILATED, Local((3, 4)), Local((4, 0))):
        register_with_transformers(bert, Full(), layers={"sliding_attention": pattern})
        with pytest.raises(ConfigError, match="sliding window of 4 on each side, so"):
            bert(seen)


@pytest.mark.parametrize("left", [False, True])
def test_learned_sinks(left: bool) -> None:
    """A key without value beside those of the pattern: in the softmax of gpt-oss, whose scores are parameters."""
    types = ["sliding_attention", "full_attention"]
    gpt = model("GptOss", **EXPERTS, sliding_window=5, head_dim=8, layer_types=types)
    leaves = [weight for name, weight in gpt.named_parameters() if "self_attn" in name]
    assert any(weight.shape == (H,) for weight in leaves)
    seen, _, _ = check_eager(gpt, "logits", leaves, left=left)
    register_with_transformers(gpt, DILATED, layers={"sliding_attention": Local((4, 0))})
    sparse = gpt(seen).logits
    assert error(sparse[0], gpt(seen[:1]).logits[0]) < 1e-5
    packed = gpt(seen.flatten()[None], position_ids=torch.arange(S).repeat(2)[None]).logits
    assert error(packed[0, S:], sparse[1]) < 1e-5


def test_a_layer_that_hands_its_window_on_by_its_type_alone() -> None:
    """A configuration's window of both sides is without the query's own position."""
    implementation = _Implementation(Full(), {}, {})
    module: Any = torch.nn.Module()
    module.config = transformers.ModernBertConfig(**SIZES, local_attention=6)
    module.layer_idx = module.config.layer_types.index("sliding_attention")
    query, key, value = torch.randn(3, 1, H, S, 8)
    for causal, window in ((False, Local((3, 3))), (True, Local((2, 0)))):
        out, _ = implementation(module, query, key, value, None, is_causal=causal)
        expected, _ = reference.attention(
            *(x.transpose(1, 2) for x in (query, key, value)), pattern=window, is_causal=causal
        )
        assert error(out, expected) < 1e-5


def test_a_mask_is_read_once_and_again_where_it_was_changed() -> None:
    mask = ~padding(6, 4, length=6)
    first = padding_of(mask)
    assert first is not None
    assert torch.equal(first, ~mask)
    assert padding_of(mask) is first
    mask[1] = True
    assert padding_of(mask) is None
    with torch.inference_mode():
        mask = ~padding(6, 4, length=6)
        assert padding_of(mask) is not None
        mask[1] = True
        assert padding_of(mask) is None
