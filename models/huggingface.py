"""Patterns for Hugging Face models (transformers 5.9 or newer): one registered name for attention and mask.

Both must be registered: without a mask function of the same name transformers makes no mask, and causality and padding
silently disappear.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

import torch
from packaging.version import Version
from torch import Tensor, nn

from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.pattern import Full, LearnedPattern, Pattern
from ..registry.discovery import default_registry
from ..registry.patterns import resolve_pattern
from ..registry.selection import check_names
from .built import BuiltAttention
from .hf_heads import heads_of, shard_of
from .hf_masks import MASK_DTYPES, documents_of, is_causal_by_mask, padding_mask
from .hf_packing import packed_lengths, padding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Pattern = Pattern | Mapping[str, Any]
_Layers = Mapping[int, _Pattern] | Mapping[str, _Pattern] | Mapping[int | str, _Pattern]

_OLDEST: Final = Version("5.9")  # in older ones some models say otherwise who attends to whom, or nothing
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_OLDER = " and its cache forgets what is older"
_SET_BY_MODEL = ("num_heads", "num_kv_heads", "head_dim", "scale", "dropout_p", "is_causal", "tensor_layout", "pattern")
# What models hand to their attention that asks nothing of it.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def register_with_transformers(
    model: PreTrainedModel | str,
    pattern: Pattern | Mapping[str, Any],
    *,
    layers: _Layers | None = None,
    **fields: Any,
) -> str:
    """Register a pattern as an attention implementation of transformers, and switch a model to it.

    Args:
        model: a model, which is switched (`model.set_attn_implementation("eager")` switches back), or the name to
            register, for `set_attn_implementation` or `from_pretrained(..., attn_implementation=name)`.
        pattern: for the layers that `layers` does not name. Layers with a sliding window take `Full()`, which is then
            the window, or a `Local` inside it.
        layers: patterns by layer number, or by one of config.layer_types; a number goes before a type.
        fields: further fields of `AttentionConfig` (backend, deterministic, limits, ...).

    Returns:
        The name; for a model one that follows from the arguments.

    Raises:
        ConfigError: a pattern or field that is not allowed, a name that transformers would read otherwise or that is
            taken, a layer that the model has not; transformers missing or too old.
    """
    transformers = _transformers()
    if not isinstance(model, str) and not hasattr(model, "set_attn_implementation"):  # wrappers of models pass it on
        raise ConfigError(f"model must be a model of transformers, or a name to register, got {type(model).__name__}")
    if not isinstance(layers, Mapping | None):
        raise ConfigError(f"layers must map layer numbers or types to patterns, got {layers!r}")
    implementation = _Implementation(pattern, layers or {}, fields)

    def holder(name: str) -> object:
        tables = transformers.AttentionInterface._global_mapping, transformers.AttentionMaskInterface._global_mapping
        return tables[0].get(name) or tables[1].get(name)  # eager has a mask only

    if isinstance(model, str):
        name = _checked(model)
    else:
        implementation.check_layers(model.config)
        name = implementation.own_name
        while not implementation.may_stand_for(holder(name)):
            name += "_"
    taken = holder(name)
    if not implementation.may_stand_for(taken):
        raise ConfigError(
            f"the attention implementation {name!r} is already registered as {taken!r}; take another name"
        )
    if taken is None:
        transformers.AttentionInterface.register(name, implementation)
        transformers.AttentionMaskInterface.register(name, padding_mask)
    if not isinstance(model, str):
        model.set_attn_implementation(name)
        if model.config.get_text_config()._attn_implementation != name:
            raise ConfigError(
                f"{type(model).__name__} does not take its attention from transformers' registry, so no pattern can be "
                f"given to it"
            )
    return name


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError("transformers is not installed; pip install 'dilated-attention[hf]'") from error
    if Version(transformers.__version__) < _OLDEST:
        raise ConfigError(f"transformers must be {_OLDEST} or newer, got {transformers.__version__}; upgrade it")
    return transformers


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or "flash" in name.lower():
        raise ConfigError(
            f"an attention implementation's name is of letters, digits, '_', '-' and '.', and without 'flash', which "
            f"transformers reads as FlashAttention, or 'paged|', as continuous batching; got {name!r}"
        )
    return name


class _Implementation:
    """The attention function of one registered name: finds each layer's pattern and calls its attention."""

    def __init__(
        self,
        pattern: Pattern | Mapping[str, Any],
        layers: _Layers,
        fields: Mapping[str, Any],
    ) -> None:
        for name in fields:
            if name in _SET_BY_MODEL:
                raise ConfigError(f"{name!r} follows from the model or from pattern=, and cannot be given here")
        config = AttentionConfig.from_dict({"num_heads": 1, "head_dim": 1, **fields})  # which models say later
        check_names(config, default_registry())
        self.pattern = _resolved(pattern)
        self.layers: dict[int | str, Pattern] = {_layer(key): _resolved(chosen) for key, chosen in layers.items()}
        self.fields = dict(fields)
        self._built: dict[tuple[Any, ...], BuiltAttention] = {}
        self._asked = self.pattern, sorted(self.layers.items(), key=str), self.fields

    def __repr__(self) -> str:
        return f"{self.pattern!r} with layers={self.layers!r} and {self.fields!r}"

    @property
    def own_name(self) -> str:
        """A name that says the same of equal arguments in every process."""
        return f"dilated_attention_{sha256(repr(self._asked).encode()).hexdigest()[:12]}"

    def may_stand_for(self, known: object) -> bool:
        """Whether nothing is registered, or the same; somebody's patterns that differ may look alike."""
        return known is None or (isinstance(known, _Implementation) and known._asked == self._asked)

    def check_layers(self, config: Any) -> None:
        """Raise `ConfigError` for a layer number or type that the model has not."""
        text = config.get_text_config()
        count, types = text.num_hidden_layers, set(getattr(text, "layer_types", None) or ())
        for layer in self.layers:
            if isinstance(layer, int) and not 0 <= layer < count:
                raise ConfigError(f"layers names layer {layer}; the model has layers 0 to {count - 1}")
            if isinstance(layer, str) and layer not in types:
                has = f"has {', '.join(sorted(types))}" if types else "has no layer_types"
                raise ConfigError(f"layers names the layer type {layer!r}; the model {has}")

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend, as transformers calls it.

        Args:
            module: the layer's attention.
            query: (B, H, S, D).
            key: (B, K, T, D), not repeated.
            value: likewise.
            attention_mask: None, or what `padding_mask` made, or (B, F) bool, False for padding.
            dropout: of attention weights; transformers gives 0 in evaluation mode.
            scaling: factor on q·k.
            is_causal: by default the module's; a mask of `padding_mask` goes before both, as in eager attention.
            sliding_window: keys that a query sees, its own included; so many on each side where it is not causal.
            s_aux: (H,) scores of a key without value that every query also sees, as gpt-oss has them.
            others: what the model hands on; what asks for something that cannot be honoured is an error.

        Returns:
            (B, S, H, D), and None for the weights, which are never formed.
        """
        self._check(others, attention_mask, query, value)
        causal = _causality(module, is_causal, attention_mask)
        window = sliding_window if sliding_window is not None else _window(module, causal)
        built = self._attention(module, query, key, dropout, scaling, causal, window)
        documents, padding = documents_of(attention_mask), None
        if attention_mask is not None and documents is None:
            key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
            padding = padding_of(attention_mask)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        batch, length = q.shape[:2]
        is_cross = _is_cross(module, causal)
        is_self = length == k.shape[1] and length > 1 and not is_cross
        if not built.is_full and (is_cross or (not causal and length != k.shape[1])):
            raise ConfigError(
                f"{length} queries attend to {k.shape[1]} keys of another sequence: only Full() does that"
            )
        lengths = packed_lengths(others, documents, padding, batch=batch, is_self=is_self)
        if lengths is not None:
            flat = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
            out = built(*flat, is_causal=causal, cu_seqlens=lengths, sinks=s_aux)
            return out.unflatten(1, (batch, length)).squeeze(0), None
        may_cross = built.is_full and not causal
        return built(q, k, v, is_causal=causal, key_padding_mask=padding, is_cross=may_cross, sinks=s_aux), None

    def _check(self, others: dict[str, Any], mask: object, query: Tensor, value: Tensor) -> None:
        """Raise `ConfigError` for what was asked for and cannot be honoured."""
        asked = sorted(name for name, x in others.items() if name not in _HARMLESS and x is not None and x is not False)
        if asked:
            raise ConfigError(
                f"the model hands {', '.join(asked)} to its attention, which no pattern honours; use "
                f"set_attn_implementation('eager') for it"
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype in MASK_DTYPES):
            shape = tuple(getattr(mask, "shape", ()))
            raise ConfigError(
                f"a ready-made mask of shape {shape} cannot be honoured: give attention_mask as (batch, seq_len) and "
                f"say by the pattern who attends to whom"
            )
        if value.shape[-1] != query.shape[-1]:
            widths = f"queries are {query.shape[-1]} wide and values {value.shape[-1]}"
            raise ConfigError(f"{widths}; a pattern's attention takes one width")

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        dropout: float,
        scaling: float | None,
        causal: bool,
        window: int | None,
    ) -> BuiltAttention:
        layer = getattr(module, "layer_idx", None)
        kind = _layer_type(module)  # models of other layer types may share the implementation
        heads = heads_of(module, query.shape[1], key.shape[1])
        identity = (layer, kind, query.shape[1], key.shape[1], query.shape[3], dropout, scaling, causal, window, heads)
        if torch.compiler.is_compiling():
            _make_while_tracing(self, module, *identity)
        elif identity not in self._built:
            self.make(module, *identity)
        return self._built[identity]

    def make(self, module: nn.Module, *identity: Any) -> bool:
        """Build the attention of a layer and keep it under `identity`."""
        layer, kind, heads, kv_heads, head_dim, dropout, scaling, causal, window, of_whole = identity
        fields = {
            **self.fields,
            "pattern": shard_of(self._windowed(self._pattern_of(module, layer, kind), layer, causal, window), of_whole),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": scaling,
            "dropout_p": dropout,
        }
        self._built[identity] = BuiltAttention(fields)
        return True

    def _pattern_of(self, module: nn.Module, layer: int | None, kind: str | None) -> Pattern:
        if not self.layers:
            return self.pattern
        if layer is None:
            raise ConfigError(
                f"layers cannot be told apart: {type(module).__name__} has no layer_idx; leave layers out"
            )
        by_type = self.layers.get(kind, self.pattern) if kind is not None else self.pattern
        return self.layers.get(layer, by_type)

    def _windowed(self, pattern: Pattern, layer: int | None, causal: bool, window: int | None) -> Pattern:
        """The pattern inside a sliding window."""
        if window is None:
            return pattern
        sides = (window - 1, 0 if causal else window - 1)
        if isinstance(pattern.unwrap(), Full):
            return _resolved({"kind": "local", "window_size": sides})
        if pattern.kind == "local":
            sizes: tuple[int, int] = pattern.to_dict()["window_size"]  # type: ignore[assignment]
            if sizes[0] <= sides[0] and (causal or sizes[1] <= sides[1]):
                return pattern
        raise ConfigError(
            f"layer {layer} has a sliding window of {window}{_OLDER if causal else ' on each side'}, so {pattern!r} "
            f"cannot be computed there; give such layers Full(), which is the window, or a Local inside it: "
            f"layers={{'sliding_attention': Full()}}"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_while_tracing(implementation: _Implementation, module: nn.Module, *identity: Any) -> bool:
    """Run by the compiler while it traces: choosing a backend is nothing for a graph."""
    return identity in implementation._built or implementation.make(module, *identity)


def _layer(key: object) -> int | str:
    """A key of `layers`; numbers of numpy as Python's, by which layers are looked up and checked."""
    if isinstance(key, str):
        return key
    if isinstance(key, Integral) and not isinstance(key, bool):
        return int(key)
    raise ConfigError(f"layers must map layer numbers or types to patterns, got the key {key!r}")


def _resolved(pattern: Pattern | Mapping[str, Any]) -> Pattern:
    found = resolve_pattern(pattern)
    if isinstance(found.unwrap(), LearnedPattern):
        raise ConfigError(
            f"a {found.kind} pattern has a gate, for which a registered name has no place; freeze it first"
        )
    return found


def _causality(module: nn.Module, is_causal: bool | None, mask: Tensor | None) -> bool:
    """Whether no query sees a later key: by the mask, else as the call says, else the module."""
    says: bool | None
    for says in (is_causal_by_mask(mask), is_causal, getattr(module, "is_causal", None)):
        if says is not None:
            return bool(says)
    raise ConfigError(
        f"neither {type(module).__name__} nor its call nor a mask says whether queries see later keys; set the "
        f"module's is_causal"
    )


def _is_cross(module: nn.Module, causal: bool) -> bool:
    """Whether a layer says that its keys are another sequence's, as GPT-2's, BERT's and BART's each do."""
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return True
    return getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True) and not causal


def _window(module: nn.Module, causal: bool) -> int | None:
    """The sliding window of a layer that hands none on: what its type says in the configuration.

    Masks of both sides count it without the query's own position, and layers that hand it on with that.
    """
    if _layer_type(module) != "sliding_attention":
        return None
    window: int | None = getattr(module.config, "sliding_window", None)
    return window if causal or window is None else window + 1


def _layer_type(module: nn.Module) -> str | None:
    """The layer's entry in config.layer_types, where the model has such."""
    types, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return types[layer] if types is not None and layer is not None and layer < len(types) else None
