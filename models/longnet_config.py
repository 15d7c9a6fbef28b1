"""The shape of a LongNet: one value, from code or from a mapping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from ..core.checks import keep_number, one_of, positive_int, positive_number
from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.pattern import Full, Pattern
from ..core.structure import NamesChecked, from_mapping
from ..registry.discovery import default_registry
from ..registry.patterns import resolve_pattern
from ..registry.selection import check_names
from .positions import POSITIONS, require_pairs

NORMS = ("pre", "sub", "deep")
ACTIVATIONS = ("gelu", "relu")
Checkpointing = bool | Literal["pointwise"]
# Fields of AttentionConfig that the layers set from fields of their own.
_SET_BY_LAYERS = ("num_heads", "head_dim", "num_kv_heads", "pattern", "is_causal", "dropout_p", "tensor_layout")


def _checkpointing(_: object, attribute: attrs.Attribute[Checkpointing], value: object) -> None:
    if not isinstance(value, bool) and value != "pointwise":
        raise ConfigError(f"{attribute.name} must be False, True or 'pointwise', got {value!r}")


def _probability(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    number = keep_number(instance, attribute, value)
    if number is None or not 0 <= number < 1:
        raise ConfigError(f"{attribute.name} must be a number from 0 to below 1, got {value!r}")


def require_config(config: object) -> None:
    """Raise `ConfigError` for what is no `LongNetConfig`."""
    if not isinstance(config, LongNetConfig):
        raise ConfigError(
            f"config must be a LongNetConfig, got a {type(config).__name__}; of a mapping make one by "
            "LongNetConfig.from_dict(...)"
        )


def _flag(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} must be True or False, got {value!r}")


def _optional(check: Any) -> Any:
    return attrs.validators.optional(check)


def _copied(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"attention must be a mapping of fields of AttentionConfig, got {value!r}")
    return dict(value)


def _resolved(value: Any) -> Pattern:
    return resolve_pattern(value)


@attrs.frozen(kw_only=True)
class LongNetConfig(NamesChecked):
    """LongNet (arXiv 2307.02486) on MAGNETO's layers (arXiv 2210.06423).

    Attributes:
        embed_dim: width of the residual stream.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key-value heads; None: as many.
        ffn_dim: inner width of the feed-forward layers; None: 4 · embed_dim.
        pattern: who attends to whom, or its mapping.
        positions: "none", "rotary" or "xpos".
        rotary_base: the longest period of the angles over 2 pi.
        xpos_base: distance over which xPos decays.
        norm: "pre" before each part; "sub" also inside it (sub-LayerNorm); "deep" after it, with a scaled residual
            (DeepNet, arXiv 2203.00555).
        final_norm: a LayerNorm after the last layer; never where norm is "deep".
        layer_norm_eps: of all of them.
        activation: "gelu" or "relu".
        dropout: of what each part adds to the residual stream, and of the embedding.
        attention_dropout: of attention weights. Above 0 `auto` takes only backends that drop weights
            (docs/configuration.md, "Dropout").
        activation_dropout: inside the feed-forward layers.
        drop_path: probability of leaving out a part, for each sequence; grows from 0 to this with depth.
        vocab_size: of token models.
        tie_embeddings: the output projection is the embedding.
        activation_checkpointing: what the backward computes again instead of keeping it. "pointwise": what norms and
            activations put out, so that matrix products and attention are computed once; where norm is "sub", half of
            what a layer keeps. True: all of a layer but its input.
        compatibility: "torchscale_zero_padding", or None for the exact definition; see `zero_keys`.
        attention: further fields of `AttentionConfig` (backend, deterministic, limits, ...).

    Raises:
        ConfigError: for a value that is not allowed.
    """

    embed_dim: int = attrs.field(validator=positive_int)
    num_layers: int = attrs.field(validator=positive_int)
    num_heads: int = attrs.field(validator=positive_int)
    num_kv_heads: int | None = attrs.field(default=None, validator=_optional(positive_int))
    ffn_dim: int | None = attrs.field(default=None, validator=_optional(positive_int))
    pattern: Pattern = attrs.field(factory=Full, converter=_resolved, hash=False)
    positions: str = attrs.field(default="none", validator=one_of(*POSITIONS))
    rotary_base: float = attrs.field(default=10_000.0, validator=positive_number)
    xpos_base: float = attrs.field(default=512.0, validator=positive_number)
    norm: str = attrs.field(default="sub", validator=one_of(*NORMS))
    final_norm: bool = attrs.field(default=True, validator=_flag)
    layer_norm_eps: float = attrs.field(default=1e-5, validator=positive_number)
    activation: str = attrs.field(default="gelu", validator=one_of(*ACTIVATIONS))
    dropout: float = attrs.field(default=0.0, validator=_probability)
    attention_dropout: float = attrs.field(default=0.0, validator=_probability)
    activation_dropout: float = attrs.field(default=0.0, validator=_probability)
    drop_path: float = attrs.field(default=0.0, validator=_probability)
    vocab_size: int | None = attrs.field(default=None, validator=_optional(positive_int))
    tie_embeddings: bool = attrs.field(default=False, validator=_flag)
    activation_checkpointing: Checkpointing = attrs.field(default=False, validator=_checkpointing)
    compatibility: str | None = None
    attention: Mapping[str, Any] = attrs.field(factory=dict, converter=_copied, hash=False)

    def __attrs_post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}")
        require_pairs(self.positions, self.head_dim)
        for name in self.attention:
            if name in _SET_BY_LAYERS:
                raise ConfigError(
                    f"attention has no {name!r} here; it is a field of LongNetConfig, or follows from one"
                )
        self.attention_fields(is_causal=False)

    def attention_fields(self, *, is_causal: bool) -> dict[str, Any]:
        """What `MultiheadAttention` takes beside its own arguments, checked."""
        fields = {
            "num_kv_heads": self.num_kv_heads,
            "pattern": self.pattern,
            "is_causal": is_causal,
            **self.attention,
        }
        config = AttentionConfig.from_dict({"num_heads": self.num_heads, "head_dim": self.head_dim, **fields})
        check_names(config, default_registry())
        return fields

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def inner_dim(self) -> int:
        """Inner width of the feed-forward layers, as a number in either case."""
        return 4 * self.embed_dim if self.ffn_dim is None else self.ffn_dim

    def residual_scale(self, *, has_memory: bool) -> float:
        """alpha of DeepNet for a stack of one kind, 1 for other norms; parts a layer has: 2, or 3 with a memory."""
        parts = 3.0 if has_memory else 2.0
        return math.sqrt(math.sqrt(parts * self.num_layers)) if self.norm == "deep" else 1.0

    def gain(self, *, has_memory: bool) -> float:
        """The factor on the first values of what writes to the residual stream (MAGNETO, DeepNet)."""
        if self.norm == "deep":
            return 1 / math.sqrt(math.sqrt((12.0 if has_memory else 8.0) * self.num_layers))
        if self.norm == "sub":
            return math.sqrt(math.log((3.0 if has_memory else 2.0) * self.num_layers))
        return 1.0

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> LongNetConfig:
        """The config that `mapping` describes; raises `ConfigError` as the class does, and for unknown keys."""
        return from_mapping(cls, mapping, name="the LongNet config")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON; `from_dict` reads it again."""
        return attrs.asdict(self, recurse=False) | {
            "pattern": self.pattern.to_dict(),
            "attention": dict(self.attention),
        }
