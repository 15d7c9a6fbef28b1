"""Checkpoints of torchscale's LongNet (github.com/microsoft/torchscale): encoders, decoders, language models.

Where torchscale differs from the definition:

- Lengths that do not divide are padded with zero keys, which are attended without causality. `compatibility=
  "torchscale_zero_padding"` reproduces that; the default does not.
- Segment lengths that are no multiple of their rate shift all segments but the first. Not reproduced.
- No gradient flows through the weights with which branches are mixed (dq is off by 18 %). Ours are the exact ones.
- key_padding_mask has no effect on attention. Here it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..core.checks import is_int
from ..core.errors import ConfigError
from .checkpoints import Tensors, load_exactly, read_tensors
from .longnet import LongNetDecoder, LongNetEncoder, LongNetLM
from .longnet_config import LongNetConfig

# Arguments that say how training runs, not what the model computes.
_HARMLESS = frozenset(
    [
        "checkpoint_activations",
        "fsdp",
        "ddp_rank",
        "flash_attention",
        "bert_init",
        "max_source_positions",
        "max_target_positions",
        "no_output_layer",
        "normalize_output",
        "vocab_size",
        "img_size",
        "patch_size",
        "in_chans",
        "seq_parallel",
        "moe_top1_expert",
        "moe_expert_count",
        "moe_gating_use_fp32",
        "moe_eval_capacity_token_fraction",
        "moe_second_expert_policy",
        "moe_normalize_gate_prob_before_dropping",
        "block_shift",
        "max_rel_pos",
        "encoder_normalize_before",
        "decoder_normalize_before",
        "pre_norm",
        "causal",
    ]
)
# Arguments that must have the value of a plain LongNet.
_MUST_BE: Mapping[str, object] = {
    "moe_freq": 0,
    "use_xmoe": False,
    "rel_pos_buckets": 0,
    "multiway": False,
    "layernorm_embedding": False,
    "share_all_embeddings": False,
}
_SIDES = ("embed_dim", "attention_heads", "ffn_embed_dim", "layers")
_READ = (
    "activation_fn",
    "activation",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "drop_path_rate",
    "segment_length",
    "dilated_ratio",
    "xpos",
    "xpos_rel_pos",
    "xpos_scale_base",
    "subln",
    "deepnorm",
    "layernorm_eps",
    "no_scale_embedding",
    "share_encoder_input_output_embed",
    "share_decoder_input_output_embed",
)


def load_torchscale(
    source: str | Path | Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    compatibility: str | None = None,
    attention: Mapping[str, Any] | None = None,
) -> LongNetEncoder | LongNetDecoder | LongNetLM:
    """torchscale's LongNetEncoder or LongNetDecoder, weights and all.

    Args:
        source: its checkpoint: safetensors, a file of torch.save, or a state_dict.
        arguments: the fields of its EncoderConfig or DecoderConfig (`vars(config)`) with segment_length and
            dilated_ratio, as lists or in torchscale's text form "[1024,2048]".
        compatibility: "torchscale_zero_padding" to compute ragged lengths as torchscale does.
        attention: further fields of `AttentionConfig` (backend, deterministic, ...).

    Returns:
        A `LongNetLM` where the checkpoint has embed_tokens, else an encoder or decoder over embeddings; in evaluation
        mode, float32 or whatever the checkpoint has, on the CPU.

    Raises:
        ConfigError: an argument that a LongNet has no place for, or a tensor without a place.
    """
    tensors = Tensors(read_tensors(source), "the torchscale checkpoint")
    has_tokens = "embed_tokens.weight" in tensors
    config = torchscale_config(
        arguments, final_norm="layer_norm.weight" in tensors, compatibility=compatibility, attention=attention
    )
    is_causal = "decoder_embed_dim" in arguments
    state: dict[str, Tensor] = {}
    model: LongNetEncoder | LongNetDecoder | LongNetLM
    take_stack(tensors, config, state, new="stack." if has_tokens else "")
    dtype = next(iter(state.values())).dtype
    if has_tokens:
        config = _take_tokens(tensors, config, arguments, state)
        model = LongNetLM(config, is_causal=is_causal, dtype=dtype)
    else:
        model = LongNetDecoder(config, dtype=dtype) if is_causal else LongNetEncoder(config, dtype=dtype)
    tensors.require_empty()
    load_exactly(model, state, "the torchscale checkpoint")
    return model.eval()


def torchscale_config(
    arguments: Mapping[str, Any],
    *,
    final_norm: bool,
    compatibility: str | None = None,
    attention: Mapping[str, Any] | None = None,
) -> LongNetConfig:
    """The `LongNetConfig` of torchscale's arguments; raises `ConfigError` for those it has no place for."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"torchscale's arguments are a mapping, vars(args) of its config, got {arguments!r} "
            f"({type(arguments).__name__})"
        )
    side = "decoder" if "decoder_embed_dim" in arguments else "encoder"
    known = {*_READ, *_HARMLESS, *_MUST_BE, *(f"{side}_{name}" for name in _SIDES)}
    for name, value in arguments.items():
        if name not in known:
            raise ConfigError(
                f"torchscale's argument {name}={value!r} is not known here; leave it out if it has no effect"
            )
        if name in _MUST_BE and value != _MUST_BE[name]:
            raise ConfigError(f"torchscale's {name} must be {_MUST_BE[name]!r} for a LongNet here, got {value!r}")
    missing = [
        name for name in (*(f"{side}_{n}" for n in _SIDES), "segment_length", "dilated_ratio") if name not in arguments
    ]
    if missing:
        raise ConfigError(f"torchscale's arguments lack {', '.join(missing)}")
    width, heads, inner, layers = (arguments[f"{side}_{name}"] for name in _SIDES)
    return LongNetConfig(
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        ffn_dim=inner,
        pattern=dilated_pattern(arguments["segment_length"], arguments["dilated_ratio"]),
        positions="xpos" if arguments.get("xpos_rel_pos", arguments.get("xpos", False)) else "none",
        xpos_base=float(arguments.get("xpos_scale_base", 512)),
        norm=_norm(arguments, side),
        final_norm=final_norm,
        layer_norm_eps=arguments.get("layernorm_eps", 1e-5),
        activation=arguments.get("activation_fn", arguments.get("activation", "gelu")),
        dropout=arguments.get("dropout", 0.0),
        attention_dropout=arguments.get("attention_dropout", 0.0),
        activation_dropout=arguments.get("activation_dropout", 0.0),
        drop_path=arguments.get("drop_path_rate", 0.0),
        compatibility=compatibility,
        attention=attention or {},
    )


def dilated_pattern(segment_lengths: str | Sequence[int], rates: str | Sequence[int]) -> dict[str, Any]:
    """torchscale's dilated attention as a pattern's mapping: its heads' offsets are numbered in blocks."""
    return {
        "kind": "dilated",
        "segment_lengths": _integers("segment_length", segment_lengths),
        "dilation_rates": _integers("dilated_ratio", rates),
        "offsets": "blocked",
    }


def _integers(name: str, value: object) -> list[int]:
    """A list of integers, or its text, which torchscale evaluates as Python."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(is_int(x) for x in found):
        raise ConfigError(f"torchscale's {name} must be a list of integers such as '[1024,2048]', got {value!r}")
    return list(found)


def _norm(arguments: Mapping[str, Any], side: str) -> str:
    if arguments.get("deepnorm", False):
        return "deep"
    if arguments.get("subln", True):
        return "sub"
    if not arguments.get(f"{side}_normalize_before", arguments.get("pre_norm", True)):
        raise ConfigError(f"{side}_normalize_before=False without deepnorm is post-norm, which LongNet here has not")
    return "pre"


def take_stack(
    tensors: Tensors, config: LongNetConfig, state: dict[str, Tensor], *, old: str = "", new: str = ""
) -> None:
    """Move the layers and the last norm of a torchscale stack from `tensors` to `state`, under our names."""
    if config.final_norm and config.norm != "deep":
        tensors.move(state, _affine("layer_norm", "norm"), old, new)
    for index in range(config.num_layers):
        _take_layer(tensors, config, state, f"{old}layers.{index}.", f"{new}layers.{index}.")


def layer_count(tensors: Tensors, prefix: str) -> int:
    """One more than the largest number of a layer; raises `ConfigError` where there is none."""
    start = f"{prefix}layers."
    numbers = [name.removeprefix(start).partition(".")[0] for name in tensors.names() if name.startswith(start)]
    if not numbers:
        raise ConfigError(f"the checkpoint has no tensor {start}0...; found {', '.join(tensors.names()[:8])}")
    return 1 + max(int(number) for number in numbers)


def _take_layer(tensors: Tensors, config: LongNetConfig, state: dict[str, Tensor], old: str, new: str) -> None:
    names = _affine("self_attn.out_proj") | _affine("self_attn_layer_norm", "self_attn_norm")
    names |= _affine("ffn.fc1", "ffn.up") | _affine("ffn.fc2", "ffn.down") | _affine("final_layer_norm", "ffn_norm")
    if config.norm == "sub":
        names |= _affine("self_attn.inner_attn_ln", "self_attn.sub_norm") | _affine("ffn.ffn_layernorm", "ffn.norm")
    tensors.move(state, names, old, new)
    for kind in ("weight", "bias"):
        parts = [tensors.take(f"{old}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
        state[f"{new}self_attn.in_proj_{kind}"] = torch.cat(parts)
    if config.positions == "xpos":
        _check_zeta(tensors.take(f"{old}self_attn.xpos.scale"), config.head_dim)


def _check_zeta(scale: Tensor, head_dim: int) -> None:
    """xPos' buffer is a constant; another one would be another model."""
    ours = (torch.arange(0, head_dim, 2, device=scale.device) + 0.4 * head_dim) / (1.4 * head_dim)
    if scale.shape != ours.shape or not torch.allclose(scale.float(), ours, atol=1e-2):
        raise ConfigError(f"the checkpoint's xpos.scale {scale.tolist()} is not xPos' own {ours.tolist()}")


def _take_tokens(
    tensors: Tensors, config: LongNetConfig, arguments: Mapping[str, Any], state: dict[str, Tensor]
) -> LongNetConfig:
    """Move embedding and output projection to `state`; the config with the vocabulary."""
    embedding = tensors.take("embed_tokens.weight")
    if "output_projection.weight" not in tensors:
        raise ConfigError(
            "the torchscale checkpoint has embed_tokens but no output_projection.weight, so no language model"
        )
    output = tensors.take("output_projection.weight")
    is_tied = any(arguments.get(f"share_{side}_input_output_embed", False) for side in ("encoder", "decoder"))
    if is_tied and not torch.equal(embedding, output):
        raise ConfigError("the checkpoint's embedding and output projection differ, though its arguments share them")
    if not arguments.get("no_scale_embedding", True):
        if is_tied:
            raise ConfigError(
                "no_scale_embedding=False with shared embeddings scales one use of them only; not supported"
            )
        embedding = embedding * math.sqrt(config.embed_dim)
    state["embedding.weight"] = embedding
    if not is_tied:
        state["output.weight"] = output
    return attrs.evolve(config, vocab_size=embedding.shape[0], tie_embeddings=is_tied)


def _affine(old: str, new: str | None = None) -> dict[str, str]:
    """Weight and bias of one module, renamed."""
    return {f"{old}.{kind}": f"{old if new is None else new}.{kind}" for kind in ("weight", "bias")}
