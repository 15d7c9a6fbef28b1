"""LongViT and dilated-attention-pytorch, whose weights have no golden files: against their definitions, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dilated_attention import ConfigError, Dilated, Pattern, reference
from dilated_attention.models import (
    LongNetEncoderLayer,
    MultiheadAttention,
    load_dilated_attention_pytorch,
    load_longvit,
)

from .model_kit import data
from .support import error

E, H, INNER = 24, 4, 40
SPLIT = Dilated((4, 8, 16), (1, 2, 4), heads="split")


class Weights(dict[str, Tensor]):
    """A state_dict of random float64 weights, made key by key."""

    def affine(self, name: str, *shape: int) -> None:
        """Weight and bias of one module."""
        near = 1.0 if len(shape) == 1 else 0.0
        self[f"{name}.weight"] = near + 0.3 * data(*shape, seed=len(self), dtype=torch.float64)
        self[f"{name}.bias"] = 0.3 * data(shape[0], seed=len(self), dtype=torch.float64)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """That module's product."""
        return functional.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """That module's LayerNorm."""
        return functional.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def attention(self, prefix: str, x: Tensor, pattern: Pattern, norm: str) -> Tensor:
        """Attention with separate projections by the oracle, normalised and projected."""
        q, k, v = (torch.unflatten(self.linear(f"{prefix}{letter}_proj", x), -1, (H, -1)) for letter in "qkv")
        out, _ = reference.attention(q, k, v, pattern=pattern, is_causal=False)
        return self.linear(f"{prefix}out_proj", self.norm(prefix + norm, out.flatten(2)))


def attention_weights(prefix: str = "", norm: str = "norm") -> Weights:
    weights = Weights()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        weights.affine(prefix + name, E, E)
    weights.affine(prefix + norm, E)
    return weights


def load(weights: dict[str, Tensor], **fields: Any) -> MultiheadAttention | LongNetEncoderLayer:
    return load_dilated_attention_pytorch(
        weights, num_heads=H, segment_lengths=SPLIT.segment_lengths, dilation_rates=SPLIT.dilation_rates, **fields
    )


def test_predecessors_attention() -> None:
    weights, x = attention_weights(), data(2, 21, E, dtype=torch.float64)
    expected = weights.attention("", x, SPLIT, "norm")
    module = load(weights)
    assert isinstance(module, MultiheadAttention)
    assert error(module(x, x, x)[0], expected) < 1e-12
    fused = Weights({k: v for k, v in weights.items() if k.startswith("out_proj")})
    for kind in ("weight", "bias"):
        fused[f"qkv_proj.{kind}"] = torch.cat([weights[f"{letter}_proj.{kind}"] for letter in "qkv"])
        fused[f"q_ln.{kind}"], fused[f"k_ln.{kind}"] = weights[f"norm.{kind}"], torch.zeros(E)
    again = load(fused)
    assert isinstance(again, MultiheadAttention)
    assert error(again(x, x, x)[0], expected) < 1e-12
    bare = load({k: v for k, v in weights.items() if not k.startswith("norm") and not k.endswith("bias")})
    assert "sub_norm.weight" not in bare.state_dict()


def test_predecessors_encoder_layer() -> None:
    weights, x = attention_weights("self_attn."), data(2, 21, E, dtype=torch.float64)
    for name, shape in {"norm1": (E,), "norm2": (E,), "norm3": (INNER,), "linear1": (INNER, E)}.items():
        weights.affine(name, *shape)
    weights.affine("linear2", E, INNER)
    middle = x + weights.attention("self_attn.", weights.norm("norm1", x), SPLIT, "norm")
    inner = weights.norm("norm3", weights.linear("linear1", weights.norm("norm2", middle)).relu())
    layer = load(weights)
    assert isinstance(layer, LongNetEncoderLayer)
    assert error(layer(x), middle + weights.linear("linear2", inner)) < 1e-12
    with pytest.raises(ConfigError, match="has biases and a LayerNorm"):
        load({k: v for k, v in weights.items() if not k.startswith("self_attn.norm")})


def test_what_predecessors_have_and_we_have_not() -> None:
    weights = attention_weights(norm="q_ln")
    weights.affine("k_ln", E)
    with pytest.raises(ConfigError, match="normalises queries and keys"):
        load(weights)
    with pytest.raises(ConfigError, match=r"no part of this model takes: rotary\.scale"):
        load(attention_weights() | {"rotary.scale": torch.zeros(1)})
    with pytest.raises(ConfigError, match="deals heads out to 3 branches"):
        load_dilated_attention_pytorch(
            attention_weights(), num_heads=2, segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4)
        )


def longvit_weights() -> Weights:
    weights = Weights()
    weights.affine("patch_embed.proj", E, 3, 4, 4)
    weights["pos_embed"] = data(1, 36, E, seed=50, dtype=torch.float64)
    for i in range(2):
        prefix = f"encoder.layers.{i}."
        weights |= attention_weights(f"{prefix}self_attn.", "inner_attn_ln")
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights.affine(prefix + name, E)
        weights.affine(f"{prefix}ffn.fc1", INNER, E)
        weights.affine(f"{prefix}ffn.ffn_layernorm", INNER)
        weights.affine(f"{prefix}ffn.fc2", E, INNER)
    return weights


@pytest.mark.parametrize("side", [24, 32])
def test_longvit(side: int) -> None:
    weights, images = longvit_weights(), data(2, 3, side, side, dtype=torch.float64)
    model = load_longvit(weights, image_size=24, num_heads=H, segment_lengths=(8, 16), dilation_rates=(1, 2))
    x = functional.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    positions = weights["pos_embed"]
    if side != 24:
        grid = positions.reshape(1, 6, 6, E).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, scale_factor=(8.1 / 6, 8.1 / 6), mode="bicubic")
        positions = grid.permute(0, 2, 3, 1).reshape(1, -1, E)
    x = x.flatten(2).transpose(1, 2) + positions
    pattern = Dilated((8, 16), (1, 2), offsets="blocked")
    for i in range(2):
        prefix = f"encoder.layers.{i}."
        read = weights.norm(f"{prefix}self_attn_layer_norm", x)
        x = x + weights.attention(f"{prefix}self_attn.", read, pattern, "inner_attn_ln")
        inner = functional.gelu(weights.linear(f"{prefix}ffn.fc1", weights.norm(f"{prefix}final_layer_norm", x)))
        x = x + weights.linear(f"{prefix}ffn.fc2", weights.norm(f"{prefix}ffn.ffn_layernorm", inner))
    assert error(model(images), x) < 1e-12


def test_longvits_limits() -> None:
    model = load_longvit(longvit_weights(), image_size=24, num_heads=H)
    assert model.config.encoder.pattern == Dilated((64, 128, 256, 512, 1024), (1, 2, 4, 8, 16), offsets="blocked")
    with pytest.raises(ConfigError, match="multiples of 4"):
        model(data(1, 3, 22, 24, dtype=torch.float64))
    with pytest.raises(ConfigError, match="does not fit"):
        load_longvit(longvit_weights(), image_size=32, num_heads=H)
    with pytest.raises(ConfigError, match="image_size must be a multiple of patch_size"):
        load_longvit(longvit_weights(), image_size=30, num_heads=H)
    with pytest.raises(ConfigError, match=r"no tensor encoder\.layers\.0"):
        load_longvit({k: v for k, v in longvit_weights().items() if "encoder" not in k}, image_size=24)
