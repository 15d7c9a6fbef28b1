"""Layers of LongNet one by one, against their formulas: residual streams, depth, angles, and built-in causality."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from dilated_attention import Full
from dilated_attention.models import LongNetConfig, LongNetEncoder
from dilated_attention.models.built import BuiltAttention
from dilated_attention.models.layers import LongNetEncoderLayer
from dilated_attention.models.positions import make_rotation

from .model_kit import data
from .support import error


def test_deep_norm_scales_the_residual_stream() -> None:
    """LN(alpha x + f(x)) with alpha = (2 N)^(1/4), arXiv 2203.00555."""
    torch.manual_seed(0)
    config = LongNetConfig(embed_dim=16, num_layers=8, num_heads=2, norm="deep")
    layer = LongNetEncoderLayer(config).eval()
    x = data(2, 9, 16)
    alpha = 16**0.25
    attended = functional.layer_norm(alpha * x + layer.self_attn(x, x, x)[0], (16,))
    expected = functional.layer_norm(alpha * attended + layer.ffn(attended), (16,))
    assert error(layer(x), expected) < 1e-5


def test_layers_are_left_out_more_often_with_depth() -> None:
    config = LongNetConfig(embed_dim=8, num_layers=5, num_heads=2, drop_path=0.4)
    found = [layer.drop_path.probability for layer in LongNetEncoder(config).layers]  # type: ignore[union-attr]
    assert torch.allclose(torch.tensor(found), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    single = LongNetConfig(embed_dim=8, num_layers=1, num_heads=2, drop_path=0.4)
    assert LongNetEncoder(single).layers[0].drop_path.probability == 0  # type: ignore[union-attr]


def test_angles_are_exact_at_far_positions() -> None:
    position = (1 << 20) + 3
    rotation = make_rotation("rotary", torch.tensor([position]), 8, dtype=torch.float32)
    for pair in range(4):
        angle = position * 10_000.0 ** -(pair / 4)
        for found, exact in ((rotation.query_cos, math.cos(angle)), (rotation.key_sin, math.sin(angle))):
            assert abs(float(found[0, 0, 0, pair]) - exact) < 1e-6


def test_what_is_built_causal_is_so_whatever_the_call_says() -> None:
    causal = BuiltAttention({"num_heads": 2, "head_dim": 8, "pattern": Full(), "is_causal": True})
    either = BuiltAttention({"num_heads": 2, "head_dim": 8, "pattern": Full()})
    q, k, v = (data(1, 9, 2, 8, seed=i) for i in range(3))
    assert torch.equal(causal(q, k, v), either(q, k, v, is_causal=True))
    assert error(causal(q, k, v), either(q, k, v)) > 0.01
