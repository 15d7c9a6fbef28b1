"""What plugins cost: discovering twenty of them, each a distribution of its own, and building an attention beside them.

    python -m benchmarks.plugins
    python -m benchmarks.plugins --plugins 50 --json

Every round is a fresh process. Discovery is timed with and without the plugins in one and the same round, from the
first look at the installed distributions to the registry; torch is not imported there. A build is timed after torch,
numpy and the backend have been imported and the registry has been discovered, and each differs from those before it in
its head_dim, so that nothing made for another is found; kernels are not called, so they compile nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9

_MANIFEST = """
from dilated_attention.registry import BackendSpec, Range, hookimpl

@hookimpl
def dilated_attention_backends():
    able = {{"device_types": ["cpu"], "dtypes": ["float32"], "head_dims": Range(1, 128), "layouts": ["dense"]}}
    return [BackendSpec(name="{name}", target="{name}_kernel:Kernel", capabilities=able, priority=-50)]
"""
_KERNEL = """
from dilated_attention.registry import KernelBackend

class Kernel(KernelBackend):
    name = "{name}"

    def forward(self, q, k, v, piece):
        raise NotImplementedError

    def backward(self, dout, q, k, v, out, lse, piece):
        raise NotImplementedError
"""
_DISCOVERY = """
import time
from dilated_attention.registry.discovery import Registry
start = time.perf_counter()
registry = Registry.discover()
took = time.perf_counter() - start
print(sum(name.startswith("bench_") for name in registry.backends), took)
"""
_BUILD = """
import json, statistics, time
from dilated_attention import Dilated, Full, Local, Random, build_attention, explain
patterns = {
    "full": Full(), "dilated": Dilated((64, 128, 256), (1, 2, 4)), "local": Local(64), "random": Random(4, 64),
}
build_attention(num_heads=4, head_dim=8)
rows = {}
for name, pattern in patterns.items():
    for seq_len in (None, 4096):
        times = []
        build_attention(pattern=pattern, num_heads=4, head_dim=8, is_causal=True, seq_len=seq_len)
        for head_dim in range(16, 80, 8):
            start = time.perf_counter()
            build_attention(pattern=pattern, num_heads=4, head_dim=head_dim, is_causal=True, seq_len=seq_len)
            times.append(time.perf_counter() - start)
        rows[f"{name}, " + ("any length" if seq_len is None else f"{seq_len} tokens")] = statistics.median(times)
print(json.dumps(rows))
"""


def install(site: Path, name: str) -> None:
    """Write a distribution with one backend as pip leaves it: modules, metadata, entry points."""
    (site / f"{name}.py").write_text(_MANIFEST.format(name=name), encoding="utf-8")
    (site / f"{name}_kernel.py").write_text(_KERNEL.format(name=name), encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[dilated_attention]\nplugin = {name}\n", encoding="utf-8")


def run(code: str, site: Path | None) -> str:
    """What `code` prints in a fresh process that finds this checkout and, where given, the plugins of `site`."""
    paths = [str(ROOT / "src"), *([str(site)] if site else [])]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DILATED_ATTENTION_")}
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return done.stdout


def milliseconds(count: int) -> dict[str, float]:
    """Medians over the rounds, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        for number in range(count):
            install(site, f"bench_{number}")
        times: dict[str, list[float]] = {}
        for round_number in range(ROUNDS + 1):
            taken: dict[str, float] = {}
            for name, where, expected in ((f"{count} plugins", site, count), ("none", None, 0)):
                found, took = run(_DISCOVERY, where).split()
                if int(found) != expected:
                    raise RuntimeError(f"discovery found {found} of {expected} plugins")
                taken[f"discovery, {name}"] = float(took)
            for name, took in json.loads(run(_BUILD, site)).items():
                taken[f"build, {name}"] = took
            if round_number:  # the first one reads files and writes bytecode
                for name, seconds in taken.items():
                    times.setdefault(name, []).append(1000 * seconds)
    rows = {name: statistics.median(values) for name, values in times.items()}
    added = [a - b for a, b in zip(times[f"discovery, {count} plugins"], times["discovery, none"], strict=True)]
    return {"discovery, added by the plugins": statistics.median(added)} | rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=20, help="how many are installed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = milliseconds(args.plugins)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for name, value in rows.items():
        print(f"{name:36}{value:8.2f} ms")


if __name__ == "__main__":
    main()
