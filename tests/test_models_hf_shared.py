"""Implementations that transformers' registry holds for the whole process: what may share one, and what must not."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import pytest
import torch

from dilated_attention import ConfigError, Full, Learned, Local, Pattern, Random, build_attention, save_pattern
from dilated_attention.models import register_with_transformers

from .hf_kit import H, S, log_multiplicity, model, tokens
from .model_kit import data
from .support import error


def test_frozen_patterns_of_one_generator_are_told_apart() -> None:
    gate = build_attention(pattern=Learned(2, 4), num_heads=H, num_kv_heads=2, head_dim=8, is_causal=True).gate
    frozen = [gate.freeze(data(1, S, H, 8, seed=i), data(1, S, 2, 8, seed=i)) for i in (1, 2)]
    llama, seen, names = model(), tokens(), []
    expected = [llama(seen, attention_mask=log_multiplicity(pattern, S)).logits for pattern in frozen]
    assert error(*expected) > 0.01
    for pattern, logits in zip(frozen, expected, strict=True):
        names.append(register_with_transformers(llama, pattern))
        assert error(llama(seen).logits, logits) < 1e-5
        names.append(register_with_transformers(llama, Full(), layers={0: pattern}))
    assert len(set(names)) == 4
    for pattern, logits, name in zip(frozen, expected, names[::2], strict=True):
        assert register_with_transformers(llama, pattern) == name
        assert error(llama(seen).logits, logits) < 1e-5
    register_with_transformers("frozen_once", frozen[0])
    with pytest.raises(ConfigError, match="already registered"):
        register_with_transformers("frozen_once", frozen[1])


@attrs.frozen(repr=False)
class Quiet(Local):
    """A pattern that does not say in its repr what it is."""

    def __repr__(self) -> str:
        return "Quiet()"


def test_patterns_that_look_alike_are_told_apart() -> None:
    """Somebody's: by the registered names, the attentions of modules, and the engines of attentions."""
    llama, seen = model(), tokens()
    q, k, v = (data(1, S, H, 8, seed=i) for i in range(3))
    kept = []
    for window in (1, 5, 1):
        expected = model()(seen, attention_mask=log_multiplicity(Local(window), S)).logits
        kept.append((register_with_transformers(llama, Quiet(window)), build_attention(pattern=Quiet(window), like=q)))
        assert error(llama(seen).logits, expected) < 1e-5
        assert error(kept[-1][1](q, k, v), build_attention(pattern=Local(window), like=q)(q, k, v)) < 1e-5
    assert kept[0][0] == kept[2][0] != kept[1][0]


def test_a_stored_pattern_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    llama, seen = model(), tokens()
    for seed in (0, 1):
        pattern = Random(2, 4, seed)
        expected = model()(seen, attention_mask=log_multiplicity(pattern, S)).logits
        save_pattern(tmp_path, "mine", pattern, seq_len=S, num_heads=H, is_causal=True, overwrite=True)
        register_with_transformers(llama, {"kind": "stored", "name": "mine", "root": str(tmp_path)})
        assert error(llama(seen).logits, expected) < 1e-5


def test_models_of_other_layer_types_may_share_a_name() -> None:
    """Layers with the same number and window, of which one model says by its types that they slide."""
    layers: dict[str, Pattern] = {"sliding_attention": Local((2, 0))}
    name = register_with_transformers("shared_by_types", Full(), layers=layers)
    types = ["sliding_attention"] * 2
    gemma = model("Gemma3", sliding_window=6, layer_types=types, head_dim=8, query_pre_attn_scalar=8)
    mistral, seen = model("Mistral", sliding_window=6), tokens()
    expected = mistral(seen).logits
    with torch.no_grad():
        for one in (gemma, mistral):
            one.set_attn_implementation(name)
            one(seen)
        assert error(mistral(seen).logits, expected) < 1e-5


def test_transformers_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.8.1")  # which replaces itself as it is used
    with pytest.raises(ConfigError, match=r"transformers must be 5\.9 or newer, got 5\.8\.1; upgrade it"):
        register_with_transformers("too_old", Full())
