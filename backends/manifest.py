"""The backends of this package, as manifests: nothing here imports torch or a kernel library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from ..core.geometry import one_token
from ..registry.hooks import hookimpl
from ..registry.specs import BackendSpec, Range, Request
from . import cards

if TYPE_CHECKING:
    from ..core.bands import Band
    from ..core.pattern import Branch

# What every kernel for dense pieces of PyTorch's strided tensors brings, core's composer having done the rest.
_DENSE: Final = {
    "layouts": ("dense",),
    "dynamic_tables": True,  # core's block product takes them
    "gqa": True,
    "causal": True,
    "offsets": True,
    "unequal_lengths": True,
    "varlen": True,  # core calls them once for each length
    "backward": True,
    "lse": True,
    "compile": "opaque",
}
# What every backend here for whole layouts brings.
_WHOLE: Final = {
    "layouts": ("branch", "block"),
    "weights": True,
    "per_head": True,
    "gqa": True,
    "causal": True,
    "offsets": True,
    "unequal_lengths": True,
    "varlen": True,
    "backward": True,
    "dlse": True,
    "lse": True,
    "compile": "opaque",
}
_HALVES: Final = ("bfloat16", "float16")
_OUTDONE: Final = -40  # behind every dense kernel
_SHORT: Final = 1 << 13  # tokens below which `sdpa`'s launches of a window take longer than `triton`'s in float32
_SHORT_DENSE: Final = 1 << 11  # tokens below which launches are what dense attention takes
_LONG_DENSE: Final = 1 << 14  # tokens from which dense attention takes longer than anything around it
_LONG: Final = 1 << 15  # tokens from which `fa4` is faster than `triton` in calls that follow each other
_BLOCK_OF_FA4: Final = 128  # the only one that it takes
_FINEST_OF_FLEX: Final = 64  # smaller blocks make masks of nearly all of its 128 x 128, more than fit

SDPA = BackendSpec(
    name="sdpa",
    target="dilated_attention.backends.sdpa:SdpaBackend",
    priority=0,
    capabilities=_DENSE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", *_HALVES),
        "head_dims": Range(1, 256),
        "dropout": True,
        "deterministic": ("forward", "backward"),
        "cuda_graph": True,
    },
    options={"kernel": "on CUDA: flash, cudnn (for any length) or efficient"},
)

# Priorities of kernels for Hopper, by forward + backward of LongNet's case on an H100 (docs/performance_log.md, "Dense
# kernels on one H100"): fa3 before sdpa's cuDNN before FlashAttention-2.
FA3 = BackendSpec(
    name="fa3",
    target="dilated_attention.backends.fa3:Fa3Backend",
    priority=30,
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "arch": ("sm_90",),
        "dtypes": _HALVES,
        "head_dims": Range(8, 256, 8),
        # Not backward: its deterministic mode was reported not to be (Dao-AILab/flash-attention#2244).
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
)

FA4 = BackendSpec(
    name="fa4",
    target="dilated_attention.backends.fa4:Fa4Backend",
    priority=-20,  # the slowest to launch, and but for what is below not the fastest (docs/performance.md)
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "arch": ("sm_90",),
        "dtypes": _HALVES,
        # Those in use of which it pads a head to a multiple of 32: gradients of causal attention are wrong of others
        # (seen with 48 on an H100: dq off by 0.7). Only 24 and 56 have one with 8 columns more, for a gradient of lse.
        "head_dims": (24, 32, 56, 64, 128),
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
    requires=("flash-attn-4==4.0.0b36",),
)

XFORMERS = BackendSpec(
    name="xformers",
    target="dilated_attention.backends.xformers:XformersBackend",
    priority=-10,  # FlashAttention-2 and cutlass are in sdpa too, with less work on the host for each call
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(4, 256, 4),
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
    requires=("xformers>=0.0.34",),
    options={"kernel": "flash or cutlass"},
)

TRITON = BackendSpec(
    name="triton",
    target="dilated_attention.backends.fused.backend:TritonBackend",
    priority=40,  # where it is the fastest; see `dilated_attention_rank_backends` below
    capabilities=_WHOLE
    | {
        # On sm_90 by itself, on other cards for users who say so: `fused.backend` judges.
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(16, 256, 8),
        "dynamic_tables": True,
        "context_parallel": True,
        "staged_blocks": True,
        "dropout": True,
        "deterministic": ("forward", "backward"),
        "cuda_graph": True,
    },
    requires=("triton>=3.4",),
    options={"unproven_card": "true where the conformance kit has passed on a card that is no Hopper"},
)

FLEX = BackendSpec(
    name="flex",
    target="dilated_attention.backends.flex:FlexBackend",
    priority=-50,  # it compiles for every length, and masks strided branches; for blocks see below
    capabilities=_WHOLE
    | {
        # Not cpu: PyTorch's FlexAttention gives no lse there.
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(16, 256, 8),
        "context_parallel": True,
    },
    requires=("triton>=3.4",),
)

MATH = BackendSpec(
    name="math",
    target="dilated_attention.backends.products:MathBackend",
    priority=-60,  # for what nothing else takes: head_dims beyond 256 or of odd widths, and float64 on a card
    capabilities=_DENSE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", *_HALVES),
        "head_dims": Range(1, 1 << 16),
        "dropout": True,
        "deterministic": ("forward", "backward"),
    },
)

REFERENCE = BackendSpec(
    name="reference",
    target="dilated_attention.backends.reference:ReferenceBackend",
    priority=-100,  # the dense float64 oracle: for comparison, and where nothing else fits
    capabilities=_WHOLE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", "bfloat16", "float16"),
        "head_dims": Range(1, 1 << 16),
        "dropout": True,
        "context_parallel": True,
        "deterministic": ("forward", "backward"),
    },
)


@hookimpl
def dilated_attention_backends() -> Iterable[BackendSpec]:
    """Those that need torch alone, and those over third-party kernels."""
    return (TRITON, FA3, FA4, SDPA, XFORMERS, FLEX, MATH, REFERENCE)


def _bands(request: Request) -> tuple[Band, ...]:
    """Those of a pattern that dense kernels compute in a few calls: not once for each length, nor on several ranks."""
    from ..core.bands import bands_of

    if request.config.varlen or "context_parallel" in request.needs:
        return ()
    return bands_of(request.pattern) or ()


def _is_hopper(request: Request) -> bool:
    return cards.compiled_for(request.device.arch) == cards.PROVEN


def _has_rings(request: Request) -> bool:
    """Whether there are kernels with a ring for every head_dim, which depends on the Triton that compiles them."""
    from . import libraries  # brings torch

    return _is_hopper(request) and cards.is_among(libraries.installed("triton"), cards.WIDE_RELEASES)


def _branches(request: Request) -> tuple[Branch, ...]:
    """Those of a pattern that is branches alone."""
    if request.needs["layouts"] != ("branch",):
        return ()
    from ..core.lowering import split  # brings numpy, which listing backends does without

    config = request.config
    return split(request.pattern, one_token(config.num_heads, config.kv_heads, config.is_causal))[0]


def _is_dense(request: Request, branches: tuple[Branch, ...]) -> bool:
    """Whether every query sees every key (causal ones every earlier one) of one length."""
    found = [(branch.segment_length, branch.stride) for branch in branches]
    return found == [(None, 1)] and not request.config.varlen


def _is_long_and_dense(request: Request, branches: tuple[Branch, ...]) -> bool:
    """Whether it is, on a Hopper card, of many tokens."""
    config = request.config
    if not _is_hopper(request) or config.dtype not in _HALVES or "context_parallel" in request.needs:
        return False
    return config.seq_len is not None and config.seq_len >= _LONG_DENSE and _is_dense(request, branches)


def _fuses(request: Request, branches: tuple[Branch, ...]) -> bool:
    """Whether the fused kernels are the fastest for a request.

    By docs/performance_log.md: "What `auto` picked", and for cards that are no Hopper, whose windows are faster as
    FlashAttention-2's, "Other cards".
    """
    config, layouts = request.config, request.needs["layouts"]
    head_dim, is_half = config.head_dim, config.dtype in _HALVES
    is_hopper = _is_hopper(request)
    if "dynamic_tables" in request.needs:
        return is_half or head_dim <= 128  # a block product that sorts and gathers at every call is far behind
    if "block" in layouts:
        if is_half:
            return (is_hopper and (head_dim <= 128 or _has_rings(request))) or not _bands(request)
        if head_dim > 64 or "branch" in layouts:  # branches lose more than blocks gain
            return False
        is_short = config.seq_len is not None and config.seq_len < _SHORT  # where launches are what takes the time
        return is_short or not _bands(request)
    # Without a ring heads are padded to a power of two, which from 129 to 192 costs more than the dense kernels' calls
    # where gradients are computed.
    is_suited = head_dim <= 64 or (
        is_hopper and (head_dim <= 128 or head_dim > 192 or not config.requires_grad or _has_rings(request))
    )
    return is_half and is_suited and len(branches) >= _fewest_branches(request, branches)


def _fewest_branches(request: Request, branches: tuple[Branch, ...]) -> int:
    """From how many on branches in half precision are faster in one launch than as the calls of `sdpa`'s kernels.

    Those are cuDNN's up to head_dim 128, at which it is the fastest, and FlashAttention-2's beyond.
    """
    config = request.config
    if config.varlen:
        return 1  # of several lengths, whose launches are many else
    if not _is_hopper(request) or 96 < config.head_dim <= 128 or (config.head_dim > 64 and not _has_rings(request)):
        return 3
    if "context_parallel" in request.needs:
        return 2 if config.head_dim <= 64 else 3
    is_short = config.head_dim <= 128 or (config.seq_len is not None and config.seq_len < _SHORT_DENSE)
    return 2 if is_short and _is_dense(request, branches) else 1


def _fuses_drops(request: Request, branches: tuple[Branch, ...]) -> bool:
    """The same with dropout, in half precision, where what there is besides are FlashAttention-2 and core's product.

    By docs/performance.md, "Dropout".
    """
    from ..core.bands import only_window

    config = request.config
    if "block" in request.needs["layouts"] or "dynamic_tables" in request.needs:
        return only_window(_bands(request)) is None
    is_short = config.seq_len is None or config.seq_len < _LONG_DENSE
    return config.head_dim <= 128 and not (is_short and _is_dense(request, branches))


def _suits_flex(request: Request) -> bool:
    """Whether `flex` beats the dense kernels: for blocks alone, not too small ones, of a known length.

    It compiles for seconds at every new length; its rings have not run over several cards. Windows are the dense
    kernels' own.
    """
    from ..core.lowering import table_block_size

    config = request.config
    is_known = config.seq_len is not None and "context_parallel" not in request.needs
    has_blocks_alone = request.needs["layouts"] == ("block",)  # it looks at every block that a strided branch touches
    if _bands(request) or not (has_blocks_alone and is_known and config.dtype in _HALVES):
        return False
    return table_block_size(request.pattern, config.num_heads, config.kv_heads, config.is_causal) >= _FINEST_OF_FLEX


def _suits_fa4(request: Request) -> bool:
    """Whether `fa4` beats the fused kernels: whole blocks at head_dim 128, so many that its launches do not count.

    Where it is asked for the mask of every third block or more it is slower. Bands are no tables to it.
    """
    from ..core.bands import bands_of
    from ..core.blocking import lower_blocks
    from ..core.geometry import Geometry

    config = request.config
    if config.head_dim != 128 or config.is_causal or config.varlen or config.dtype not in _HALVES:
        return False
    if request.needs["layouts"] != ("block",) or not {"context_parallel", "dynamic_tables"}.isdisjoint(request.needs):
        return False
    if config.seq_len is None or config.seq_len < _LONG or bands_of(request.pattern) is not None:
        return False
    # Whether blocks are whole shows in a few rows of them. Those of the middle meet both edges of a window, however
    # long it is; and of the very sequence, since some patterns fit no other. Its end need not be that of a block.
    in_blocks = config.seq_len // _BLOCK_OF_FA4
    geometry = Geometry(
        q_len=8 * _BLOCK_OF_FA4,
        kv_len=in_blocks * _BLOCK_OF_FA4,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        is_causal=False,
        q_offset=in_blocks // 2 * _BLOCK_OF_FA4,
        whole_len=config.seq_len,
    )
    blocks = lower_blocks(request.pattern, geometry, limit_bytes=config.limits.layout_bytes)
    is_whole = not len(blocks.masks) and bool((blocks.weights == 1).all())
    return is_whole and blocks.block_size == _BLOCK_OF_FA4


@hookimpl
def dilated_attention_rank_backends(request: Request, candidates: Sequence[BackendSpec]) -> Sequence[str]:
    """By priority, which of kernels for whole layouts depends on what they would compute.

    `flex` is for blocks that the fused kernels are refused for. A window alone is FlashAttention-3's or -4's, as long
    dense attention is, and long tables of whole blocks are FlashAttention-4's at head_dim 128.
    """
    from ..core.bands import only_window

    priorities, branches = {spec.name: spec.priority for spec in candidates}, _branches(request)
    if request.config.dropout_p and request.config.dtype in _HALVES:
        if not _fuses_drops(request, branches):
            priorities[TRITON.name] = _OUTDONE
    elif _is_long_and_dense(request, branches):
        head_dim = request.config.head_dim
        is_wide = 64 < head_dim <= 96 or head_dim > 128
        is_faster = 32 < head_dim <= 64 or (is_wide and _has_rings(request))  # than cuDNN, or FlashAttention-2
        priorities[TRITON.name] = FA3.priority - 2 if is_faster else _OUTDONE
        if head_dim in (64, 128):  # those that were measured
            priorities[FA4.name] = FA3.priority + (1 if request.config.requires_grad else -1)
    elif not _fuses(request, branches):
        priorities[TRITON.name] = _OUTDONE
    elif 0 < len(branches) < (2 if request.config.head_dim <= 64 else 3) and not request.config.varlen:
        priorities[TRITON.name] = FA3.priority - 2  # whose kernel is the faster one, where calls are long
    elif request.config.dtype in _HALVES and only_window(_bands(request)) is not None:
        priorities[TRITON.name] = FA3.priority - 2
        # Those that were measured; at 64 its forward pass alone is no faster.
        if {64: request.config.requires_grad, 128: True}.get(request.config.head_dim, False):
            priorities[FA4.name] = FA3.priority - 1
    if FA4.name in priorities and _suits_fa4(request):
        priorities[FA4.name] = TRITON.priority + 1
    if FLEX.name in priorities and _suits_flex(request):
        priorities[FLEX.name] = TRITON.priority - 1
    return sorted((spec.name for spec in candidates), key=lambda name: (-priorities[name], name))
