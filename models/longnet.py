"""LongNet encoders, decoders and language models (arXiv 2307.02486).

Shapes: B batch, S sequence, M memory length, E embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ..core.checks import require_int
from ..core.decoding import DecodingCache
from ..core.documents import check_documents
from ..core.errors import ConfigError
from .built import projected_dtype
from .layers import LongNetDecoderLayer, LongNetEncoderLayer
from .longnet_config import LongNetConfig, require_config
from .multihead import MultiheadAttention, as_padding
from .positions import Rotation, make_rotation
from .requirements import require_tokens

_Device = torch.device | str | None


@attrs.define
class LongNetCache:
    """What a language model keeps while it decodes: `LongNetLM.make_cache` makes one, `step` fills it.

    Attributes:
        layers: one cache a layer.
        centre: where xPos' scales are 1.
    """

    layers: list[DecodingCache]
    centre: int

    @property
    def seq_len(self) -> int:
        """Tokens that it has seen."""
        return self.layers[0].seq_len

    @property
    def nbytes(self) -> int:
        """Memory that it occupies."""
        return sum(layer.nbytes for layer in self.layers)

    def select(self, rows: Tensor) -> None:
        """Hold the sequences `rows` of the batch from now on; see `DecodingCache.select`."""
        for layer in self.layers:
            layer.select(rows)

    def crop(self, seq_len: int) -> None:
        """Forget all tokens but the first `seq_len`; see `DecodingCache.crop`."""
        for layer in self.layers:
            layer.crop(seq_len)


class _Stack(nn.Module):
    """Layers one after the other: positions worked out once, activations checkpointed layer by layer."""

    def __init__(self, config: LongNetConfig, layers: nn.ModuleList, made: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        has_norm = config.final_norm and config.norm != "deep"
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **made) if has_norm else None

    def _run(
        self,
        x_BSE: Tensor,
        padding: Tensor | None,
        *memory: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """The residual stream after layers and last norm; `keep` collects it before each layer and after the last."""
        if x_BSE.dim() != 3 or x_BSE.shape[2] != self.config.embed_dim:
            raise ConfigError(f"x must be (batch, seq_len, {self.config.embed_dim}), got {tuple(x_BSE.shape)}")
        padding = as_padding(padding)
        if cu_seqlens is not None:
            check_documents(padding, cu_seqlens, x_BSE, x_BSE, None, 0, is_causal=False)
        rotation = self._rotation(x_BSE, padding, cu_seqlens)
        padding, cu_seqlens = _read_once(padding), _read_once(cu_seqlens)
        recompute = self.config.activation_checkpointing is True and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if keep is not None:
                keep.append(x_BSE)
            arguments = (x_BSE, padding, rotation, *memory)
            run: Callable[..., Tensor] = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x_BSE = run(*arguments, cu_seqlens=cu_seqlens)
        if keep is not None:
            keep.append(x_BSE)
        return self.norm(x_BSE) if self.norm is not None else x_BSE

    def _rotation(self, x_BSE: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None) -> Rotation | None:
        if self.config.positions == "none":
            return None
        attention: MultiheadAttention = self.layers[0].self_attn  # type: ignore[assignment]
        return attention.rotation(x_BSE, padding, cu_seqlens)


class LongNetEncoder(_Stack):
    """A stack of encoder layers over embeddings.

    Args:
        config: its shape.
        is_causal: no position sees a later one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        is_causal: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        require_config(config)
        depths = range(config.num_layers)
        layers = nn.ModuleList(LongNetEncoderLayer(config, depth=i, is_causal=is_causal, **made) for i in depths)
        super().__init__(config, layers, made)

    def forward(
        self, x_BSE: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """(B, S, E) to (B, S, E).

        Args:
            x_BSE: embeddings.
            key_padding_mask: (B, S) bool, True for padding.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row, instead.
        """
        return self._run(x_BSE, key_padding_mask, cu_seqlens=cu_seqlens)

    def hidden_states(
        self, x_BSE: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> list[Tensor]:
        """The residual stream before the first layer and after each, without the last norm: num_layers + 1 tensors."""
        kept: list[Tensor] = []
        self._run(x_BSE, key_padding_mask, cu_seqlens=cu_seqlens, keep=kept)
        return kept


class LongNetDecoder(_Stack):
    """A stack of decoder layers over embeddings.

    Args:
        config: its shape.
        has_memory: attend to an encoder's output too.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        has_memory: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        require_config(config)
        depths = range(config.num_layers)
        layers = nn.ModuleList(LongNetDecoderLayer(config, depth=i, has_memory=has_memory, **made) for i in depths)
        super().__init__(config, layers, made)
        self.has_memory = has_memory

    def forward(
        self,
        x_BSE: Tensor,
        key_padding_mask: Tensor | None = None,
        memory_BME: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, S, E) to (B, S, E).

        Args:
            x_BSE: embeddings.
            key_padding_mask: (B, S) bool, True for padding.
            memory_BME: an encoder's output; given exactly where the decoder has a memory.
            memory_padding_mask: (B, M) bool, True for padding.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row, instead of masks and memory.
        """
        if (memory_BME is not None) != self.has_memory:
            raise ConfigError(
                f"this decoder was made with has_memory={self.has_memory} and called "
                f"{'without a' if memory_BME is None else 'with a'} memory"
            )
        memory = memory_BME, _read_once(as_padding(memory_padding_mask))
        return self._run(x_BSE, key_padding_mask, *memory, cu_seqlens=cu_seqlens)


def _read_once(given: Tensor | None) -> Tensor | None:
    """A mask or lengths where the host can read them, as every layer's attention does, but for graphs."""
    return given if given is None or torch.compiler.is_compiling() else given.cpu()


def _require_cache(cache: object, num_layers: int) -> None:
    """Raise `ConfigError` for what is no cache of a model of so many layers, before any of them takes tokens."""
    if not isinstance(cache, LongNetCache):
        raise ConfigError(f"cache must be what make_cache made, got {type(cache).__name__}")
    if len(cache.layers) != num_layers:
        raise ConfigError(
            f"the cache was made for {len(cache.layers)} layers, and the model has {num_layers}; make one with its "
            "make_cache"
        )
    seen = [layer.seq_len for layer in cache.layers]
    if min(seen) != max(seen):
        raise ConfigError(
            f"the layers of the cache have seen {', '.join(map(str, seen))} tokens, as after a step that failed on the "
            "way; make a new one"
        )


class LongNetLM(nn.Module):
    """A language model: embedding, stack, logits.

    Args:
        config: its shape, with a vocab_size.
        is_causal: predict the next token; False makes a model for masked tokens.
        device: of the parameters.
        dtype: of the parameters.
    """

    stack: LongNetDecoder | LongNetEncoder

    def __init__(
        self,
        config: LongNetConfig,
        *,
        is_causal: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_config(config)
        if config.vocab_size is None:
            raise ConfigError("LongNetLM needs LongNetConfig.vocab_size, got None")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.is_causal = config, is_causal
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, **made)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = LongNetDecoder(config, **made) if is_causal else LongNetEncoder(config, **made)
        self.output = None if config.tie_embeddings else nn.Linear(config.embed_dim, config.vocab_size, False, **made)
        for layer in (self.embedding, self.output):
            if layer is not None:
                nn.init.normal_(layer.weight, std=config.embed_dim**-0.5)

    def forward(
        self, tokens_BS: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, S) int64 to logits (B, S, V).

        Args:
            tokens_BS: the tokens.
            key_padding_mask: (B, S) bool, True for padding.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row, instead.
        """
        require_tokens(tokens_BS)
        x_BSE = self.dropout(self.embedding(tokens_BS))
        return self.logits(self.stack(x_BSE, key_padding_mask, cu_seqlens=cu_seqlens))

    def make_cache(self, batch_size: int, max_seq_len: int, *, max_crop: int = 0) -> LongNetCache:
        """An empty cache for `step`; under autocast make it there, too.

        Args:
            batch_size: sequences decoded together, all of one length.
            max_seq_len: most tokens that it will see.
            max_crop: how many of the last ones `cache.crop` must be able to take back.
        """
        layers: list[LongNetDecoderLayer] = self._decoder_layers()
        require_int("max_seq_len", max_seq_len, minimum=1)
        like = self.embedding.weight
        attentions = [layer.self_attn.attention for layer in layers]
        caches = [built.make_cache(batch_size, max_seq_len, like=like, max_crop=max_crop) for built in attentions]
        return LongNetCache(layers=caches, centre=max_seq_len // 2)

    @torch.no_grad()
    def step(self, tokens_BS: Tensor, cache: LongNetCache) -> Tensor:
        """Logits (B, S, V) of the next tokens, or at first of a prompt: what `forward` over all tokens gives for them.

        Raises:
            ConfigError: in training mode, for what are no tokens, a cache of another model or of a step that failed
                between its layers, or as `Attention.step`.
        """
        require_tokens(tokens_BS)
        if self.training:
            raise ConfigError("decoding wants evaluation mode; call eval() first")
        layers = self._decoder_layers()
        _require_cache(cache, len(layers))
        x_BSE = self.embedding(tokens_BS)
        rotation = self._rotation_at(cache, x_BSE)
        for layer, held in zip(layers, cache.layers, strict=True):
            x_BSE = layer.step(x_BSE, held, rotation)
        norm = self.stack.norm
        return self.logits(x_BSE if norm is None else norm(x_BSE))

    def _decoder_layers(self) -> list[LongNetDecoderLayer]:
        if not self.is_causal:
            raise ConfigError("a model made with is_causal=False sees later tokens and cannot decode")
        return list(self.stack.layers)  # type: ignore[arg-type]

    def _rotation_at(self, cache: LongNetCache, x_BSE: Tensor) -> Rotation | None:
        """Positions of new tokens; xPos is centred where the cache says, since keys are kept as they were turned."""
        if self.config.positions == "none":
            return None
        return make_rotation(
            self.config.positions,
            torch.arange(cache.seq_len, cache.seq_len + x_BSE.shape[1], device=x_BSE.device),
            self.config.head_dim,
            dtype=projected_dtype(x_BSE),
            base=self.config.rotary_base,
            xpos_base=self.config.xpos_base,
            centre=cache.centre,
        )

    def generate(
        self,
        tokens_BS: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts of one length; see `generation.generate`."""
        from .generation import generate

        return generate(
            self,
            tokens_BS,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            stop_token=stop_token,
            generator=generator,
        )

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Scores of each token of the vocabulary, (B, S, V)."""
        if self.output is None:
            return linear(x_BSE, self.embedding.weight)
        scores: Tensor = self.output(x_BSE)  # called, for what is hung on it or put in its place
        return scores
