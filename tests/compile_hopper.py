"""Compiles the kernels in Gluon for Hopper, without a card and without torch.

`python compile_hopper.py FUSED_FOLDER TILES`, with TILES a JSON list of what a `Tile` has, and of module, kernel, width
and registers. Prints a line for each: its name and head_dim, its registers' spills and its shared memory in bytes, and
whether ptxas gave up the overlap of its products.
`test_hopper_kernels` runs it with every Triton that they serve.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from types import ModuleType
from typing import Any

# The compiler by itself has no Python types.
triton: Any = importlib.import_module("triton")
GPUTarget: Any = importlib.import_module("triton.backends.compiler").GPUTarget
GluonASTSource: Any = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource

POINTERS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*bf16"),
    **dict.fromkeys(("head_kind", "slot_group", "slot_index", "group_size", "group_start", "residues"), "*i32"),
    **dict.fromkeys(("walks", "run_start", "runs", "totals", "documents"), "*i32"),
    **dict.fromkeys(("head_table", "starts", "ends", "cols", "mask_ids", "masks"), "*i32"),
    **dict.fromkeys(("lse_ptr", "largest_ptr", "sums_ptr"), "*fp32"),
    "out_ptr": "*bf16",
    "stats_ptr": "*i64",
    "draws": "*i8",
    "levels_ptr": "*bf16",
    "biases": "*fp32",
}
BOXES = {"sums": 0, "more_sums": -1}
FLOATS = ("scale", "grad_scale")
ALIGNED = ("num_heads", "q_high", "k_high", "period")  # multiples of 16, as of any length that is measured


def kernel(folder: str, module: str, name: str) -> Any:
    """A kernel of a module of the folder, as of a package of its own."""
    package = ModuleType("fused")
    package.__path__ = [folder]
    sys.modules["fused"] = package
    return getattr(importlib.import_module(f"fused.{module}"), name)


def box(constants: dict[str, Any], piece: int) -> str:
    """The kind of a box of sums, of a piece."""
    whole = 1 << (constants["BLOCK_D"].bit_length() - 1)
    width = (whole, constants["BLOCK_D"] - whole or whole)[piece]
    layout = f"NVMMASharedLayout(swizzle_byte_width={min(128, 4 * width)}, element_bitwidth=32, rank=4)"
    return f"tensordesc<fp32[1, {constants['BLOCK_N']}, 1, {width}],{layout}>"


def source_of(make: Any, fn: Any, constants: dict[str, Any], dtype: str = "bf16") -> Any:
    """What is compiled of a kernel: `make` is the compiler's class for its dialect, `dtype` that of the tensors."""
    kinds = {name: POINTERS.get(name, "fp32" if name in FLOATS else "i32") for name in fn.arg_names}
    kinds = {name: kind.replace("bf16", dtype) for name, kind in kinds.items()}
    kinds |= {name: box(constants, BOXES[name]) for name in kinds if name in BOXES}
    signature = kinds | dict.fromkeys(constants, "constexpr")
    values = {(i,): constants[name] for i, name in enumerate(fn.arg_names) if name in constants}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if name in POINTERS or name in ALIGNED or name.startswith("stride")
    }
    return make(fn, signature, values, divisible)


def compile_for_hopper(fn: Any, constants: dict[str, Any], warps: int, registers: int) -> tuple[int, str]:
    """Bytes of shared memory, and what ptxas says of it."""
    source = source_of(GluonASTSource, fn, constants)
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared, said.getvalue()


def main(folder: str, tiles: str) -> None:
    """Each tile, for the head_dims, tables and sizes of tensors that compile apart, and of documents.

    Of those whose rows may end with their document, too.
    """
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    for tile in json.loads(tiles):
        name, width = tile["kernel"], tile["width"]
        fn = kernel(folder, tile["module"], name)
        variants = [(width, True, False, False, False), (width - 16, False, True, False, False)]
        variants += [(width, True, False, True, False)]
        variants += [(width, True, False, True, True)] if "IN_ORDER" in fn.arg_names else []
        for head_dim, shifts, wide, packed, in_order in variants:
            constants = {
                "HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_N": tile["columns"], "STAGES": tile["stages"],
                "WIDE": wide, "SPLIT": tile["split"], "SHIFTS": shifts, "BLOCK": 128, "ADDS": wide, "BOUNDED": True,
                "PARTS": tile["parts"], "APART": tile["apart"], "PART_REGISTERS": tile["registers"],
                "FEED_REGISTERS": tile["feeding"], "ADD_REGISTERS": tile["adding"], "PACKED": packed,
                "IN_ORDER": in_order,
            }  # fmt: skip
            taken = {key: value for key, value in constants.items() if key in fn.arg_names}
            shared, said = compile_for_hopper(fn, taken, tile["warps"], tile["begin"])
            (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
            overlap = "serialized" if "serialized" in said else "overlaps"
            sys.stdout.write(f"{name} {head_dim} {spilled} {shared} {overlap}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
