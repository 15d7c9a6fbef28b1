"""The fused kernels over documents under Triton's interpreter on the CPU; `test_backend_triton` runs this file."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import AttentionConfig, Dilated, Full, Global, Local, Pattern, Random
from dilated_attention.backends.fused import launches
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.tiles import Pass, Tile, Tiles, TileSizes
from dilated_attention.core import arranged, reference
from dilated_attention.core.document_ops import attend_documents
from dilated_attention.core.documents import read_documents
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES
from dilated_attention.core.lowering import lower
from dilated_attention.core.ops import intern

from .support import NAMES, error, inputs, with_gradients

NEVER = 1 << 30


def check_documents(
    pattern: Pattern,
    *,
    mask: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    q_len: int = 0,
    is_causal: bool = True,
    factor: float = 1.0,
    bound_from: int = NEVER,
    limit: float = 1e-5,
    tile: int = 16,
) -> None:
    """Out, lse and all gradients, through lse too, in float32 against the oracle; NaN where no document is.

    Rows and columns of a step are `tile`; two heads share a key's where documents are packed, one is there otherwise.
    """
    kv_len = int(bounds[-1]) if mask is None and bounds is not None else (0 if mask is None else mask.shape[1])
    heads = 2 if mask is None else 1
    geometry = Geometry(q_len=q_len or kv_len, kv_len=kv_len, num_heads=heads, num_kv_heads=1, is_causal=is_causal)
    config = AttentionConfig(num_heads=heads, num_kv_heads=1, head_dim=16, pattern=pattern, is_causal=is_causal)
    name = f"interpreted, documents, bounded from {bound_from}, tiles of {tile}"
    fused = FusedKernel(name, TileSizes.alike(Tiles.alike(Tile(tile, tile, 4, 1))), bound_from)
    engine = intern(Engine(config, pattern, fused, takes_layout=True, has_dlse=True, call_axes=frozenset(CALL_AXES)))
    tensors = inputs(geometry, batch=1 if mask is None else len(mask), head_dim=16, dtype=torch.float32)
    tensors = [*(x.detach().mul(factor).requires_grad_() for x in tensors[:2]), tensors[2]]
    if mask is not None:
        for x in tensors:
            x.data[mask[:, kv_len - x.shape[1] :]] = math.nan
    of_call: dict[str, Any] = {"key_padding_mask": mask, "cu_seqlens": bounds}
    query, key, value = tensors
    before = engine.counters()
    out, lse = attend_documents(query, key, value, engine, seed=None, gate=None, recompute=False, **of_call)
    actual = with_gradients(out, lse, tensors, through_lse=True)
    wide = [x.detach().nan_to_num().double().requires_grad_() for x in tensors]
    query, key, value = wide
    out, lse = reference.attention(query, key, value, pattern=pattern, is_causal=is_causal, **of_call)
    expected = with_gradients(out, lse, wide, through_lse=True)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < limit, (name, error(a, e))
    found, documents = engine.counters(), read_documents(mask, bounds, q_len or kv_len, kv_len)
    alone = [attrs.evolve(geometry, q_len=d.q_len, kv_len=d.kv_len, q_offset=d.kv_len - d.q_len) for d in documents]
    tokens = sum(d.q_len for d in documents)
    assert found.forward.tokens - before.forward.tokens == found.backward.tokens - before.backward.tokens == tokens
    flops = 4 * 16 * sum(lower(pattern, own).pairs for own in alone)
    assert found.forward.flops - before.forward.flops == flops
    assert 2 * (found.backward.flops - before.backward.flops) == 5 * flops


def launches_of(part: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What such parts launch from now on."""
    launched: list[str] = []
    run = part.run

    def told(self: object, which: Pass, *args: Any, **by: Any) -> None:
        launched.append(which)
        run(self, which, *args, **by)

    monkeypatch.setattr(part, "run", told)
    return launched


LATER = torch.arange(41) < torch.tensor([[0], [41], [19]])  # padding before the tokens
EARLIER = LATER.flip(1)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # of the largest key, which is then not used
@pytest.mark.parametrize(
    ("pattern", "of_call"),
    [
        (Dilated((8, 32), (1, 2)), {"bounds": torch.tensor([0, 0, 17, 19, 52])}),
        pytest.param(
            Dilated((8, 32), (1, 2)),
            {"bounds": torch.tensor([0, 17, 19, 52]), "is_causal": False, "bound_from": 0},
            marks=pytest.mark.slow,
        ),
        pytest.param(Dilated((7, 12), (2, 3)), {"mask": EARLIER}, marks=pytest.mark.slow),
        pytest.param(Dilated((8, 16, 80), (1, 2, 16)), {"mask": LATER, "is_causal": False}, marks=pytest.mark.slow),
        (Dilated((8, 16), (1, 2)), {"mask": LATER, "q_len": 12}),
        (Full(), {"mask": EARLIER, "q_len": 27, "bound_from": 0}),
        (Dilated((8, 16), (1, 2)), {"mask": LATER, "bound_from": 0}),
    ],
    ids=["packed", "all pairs", "rates that do not divide", "rare", "fewer queries", "full", "bounded"],
)
def test_documents_in_one_launch(pattern: Pattern, of_call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with positions and a pattern of its own, none by itself."""
    launched = launches_of(launches.BranchPart, monkeypatch)
    check_documents(pattern, **of_call)
    assert launched == ["forward", "queries", "keys"]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:overflow encountered in exp2")
@pytest.mark.parametrize(
    "of_call",
    [
        {"bounds": torch.tensor([0, 0, 17, 19, 52])},
        pytest.param({"mask": LATER}, marks=pytest.mark.slow),
        pytest.param({"mask": EARLIER}, marks=pytest.mark.slow),
    ],
    ids=["packed", "padded before", "padded behind"],
)
@pytest.mark.parametrize(
    ("pattern", "tile"),
    [
        (Random(2, 16, seed=3), 16),
        (Local((20, 0)) | Global(3), 32),
        (Dilated((8, 16), (1, 2)) + Random(1, 16), 16),
        pytest.param(Random(1, 16) + Local(9), 16, marks=pytest.mark.slow),
    ],
    ids=["random", "masks", "branches", "weights"],
)
def test_blocks_of_documents_in_one_launch(
    pattern: Pattern, tile: int, of_call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one table, which ends behind them."""
    launched = launches_of(launches.BlockPart, monkeypatch)
    check_documents(pattern, **of_call, factor=3, tile=tile)
    assert launched == ["forward", "queries", "keys"]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:overflow encountered in exp2")
@pytest.mark.parametrize(
    ("pattern", "of_call"),
    [
        pytest.param(
            Local((300, 0)), {"bounds": torch.tensor([0, 0, 258, 259, 290]), "tile": 64}, marks=pytest.mark.slow
        ),
        pytest.param(
            Local((6, 9)) | Global(3), {"bounds": torch.tensor([0, 0, 17, 19, 52]), "tile": 32}, marks=pytest.mark.slow
        ),
        pytest.param(Dilated((8, 16), (1, 2)) + Local(9), {"mask": EARLIER}, marks=pytest.mark.slow),
        (Local(9) + Local((3, 0)), {"mask": LATER, "tile": 32}),
    ],
    ids=["beyond a block", "global", "branches", "weights"],
)
def test_bands_of_documents_whose_queries_see_what_follows(
    pattern: Pattern, of_call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries then end with their document too."""
    launched = launches_of(launches.BlockPart, monkeypatch)
    check_documents(pattern, **of_call, is_causal=False, factor=3)
    assert launched == ["forward", "queries", "keys"]


def test_other_blocks_are_computed_one_length_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose pairs may depend on the length, where attention is not causal."""
    launched = launches_of(launches.BlockPart, monkeypatch)
    check_documents(Random(2, 16, seed=3), bounds=torch.tensor([0, 17, 52]), is_causal=False)
    assert launched == 2 * ["forward"] + 2 * ["queries", "keys"]


@pytest.mark.slow
def test_blocks_that_everyone_sees() -> None:
    """Whose rows begin first."""
    check_documents(Random(1, 16) | Global(16), bounds=torch.tensor([0, 200, 215]))


@pytest.mark.parametrize(
    "pattern", [pytest.param(Local((20, 0)), marks=pytest.mark.slow), Random(2, 16), Dilated((8, 16), (1, 2))], ids=str
)
def test_queries_that_stand_elsewhere_than_their_keys(pattern: Pattern) -> None:
    """Documents as long as their queries are many, behind the first keys: not one table for both."""
    check_documents(pattern, mask=torch.arange(16) < torch.tensor([[8], [6]]), q_len=12)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of pairs that are left out after it
def test_documents_that_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind an end weigh nothing, however large the scores of what they see."""
    monkeypatch.setattr(arranged, "packs", lambda engine, documents, device: False)
    monkeypatch.setattr(arranged, "fills_documents", lambda engine, device: True)
    check_documents(Random(2, 8), bounds=torch.tensor([0, 17, 35]), factor=20, limit=1e-4)
