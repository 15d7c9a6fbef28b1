"""The attention inside a module: built for the dtype, device and causality it is called with, and kept.

Modules change after they are made (`.to(torch.bfloat16)`, `.cuda()`, autocast), an `Attention` does not: it was chosen
for one dtype and one kind of device. Shapes: B batch, S query length, T key length, H query heads, K key-value heads,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

import attrs
import torch
from torch import Tensor, nn

from ..core.attention import Attention
from ..core.config import AttentionConfig
from ..core.decoding import DecodingCache
from ..core.errors import ConfigError
from ..core.gate import Gate
from ..core.outside import outside_graphs
from ..core.pattern import Full, LearnedPattern, Pattern
from ..registry.build import build_attention
from ..registry.discovery import default_registry
from ..registry.patterns import resolve_pattern
from ..registry.selection import check_names
from .zero_keys import check_zero_padding, with_zero_keys

_Key = tuple[torch.dtype, str, bool, bool]  # dtype, device type, causal, with dropout

ZERO_PADDING = "torchscale_zero_padding"


class _Builds:
    """The attentions of one configuration, by what they are called with; equal modules share them.

    Those of a learned pattern have one gate, and only its module uses them.
    """

    def __init__(self, config: AttentionConfig, gate: Gate | None, token: str) -> None:
        self.config = config
        self.gate = gate
        self.token = token
        self.made: dict[_Key, Attention] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _builds_of, (self.config, self.gate)  # copies of a module share too, and nothing built is pickled

    def attention_for(self, dtype: torch.dtype, device_type: str, is_causal: bool, drops: bool) -> Attention:
        """The attention for these inputs, built now if it was not before."""
        key = (dtype, device_type, is_causal, drops)
        if key not in self.made:
            attention = build_attention(
                self.config,
                dtype=dtype,
                device=device_type,
                is_causal=is_causal,
                dropout_p=self.config.dropout_p if drops else 0.0,
            )
            if self.gate is not None:
                attention.gate = self.gate
            self.made[key] = attention
        return self.made[key]


# By a name that a graph can hold: torch 2.11 gives a function that runs while tracing no module.
_BUILDS: Final[WeakValueDictionary[str, _Builds]] = WeakValueDictionary()


def _builds_of(config: AttentionConfig, gate: Gate | None) -> _Builds:
    token = repr(config)
    while (known := _BUILDS.get(token)) is not None and (known.gate is not gate or known.config != config):
        token += "'"  # another layer's gate; and somebody's patterns may look alike
    made = known or _Builds(config, gate, token)
    return _BUILDS.setdefault(token, made)


class BuiltAttention(nn.Module):
    """One attention for whatever dtype, device and causality it is called with; each is built once, on first use.

    Under torch.compile that happens while tracing, so that graphs stay whole. Dropout is while training: in evaluation
    mode the attention is built without it. A learned pattern has a gate, which is made at once, for one causality, and
    which all that is built for this module shares. A forward pre-hook of this module sees the queries and keys that
    `gate.distillation_loss` takes.

    Args:
        fields: fields of `AttentionConfig`, `is_causal` among them where no call may be other than causal.
        compatibility: "torchscale_zero_padding" adds the zero keys that torchscale pads ragged lengths with to every
            softmax (`zero_keys`), for weights that were trained so; None is the exact definition.
        device: where the module's parameters are made.
        dtype: theirs.

    Attributes:
        pattern: the pattern, resolved.
        gate: chooses the blocks of a learned pattern; None for others. Its parameters have the module's dtype.
    """

    gate: Gate | None

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        compatibility: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = AttentionConfig.from_dict(fields)
        check_names(config, default_registry())
        self.pattern: Pattern = resolve_pattern(config.pattern)
        self.config = attrs.evolve(config, pattern=self.pattern)
        if compatibility not in (None, ZERO_PADDING):
            raise ConfigError(f"compatibility must be None or {ZERO_PADDING!r}, got {compatibility!r}")
        if compatibility is not None:
            check_zero_padding(self.config)
        self.compatibility = compatibility
        self._has_dropout = self.config.dropout_p > 0  # under torch.compile(dynamic=True) the number is a symbol
        self.gate = self._make_gate(device, dtype)
        self._builds = _builds_of(self.config, self.gate)

    def _make_gate(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Gate | None:
        learned = self.pattern.unwrap()
        if not isinstance(learned, LearnedPattern):
            return None
        device = torch.device(device) if device is not None else torch.get_default_device()
        if device.type == "meta":
            raise ConfigError(
                f"a {self.pattern.kind} pattern's gate has numbers to begin with and is made at once, which the meta "
                "device rules out; make the module on the device that it is to run on"
            )
        gate = learned.make_gate(attrs.evolve(self.config, device=device))
        return gate.to(dtype or torch.get_default_dtype())  # as the module's other parameters: FSDP2 wants them alike

    def set_dropout(self, dropout_p: float) -> None:
        """Drop with that probability from now on; attentions that were built for others are kept.

        Raises:
            ConfigError: for no probability below 1.
        """
        config = attrs.evolve(self.config, dropout_p=dropout_p)
        self.config, self._has_dropout, self._builds = config, dropout_p > 0, _builds_of(config, self.gate)

    @property
    def is_full(self) -> bool:
        """Whether queries and keys may come from different sequences: only `Full` asks nothing of positions."""
        return isinstance(self.pattern.unwrap(), Full)

    def extra_repr(self) -> str:
        """The pattern, and what it was built for so far."""
        made = self._builds.made.items()
        built = ", ".join(
            f"{dtype} on {device}{', causal' * causal}{', with dropout' * drops}: {a.plan.backend}"
            for (dtype, device, causal, drops), a in made
        )
        mode = f", compatibility={self.compatibility!r}" if self.compatibility else ""
        return f"{self.pattern!r}{mode}, built for ({built})"

    def attention_for(self, dtype: torch.dtype, device_type: str, *, is_causal: bool) -> Attention:
        """The attention for these inputs, built now if it was not before; `plan.explain()` says what was chosen.

        Raises:
            ConfigError, NoBackendError: as `build_attention`; for a learned pattern also for another causality.
        """
        self._check_causality(is_causal)
        return self._builds.attention_for(dtype, device_type, is_causal, self._drops)

    def _check_causality(self, is_causal: bool) -> None:
        if self.gate is not None and is_causal != self.config.is_causal:
            raise ConfigError(
                f"the {self.pattern.kind} pattern's gate was made for is_causal={self.config.is_causal} and called "
                f"with is_causal={is_causal}; make the module with that is_causal="
            )

    def built_attentions(self) -> tuple[Attention, ...]:
        """What was built by now, here or in modules that share it."""
        return tuple(self._builds.made.values())

    @property
    def _drops(self) -> bool:
        return self.training and self._has_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        is_cross: bool = False,
        cu_seqlens: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, S, H, D).
            key: (B, T, K, D).
            value: (B, T, K, D).
            is_causal: no query sees a later key; also where the configuration says so.
            key_padding_mask: (B, T) bool, True for padding.
            is_cross: queries are not the tokens that the mask speaks of; all of them attend.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in a batch of one row.
            sinks: (H,) scores of a key that every query of a head also sees, whose value is 0, as gpt-oss has them;
                not beside `is_cross` with a mask, nor with `compatibility`.

        Returns:
            (B, S, H, D); under autocast of its dtype, whatever that of the inputs is, as torch's attention is.
        """
        is_causal = is_causal or self.config.is_causal
        self._check_causality(is_causal)
        built_for = (projected_dtype(query), query.device.type, is_causal, self._drops)
        if torch.compiler.is_compiling():
            _build_while_tracing(self._builds.token, *built_for)
            attention = self._builds.made[built_for]
        else:
            attention = self._builds.attention_for(*built_for)
        if sinks is not None and (self.compatibility is not None or (is_cross and key_padding_mask is not None)):
            raise ConfigError("sinks are not taken beside compatibility, nor with a padding mask across two sequences")
        if is_cross and key_padding_mask is not None:
            return _over_real_keys(attention, query, key, value, key_padding_mask)
        if sinks is not None:
            documents = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
            out, lse = attention(query, key, value, return_lse=True, **documents)
            return with_sinks(out, lse, sinks)
        if self.compatibility is None or is_causal:
            attended: Tensor = attention(query, key, value, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens)
            return attended
        if key_padding_mask is not None or cu_seqlens is not None:
            raise ConfigError(
                f"compatibility={self.compatibility!r} takes no key_padding_mask: the original ignored it; run the "
                f"sequences one by one, or without compatibility"
            )
        out, lse = attention(query, key, value, return_lse=True)
        return with_zero_keys(out, lse, self.pattern, self.config.kv_heads)

    @outside_graphs
    def make_cache(self, batch_size: int, max_seq_len: int | None, *, like: Tensor, max_crop: int = 0) -> DecodingCache:
        """An empty cache for decoding, causal, for what is projected of `like`; see `Attention.make_cache`."""
        attention = self.attention_for(projected_dtype(like), like.device.type, is_causal=True)
        return attention.make_cache(batch_size, max_seq_len, max_crop=max_crop)

    @outside_graphs
    def step(self, query: Tensor, key: Tensor, value: Tensor, cache: DecodingCache) -> Tensor:
        """The next tokens' output (B, S, H, D), causal; see `Attention.step`."""
        attention = self.attention_for(projected_dtype(query), query.device.type, is_causal=True)
        return attention.step(query, key, value, cache)


def projected_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what is projected of `x` or attends: under autocast that of autocast, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax has a key of that score and of value 0 besides: out exp(lse) / (exp(lse) + exp(sink)).

    Args:
        out: (B, S, H, D).
        lse: (B, H, S).
        sinks: (H,).

    Returns:
        (B, S, H, D), in the dtype of out, differentiable in all three.
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype)


def _over_real_keys(attention: Attention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """Each row's queries over its keys that are not padding; rows of equally many keys at once.

    The mask is read by the host, so a graph breaks here.
    """
    real = ~padding.cpu()
    counts = real.sum(1)
    parts, rows = [], []
    for count in sorted(set(counts.tolist())):
        alike = counts == count
        places = (real & alike[:, None]).flatten().nonzero().squeeze(1).to(key.device)
        rows.append(alike.nonzero().squeeze(1))
        k, v = (torch.unflatten(x.flatten(0, 1)[places], 0, (len(rows[-1]), count)) for x in (key, value))
        parts.append(attention(query[rows[-1].to(query.device)], k, v))
    if len(parts) < 2:
        return parts[0] if parts else torch.empty_like(query)
    return torch.cat(parts)[torch.cat(rows).argsort().to(query.device)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _build_while_tracing(token: str, *built_for: Any) -> bool:
    """Run by the compiler while it traces, not traced itself: choosing a backend is nothing for a graph."""
    return _BUILDS[token].attention_for(*built_for) is not None
