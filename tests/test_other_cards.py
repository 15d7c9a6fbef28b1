"""The fused kernels on cards that are no Hopper: who may run them, what they are compiled for, what they compute."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import ConfigError, Dilated, Full, Learned, Local, Random
from dilated_attention.backends import manifest
from dilated_attention.backends.cards import shared_kib
from dilated_attention.backends.fused.backend import TritonBackend
from dilated_attention.backends.fused.launches import OF_BLOCKS, OF_BRANCHES
from dilated_attention.backends.fused.tiles import Pass, Tile, Tiles, TileSizes, padded

from .kernel_kit import H100, codes, request, verdict

LONGNET = Dilated(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))
BLOCKS = Random(density=0.1, block_size=128)
ALLOWED: dict[str, Any] = {"backend_options": {"triton": {"unproven_card": True}}}


def card(arch: str) -> Any:
    """A card by its architecture."""
    return attrs.evolve(H100, arch=arch, name=arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_they_are_refused_there_until_the_user_allows_it(arch: str) -> None:
    refused = verdict("triton", card(arch), pattern=LONGNET)
    assert codes(refused) == {"arch"}
    (refusal,) = refused.refusals
    assert refusal.required == arch
    assert "conformance triton --device cuda --option unproven_card=true" in refusal.remedy
    assert "backend_options={'triton': {'unproven_card': True}}" in refusal.remedy
    allowed = verdict("triton", card(arch), pattern=LONGNET, **ALLOWED)
    assert allowed.accepts
    assert allowed.kernel.startswith("fused (triton ")  # not the kernels in Gluon, which are for Hopper
    assert not any(tile.parts for tile in passes(TritonBackend().build(request(card(arch), LONGNET)).tiles).values())


def test_older_ones_are_refused_even_so() -> None:
    for backend in ("triton", "flex"):
        (refusal,) = verdict(backend, card("sm_75"), pattern=LONGNET, **ALLOWED).refusals
        assert (refusal.code, refusal.required) == ("arch", "sm_75")
        assert refusal.actual == "sm_80 or newer, which Triton supports"


def test_hopper_needs_no_permission() -> None:
    assert verdict("triton", pattern=LONGNET).kernel == verdict("triton", pattern=LONGNET, **ALLOWED).kernel


@pytest.mark.parametrize(("given", "said"), [(1, r"line\), got 1"), ("True", "true or false in TOML.*got 'True'")])
def test_the_permission_is_a_bool(given: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        verdict("triton", pattern=LONGNET, backend_options={"triton": {"unproven_card": given}})


def test_what_triton_is_told_to_compile_for_is_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    assert codes(verdict("triton", pattern=LONGNET)) == {"arch"}
    assert verdict("triton", pattern=LONGNET, **ALLOWED).kernel.startswith("fused (triton ")
    monkeypatch.delenv("TRITON_OVERRIDE_ARCH")
    assert verdict("triton", pattern=LONGNET).accepts


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "expected"),
    [
        ("sm_89", "float32", 136, {"head_dims"}),
        ("sm_89", "float32", 128, set()),
        ("sm_80", "float32", 256, set()),
        ("sm_120", "bfloat16", 256, set()),
        ("sm_90", "float32", 256, set()),
    ],
)
def test_tiles_of_float32_that_do_not_fit_are_refused(arch: str, dtype: str, head_dim: int, expected: set[str]) -> None:
    assert codes(verdict("triton", card(arch), dtype=dtype, head_dim=head_dim, **ALLOWED)) == expected


@pytest.mark.parametrize(
    ("fields", "is_first"),
    [
        ({"pattern": LONGNET}, True),
        ({"pattern": LONGNET, "head_dim": 128}, False),
        ({"pattern": LONGNET, "head_dim": 256}, False),
        ({"pattern": LONGNET, "dtype": "float32"}, False),
        ({"pattern": Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))}, False),
        ({"pattern": Full()}, False),
        ({"pattern": Full(), "varlen": True}, True),
        ({"pattern": BLOCKS}, True),
        ({"pattern": BLOCKS, "seq_len": 4096, "head_dim": 128}, True),
        ({"pattern": Local(70)}, False),
        ({"pattern": Local(70), "varlen": True}, True),
        ({"pattern": Learned(block_size=128, blocks_per_row=2)}, True),
    ],
)
def test_where_they_come_first(fields: dict[str, Any], is_first: bool) -> None:
    specs = [manifest.REFERENCE, manifest.FLEX, manifest.SDPA, manifest.TRITON]
    order = manifest.dilated_attention_rank_backends(request(card("sm_80"), **fields), specs)
    assert (order[0] == "triton") is is_first


def passes(sizes: TileSizes) -> dict[tuple[str, Pass], Tile]:
    """Every tile, by what it is for."""

    def of(name: str, tiles: Tiles) -> Iterator[tuple[tuple[str, Pass], Tile]]:
        return (((name, which), tiles.of(which)) for which in tiles.passes)

    return dict(
        itertools.chain(
            of("branches", sizes.branches), of("blocks of 128", sizes.within(128)), of("blocks of 64", sizes.within(64))
        )
    )


def compiled(kind: str, which: Pass, tile: Tile, head_dim: int, dtype: str, capability: int, *, apart: int = 16) -> Any:
    """A kernel for a card that need not be here, with heads that many numbers, or a multiple of it, apart."""
    triton: Any = pytest.importorskip("triton")
    compiler: Any = importlib.import_module("triton.compiler")
    target: Any = importlib.import_module("triton.backends.compiler").GPUTarget
    from .compile_hopper import source_of

    module, name = (OF_BRANCHES if kind == "branches" else OF_BLOCKS)[which]
    fn = getattr(importlib.import_module(f"dilated_attention.backends.fused.{module}"), name)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_N": tile.columns, "BLOCK_M": tile.rows,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", "SPLIT": tile.split, "SHIFTS": True, "WIDE": True,
        "PACKED": True, "BOUNDED": True, "ADDS": True, "IN_ORDER": True, "DROPS": True,
        "BLOCK": 64 if kind.endswith("64") else 128,
    }  # fmt: skip
    taken = {key: value for key, value in constants.items() if key in fn.arg_names}
    source = source_of(compiler.ASTSource, fn, taken, dtype)
    if apart % 16:  # which is all that Triton is told of a number
        for place in (i for i, name in enumerate(fn.arg_names) if name.startswith("stride") and name.endswith("h")):
            del source.attrs[place,]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    options |= {"maxnreg": tile.registers} if tile.registers else {}
    return triton.compile(source, target=target("cuda", capability, 32), options=options)


def check_that_they_fit(capability: int, dtype: str, head_dim: int, kinds: tuple[str, ...]) -> None:
    """Every kernel compiles for a card and asks for no more shared memory than it has."""
    kib = shared_kib(f"sm_{capability}")
    sizes = TileSizes.elsewhere(head_dim, torch.float32 if dtype == "fp32" else torch.bfloat16, kib)
    for (kind, which), tile in passes(sizes).items():
        if kind in kinds:
            shared = compiled(kind, which, tile, head_dim, dtype, capability).metadata.shared
            assert shared <= kib * 1024, (kind, which, tile)


def test_they_compile_for_a_card_that_is_not_here_and_fit() -> None:
    check_that_they_fit(89, "bf16", 64, ("blocks of 64",))


@pytest.mark.parametrize("kind", ["branches", "blocks of 128"])
def test_rows_of_every_head_dim_are_read_16_bytes_at_once(kind: str) -> None:
    """Also where heads that lie next to each other are 8 but not 16 numbers apart."""
    tile = passes(TileSizes.elsewhere(72, torch.bfloat16, 99))[kind, "forward"]
    ptx = compiled(kind, "forward", tile, 72, "bf16", 86, apart=72).asm["ptx"]
    assert re.search(r"cp\.async\.\w+\.shared\.global [^;]*, 0x10,", ptx)
    assert not re.search(r"(ld|st)\.global\S*\.[bu]16", ptx)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [
        *itertools.product((86, 120), ("bf16",), (16, 32, 64, 128, 256)),
        (80, "bf16", 256),
        (80, "fp16", 64),
        (80, "fp32", 64),
        (89, "fp32", 128),
        (100, "bf16", 64),
        (100, "bf16", 128),
    ],
)
def test_all_of_them_compile_for_cards_that_are_not_here_and_fit(capability: int, dtype: str, head_dim: int) -> None:
    check_that_they_fit(capability, dtype, head_dim, ("branches", "blocks of 128", "blocks of 64"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_what_an_older_card_would_run_conforms() -> None:
    """Triton takes sm_80's instructions for products and copies, which newer cards have too."""
    done = subprocess.run(
        [
            sys.executable, "-m", "dilated_attention", "conformance", "triton", "--device", "cuda", "--quick",
            "--option", "unproven_card=true",
        ],
        env=os.environ | {"TRITON_OVERRIDE_ARCH": "sm80"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
