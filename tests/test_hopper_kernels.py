"""The kernels in Gluon: they compile for Hopper without losing their overlap, and compute what those in Triton do."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import ConfigError, Dilated, Full, Global, Local, Pattern, Random, Strided
from dilated_attention.backends.cards import GLUON_RELEASES
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.launches import OF_BLOCKS, OF_BRANCHES, in_lines
from dilated_attention.backends.fused.tiles import Pass, Tile, TileSizes, can_be_fed
from dilated_attention.core.documents import Document, Packing
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower

ROOT = Path(__file__).parents[1]
LONGNET = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
RAGGED = Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 2))
RARE = Dilated(segment_lengths=(64, 128, 2048), dilation_rates=(1, 2, 64))  # a branch over everything, row by row
WIDTHS = (48, 64, 96, 128, 192, 256)
NEVER = 1 << 30
ALWAYS = 0

SIZES = [(torch.bfloat16, 64), (torch.float16, 48), (torch.bfloat16, 96), (torch.bfloat16, 104), (torch.float16, 192),
         (torch.bfloat16, 256)]  # fmt: skip
PADDED = [(torch.bfloat16, 40), (torch.float16, 80), (torch.bfloat16, 136), (torch.float16, 200)]

on_the_card = pytest.mark.skipif(
    not can_be_fed(64, torch.bfloat16, version("triton")), reason="not tested with this release of Triton"
)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "release", "expected"),
    [
        (64, torch.bfloat16, "3.6.0", True),
        (48, torch.float16, "3.6.1", True),
        (128, torch.bfloat16, "3.6.0", True),
        (32, torch.bfloat16, "3.6.0", False),
        (256, torch.bfloat16, "3.6.0", True),
        (256, torch.bfloat16, "3.7.0", True),
        (136, torch.float16, "3.9.0", True),
        (264, torch.float16, "3.9.0", False),
        (256, torch.float32, "3.6.0", False),
        (64, torch.float32, "3.6.0", False),
        (64, torch.bfloat16, "3.5.1", False),
        (64, torch.bfloat16, "3.10.0", False),
        (64, torch.bfloat16, "3.7.1+git1a2b3c4d", True),
        (64, torch.bfloat16, "3.60.0", False),
    ],
)
def test_they_serve_what_they_passed_their_tests_for(
    head_dim: int, dtype: torch.dtype, release: str, expected: bool
) -> None:
    assert can_be_fed(head_dim, dtype, release) is expected


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_that_their_rows_do_not_divide_are_never_theirs(head_dim: int, is_causal: bool) -> None:
    fed = TileSizes.of(head_dim, torch.bfloat16, is_causal=is_causal, fed=True)
    unfed = TileSizes.of(head_dim, torch.bfloat16, is_causal=is_causal)
    for block in (16, 32, 64):
        assert fed.within(block) == unfed.within(block)
    for sizes, block in ((fed, 64), (unfed, 64)):  # no 128 rows cut to 64, of which 8 warps would have few each
        few = (Tile(64, 64, 4, 3, 128), Tile(64, 32, 4, 3, 168)) if head_dim <= 128 else (Tile(64, 32, 4, 2),)
        assert sizes.within(block).forward in few
    for block in (128, 256):
        assert fed.within(block).forward.parts == 2
        assert fed.within(block).keys.parts == (1 if head_dim > 128 else 2)


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_their_registers_fit_on_a_multiprocessor(head_dim: int, is_causal: bool) -> None:
    """65,536, in portions of 8 for each thread."""
    sizes = TileSizes.of(head_dim, torch.bfloat16, is_causal=is_causal, fed=True)
    chosen = [tiles.of(which) for tiles in (sizes.branches, sizes.blocks) for which in tiles.passes]
    fed = [tile for tile in chosen if tile.parts]
    assert len(fed) >= 4
    for tile in fed:
        adding, parts = tile.adding if tile.adds else 0, tile.parts + tile.apart
        registers, threads = tile.registers or 0, 128 * (parts + 1 + tile.adds)
        assert registers % 8 == tile.begin % 8 == tile.feeding % 8 == adding % 8 == 0
        assert 24 <= tile.feeding < tile.begin < registers
        assert adding == 0 or adding >= 64
        assert threads * tile.begin == 128 * (parts * registers + tile.feeding + adding)
        assert threads * tile.begin * (1 if tile.begin == 168 or tile.adds else 2) <= 65536


@pytest.mark.parametrize("pattern", [LONGNET, Random(density=0.3, block_size=128)], ids=str)
@pytest.mark.parametrize("which", ["forward", "queries"])
def test_a_single_part_serves_gradients_of_keys_alone(pattern: Pattern, which: Pass) -> None:
    """A launch of another would wait for ever."""
    plain = TileSizes.of(64, torch.bfloat16, is_causal=True).branches
    tiles = TileSizes.alike(attrs.evolve(plain, **{which: Tile.by_ring(64, 4, 232, parts=1)}))
    layout = lower(pattern, Geometry.self_attention(256, 2, is_causal=True))
    with pytest.raises(ConfigError, match="1 part serves gradients_of_keys alone"):
        FusedKernel("refused", tiles).parts(layout, torch.device("cpu"))


@pytest.mark.parametrize("pattern", [LONGNET, Random(density=0.3, block_size=128)], ids=str)
@pytest.mark.parametrize("which", ["forward", "queries"])
def test_dk_and_dv_apart_serve_gradients_of_keys_alone(pattern: Pattern, which: Pass) -> None:
    plain = TileSizes.of(64, torch.bfloat16, is_causal=True).branches
    tiles = TileSizes.alike(attrs.evolve(plain, **{which: Tile.by_ring_apart(64, 2, 232)}))
    layout = lower(pattern, Geometry.self_attention(256, 2, is_causal=True))
    with pytest.raises(ConfigError, match="dk and dv apart serves gradients of keys alone"):
        FusedKernel("refused", tiles).parts(layout, torch.device("cpu"))


@pytest.mark.parametrize("pattern", [LONGNET, Random(density=0.3, block_size=128)], ids=str)
@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
def test_a_ring_of_one_stage_is_refused(pattern: Pattern, which: Pass) -> None:
    """A part may hold the tiles of one step while it waits for another."""
    plain = TileSizes.of(128, torch.bfloat16, is_causal=True).branches
    tiles = TileSizes.alike(attrs.evolve(plain, **{which: Tile.by_ring(32, 1, 232)}))
    layout = lower(pattern, Geometry.self_attention(256, 2, is_causal=True))
    with pytest.raises(ConfigError, match=r"a ring needs 2 stages at least, not 1: \w+ may hold"):
        FusedKernel("refused", tiles).parts(layout, torch.device("cpu"))


@pytest.mark.parametrize("pattern", [LONGNET, Random(density=0.3, block_size=128)], ids=str)
@pytest.mark.parametrize(("which", "adds"), [("forward", True), ("keys", True), ("gradients", False)])
def test_only_gradients_in_one_launch_have_warps_that_add(pattern: Pattern, which: Pass, adds: bool) -> None:
    plain = TileSizes.of(64, torch.bfloat16, is_causal=True).branches
    tiles = TileSizes.alike(attrs.evolve(plain, **{which: Tile.by_ring(64, 4, 208, adds=adds)}))
    layout = lower(pattern, Geometry.self_attention(256, 2, is_causal=True))
    with pytest.raises(ConfigError, match="a tile that adds serves gradients in one launch"):
        FusedKernel("refused", tiles).parts(layout, torch.device("cpu"))


def test_rows_that_do_not_begin_at_multiples_of_16_bytes_are_copied() -> None:
    x = torch.randn(2, 6, 3, 24).half()
    for same in (x, x[:, 1:], x[:, :, 1:], x[..., 8:], x.transpose(1, 2)):
        assert in_lines(same) is same
    apart = torch.randn(2, 6, 3, 20).half()
    for other in (x[..., 1:17], apart[..., :16], x.flatten()[1:-15].view(1, -1, 2, 8)):
        copy = in_lines(other)
        assert copy.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in copy.stride()[:3])
        assert torch.equal(copy, other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", GLUON_RELEASES)
def test_they_compile_for_hopper_and_keep_their_overlap(release: str, tmp_path: Path) -> None:
    """With every Triton that they serve, installed for it alone."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", f"triton=={release}.*"], check=True)
    tiles: list[dict[str, Any]] = []
    for width, is_causal in itertools.product(WIDTHS, (True, False)):
        sizes = TileSizes.of(width, torch.bfloat16, is_causal=is_causal, fed=True)
        for kernels, chosen in ((OF_BRANCHES, sizes.branches), (OF_BLOCKS, sizes.blocks)):
            for which in chosen.passes:
                (module, name), tile = kernels[which], chosen.of(which)
                if tile.parts:
                    adding = tile.adding if tile.adds else 0
                    registers = {"begin": tile.begin, "feeding": tile.feeding, "adding": adding}
                    named = {"module": f"hopper_{module}", "kernel": name, "width": width}
                    tiles.append(attrs.asdict(tile) | registers | named)
    tiles = [tile for number, tile in enumerate(tiles) if tile not in tiles[:number]]
    command = [str(python), str(ROOT / "tests/compile_hopper.py"), str(ROOT / "backends/fused"), json.dumps(tiles)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    of_rows = ("attend_blocks", "block_gradients_of_queries")
    asked_for = [tile for tile in tiles for _ in range(4 if tile["kernel"] in of_rows else 3)]
    assert len(lines) == 130
    for line, asked in zip(lines, asked_for, strict=True):
        *_, spilled, shared, overlap = line.split()
        # What merges rows of 256 columns with those that are there, as rings do, keeps both for once.
        merges = asked["width"] > 192 and asked["kernel"] in of_rows
        programs = 2 if asked["begin"] == 80 and not asked["adds"] else 1  # a multiprocessor keeps 1 KiB for each
        most = 1280 if merges else 704 if release == "3.9" else 640  # whose ptxas is told to spill, see the log
        assert overlap == "overlaps", line
        assert int(spilled) <= most, line
        assert int(shared) <= 228 * 1024 // programs - 1024, line


def draw(dtype: torch.dtype, *shape: int, shift: int = 0) -> torch.Tensor:
    """Strided rows, whose first lies that many elements after a multiple of 16 bytes."""
    batch, length, heads, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(length + heads)
    packed = torch.randn((batch, length, heads, 2 * head_dim + shift), generator=generator, device="cuda").to(dtype)
    return packed[..., head_dim + shift :]


def within(packing: Packing, length: int, start: int, count: int) -> torch.Tensor:
    """(B, length) bool, where documents are; `start` and `count` are columns of `Packing.places`."""
    found = torch.zeros((packing.batch, length), dtype=torch.bool, device="cuda")
    for place in packing.places:
        found[place[0], place[start] : place[start] + place[count]] = True
    return found


def compare(
    pattern: Pattern,
    geometry: Geometry,
    dtype: torch.dtype,
    head_dim: int,
    *,
    bound_from: int = NEVER,
    factor: float = 1.0,
    shift: int = 0,
    times: float = 1.1,
    deterministic: bool = False,
    packing: Packing | None = None,
) -> None:
    """Out, lse and gradients, against float32: as near as the kernels in Triton are, but for that factor.

    With a packing whatever belongs to none of its documents is NaN.
    """
    layout = lower(pattern, geometry)
    q_len, kv_len = geometry.q_len, geometry.kv_len
    if packing is not None:
        q_len, kv_len = packing.q_len, packing.kv_len
    rows, keys = (2, q_len, geometry.num_heads), (2, kv_len, geometry.num_kv_heads)
    dout, key, value = torch.randn((*rows, head_dim), device="cuda").to(dtype), *(
        draw(dtype, *keys, head_dim, shift=n * shift) for n in (1, 3)
    )  # fmt: skip
    query = draw(dtype, *rows, head_dim, shift=shift) * factor
    if packing is not None:
        for x, at in ((query, (1, 2)), (dout, (1, 2)), (key, (3, 4)), (value, (3, 4))):
            x[~within(packing, x.shape[1], *at)] = torch.nan
    piece = LayoutPiece(layout=layout, scale=head_dim**-0.5, deterministic=deterministic, packing=packing)
    fed = TileSizes.of(head_dim, dtype, is_causal=geometry.is_causal, fed=True)
    assert layout.blocks is None or fed.within(layout.blocks.block_size).forward.parts
    exact = TileSizes.of(head_dim, torch.float32, is_causal=geometry.is_causal)

    def run(sizes: TileSizes, to: torch.dtype) -> dict[str, torch.Tensor]:
        g, q, k, v = (x.to(to) for x in (dout, query, key, value))
        kernel = FusedKernel("compared", sizes, bound_from)
        out, lse = kernel.forward(q, k, v, piece)
        dlse = torch.cos(lse).where(torch.isfinite(lse), 0)
        grads = kernel.backward(g, q, k, v, out, lse, piece, dlse=dlse)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))

    assert fed.unfed is not None
    found, in_triton, expected = run(fed, dtype), run(fed.unfed, dtype), run(exact, torch.float32)
    for name, want in expected.items():
        assert torch.equal(torch.isfinite(found[name]), torch.isfinite(want)), name
        mine, theirs = ((x[name].float() - want).nan_to_num(0, 0, 0).norm() for x in (found, in_triton))
        assert mine <= times * theirs + 1e-6 * want.nan_to_num(0, 0, 0).norm(), (name, float(mine), float(theirs))


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [LONGNET, RAGGED, RARE, Full(), Strided(3)], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), SIZES + PADDED)
def test_branches(dtype: torch.dtype, head_dim: int, pattern: Pattern, is_causal: bool) -> None:
    """Also of rows and keys that meet none."""
    geometry = Geometry(
        q_len=700, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=is_causal, q_offset=90, kv_offset=7
    )
    compare(pattern, geometry, dtype, head_dim)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [LONGNET, RAGGED, RARE, Full()], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), SIZES)
def test_documents(dtype: torch.dtype, head_dim: int, pattern: Pattern, is_causal: bool, deterministic: bool) -> None:
    """In rows that they do not fill, some with more keys than queries."""
    documents = (Document(0, 0, 1, 3, 1), Document(0, 5, 300, 9, 300), Document(0, 320, 140, 330, 500),
                 Document(1, 20, 901, 40, 950))  # fmt: skip
    packing = Packing(documents, 2, 1000, 1000)
    geometry = Geometry(q_len=1000, kv_len=1000, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    compare(pattern, geometry, dtype, head_dim, packing=packing, deterministic=deterministic)
    compare(pattern, geometry, dtype, head_dim, packing=packing, deterministic=deterministic, bound_from=ALWAYS)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [Random(density=0.3, block_size=128), Random(density=0.3, block_size=256), Local((300, 0)) | Global(3),
     LONGNET + Local((100, 0)), Local((300, 0)) + Local((500, 0))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("dtype", "head_dim"), SIZES)
def test_blocks_of_documents(
    dtype: torch.dtype, head_dim: int, is_causal: bool, pattern: Pattern, deterministic: bool
) -> None:
    """Which end within blocks, at their ends, and before the table does."""
    documents = (Document(0, 0, 1, 0, 1), Document(0, 5, 300, 5, 300), Document(0, 320, 640, 320, 640),
                 Document(1, 20, 965, 20, 965))  # fmt: skip
    packing = Packing(documents, 2, 1000, 1000)
    geometry = Geometry(q_len=1100, kv_len=1100, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    compare(pattern, geometry, dtype, head_dim, packing=packing, deterministic=deterministic)
    compare(pattern, geometry, dtype, head_dim, packing=packing, deterministic=deterministic, bound_from=ALWAYS)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [Random(density=0.3, block_size=128), Random(density=0.3, block_size=256), Local(100) | Global(3)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads"),
    [*((*size, 2) for size in SIZES + PADDED), (torch.float16, 128, 4)],
)
def test_blocks(dtype: torch.dtype, head_dim: int, kv_heads: int, pattern: Pattern, is_causal: bool) -> None:
    """With blocks that reach past the ends, masks, and pairs that count twice."""
    geometry = Geometry(q_len=1000, kv_len=1000, num_heads=4, num_kv_heads=kv_heads, is_causal=is_causal)
    compare(pattern, geometry, dtype, head_dim)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("pattern", [LONGNET, Local(100) | Global(3), LONGNET | Global(3)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_with_the_same_bits_on_every_run(pattern: Pattern, is_causal: bool) -> None:
    """Where they are asked for: in two launches, which add nothing atomically."""
    geometry = Geometry(q_len=1000, kv_len=1000, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    compare(pattern, geometry, torch.bfloat16, 64, deterministic=True)
    compare(pattern, geometry, torch.bfloat16, 64)
    query, dout = (draw(torch.bfloat16, 2, 1000, 4, 64) for _ in range(2))
    key, value = (draw(torch.bfloat16, 2, 1000, 2, 64) for _ in range(2))
    kernel = FusedKernel("same", TileSizes.of(64, torch.bfloat16, is_causal=is_causal, fed=True))
    piece = LayoutPiece(layout=lower(pattern, geometry), scale=0.1, deterministic=True)
    out, lse = kernel.forward(query, key, value, piece)
    first, *others = (kernel.backward(dout, query, key, value, out, lse, piece) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize("pattern", [LONGNET, Local(100) | Global(3)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_scores_with_and_without_a_bound(head_dim: int, pattern: Pattern, factor: float) -> None:
    """Large queries have none, and take the running maximum, beside others that have.

    With that the largest weight of a row is 1, which bfloat16 has without rounding; with a bound it is not.
    """
    geometry = Geometry(q_len=1000, kv_len=1000, num_heads=4, num_kv_heads=2, is_causal=True)
    compare(pattern, geometry, torch.bfloat16, head_dim, bound_from=ALWAYS, factor=factor, times=1.25)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("pattern", [LONGNET, Local(100) | Global(3)], ids=str)
@pytest.mark.parametrize("head_dim", [56, 64, 88])
def test_rows_that_begin_anywhere(head_dim: int, pattern: Pattern) -> None:
    """Not only at multiples of 16 bytes, which is what their copies take."""
    geometry = Geometry(q_len=300, kv_len=300, num_heads=4, num_kv_heads=2, is_causal=True)
    compare(pattern, geometry, torch.float16, head_dim, shift=1)


@pytest.mark.gpu
@on_the_card
@pytest.mark.parametrize("head_dim", [56, 96, 128, 200])
def test_blocks_are_added_to_what_is_there(head_dim: int) -> None:
    """As rings do: out and lse merged, dq summed; a row of blocks without any keeps what it has."""
    geometry = Geometry(q_len=700, kv_len=700, num_heads=4, num_kv_heads=2, is_causal=True)
    layout = lower(Local((200, 0)) | Global(3), geometry)
    later = Geometry(q_len=700, kv_len=700, num_heads=4, num_kv_heads=2, is_causal=True, kv_offset=300)
    empty = lower(Local((200, 0)) | Global(3), later)
    assert empty.blocks is not None
    assert (empty.blocks.row_ptr[:, 1:] == empty.blocks.row_ptr[:, :-1]).any()
    sizes = TileSizes.of(head_dim, torch.bfloat16, is_causal=True, fed=True)
    assert sizes.unfed is not None
    rows, keys = (1, 700, 4, head_dim), (1, 700, 2, head_dim)
    query, dout = draw(torch.bfloat16, *rows), draw(torch.bfloat16, *rows)
    key, value = draw(torch.bfloat16, *keys), draw(torch.bfloat16, *keys)
    found: list[tuple[torch.Tensor, ...]] = []
    for tiles in (sizes, sizes.unfed):
        kernel = FusedKernel("compared", tiles)
        out, lse = kernel.forward(query, key, value, LayoutPiece(layout=layout, scale=0.1))
        dq = dout.float().contiguous()
        for added in (layout, empty):
            piece = LayoutPiece(layout=added, scale=0.1)
            kernel.merge(out, lse, query, key, value, piece)
            sums = kernel.row_sums(dout, out, lse, None)
            kernel.gradients_of_queries(dout, query, key, value, sums, piece, dq)
        found.append((out, lse, dq))
    for name, mine, theirs in zip(("out", "lse", "dq"), *found, strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < (1e-5 if name == "lse" else 5e-3), (name, float(error))
