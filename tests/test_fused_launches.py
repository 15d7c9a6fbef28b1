"""What is given at every launch of our kernels in Triton, as a card would take it: arguments, and how to compile."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention import Dilated, Local, Pattern
from dilated_attention.backends.fused import gradient_kernels, kernels, runs
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.tiles import Tile, TileSizes, padded
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower

BACKENDS = Path(__file__).parents[1] / "backends"
# Of a launch, not of a kernel.
OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}


def launches(path: Path) -> list[ast.Call]:
    """Every `kernel[grid](...)` of a module."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Subscript)]


def test_every_launch_says_whether_products_and_sums_are_rounded_once() -> None:
    """Triton 3.9 warns where it is not said, and 3.10 has another default."""
    found = 0
    for path in (*BACKENDS.glob("*.py"), *BACKENDS.glob("fused/*.py")):
        if path.stem.endswith("kernels"):
            continue
        for call in launches(path):
            given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
            assert "FP_FUSION" in given, (path, call.lineno)
            found += 1
    assert found == 2  # `launch`, the listing of runs


class Taken:
    """In the place of a kernel: what a launch gives it are all of its arguments, and nothing else."""

    def __init__(self, kernel: Any, told: list[str]) -> None:
        self.kernel, self.told = kernel, told

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            names = list(self.kernel.arg_names)
            assert [*names[: len(args)], *(name for name in names[len(args) :] if name in named)] == names
            assert named.keys() <= {*names[len(args) :], *OPTIONS}
            assert named["enable_fp_fusion"] is True
            assert all(isinstance(x, torch.Tensor) for x, name in zip(args, names, strict=False) if "_ptr" in name)
            self.told.append(self.kernel.__name__)

        return launch


@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize("head_dim", [64, 48, 128])
@pytest.mark.parametrize("pattern", [Dilated((64, 256), (1, 2)), Local(100)], ids=str)
def test_every_kernel_is_given_its_arguments(
    pattern: Pattern, head_dim: int, fed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for module, name in ((runs, "list_runs"), (kernels, "largest_rows")):
        monkeypatch.setattr(module, name, Taken(getattr(module, name), told))
    for name in ("prepare_rows", "level_rows"):
        monkeypatch.setattr(gradient_kernels, name, Taken(getattr(gradient_kernels, name), told))
    layout = lower(pattern, Geometry.self_attention(256, 2, is_causal=True))
    fused = FusedKernel("told", TileSizes.of(head_dim, torch.bfloat16, is_causal=True, fed=fed), bound_from=0)
    (part,) = fused.parts(layout, torch.device("cpu"))
    monkeypatch.setattr(part, "_kernels", {which: Taken(x, told) for which, x in part._kernels.items()})  # type: ignore[attr-defined]
    query, key, value, dout = (torch.zeros(1, 256, 2, head_dim, dtype=torch.bfloat16) for _ in range(4))
    out, lse = fused.forward(query, key, value, LayoutPiece(layout=layout, scale=1.0))
    for is_exact in (True, False):
        piece = LayoutPiece(layout=layout, scale=1.0, deterministic=is_exact)
        fused.backward(dout, query, key, value, out, lse, piece)
        fused.gradients(dout, query, key, value, fused.row_sums(dout, out, lse, None), piece)
    blocks = "" if layout.blocks is None else "block_"
    expected = {f"{blocks}gradients_of_queries", f"{blocks}gradients_of_keys", "prepare_rows"}
    expected |= {"attend", "list_runs"} if layout.blocks is None else {"attend_blocks"}
    expected |= {"largest_rows"} if layout.blocks is None or fed else set()
    expected |= {f"{blocks}gradients", "level_rows"} if fed and head_dim <= 64 else set()
    assert set(told) == expected


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [(40, 48), (48, 48), (56, 64), (64, 64), (72, 96), (96, 96), (104, 128), (128, 128), (136, 192), (192, 192),
     (200, 256)],
)  # fmt: skip
def test_rows_of_two_pieces_where_they_suffice(head_dim: int, expected: int) -> None:
    assert Tile.by_ring(64, 2, 232).span(head_dim) == expected
    assert Tile(64, 32, 4, 2).span(head_dim) == padded(head_dim)
    for release, is_fed in (("3.6.0", True), ("3.9.0", True), ("3.10.0", False)):
        sizes = TileSizes.chosen("sm_90", head_dim, torch.bfloat16, is_causal=True, version=release)
        for tile in (sizes.branches.forward, sizes.blocks.forward, sizes.branches.keys):
            assert tile.span(head_dim) == (expected if is_fed else padded(head_dim))
            assert (tile.parts > 0) is is_fed
