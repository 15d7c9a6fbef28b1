"""Which way Hugging Face models look, by their masks or by themselves: as in eager attention, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.models.aimv2.configuration_aimv2 import Aimv2TextConfig
from transformers.models.aimv2.modeling_aimv2 import Aimv2TextModel
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalVisionConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalVisionModel

from dilated_attention import ConfigError, Full
from dilated_attention.models import register_with_transformers
from dilated_attention.models.hf_masks import is_causal_by_mask, padding_mask
from dilated_attention.models.hf_packing import padding_of
from dilated_attention.models.huggingface import _Implementation

from .hf_kit import SIZES, VOCAB, H, S, tokens
from .model_kit import padding
from .support import error

_WORDS = SIZES | {"num_key_value_heads": None, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": H, "attn_implementation": "eager"}
# Splinter, Align and Clap have layers that do not say which way they look.
ENCODERS: Mapping[str, dict[str, Any]] = {
    "Splinter": _WORDS | {"question_token_id": 2},
    "AlignText": _WORDS,
    "ClapText": _WORDS,
    "Bert": _WORDS,
    "ModernBert": SIZES
    | {"cls_token_id": 1, "sep_token_id": 1, "global_attn_every_n_layers": 2, "local_attention": 64},
    "Llama": SIZES | {"is_causal": False},  # of a decoder, by its configuration
}
DECODERS: Mapping[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Qwen3": SIZES | {"head_dim": 8},
    "Mistral": SIZES | {"sliding_window": 30},
    "GPT2": _GPT,
    "OPT": SIZES | {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "Bert": _WORDS | {"is_decoder": True},
}
_CASES = [(kind, True) for kind in DECODERS] + [(kind, False) for kind in ENCODERS]


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("kind", "is_causal"), _CASES, ids=lambda case: str(case))
def test_first_token_moves_with_the_last_of_models_that_look_both_ways(
    kind: str, is_causal: bool, is_padded: bool
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(DECODERS if is_causal else ENCODERS)[kind])
    mine = getattr(transformers, f"{kind}Model")(config).eval()
    seen, real = tokens(), ~padding(S, 9, length=S)
    other = seen.clone()
    for row, last in enumerate((S - 1, 8 if is_padded else S - 1)):
        other[row, last] = seen[row, last] % (VOCAB - 3) + 3
    given: dict[str, Any] = {"attention_mask": real.long()} if is_padded else {}
    there = real if is_padded else torch.ones_like(real)

    def run(ids: Tensor) -> Tensor:
        found: Tensor = mine(ids, **given)[0]
        return found

    with torch.no_grad():
        expected = run(seen)
        moved = (run(other) - expected)[:, 0].abs().amax(-1)
        register_with_transformers(mine, Full())
        assert error(run(seen)[there], expected[there]) < 1e-5
        own = (run(other) - run(seen))[:, 0].abs().amax(-1)
    assert bool((own == 0).all() if is_causal else (own > 1e-4).all())
    assert error(own, moved) < 1e-5


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_tower_that_is_causal_by_its_mask_alone(is_padded: bool) -> None:
    """AIMv2's layers call themselves bidirectional; the text tower's mask is causal, where there is a mask."""
    torch.manual_seed(0)
    fields = {name: SIZES[name] for name in SIZES if not name.startswith("num_key") and name != "initializer_range"}
    tower: Any = Aimv2TextModel(Aimv2TextConfig(**fields | {"eos_token_id": 2, "initializer_range": 0.4})).train(False)
    seen, real = tokens(), ~padding(S, 9 if is_padded else S, length=S)
    with torch.no_grad():
        expected, free = tower(seen, attention_mask=real.long())[0][real], tower(seen)[0]
        register_with_transformers(tower, Full())
        assert error(tower(seen, attention_mask=real.long())[0][real], expected) < 1e-5
        assert error(tower(seen)[0], free) < 1e-5
        assert error(free[real], expected) > 0.01


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_layer_that_says_the_contrary_of_its_mask(is_padded: bool) -> None:
    """Phi-4's vision tower calls itself causal, and looks both ways by its mask (transformers' own sdpa goes wrong)."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": H,
        "image_size": 32,
        "patch_size": 8,
        "crop_size": 32,
        "attn_implementation": "eager",
    }
    tower: Any = Phi4MultimodalVisionModel(Phi4MultimodalVisionConfig(**fields)).train(False)
    assert tower.encoder.layers[0].self_attn.is_causal
    patches = torch.ones(2, 4, 4, dtype=torch.bool)
    if is_padded:
        patches[1, 2:] = False
    image, there = torch.randn(2, 3, 32, 32), patches.flatten(1)
    with torch.no_grad():
        expected = tower(image, patch_attention_mask=patches).last_hidden_state[there]
        register_with_transformers(tower, Full())
        assert error(tower(image, patch_attention_mask=patches).last_hidden_state[there], expected) < 1e-5


def test_a_layer_that_says_nothing_is_refused_where_its_mask_does_not_say_it_either() -> None:
    implementation, module = _Implementation(Full(), {}, {}), torch.nn.Module()
    query, key, value = torch.randn(3, 1, H, S, 8)
    for mask in (None, torch.ones(1, S, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="neither Module nor its call nor a mask says"):
            implementation(module, query, key, value, mask)
    both_ways, causal = (implementation(module, query, key, value, None, is_causal=says)[0] for says in (False, True))
    assert error(both_ways, causal) > 0.01
    masked = (
        padding_mask(1, q_length=S, kv_length=S, mask_function=masking_utils.bidirectional_mask_function),
        padding_mask(1, q_length=S, kv_length=S + 1, mask_function=masking_utils.causal_mask_function),
    )
    for mask, expected in zip(masked, (both_ways, causal), strict=True):
        assert torch.equal(implementation(module, query, key, value, mask)[0], expected)


def test_masks_say_which_way_they_look() -> None:
    real = ~padding(S, 9, length=S)
    window = masking_utils.sliding_window_bidirectional_mask_function(5)
    for function, says in (
        (masking_utils.causal_mask_function, True),
        (masking_utils.sliding_window_causal_mask_function(5), True),
        (masking_utils.bidirectional_mask_function, False),
        (window, False),
    ):
        for given in (None, torch.ones_like(real), real):
            made = padding_mask(2, q_length=S, kv_length=S, mask_function=function, attention_mask=given)
            assert is_causal_by_mask(made) is says
            again = padding_mask(2, q_length=S, kv_length=S, mask_function=function, attention_mask=made.bool())
            assert torch.equal(again, made)
            read = padding_of(made)
            assert read is None if given is not real else torch.equal(read, ~real)  # type: ignore[arg-type]
        places = torch.tensor([0] * 9 + [1] * (S - 9)).expand(2, -1)
        packed = masking_utils.and_masks(masking_utils.packed_sequence_mask_function(places), function)
        if function is not window:
            assert is_causal_by_mask(padding_mask(2, q_length=S, kv_length=S, mask_function=packed)) is says


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True])
def test_encoders_compiled_and_checkpointed(is_padded: bool) -> None:
    torch.manual_seed(0)
    bert: Any = transformers
    mine, seen = bert.SplinterModel(bert.SplinterConfig(**ENCODERS["Splinter"])).eval(), tokens()
    given: dict[str, Any] = {"attention_mask": (~padding(S, 9, length=S)).long()} if is_padded else {}
    expected = mine(seen, **given)[0]
    register_with_transformers(mine, Full())
    there = given.get("attention_mask", torch.ones_like(seen)).bool()
    compiled: Any = torch.compile(mine, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(seen, **given)[0][there], expected[there]) < 1e-5
    mine.train()
    for is_reentrant in (False, True):
        getattr(mine, "activation_checkpointing_enable", mine.gradient_checkpointing_enable)(
            {"use_reentrant": is_reentrant}
        )
        assert error(mine(seen, **given)[0][there], expected[there]) < 1e-5
