"""Patterns in Hugging Face models: against eager attention with the pattern as an additive mask, cached or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, masking_utils

from dilated_attention import ConfigError, Full, Global, Local, Pattern
from dilated_attention.models import register_with_transformers
from dilated_attention.models.hf_masks import padding_mask, require_known
from dilated_attention.models.hf_packing import padding_of

from .hf_kit import DILATED, EXPERTS, SIZES, VOCAB, H, S, check_eager, log_multiplicity, model, tokens
from .model_kit import padding
from .support import error

BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.4,
    "attn_implementation": "eager",
}


@pytest.mark.parametrize("left", [False, True])
def test_full_is_eager(left: bool) -> None:
    llama = model()
    expected = llama(tokens()).logits
    seen, _, _ = check_eager(llama, "logits", list(llama.parameters()), left=left)
    assert register_with_transformers(llama, Full()).startswith("dilated_attention_")
    assert error(llama(seen).logits, expected) < 1e-5


@pytest.mark.parametrize("pattern", [DILATED, Local(3) | Global(2)])
def test_a_pattern_is_eager_with_its_multiplicity(pattern: Pattern) -> None:
    llama, seen = model(), tokens()
    expected = llama(seen, attention_mask=log_multiplicity(pattern, S)).logits
    dense = llama(seen).logits
    register_with_transformers(llama, pattern)
    assert error(llama(seen).logits, expected) < 1e-5
    assert error(dense, expected) > 0.01
    mask = ~padding(S, 9, length=S, left=True)
    batched = llama(seen, attention_mask=mask.long()).logits
    assert error(batched[1, S - 9 :], llama(seen[1:, S - 9 :]).logits[0]) < 1e-5


def test_layers_by_number_and_by_type() -> None:
    llama, seen = model(), tokens(1)
    by_number = register_with_transformers(llama, DILATED, layers={0: Local(2)})
    expected = llama(seen).logits
    register_with_transformers(llama, DILATED)
    assert error(llama(seen).logits, expected) > 1e-3
    llama.set_attn_implementation(by_number)
    assert torch.equal(llama(seen).logits, expected)
    gemma = model("Gemma3", sliding_window=6, layer_types=["sliding_attention", "full_attention"], head_dim=8)
    dense = gemma(seen).logits
    name = register_with_transformers(gemma, Full(), layers={"sliding_attention": Local((3, 0))})
    narrow = gemma(seen).logits
    assert error(narrow, dense) > 1e-3
    mixed: dict[int | str, Pattern] = {1: Full(), "sliding_attention": Local((3, 0))}
    register_with_transformers(gemma, Local((3, 0)), layers=mixed)
    assert gemma.config._attn_implementation != name
    assert torch.equal(gemma(seen).logits, narrow)
    register_with_transformers(gemma, Full())
    assert error(gemma(seen).logits, dense) < 1e-5


CACHES: Mapping[str, tuple[str, dict[str, Any], Pattern, dict[int | str, Pattern]]] = {
    "dynamic": ("Llama", {}, DILATED, {}),
    "static": ("Llama", {}, DILATED | Global(1), {1: Full()}),
    "sliding": ("Mistral", {"sliding_window": 7}, Full(), {}),
    "static sliding": ("Mistral", {"sliding_window": 7}, Local((2, 0)), {}),
    "hybrid": (
        "Gemma3",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
        DILATED,
        {"sliding_attention": Full()},
    ),
    "sinks": (
        "GptOss",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8} | EXPERTS,
        Full(),
        {},
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_generation_with_a_cache_is_generation_without(cache: str, is_padded: bool) -> None:
    kind, fields, pattern, layers = CACHES[cache]
    mine, seen = model(kind, **fields), tokens(length=12)
    register_with_transformers(mine, pattern, layers=layers)
    mask = (~padding(12, 5, length=12, left=True)).long() if is_padded else None
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if "static" in cache:
        options["cache_implementation"] = "static"
    cached = mine.generate(seen, **options)
    plain = mine.generate(seen, **options | {"use_cache": False, "cache_implementation": None})
    assert torch.equal(cached.sequences, plain.sequences)
    assert max(error(a, e) for a, e in zip(cached.logits, plain.logits, strict=True)) < 1e-5
    assert error(plain.logits[-1], plain.logits[0]) > 1e-3  # a model that says something
    if is_padded:
        alone = mine.generate(seen[1:, 7:], **options | {"attention_mask": None})
        assert max(error(a, e[1:]) for a, e in zip(alone.logits, cached.logits, strict=True)) < 1e-5


def test_gradient_checkpointing() -> None:
    llama, seen = model(), tokens()
    register_with_transformers(llama, DILATED)
    grads = []
    for is_checkpointed in (False, True):
        llama.train()
        if is_checkpointed:
            enable = getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)
            enable()
        llama.zero_grad()
        llama(seen, labels=seen).loss.backward()
        grads.append([p.grad.clone() for p in llama.parameters()])
    assert max(error(a, e) for a, e in zip(*grads, strict=True)) < 1e-6


@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast_holds_for_the_attention_as_for_sdpa(use_cache: bool) -> None:
    """Rotary positions, and caches with them, hand on float32 of what was projected in bfloat16."""
    llama, seen, made = model(), tokens(), []
    exact = llama(seen).logits
    name = register_with_transformers(llama, Full())
    attend = AttentionInterface()[name]

    def spy(*given: Any, **others: Any) -> Any:
        made.append(attend(*given, **others))
        return made[-1]

    names: Any = AttentionInterface
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setitem(names._global_mapping, name, spy)
        assert error(llama(seen, use_cache=use_cache).logits, exact) < 0.1
    assert [out.dtype for out, _ in made] == [torch.bfloat16] * 2


def test_switching_back_and_forth() -> None:
    llama, seen = model(), tokens()
    dense = llama(seen).logits
    name = register_with_transformers(llama, DILATED)
    sparse = llama(seen).logits
    assert error(sparse, dense) > 0.01
    for implementation, expected in (("sdpa", dense), (name, sparse), ("eager", dense), (name, sparse)):
        llama.set_attn_implementation(implementation)
        assert error(llama(seen).logits, expected) < 1e-5
    made = model(attn_implementation=register_with_transformers("my_pattern", DILATED))
    assert error(made(seen).logits, sparse) < 1e-5
    assert register_with_transformers("my_pattern", DILATED) == "my_pattern"


def test_encoders_and_cross_attention() -> None:
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            **SIZES | {"num_key_value_heads": None}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    ).eval()
    seen, mask = tokens(), ~padding(S, 9, length=S)
    expected = bert(seen, attention_mask=mask.long()).last_hidden_state[mask]
    register_with_transformers(bert, Full())
    assert error(bert(seen, attention_mask=mask.long()).last_hidden_state[mask], expected) < 1e-5
    register_with_transformers(bert, DILATED)
    sparse = bert(seen, attention_mask=mask.long()).last_hidden_state
    assert error(sparse[1, :9], bert(seen[1:, :9]).last_hidden_state[0]) < 1e-5
    assert error(sparse[mask], expected) > 0.01
    bart = transformers.BartModel(transformers.BartConfig(**BART)).eval()
    given = {"input_ids": seen, "attention_mask": mask.long(), "decoder_input_ids": tokens(length=7, seed=3)}
    expected = bart(**given).last_hidden_state
    register_with_transformers(bart, Full())
    assert error(bart(**given).last_hidden_state, expected) < 1e-5
    register_with_transformers(bart, DILATED)
    with pytest.raises(ConfigError, match="of another sequence: only Full"):
        bart(**given)


READERS: Mapping[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": H, "add_cross_attention": True},
    "Bert": SIZES | {"num_hidden_layers": 1, "is_decoder": True, "add_cross_attention": True},
    "Bart": BART,
    "PegasusX": BART,  # whose decoder is causal by its mask alone
}


@pytest.mark.parametrize("kind", READERS)
def test_two_sequences_of_equal_lengths_are_two_sequences(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**READERS[kind] | {"attn_implementation": "eager"})
    mine = getattr(transformers, f"{kind}Model")(config).eval()
    has_encoder = config.is_encoder_decoder
    other = {"decoder_input_ids": tokens(seed=3)} if has_encoder else {"encoder_hidden_states": torch.randn(2, S, 32)}
    given = {"input_ids": tokens(), **other}
    expected = mine(**given).last_hidden_state
    register_with_transformers(mine, Full())
    assert error(mine(**given).last_hidden_state, expected) < 1e-5
    register_with_transformers(mine, DILATED)
    with pytest.raises(ConfigError, match=rf"{S} queries attend to {S} keys of another sequence: only Full"):
        mine(**given)
    if not has_encoder:
        assert mine(tokens()).last_hidden_state.isfinite().all()  # without the other sequence


@pytest.mark.parametrize("name", ["my_flash", "paged|mine", "user/kernel", ""])
def test_names_that_transformers_reads_otherwise(name: str) -> None:
    with pytest.raises(ConfigError, match="without 'flash'"):
        register_with_transformers(name, DILATED)


def test_what_cannot_be_registered() -> None:
    llama = model()
    refused: list[tuple[str, dict[str, Any]]] = [
        ("layers 0 to 1", {"layers": {2: Full()}}),
        ("has full_attention|no layer_types", {"layers": {"sliding_attention": Full()}}),
        ("follows from the model", {"dropout_p": 0.1}),
        ("did you mean 'backend'", {"backnd": "sdpa"}),
        ("unknown backend 'spda' .did you mean 'sdpa'", {"backend": "spda"}),
        ("deterministic must be True or False, got 1", {"deterministic": 1}),
        ("layers must map layer numbers or types to patterns", {"layers": [Full()]}),
        ("layer numbers or types to patterns, got the key 0.5", {"layers": {0.5: Full()}}),
        ("layer numbers or types to patterns, got the key True", {"layers": {True: Full()}}),
        ("layers names layer 2; the model has layers 0 to 1", {"layers": {np.int64(2): Full()}}),
    ]
    for words, fields in refused:
        with pytest.raises(ConfigError, match=words):
            register_with_transformers(llama, DILATED, **fields)
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="model must be a model of transformers, or a name to register, got Linear"):
        register_with_transformers(other, DILATED)
    with pytest.raises(ConfigError, match="freeze it first"):
        register_with_transformers(llama, {"kind": "learned", "block_size": 4, "blocks_per_row": 2})
    register_with_transformers("taken", DILATED)
    for name in ("taken", "eager", "sdpa"):
        with pytest.raises(ConfigError, match="already registered"):
            register_with_transformers(name, Local(3))
    assert AttentionInterface()["sdpa"].__name__ == "sdpa_attention_forward"


def test_what_cannot_be_honoured() -> None:
    llama, seen = model(), tokens()
    register_with_transformers(llama, DILATED)
    with pytest.raises(ConfigError, match=r"ready-made mask of shape \(1, 4, 21, 21\)"):
        llama(seen, attention_mask=log_multiplicity(DILATED, S))
    with pytest.raises(ConfigError, match="output_attentions"):
        llama.model.layers[0].self_attn(
            torch.zeros(1, S, 32), (torch.ones(1, S, 8), torch.zeros(1, S, 8)), None, output_attentions=True
        )
    gemma = model("Gemma2", head_dim=8, attn_logit_softcapping=30.0)
    register_with_transformers(gemma, Full())
    with pytest.raises(ConfigError, match="softcap"):
        gemma(seen)
    mistral = model("Mistral", sliding_window=7)
    register_with_transformers(mistral, DILATED)
    with pytest.raises(ConfigError, match=r"sliding window of 7 and its cache forgets"):
        mistral(seen)
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=H)
    )

    def call() -> None:
        register_with_transformers(t5, Full())
        t5(seen)

    # Old releases do not ask the registry for T5, new ones hand it a bias.
    with pytest.raises(ConfigError, match=r"position_bias|from transformers' registry"):
        call()


def test_mask_functions() -> None:
    known = masking_utils
    recognised = [
        known.causal_mask_function,
        known.bidirectional_mask_function,
        known.sliding_window_causal_mask_function(5),
        known.sliding_window_bidirectional_mask_function(5),
        known.and_masks(known.packed_sequence_mask_function(torch.zeros(1, 3)), known.causal_mask_function),
    ]
    if hasattr(known, "packed_sequence_compatibility_function"):
        places = torch.zeros(1, 3)
        recognised.append(known.packed_sequence_compatibility_function(recognised[2], places, places))
    for function in recognised:
        require_known(function)
    overlays = [
        known.chunked_causal_mask_function(4, torch.zeros(1)),
        known.or_masks(known.causal_mask_function, lambda b, h, q, k: q == k),
        known.and_masks(known.causal_mask_function, lambda b, h, q, k: q == k),
        known.and_masks(known.sliding_window_overlay(3), lambda b, h, q, k: q == k),
        known.and_masks(known.sliding_window_bidirectional_overlay(3), known.causal_mask_function),
        lambda b, h, q, k: q >= k,
    ]
    for function in overlays:
        with pytest.raises(ConfigError, match="none that this attention can honour"):
            require_known(function)


def test_masks_are_never_square() -> None:
    mask = ~padding(6, 4, length=6, left=True)
    whole = torch.ones_like(mask)
    for given, seen in (
        (padding_mask(2, q_length=6, kv_length=6), whole),
        (padding_mask(2, q_length=6, kv_length=6, attention_mask=whole), whole),
        (padding_mask(2, q_length=6, kv_length=6, attention_mask=mask), mask),
        (padding_mask(2, q_length=1, q_offset=torch.tensor(5), kv_length=32, attention_mask=mask), mask),
        (padding_mask(2, q_length=1, q_offset=3, kv_length=32), whole[:, :4]),
        (
            padding_mask(2, cache_position=torch.tensor([5]), kv_length=4, kv_offset=2, attention_mask=mask),
            whole[:, 2:],
        ),
    ):
        assert torch.equal(given.bool(), seen)
        assert (padding_of(given) is None) == bool(seen.all())
    with pytest.raises(ConfigError, match="too few for the keys"):
        padding_mask(2, q_length=7, kv_length=7, attention_mask=mask)
    with pytest.raises(ConfigError, match="neither"):
        padding_mask(2, kv_length=7)


@pytest.mark.slow
def test_compiled_with_a_graph_break_at_the_mask() -> None:
    llama, seen = model(), tokens()
    register_with_transformers(llama, DILATED)
    expected = llama(seen, use_cache=False).logits
    compiled: Any = torch.compile(llama, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(seen, use_cache=False).logits, expected) < 1e-5
