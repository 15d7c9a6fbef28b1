"""The gradient of lse, handed to dense kernels that take it; to others it goes in more columns."""

from __future__ import annotations

import attrs
import pytest
import torch

from dilated_attention import (
    ConfigError,
    ContextParallel,
    Dilated,
    Full,
    Global,
    Local,
    Pattern,
    Random,
    build_attention,
)
from dilated_attention.backends.sdpa import SdpaBackend
from dilated_attention.core.band_calls import dense_form
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DenseKernel, takes_dlse
from dilated_attention.exchange.shards import Shards

from .dense_math import ExactSquares, ExactThroughLse
from .kernel_kit import check_emulated
from .ring_simulation import worst
from .support import NAMES, error, inputs, oracle, ours

DILATED = Dilated((8, 16, 48), (1, 2, 3))
SOME: list[Pattern] = [
    Full(),
    DILATED,
    DILATED + DILATED,
    Local((7, 2)),
    Local((500, 0)),
    Local((8, 8)) | Global(5),
    DILATED + Local((6, 3)),
    DILATED + Random(1, 8, seed=3),
    Random(2, 8, seed=3),
]


class OneLength(ExactThroughLse):
    """One that leaves other lengths to another kernel."""

    def __init__(self, other_lengths: DenseKernel) -> None:
        super().__init__()
        self.other_lengths = other_lengths


def test_only_kernels_that_say_so_are_handed_it() -> None:
    assert takes_dlse(ExactThroughLse())
    assert not takes_dlse(ExactSquares())
    assert takes_dlse(OneLength(ExactThroughLse()))
    assert not takes_dlse(OneLength(ExactSquares()))  # calls of other lengths would be handed it


@pytest.mark.parametrize(("kernel", "has_dlse"), [(ExactThroughLse(), True), (ExactSquares(), False)])
def test_a_build_asks_the_kernel_where_more_columns_are_refused(
    kernel: ExactSquares, has_dlse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SdpaBackend, "build", lambda *_: kernel)
    attention = build_attention(num_heads=1, head_dim=256, backend="sdpa")
    assert attention._engine.has_dlse is has_dlse
    # Of a kernel for whole layouts and its companion for the rows of other ranks both have to.
    one = ContextParallel(size=1)
    attention = build_attention(num_heads=1, head_dim=256, backend="reference", context_parallel=one, device="cpu")
    assert attention._engine.has_dlse is has_dlse


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", SOME, ids=str)
def test_it_comes_home(pattern: Pattern, is_causal: bool) -> None:
    for q_len, kv_len in ((48, 48), (67, 67), (21, 67)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=2, is_causal=is_causal)
        check_emulated(ExactThroughLse(), geometry, pattern, head_dim=8)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", SOME, ids=str)
def test_it_comes_home_on_ranks(pattern: Pattern, is_causal: bool) -> None:
    shards = Shards(48, 3, 4, 2, is_causal)
    for hops in (False, True):
        assert worst(pattern, shards, batch=2, through_lse=True, dense=ExactThroughLse(), hops=hops) < 1e-12


@pytest.mark.parametrize("scale", [0.4, -0.4])
def test_both_ways_are_the_same(scale: float) -> None:
    geometry = Geometry.self_attention(61, 2)
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=torch.float64)
    query, key, value = (x.detach() for x in tensors)
    found = dense_form(Local((7, 3)) + Full(), geometry, windows=False)
    assert found is not None
    widening = Composer(ExactSquares(), scale, False)
    taking = attrs.evolve(widening, kernel=ExactThroughLse())
    out, lse = widening.forward(query, key, value, found.schedule)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given = (query, key, value, out, lse, found.schedule)
    taken, widened = (each.backward_through_lse(dout, dlse, *given) for each in (taking, widening))
    for a, e in zip(taken, widened, strict=True):
        assert error(a, e) < 1e-12
    assert error(widening.backward(dout, *given)[0], widened[0]) > 1e-2


def test_tables_of_blocks_need_no_more_columns() -> None:
    geometry, fields = Geometry.self_attention(40, 2), {"num_heads": 2, "head_dim": 256, "backend": "sdpa"}
    tensors = inputs(geometry, batch=1, head_dim=256, dtype=torch.float32)
    blocks, *dense = (build_attention(pattern=pattern, **fields) for pattern in (Random(1, 16), Full(), Local(9)))  # type: ignore[arg-type]
    expected = oracle(Random(1, 16), tensors, geometry, through_lse=True)
    for name, a, e in zip(NAMES, ours(blocks, tensors, geometry, through_lse=True), expected, strict=True):
        assert error(a, e) < 1e-5, name
    for attention in dense:
        with pytest.raises(ConfigError, match="cannot carry a gradient through lse at head_dim=256"):
            ours(attention, tensors, geometry, through_lse=True)
