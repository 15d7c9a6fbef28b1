"""`torch.nn.MultiheadAttention` with a pattern.

Shapes: B batch, S query length, T key length, E embed_dim, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.checks import require_choice, require_int, require_positive
from ..core.config import check_fields
from ..core.decoding import DecodingCache
from ..core.documents import check_documents
from ..core.errors import ConfigError
from .built import BuiltAttention, projected_dtype
from .positions import POSITIONS, Rotation, make_rotation, packed_positions, positions_of, require_pairs, rotate
from .recomputing import chained
from .requirements import require

# Fields of AttentionConfig that follow from arguments of their own, and the argument to use instead.
_OWN = {
    "num_heads": "num_heads",
    "head_dim": "embed_dim and num_heads",
    "dropout_p": "dropout",
    "tensor_layout": "batch_first",
}


class MultiheadAttention(nn.Module):
    """Multi-head attention under a pattern; with `Full` it is `torch.nn.MultiheadAttention`, weights included.

    Its state_dict is that of `nn.MultiheadAttention` (in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias, or
    q_proj_weight, ... where kdim or vdim differ), so that either loads the other's; sub_norm adds two keys.

    Args:
        embed_dim: E.
        num_heads: H; a divisor of E.
        dropout: of attention weights, while training; `module.dropout = p` changes it. Above 0 `auto` takes only
            backends that drop weights (docs/configuration.md, "Dropout").
        bias: of the projections.
        kdim: width of keys, by default E.
        vdim: width of values, by default E.
        batch_first: tensors are (B, S, E) instead of (S, B, E); False by default, as in torch.
        device: of the parameters.
        dtype: of the parameters.
        is_self: query, key and value are always one sequence's, as they must be anyway but for `Full`, not causal and
            without positions. Then a mask speaks of the queries too, and nothing is computed for padding.
        positions: "none", "rotary" (RoFormer) or "xpos", for self-attention.
        rotary_base: the longest period of the angles over 2 pi.
        xpos_base: distance over which xPos decays.
        sub_norm: a LayerNorm before the output projection (sub-LayerNorm of MAGNETO, arXiv 2210.06423).
        gain: MAGNETO's initialisation: Xavier-normal, values and output projection times `gain` (sqrt(log(2 N)) for
            N layers). None initialises as torch does.
        layer_norm_eps: of sub_norm.
        compatibility: "torchscale_zero_padding" for weights trained with torchscale; see `zero_keys`.
        recompute: while training, norms before a projection are computed again in the backward instead of kept.
        fields: further fields of `AttentionConfig`: pattern, num_kv_heads, is_causal, scale, backend, ...

    Raises:
        ConfigError: for values that no backend could honour.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        is_self: bool = False,
        positions: str = "none",
        rotary_base: float = 10_000.0,
        xpos_base: float = 512.0,
        sub_norm: bool = False,
        gain: float | None = None,
        layer_norm_eps: float = 1e-5,
        compatibility: str | None = None,
        recompute: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        embed_dim = require_int("embed_dim", embed_dim, minimum=1)
        num_heads = require_int("num_heads", num_heads, minimum=1)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        require_choice("positions", positions, POSITIONS)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                require_int(name, width, minimum=1)
        for name, number in (("gain", gain), ("rotary_base", rotary_base), ("xpos_base", xpos_base)):
            if number is not None:
                require_positive(name, number)
        self._check(fields)
        head_dim = embed_dim // num_heads
        require_pairs(positions, head_dim)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.batch_first, self.is_self, self.recompute = batch_first, is_self, recompute
        self.positions, self.rotary_base, self.xpos_base, self.gain = positions, rotary_base, xpos_base, gain
        given = {"num_heads": num_heads, "head_dim": head_dim, "dropout_p": dropout, **fields}
        self.attention = BuiltAttention(given, compatibility=compatibility, device=device, dtype=dtype)
        self._kv_dim = self.attention.config.kv_heads * head_dim
        self._sizes = [embed_dim, self._kv_dim, self._kv_dim]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self._make_projections(bias, made)
        self.sub_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, **made) if sub_norm else None
        self.reset_parameters()

    @staticmethod
    def _check(fields: dict[str, Any]) -> None:
        for name, instead in _OWN.items():
            if name in fields:
                raise ConfigError(f"MultiheadAttention has no {name!r}; it follows from {instead}")
        for name in ("add_bias_kv", "add_zero_attn"):
            if fields.pop(name, False):
                raise ConfigError(f"{name} must be False: a pattern has no place for keys beside the sequence's")
        check_fields(fields)

    def _make_projections(self, bias: bool, made: dict[str, Any]) -> None:
        e, kv = self.embed_dim, self._kv_dim
        packed = self.kdim == e and self.vdim == e
        shapes = {"in_proj_weight": (e + 2 * kv, e)}
        if not packed:
            shapes = {"q_proj_weight": (e, e), "k_proj_weight": (kv, self.kdim), "v_proj_weight": (kv, self.vdim)}
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            shape = shapes.get(name)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)) if shape else None)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(e + 2 * kv, **made)) if bias else None)

    @property
    def dropout(self) -> float:
        """With which probability attention weights are dropped while training."""
        return self.attention.config.dropout_p

    @dropout.setter
    def dropout(self, dropout_p: float) -> None:
        self.attention.set_dropout(dropout_p)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: it is what keeps `nn.TransformerEncoderLayer` from its own dense attention in evaluation mode."""
        return False

    @property
    def _may_cross(self) -> bool:
        """Whether queries and keys may be of two sequences, whose positions have nothing to do with each other."""
        return self.attention.is_full and self.positions == "none" and not self.is_self

    def reset_parameters(self) -> None:
        """Draw new weights: as torch does, or where `gain` is given as MAGNETO does."""
        for name, weight in self._input_weights():
            if self.gain is None:
                nn.init.xavier_uniform_(weight)
                continue
            parts = weight.split_with_sizes(self._sizes) if name == "in_proj_weight" else [weight]
            for index, part in enumerate(parts):
                is_value = index == 2 or name == "v_proj_weight"
                nn.init.xavier_normal_(part, gain=self.gain if is_value else 1.0)
        if self.gain is not None:
            nn.init.xavier_normal_(self.out_proj.weight, gain=self.gain)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.sub_norm is not None:
            self.sub_norm.reset_parameters()

    def _input_weights(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.named_parameters(recurse=False) if name != "in_proj_bias"]

    def extra_repr(self) -> str:
        """The arguments that the submodules do not show."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, "
            f"positions={self.positions!r}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        rotation: Rotation | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (B, S, E), or (S, B, E) with batch_first=False, or (S, E).
            key: (B, T, kdim), (T, B, kdim) or (T, kdim). Attention between two sequences only `Full` allows, not causal
                and without positions. They are two where T is not S.
            value: like key, with vdim.
            key_padding_mask: (B, T), True for padding; or as torch passes it on, floating-point with -inf for padding.
                Where two sequences are allowed it speaks of keys alone, as in torch; otherwise of queries too, and rows
                that are padding give what the output projection makes of zeros.
            need_weights: must be False: the weights are never formed.
            attn_mask: as in torch, only beside is_causal=True, whose mask the caller says that it is. Who attends to
                whom is the pattern's.
            average_attn_weights: as in torch, without effect where there are no weights.
            is_causal: no query sees a later key.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row, each a sequence by itself.
            rotation: positions worked out before, of `make_rotation`; otherwise they are worked out here, counting
                the tokens of each row that are not padding, or of each document.
            norm: of the tokens, before they are projected; not where two sequences are allowed.

        Returns:
            The output, shaped like query, and None.

        Raises:
            ConfigError: for what cannot be honoured.
        """
        if need_weights:
            raise ConfigError("need_weights must be False: the attention weights are never formed")
        if attn_mask is not None and not is_causal:
            raise ConfigError(
                "attn_mask is taken only beside is_causal=True, as the causal mask; say who attends to whom by pattern="
            )
        _check_tensors(query, key, value)
        padding = as_padding(key_padding_mask)
        is_single, are_same = query.dim() == 2, query is key and key is value
        # Hooks, checkpoints and FSDP hand on a copy of each, so identity decides of speed and of this error alone.
        is_memory = key is value and not are_same and not self.is_self
        if norm is not None and self._may_cross:
            raise ConfigError(
                "norm is taken for self-attention only; make the module with is_self=True, or normalise query, key and "
                "value before the call"
            )
        if is_single:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            padding = padding.unsqueeze(0) if padding is not None else None
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        is_causal = is_causal or self.attention.config.is_causal
        self._check_shapes(query, key, value, padding)
        if cu_seqlens is not None:
            check_documents(padding, cu_seqlens, query, key, None, 0, is_causal=is_causal)
        if (is_memory or query.shape[1] != key.shape[1]) and (is_causal or not self._may_cross):
            raise ConfigError(
                f"query has {query.shape[1]} tokens and key {key.shape[1]}"
                f"{', and key and value are one tensor and query another' * is_memory}: attention between two "
                f"sequences is Full() only, not causal and without positions; got {self.attention.pattern!r}, "
                f"is_causal={is_causal}, positions={self.positions!r}, is_self={self.is_self}"
            )
        inputs = (query,) if are_same else (query, key, value)
        q_BSHD, k_BTKD, v_BTKD = self._heads(*inputs, norm=norm)
        if self.positions != "none":
            rotation = rotation or self.rotation(q_BSHD, padding, cu_seqlens)
            q_BSHD, k_BTKD = rotate(q_BSHD, k_BTKD, rotation)
        is_cross = self._may_cross and not is_causal
        sequences: dict[str, Any] = {"key_padding_mask": padding, "cu_seqlens": cu_seqlens, "is_cross": is_cross}
        out_BSHD = self.attention(q_BSHD, k_BTKD, v_BTKD, is_causal=is_causal, **sequences)
        out_BSE = self._project(out_BSHD)
        if is_single:
            return out_BSE.squeeze(0), None
        return out_BSE if self.batch_first else out_BSE.transpose(0, 1), None

    def step(self, x_BSE: Tensor, cache: DecodingCache, rotation: Rotation | None = None) -> Tensor:
        """The next tokens of self-attention while decoding: causal, batch-first, without gradients.

        Args:
            x_BSE: the new tokens.
            cache: of `attention.make_cache`; it takes them in.
            rotation: of their positions, exactly where the module has positions.

        Returns:
            (B, S, E).
        """
        if (rotation is None) != (self.positions == "none"):
            raise ConfigError(
                f"a step of a module with positions={self.positions!r} got rotation={rotation is not None}"
            )
        q_BSHD, k_BSKD, v_BSKD = self._heads(x_BSE)
        if rotation is not None:
            q_BSHD, k_BSKD = rotate(q_BSHD, k_BSKD, rotation)
        return self._project(self.attention.step(q_BSHD, k_BSKD, v_BSKD, cache))

    def _project(self, out_BSHD: Tensor) -> Tensor:
        """Heads to (B, S, E)."""
        recompute = self.recompute and self.training and self.sub_norm is not None
        return chained(out_BSHD.flatten(2), self.sub_norm, self.out_proj, recompute=recompute)

    def rotation(self, like: Tensor, padding: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Rotation:
        """Positions for queries like (B, S, ...), counting from 0 over what is not padding, or in each document."""
        if padding is not None:
            places = positions_of(padding)
        elif cu_seqlens is not None:
            places = packed_positions(cu_seqlens, like.shape[1], like.device)
        else:
            places = torch.arange(like.shape[1], device=like.device)
        return make_rotation(
            self.positions,
            places,
            self.head_dim,
            dtype=projected_dtype(like),
            base=self.rotary_base,
            xpos_base=self.xpos_base,
        )

    def _heads(self, *inputs: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of query, key and value, or of the one tensor that is all three.

        Returns:
            (B, S, H, D), (B, T, K, D), (B, T, K, D).
        """
        sizes, packed = self._sizes, self.in_proj_weight
        project = partial(chained, recompute=self.recompute and self.training and norm is not None)
        if packed is not None and len(inputs) == 1:
            whole = partial(linear, weight=packed, bias=self.in_proj_bias)
            parts = project(inputs[0], norm, whole).split_with_sizes(sizes, dim=-1)
        else:
            # By name: what prunes or parametrizes a weight takes it out of the parameters, or puts it at their end.
            weights = (
                packed.split_with_sizes(sizes)
                if packed is not None
                else [getattr(self, f"{letter}_proj_weight") for letter in "qkv"]
            )
            biases = self.in_proj_bias.split_with_sizes(sizes) if self.in_proj_bias is not None else (None, None, None)
            each = zip(inputs * (3 // len(inputs)), weights, biases, strict=True)
            parts = tuple(project(x, norm, partial(linear, weight=w, bias=b)) for x, w, b in each)
        q, k, v = (torch.unflatten(part, -1, (-1, self.head_dim)) for part in parts)
        return q, k, v

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Batch-first shapes."""
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if x.dim() != 3 or x.shape[2] != width:
                raise ConfigError(f"{name} must have three dimensions, the last of {width}; got {tuple(x.shape)}")
        if mask is not None and mask.shape != key.shape[:2]:
            raise ConfigError(
                f"key_padding_mask must be (batch, kv_len) {tuple(key.shape[:2])}, got {tuple(mask.shape)}"
            )


def _check_tensors(*inputs: object) -> None:
    """Raise `ConfigError` for inputs that are no tensors, or nested ones."""
    if not all(isinstance(x, Tensor) for x in inputs):
        found = ", ".join(type(x).__name__ for x in inputs)
        raise ConfigError(f"query, key and value must be tensors, got {found}")
    if any(isinstance(x, Tensor) and x.is_nested for x in inputs):
        raise ConfigError(
            "query, key and value must be dense tensors, got nested ones. nn.TransformerEncoder makes them of padded "
            "batches in evaluation mode: make the encoder with enable_nested_tensor=False, or set its "
            "use_nested_tensor to False"
        )


def as_padding(mask: Tensor | None) -> Tensor | None:
    """A bool mask from one that torch has turned into 0 and -inf."""
    if not isinstance(mask, Tensor | None):
        raise ConfigError(f"key_padding_mask must be a tensor, got {type(mask).__name__}")
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ConfigError(f"key_padding_mask must be bool (True for padding) or floating-point, got {mask.dtype}")
    padding = mask == -torch.inf
    message = "a floating-point key_padding_mask must be 0 or -inf everywhere: padding is left out, never weighted"
    require(((mask == 0) | padding).all(), message)
    return padding
