"""Measures one tree of this package, of any version, as a script: `python -P compare_worker.py TREE DEVICE THREADS`.

Orders come as lines of JSON on stdin and are answered on the stdout that it was started with. Of the tree it uses
nothing but `build_attention`; what times and weighs is this file's neighbour, so that both trees are measured alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _neighbour(name: str) -> ModuleType:
    """A module that stands beside this file, whatever package is on the path."""
    spec = importlib.util.spec_from_file_location(f"_bench_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Worker:
    """The calls of the case it was last given."""

    def __init__(self, package: ModuleType, device: str) -> None:
        self.package = package
        self.device = device
        self.device_type = device.partition(":")[0]
        self.timing = _neighbour("timing")
        self.calls: dict[str, Callable[[], Any]] = {}

    def prepare(self, config: dict[str, Any], shape: list[int]) -> dict[str, Any]:
        """Build, warm up, and say what was chosen and what came out, as sums that equal results share."""
        attention = self.package.build_attention(config, device=self.device, seq_len=shape[1])
        inputs = self.timing.random_inputs(
            tuple(shape), config["dtype"], self.device, kv_heads=config.get("num_kv_heads")
        )

        def forward() -> torch.Tensor:
            with torch.no_grad():
                out: torch.Tensor = attention(*inputs[:3])
            return out

        self.calls = {"forward": forward, "training": self.timing.training(attention, inputs)}
        results = [forward(), *self.calls["training"]()]
        sums = [[float(x.double().norm()), float((x.double() * inputs[3].double()).sum())] for x in results]
        return {"backend": attention.plan.backend, "kernel": attention.plan.kernel, "sums": sums}

    def milliseconds(self, phase: str, calls: int) -> float:
        """Of `calls` calls, one behind the other."""
        call = self.calls[phase]

        def several() -> None:
            for _ in range(calls):
                call()

        taken: float = self.timing.milliseconds(several, self.device_type)
        return taken

    def threads(self) -> int:
        """Of a CPU's kernels here."""
        return torch.get_num_threads()

    def peak_bytes(self, phase: str) -> int:
        """The smaller of two measurements: what grows between them is no peak of one call."""
        found: list[int] = [self.timing.extra_bytes(self.calls[phase], self.device_type) for _ in range(2)]
        return min(found)


def main() -> None:
    """Serve until stdin ends."""
    tree, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    torch.set_num_threads(int(sys.argv[3]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    package = importlib.import_module("dilated_attention")  # the tree's, whatever it is: this file is of no package
    found = Path(str(package.__file__)).resolve()
    if not found.is_relative_to(tree):
        sys.exit(f"{found} was imported, which is not of {tree}")
    worker = Worker(package, device)
    print(json.dumps({"version": package.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        method = getattr(worker, order.pop("do"))
        try:
            answer = {"value": method(**order)}
        except Exception as error:  # noqa: BLE001 - an old tree may fail in any way; whoever asked reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
