"""Modules of dilated-attention-pytorch (fkodom's, and the package that grew out of it) as modules of this one.

The weights are carried over exactly; what they computed is not, because it was wrong:

- Outputs of each group of heads were divided by their own signed sum over all positions
  (`x / x.sum(dim=(1, 2))`). That makes the output independent of the values' scale, lets every position see the
  future, and blows up where the sum is near 0. Here each head's softmax is what it is.
- Heads were divided among groups without regard to a remainder, so that of 12 heads in 5 groups two had no output.
  Here the first groups get one head more (`heads="split"`).
- Sequences had to be multiples of every segment length. Here the last segment is shorter.
- Padding masks had no effect, or were dropped with a warning. Here they have.

So a converted model is a starting point to be trained further, not the model that was: expect other outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .checkpoints import Tensors, load_exactly, read_tensors
from .layers import LongNetEncoderLayer
from .longnet_config import LongNetConfig
from .multihead import MultiheadAttention

_SOURCE = "the dilated-attention-pytorch checkpoint"


def load_dilated_attention_pytorch(
    source: str | Path | Mapping[str, Any],
    *,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    activation: str = "relu",
    **fields: Any,
) -> MultiheadAttention | LongNetEncoderLayer:
    """A MultiheadDilatedAttention, or a DilatedTransformerEncoderLayer, with its weights under the exact definition.

    Args:
        source: the module's checkpoint: safetensors, a file of torch.save, or a state_dict.
        num_heads: as it was made with.
        segment_lengths: likewise.
        dilation_rates: likewise.
        activation: of an encoder layer; theirs defaults to "relu".
        fields: further fields of `AttentionConfig` (is_causal, backend, ...).

    Returns:
        A batch-first `MultiheadAttention`, or a `LongNetEncoderLayer` where the checkpoint is a layer's.

    Raises:
        ConfigError: a tensor without a place; normalised queries and keys, which no module here has.
    """
    tensors = Tensors(read_tensors(source), _SOURCE)
    pattern = {
        "kind": "dilated",
        "segment_lengths": list(segment_lengths),
        "dilation_rates": list(dilation_rates),
        "heads": "split",
    }
    state: dict[str, Tensor] = {}
    if "linear1.weight" not in tensors:
        has_norm, has_bias = _take_attention(tensors, state, "", "")
        weight = state["out_proj.weight"]
        module: MultiheadAttention | LongNetEncoderLayer = MultiheadAttention(
            weight.shape[0],
            num_heads,
            bias=has_bias,
            batch_first=True,
            sub_norm=has_norm,
            pattern=pattern,
            dtype=weight.dtype,
            **fields,
        )
    else:
        if not all(_take_attention(tensors, state, "self_attn.", "self_attn.")):
            raise ConfigError("an encoder layer's attention has biases and a LayerNorm, this checkpoint's has not")
        module = _layer(tensors, state, num_heads, pattern, activation, fields)
    tensors.require_empty()
    load_exactly(module, state, _SOURCE)
    return module


def _take_attention(tensors: Tensors, state: dict[str, Tensor], old: str, new: str) -> tuple[bool, bool]:
    """Move an attention's weights to `state`; whether it has a norm before its output projection, and biases."""
    has_bias = f"{old}out_proj.bias" in tensors
    is_fused = f"{old}qkv_proj.weight" in tensors
    for kind in ("weight", "bias") if has_bias else ("weight",):
        names = ("qkv_proj",) if is_fused else ("q_proj", "k_proj", "v_proj")
        state[f"{new}in_proj_{kind}"] = torch.cat([tensors.take(f"{old}{name}.{kind}") for name in names])
        state[f"{new}out_proj.{kind}"] = tensors.take(f"{old}out_proj.{kind}")
    norm = next((name for name in ("norm", "q_ln") if f"{old}{name}.weight" in tensors), None)
    if norm == "q_ln" and not is_fused:
        raise ConfigError(
            f"{_SOURCE} is of a module that normalises queries and keys over all heads before attention and uses "
            f"the queries' norm once more after it; no module here does, so its weights would mean something else"
        )
    if norm is not None:
        tensors.move(state, {f"{norm}.{kind}": f"sub_norm.{kind}" for kind in ("weight", "bias")}, old, new)
        if norm == "q_ln":  # the fused module has k_ln too, and never uses it
            tensors.take(f"{old}k_ln.weight")
            tensors.take(f"{old}k_ln.bias")
    return norm is not None, has_bias


def _layer(
    tensors: Tensors,
    state: dict[str, Tensor],
    num_heads: int,
    pattern: Mapping[str, Any],
    activation: str,
    fields: dict[str, Any],
) -> LongNetEncoderLayer:
    renamed = {"norm1": "self_attn_norm", "norm2": "ffn_norm"}
    renamed |= {"linear1": "ffn.up", "norm3": "ffn.norm", "linear2": "ffn.down"}
    tensors.move(state, {f"{a}.{kind}": f"{b}.{kind}" for a, b in renamed.items() for kind in ("weight", "bias")})
    inner, width = state["ffn.up.weight"].shape
    is_causal = fields.pop("is_causal", False)
    config = LongNetConfig(
        embed_dim=width,
        num_layers=1,
        num_heads=num_heads,
        ffn_dim=inner,
        pattern=pattern,
        activation=activation,
        attention=fields,
    )
    return LongNetEncoderLayer(config, is_causal=is_causal, dtype=state["ffn.up.weight"].dtype)
