"""Programs of documents that are computed together: what they are made of, what is kept of them, who gets them."""

from __future__ import annotations

import gc
from typing import Any, ClassVar
from weakref import ref

import attrs
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    Dilated,
    Full,
    Global,
    Learned,
    Limits,
    Local,
    Pattern,
    Random,
)
from dilated_attention.core import arranged, document_programs
from dilated_attention.core.cache import ByteLRU
from dilated_attention.core.document_programs import DocumentPrograms
from dilated_attention.core.documents import Document, Packing
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES, LayoutPiece
from dilated_attention.core.layout import Layout
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch
from dilated_attention.core.program import Program

CPU = torch.device("cpu")
Ints = NDArray[np.int64]


class Packer:
    """A kernel that only prepares, and remembers for what."""

    name = "packer"

    def __init__(self) -> None:
        self.prepared: list[tuple[Layout, Packing, bool]] = []

    def prepare_packing(self, layout: Layout, packing: Packing, device: torch.device, *, deterministic: bool) -> int:
        self.prepared.append((layout, packing, deterministic))
        return 1000

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(self, *given: Any, dlse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def packing_of(*lengths: int) -> Packing:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = tuple(Document(0, at, n, at, n) for at, n in zip(starts, lengths, strict=True))
    return Packing(documents, 1, sum(lengths), sum(lengths))


def config_of(pattern: Pattern, **fields: Any) -> AttentionConfig:
    defaults: dict[str, Any] = {"num_heads": 2, "head_dim": 16, "pattern": pattern, "is_causal": True}
    return AttentionConfig(**defaults | fields)


def make(pattern: Pattern, **fields: Any) -> tuple[DocumentPrograms, ByteLRU[tuple[Any, ...], Program], Packer]:
    programs: ByteLRU[tuple[Any, ...], Program] = ByteLRU(1 << 28)
    kernel = Packer()
    return DocumentPrograms(programs, kernel, pattern, config_of(pattern, **fields)), programs, kernel


@pytest.mark.parametrize(
    ("pattern", "is_causal"),
    [
        (Dilated((8, 16), (1, 2)), True),
        (Full(), True),
        (Random(2, 16), True),
        (Local((20, 0)) + Local((3, 0)), True),
        (Dilated((8, 16), (1, 2)), False),
        (Local((20, 5)) | Global(3), False),
        (Dilated((8, 16), (1, 2)) + Local((20, 5)), False),
    ],
    ids=str,
)
def test_pairs_are_those_of_each_document(pattern: Pattern, is_causal: bool) -> None:
    made, programs, kernel = make(pattern, deterministic=True, is_causal=is_causal)
    program = made.program(packing_of(17, 1, 40, 17), CPU)
    alone = (lower(pattern, Geometry.self_attention(n, 2, is_causal=is_causal)).pairs for n in (17, 1, 40, 17))
    assert program.counted(1, None) == (75, sum(alone))
    assert programs.nbytes >= 1000
    assert kernel.prepared == [(program.layout, packing_of(17, 1, 40, 17), True)]


def test_lengths_that_are_about_the_same_are_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []

    def told(pattern: Pattern, geometry: Geometry, **by: Any) -> Layout:
        lowered.append(geometry.q_len)
        return lower(pattern, geometry, **by)

    monkeypatch.setattr(document_programs, "lower", told)
    made, programs, kernel = make(Random(2, 16))
    for longest in (130, 140, 144, 133):
        made.program(packing_of(20, longest), CPU)
    assert lowered == [144]
    made.program(packing_of(20, 145), CPU)
    assert len(lowered) == 2
    layouts = [layout for layout, _, _ in kernel.prepared]
    assert len(set(map(id, layouts))) == 5  # kernels keep what they make of one for as long as it lives
    assert len({id(layout.blocks) for layout in layouts}) == 2
    assert (programs.counters.misses, programs.counters.entries) == (5, 5)


def test_what_has_no_room_for_more_is_lowered_as_it_is() -> None:
    """2,049 tokens are rounded up to 2,304, of which the blocks take a quarter more."""
    exact = lower(Random(density=0.5, block_size=16), Geometry.self_attention(2049, 2, is_causal=True))
    limits = Limits(layout_bytes=exact.nbytes + 4096)
    made, _, kernel = make(Random(density=0.5, block_size=16), limits=limits)
    made.program(packing_of(2049, 5), CPU)
    assert kernel.prepared[0][0].geometry.q_len == 2049
    with pytest.raises(ConfigError, match="layout_bytes"):
        made.program(packing_of(2304, 5), CPU)


def test_few_are_kept() -> None:
    made, programs, kernel = make(Local((20, 0)))
    first = ref(made.program(packing_of(3, 200), CPU))
    for more in range(document_programs.KEPT - 1):
        made.program(packing_of(4 + more, 200), CPU)
    assert first() is made.program(packing_of(3, 200), CPU)
    assert len(programs) == document_programs.KEPT
    for more in range(document_programs.KEPT):
        made.program(packing_of(100 + more, 200), CPU)
    kernel.prepared.clear()
    gc.collect()
    assert first() is None
    assert len(programs) == document_programs.KEPT
    assert programs.counters.evictions == 0


@attrs.frozen
class Halves(Pattern):
    """Two segments, however long the sequence is."""

    kind: ClassVar[str] = "halves"

    def multiplicity(self, query: Ints, key: Ints, head: Ints, geometry: Geometry) -> Ints:
        half = -(-geometry.seq_len // 2)
        return np.equal(query // half, key // half).astype(np.int64)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...]:
        return (Branch(-(-geometry.seq_len // 2), 1, (0,) * geometry.num_heads),)


@pytest.mark.parametrize(
    ("pattern", "fields", "moved", "expected"),
    [
        (Dilated((8, 16), (1, 2)), {}, 0, True),
        (Dilated((8, 16), (1, 2)), {"is_causal": False}, 2, True),
        (Dilated((8, 16), (1, 2)), {"dropout_p": 0.1}, 0, True),
        (Local((20, 0)), {}, 0, True),
        (Local((20, 0)), {}, 2, False),  # keys elsewhere than their queries
        (Local(20), {"is_causal": False}, 0, True),
        (Local(20), {"is_causal": False}, 2, False),
        (Dilated((8, 16), (1, 2)) + (Local(20) | Global(3)), {"is_causal": False}, 0, True),
        (Random(2, 16), {}, 0, True),
        (Random(2, 16), {"is_causal": False}, 0, False),  # what is drawn depends on the length
        (Halves(), {}, 0, False),
        (Learned(block_size=16, blocks_per_row=2), {}, 0, False),
    ],
)
def test_who_is_computed_together(
    pattern: Pattern, fields: dict[str, Any], moved: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = frozenset(CALL_AXES)
    engine = Engine(config_of(pattern, **fields), pattern, Packer(), takes_layout=True, has_dlse=True, call_axes=axes)
    documents = [Document(0, 0, 5, moved, 5), Document(0, 5, 9, 5 + moved, 9)]
    assert arranged.packs(engine, documents, CPU) is expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not arranged.packs(engine, documents, torch.device("cuda"))
