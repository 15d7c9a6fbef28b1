"""FlexAttention compiled: once for the length that an attention is built for, and once for all other lengths.

"Once" is once for each kind of inputs, see `_COMPILED`. What is compiled for all lengths is slower: it cannot leave out
the tests for a sequence's end.

Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from .flex_tables import BLOCK_SIZE, FlexTables, modifiers

# The modifiers' loads would be kept for several stages too, for which shared memory is too small; and few queries would
# get another kernel, which has no tiles for every type.
_OPTIONS: Final[FlexKernelOptions] = {"num_stages": 1, "FORCE_USE_FLEX_ATTENTION": True}
_SERIAL: Final = count()
_Run = Callable[[Tensor, Tensor, Tensor, FlexTables, float], tuple[Tensor, Tensor]]
# By what of the inputs is compiled: dtype, device, numbers of heads, head_dim, scale, whether there are gradients, more
# batch rows than one, more tokens than one block, tables that differ by head. Kept for the process, as the compiler
# keeps its own: an attention that is built again, and each layer alike, compile nothing.
_COMPILED: Final[dict[tuple[object, ...], _Run]] = {}


def attend(
    query_BHSD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, tables: FlexTables, scale: float
) -> tuple[Tensor, Tensor]:
    """What is compiled; never called as it is, since without a compiler it would form all scores.

    Returns out (B, H, S, D) and lse (B, H, S); differentiable.
    """
    mask_mod, score_mod = modifiers(tables)
    lengths = query_BHSD.shape[2], key_BKTD.shape[2]
    out, aux = flex_attention(
        query_BHSD,
        key_BKTD,
        value_BKTD,
        score_mod=score_mod,
        block_mask=BlockMask(lengths, *tables.lists, BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE), mask_mod=mask_mod),
        scale=scale,
        kernel_options=_OPTIONS,
        enable_gqa=query_BHSD.shape[1] != key_BKTD.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


class CompiledAttend:
    """`attend` over the tables of a layout, compiled at the first call with such inputs.

    Args:
        tables: of the layout.
        any_length: compile for all lengths rather than for those of the layout.
    """

    def __init__(self, tables: FlexTables, *, any_length: bool) -> None:
        self.tables = tables
        self._axes = (0, 2) if any_length else (0,)
        counts, indices = tables.lists[::2], tables.lists[1::2]
        moving = [(tables.masks, (0,)), (tables.heads, ()), (tables.numbers, (1, 2) if any_length else ())]
        moving += [(x, (2,) if any_length else ()) for x in counts]
        moving += [(x, (2, 3) if any_length else (3,)) for x in indices]
        self._kind = tables.is_weighted, *(_compiled_sizes(x, axes) for x, axes in moving)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `attend`; query, key and value have the strides of (B, len, heads, D)."""
        inputs = query, key, value
        sizes = [_compiled_sizes(x, self._axes) for x in inputs]
        own = query.dtype, query.device, query.requires_grad, scale, torch.get_float32_matmul_precision()
        kind = self._kind, own, *sizes
        run = _COMPILED.get(kind) or _compile()
        results = run(*inputs, self.tables, scale)
        _COMPILED[kind] = run
        return results


def _compiled_sizes(x: Tensor, axes: tuple[int, ...]) -> tuple[int | None, ...]:
    """The sizes that are compiled: all but those of `axes`, of which the compiler is told; there too 1 is special."""
    sizes: list[int | None] = [*x.shape]
    for axis in axes:
        if x.shape[axis] > 1:
            torch._dynamo.mark_dynamic(x, axis)
            sizes[axis] = None
    return tuple(sizes)


def _compile() -> _Run:
    """`attend`, to be compiled at its first call; it fails rather than run without a compiler.

    The compiler keeps what it compiled, and how often, with the code of a function, and the sizes that it has seen by
    the name of the code: a copy of another name has its own.
    """
    own = FunctionType(attend.__code__.replace(co_name=f"attend_{next(_SERIAL)}"), attend.__globals__)
    run: _Run = torch.compile(own, fullgraph=True)
    return run
