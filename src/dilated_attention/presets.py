"""Well-known sparse attentions, composed from the pattern algebra."""

from __future__ import annotations

from .core.checks import require_int
from .core.errors import ConfigError
from .core.pattern import Union
from .patterns.global_tokens import Global
from .patterns.local import Local
from .patterns.random import Random

__all__ = ["bigbird", "longformer"]


def longformer(*, window_size: int = 512, global_tokens: int = 1) -> Union:
    """Longformer (arXiv 2004.05150): a window around each position, and global tokens at the start.

    Args:
        window_size: keys in the window besides the query's own, half of them on each side; even.
        global_tokens: positions that see all and are seen by all.
    """
    if require_int("window_size", window_size, minimum=2) % 2:
        raise ConfigError(f"window_size must be even, half on each side; got {window_size}")
    return Local(window_size // 2) | Global(global_tokens)


def bigbird(
    *,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
) -> Union:
    """BigBird (arXiv 2007.14062), ITC: a window, global tokens at the start, and random blocks, all sized in blocks.

    The window slides by tokens instead of by blocks: a query sees window_blocks // 2 blocks' worth on each side.

    Args:
        block_size: positions in a block.
        window_blocks: width of the window in blocks; odd.
        global_blocks: blocks at the start that see all and are seen by all.
        random_blocks: blocks drawn for each row of blocks and head, besides its own.
        seed: of the draw.
    """
    if not require_int("window_blocks", window_blocks, minimum=1) % 2:
        raise ConfigError(f"window_blocks must be odd, its middle is the query's own block; got {window_blocks}")
    require_int("block_size", block_size, minimum=1)
    require_int("global_blocks", global_blocks, minimum=1)
    require_int("random_blocks", random_blocks, minimum=1)
    window = Local(block_size * (window_blocks // 2))
    return window | Global(block_size * global_blocks) | Random(random_blocks + 1, block_size, seed)
