"""Times each pass of the fused kernels alone, with other tiles beside those that are chosen.

python -m benchmarks.tiles longnet-128k 'random-128k-*'
python -m benchmarks.tiles longnet-128k --pass keys --tile ring:64,4,232,parts=1 --tile 64,32,4,3,registers=168,split

A tile is ROWS,COLUMNS,WARPS,STAGES, or ring:COLUMNS,STAGES,REGISTERS of the kernels for Hopper, with 64 rows a part
(with ",adds" for --pass gradients, all of them in one launch).
Cases are those of `bench`. All tiles are compiled first, in processes of their own; then each is compared with the
kernels in Triton, and all take turns as CUDA graphs. The kernels for Hopper need a card of compute capability 9.0; with
TRITON_OVERRIDE_ARCH=sm80 such a card runs what an older one would.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from statistics import quantiles
from typing import Final

import attrs
import torch
from torch import Tensor

from dilated_attention.backends.cards import OLDEST, compiled_for
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.launches import BOUND_FROM
from dilated_attention.backends.fused.tiles import PASSES, Pass, Tile, Tiles, TileSizes
from dilated_attention.bench.cases import BenchCase, named_cases
from dilated_attention.bench.graphs import capture
from dilated_attention.bench.timing import Call, difference, in_turns
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower
from dilated_attention.registry.device import describe_device
from dilated_attention.registry.specs import compute_capability

_BOUND: Final = 1e-2  # of 16-bit results of the same sums


def parsed_tile(text: str) -> Tile:
    """A tile as it is written on the command line.

    Raises:
        ConfigError: what is none.
    """
    kind, _, rest = text.rpartition(":")
    words = rest.split(",")
    numbers = [int(word) for word in words if word.isdecimal()]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    split, adds, apart = "split" in words, "adds" in words and bool(kind), words[3:] == ["apart"] and bool(kind)
    known = {"parts"} if kind else {"registers"}
    wrong = len(numbers) != (3 if kind else 4) or kind not in ("", "ring") or not named.keys() <= known
    if (
        wrong
        or len(numbers) + len(named) + split + adds + apart != len(words)
        or not all(x.isdecimal() for x in named.values())
    ):
        raise ConfigError(
            f"{text!r} is no tile; write ROWS,COLUMNS,WARPS,STAGES[,registers=N][,split] or "
            "ring:COLUMNS,STAGES,REGISTERS[,parts=N][,split][,adds] or ring:COLUMNS,STAGES,REGISTERS,apart"
        )
    if apart:
        return Tile.by_ring_apart(*numbers)
    if kind:
        return Tile.by_ring(*numbers, parts=int(named.get("parts", 2)), split=split, adds=adds)
    rows, columns, warps, stages = numbers
    return Tile(rows, columns, warps, stages, int(named["registers"]) if named else None, split)


def _arch() -> str:
    """What Triton compiles for here."""
    return compiled_for(describe_device("cuda").arch)


@attrs.frozen(eq=False)
class Passes:
    """The tensors of a case, and its passes with any tiles."""

    case: BenchCase
    inputs: list[Tensor]
    piece: LayoutPiece
    plain: TileSizes

    @classmethod
    def of(cls, case: BenchCase) -> Passes:
        """With random tensors on the card."""
        layout = lower(case.pattern, case.geometry)
        if bool(layout.branches) == (layout.blocks is not None):
            raise ConfigError(f"{case.name} has branches and blocks; take a case with one of them")
        dtype: torch.dtype = getattr(torch, case.dtype)
        plain = TileSizes.of(case.head_dim, dtype, is_causal=case.is_causal)
        return cls(case, case.inputs("cuda"), LayoutPiece(layout=layout, scale=case.head_dim**-0.5), plain)

    @cached_property
    def row_sums(self) -> Tensor:
        """What the backward passes take of a forward pass by the kernels in Triton."""
        out, lse = self.expected("forward")
        return FusedKernel("plain", self.plain).row_sums(self.inputs[3], out, lse, None)

    def expected(self, which: Pass) -> tuple[Tensor, ...]:
        """A pass by the kernels in Triton."""
        query, key, value, dout = self.inputs
        plain = FusedKernel("plain", self.plain)
        if which == "forward":
            return plain.forward(query, key, value, self.piece)
        given = dout, query, key, value, self.row_sums, self.piece
        of_queries = () if which == "keys" else (plain.gradients_of_queries(*given),)
        return of_queries if which == "queries" else (*of_queries, *plain.gradients_of_keys(*given))

    def tiles(self, sizes: TileSizes) -> Tiles:
        """Those of this layout."""
        blocks = self.piece.layout.blocks
        return sizes.branches if blocks is None else sizes.within(blocks.block_size)

    def chosen(self) -> Tiles:
        """Those that the backend takes."""
        case, dtype = self.case, self.inputs[0].dtype
        of_card = TileSizes.chosen(_arch(), case.head_dim, dtype, is_causal=case.is_causal, version=version("triton"))
        return self.tiles(of_card)

    def call(self, which: Pass, tile: Tile) -> Call:
        """One pass with that tile.

        Raises:
            ConfigError: a tile that the pass has no kernel for.
        """
        tiles = attrs.evolve(self.tiles(self.plain), **{which: tile})
        kernel = FusedKernel("timed", TileSizes.alike(tiles), BOUND_FROM)
        query, key, value, dout = self.inputs
        if which == "forward":
            return lambda: kernel.forward(query, key, value, self.piece)
        sums = self.row_sums
        if which == "queries":
            return lambda: (kernel.gradients_of_queries(dout, query, key, value, sums, self.piece),)
        if which == "keys":
            return lambda: kernel.gradients_of_keys(dout, query, key, value, sums, self.piece)
        return lambda: kernel.gradients(dout, query, key, value, sums, self.piece)

    def candidates(self, which: Pass, more: Sequence[Tile]) -> list[Tile]:
        """The tile in Triton, the chosen one, and others."""
        known = [tiles.of(which) for tiles in (self.tiles(self.plain), self.chosen()) if which in tiles.passes]
        listed = [*known, *more]
        return [tile for number, tile in enumerate(listed) if tile not in listed[:number]]


def rows_of(passes: Passes, which: Pass, tiles: Sequence[Tile], rounds: int) -> Iterator[str]:
    """A line for each tile: its time, quartiles, how far it is from Triton's, and whether it is the chosen one."""
    calls: dict[Tile, Call] = {}
    kept: list[Call] = []  # a graph reads the tables of the kernel that it was captured of
    off: dict[Tile, float] = {}
    expected = passes.expected(which)
    chosen = passes.chosen()
    for tile in tiles:
        call = passes.call(which, tile)
        found = call()
        assert isinstance(found, tuple)
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.dim() == 4]
        off[tile] = max(difference(a, b) for a, b in pairs)
        if off[tile] < _BOUND:
            calls[tile], _ = capture(call)
            kept.append(call)
    times = in_turns(calls, rounds, "cuda", warm_up=2)
    for tile in tiles:
        mark = " chosen" if which in chosen.passes and tile == chosen.of(which) else ""
        if tile in times:
            low, middle, high = quantiles(times[tile], n=4)
            told = f"{middle:8.3f} ms  {low:.3f} to {high:.3f}  off {off[tile]:.0e}"
        else:
            told = f"wrong: off by {off[tile]:.0e}, allowed are {_BOUND:.0e}"
        yield f"{passes.case.name:22} {which:8} {told}  {tile}{mark}"


def compile_ahead(arguments: Sequence[str], processes: int) -> None:
    """Compile everything into Triton's cache, each process its share."""
    command = [sys.executable, "-m", "benchmarks.tiles", *arguments, "--processes", str(processes)]
    started = [subprocess.Popen([*command, "--share", str(share)]) for share in range(processes)]
    for process in started:
        process.wait()


def measure(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Print a line for each tile, or compile a share of them.

    Raises:
        ConfigError: a case, tile or machine that will not do.
    """
    cases, more = named_cases(args.cases, "cuda"), [parsed_tile(text) for text in args.tile]
    if any(tile.parts == 1 for tile in more) and args.passes != ["keys"]:
        raise ConfigError("a ring with 1 part, or apart, serves gradients of keys alone; add --pass keys")
    if any(tile.adds for tile in more) and args.passes != ["gradients"]:
        raise ConfigError("a tile that adds serves gradients in one launch alone; add --pass gradients")
    if not torch.cuda.is_available() or compute_capability(_arch()) < OLDEST:
        raise ConfigError("it needs a CUDA card of compute capability 8.0 or newer, 9.0 (H100, H200) for rings")
    if args.share is None and args.processes > 1:
        compile_ahead(given, args.processes)
    number = 0
    for case in cases:
        passes = Passes.of(case)
        for which in args.passes or passes.chosen().passes:
            tiles = passes.candidates(which, more)
            if args.share is None:
                print("\n".join(rows_of(passes, which, tiles, args.rounds)), flush=True)
                continue
            for tile in tiles:
                if number % args.processes == args.share:
                    passes.call(which, tile)()
                number += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or compile a share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help="cases of bench; * stands for any letters")
    parser.add_argument("--pass", dest="passes", action="append", choices=PASSES, help="repeatable; default: all")
    parser.add_argument("--tile", action="append", default=[], help="repeatable")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    try:
        measure(args, given)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
