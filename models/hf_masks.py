"""The mask function that stands beside our attention in transformers' registry: two dimensions, never N × N.

transformers describes a mask by a function of (query, key) positions that it composes from known pieces. Windows reach
the attention by another way (`sliding_window`), so all there is to do here is to make sure that the function says
nothing else, to cut the padding mask to the keys that there are, and to hand on which tokens are packed together and
whether the mask is causal. Not every layer says the last itself, and some say it wrongly (AIMv2's text tower, Phi-4's
for images), which eager attention, that goes by its mask, does not show. The mask's dtype says it: what recomputes or
compiles a layer hands tensors on as they are.

Shapes: B batch, S query length, T key length as the cache has it, F the filled part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError

_PLAIN = ("causal_mask_function", "bidirectional_mask_function")
# Pieces that such a mask may be met with, and what the attention knows them by.
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_WINDOW_OF_BOTH_SIDES = "sliding_window_bidirectional_overlay.<locals>.inner_mask"
_WINDOWED = ([_WINDOW, "causal_mask_function"], [_WINDOW_OF_BOTH_SIDES, "bidirectional_mask_function"])
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"
_BOTH = "and_masks.<locals>.and_mask"

_PADDING = {True: torch.uint8, False: torch.int8}  # by whether the mask is causal
# Not int64, as masks of 0 and 1 often are. int16 may wrap: only neighbours are compared, and these differ even so.
_DOCUMENTS = {True: torch.int32, False: torch.int16}
_SAYS = {dtype: causal for kinds in (_PADDING, _DOCUMENTS) for causal, dtype in kinds.items()}
MASK_DTYPES = (torch.bool, *_SAYS)


@torch.compiler.disable(reason="a graph cannot look into transformers' mask functions")  # type: ignore[untyped-decorator, no-untyped-call]
def padding_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """What transformers calls to make a mask; arguments as its `AttentionMaskInterface` has them.

    Args:
        batch_size: B.
        q_length: S; transformers before 5.4 gives cache_position instead.
        kv_length: T, in a static cache its whole length.
        q_offset: position of the first query.
        kv_offset: position of the first key that the cache still has.
        mask_function: must be causal or bidirectional, windowed or packed, and nothing else.
        attention_mask: (B, positions so far) bool, False for padding.
        cache_position: (S,) positions of the queries.
        ignored: what other kinds of masks need (dtype, device, whether they may be left out, ...).

    Returns:
        (B, F) uint8 (causal) or int8 (not causal), 0 for padding: the attention takes the first F keys. For rows that
        hold several documents (B, S) int32 (causal) or int16 (not causal), the number of each token's document: not
        every model hands its attention the position_ids that say so.

    Raises:
        ConfigError: for a mask function that says more.
    """
    causal = _is_causal(mask_function)
    if mask_function is not None:
        require_known(mask_function)
        documents = _documents(mask_function)
        if documents is not None and attention_mask is None and bool((documents != documents[:, :1]).any()):
            return documents.expand(batch_size, -1).to(_DOCUMENTS[causal])
    if q_length is None:
        if cache_position is None:
            raise ConfigError("a mask needs q_length or cache_position; this version of transformers gives neither")
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if isinstance(q_offset, Tensor):
        q_offset = int(q_offset)
    filled = min(kv_length, q_offset + q_length - kv_offset) if causal else kv_length
    if attention_mask is None:
        return _all_tokens(batch_size, filled, causal, _device(ignored))
    if attention_mask.dim() != 2:
        raise ConfigError(f"attention_mask must be (batch, seq_len), got {tuple(attention_mask.shape)}")
    # generate makes the masks of static caches ahead, and the model then hands them in once more: cut already.
    start = 0 if attention_mask.shape[1] == filled else kv_offset
    mask = attention_mask[:, start : start + filled].bool()
    if mask.shape[1] < filled:
        raise ConfigError(
            f"attention_mask has {attention_mask.shape[1]} columns, too few for the keys up to position "
            f"{kv_offset + filled}; give it one column for each token seen so far"
        )
    return _all_tokens(batch_size, filled, causal, mask.device) if bool(mask.all()) else mask.to(_PADDING[causal])


def _all_tokens(batch: int, length: int, causal: bool, device: torch.device | str) -> Tensor:
    """A mask without padding, which shows by its strides, so that nobody need read it."""
    return torch.ones((), dtype=_PADDING[causal], device=device).expand(batch, length)


def is_causal_by_mask(mask: Tensor | None) -> bool | None:
    """Whether the mask function was causal, which the masks that it made say; None where there is none of these."""
    return None if mask is None else _SAYS.get(mask.dtype)


def documents_of(mask: Tensor | None) -> Tensor | None:
    """The mask, where it is numbers of documents."""
    return mask if mask is not None and mask.dtype in _DOCUMENTS.values() else None


def require_known(function: Callable[..., Any]) -> None:
    """Raise `ConfigError` unless the mask function says only what our attention is told by other ways."""
    name = _name(function)
    if name in _PLAIN or name == _PACKED:
        return
    if name == _REMAPPED:
        require_known(_captured(function)["mask_function"])
        return
    if name == _BOTH:
        parts = _captured(function)["mask_functions"]
        names = [_name(part) for part in parts]
        if names in _WINDOWED or _PACKED in names:  # first, or as in 5.0 last
            for part in parts:
                if _name(part) not in (_WINDOW, _WINDOW_OF_BOTH_SIDES):
                    require_known(part)
            return
        name = " & ".join(names)
    raise ConfigError(
        f"the model's mask function {name!r} is none that this attention can honour: it takes causal and bidirectional "
        f"masks, sliding windows of either and packed sequences, and says by its pattern who attends to whom. Use "
        f"set_attn_implementation('eager') for this model"
    )


def _documents(function: Callable[..., Any]) -> Tensor | None:
    """The number of the document of each token, (B or 1, S) int64, where a known mask function has one."""
    if _name(function) == _BOTH:
        found = (_documents(part) for part in _captured(function)["mask_functions"])
        return next((numbers for numbers in found if numbers is not None), None)
    if _name(function) != _PACKED:
        return None
    numbers: Tensor = _captured(function)["packed_sequence_mask"]
    return numbers


def _is_causal(function: Callable[..., Any] | None) -> bool:
    """Whether no query sees a later key, so that a static cache can be cut behind the last."""
    if function is not None and _name(function) == _BOTH:
        return all(map(_is_causal, _captured(function)["mask_functions"]))
    if function is not None and _name(function) == _REMAPPED:
        return _is_causal(_captured(function)["mask_function"])
    return function is None or _name(function) not in ("bidirectional_mask_function", _WINDOW_OF_BOTH_SIDES)


def _name(function: Callable[..., Any]) -> str:
    return function.__qualname__


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _device(given: dict[str, Any]) -> torch.device | str:
    device: torch.device | str = given.get("device") or torch.get_default_device()
    return device
