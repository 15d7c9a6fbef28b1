"""How well `bench --compare` tells slow-downs from noise on this machine: planted ones, and equal code.

    python -m benchmarks.detection                     40 runs of equal code and 20 slow-downs, some 40 minutes
    python -m benchmarks.detection --equal 4 --planted 4

A copy of this checkout becomes a git repository of its own, in a temporary folder; what is planted makes its CPU
kernels spin for a share of the processor time that they took, so the slow-down is real and known, and no larger where
other work takes the processor away. Every run is the command itself, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "exchange", "registry", "patterns", "backends", "models", "src")
# Of the kernels' time; of a whole call some hundredths less.
SHARES = (0.12, 0.15, 0.2, 0.3)

SLOW = """

def _spinning(plain, share):
    import functools
    import time

    @functools.wraps(plain)
    def call(self, *arguments, **named):
        start = time.thread_time()
        result = plain(self, *arguments, **named)
        end = start + (1 + share) * (time.thread_time() - start)
        while time.thread_time() < end:
            pass
        return result

    return call


CpuFlash.forward = _spinning(CpuFlash.forward, {share})
CpuFlash.backward = _spinning(CpuFlash.backward, {share})
"""
LEAK = """

def _keeping(plain, kept=[]):
    def call(self, *arguments, **named):
        result = plain(self, *arguments, **named)
        kept.append(result[0].clone())
        return result

    return call


CpuFlash.forward = _keeping(CpuFlash.forward)
"""


def copied_checkout(folder: Path) -> Path:
    """The package's sources as they stand, committed to a repository of their own."""
    tree = folder / "tree"
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=junk)
    author = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", "-C", str(tree), *arguments], check=True, capture_output=True)
    return tree


def plant(tree: Path, code: str) -> None:
    """Append `code` to the CPU kernel's module of the working tree; nothing else is changed."""
    subprocess.run(["git", "-C", str(tree), "checkout", "-q", "--", "."], check=True)
    path = tree / "backends" / "aten.py"
    path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")


def compared(tree: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and stderr of the command, run from `tree`."""
    command = [sys.executable, "-m", "dilated_attention", "bench", "--compare", "--case", "longnet-1k", "--json"]
    done = subprocess.run(
        [*command, "--device", "cpu", *arguments],
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def trial(tree: Path, share: float | None) -> dict[str, Any]:
    """One run, of equal code where `share` is None."""
    plant(tree, "" if share is None else SLOW.format(share=share))
    status, data, said = compared(tree)
    if not data:
        sys.exit(said)
    rows = data["comparisons"]
    return {
        "share": share,
        "status": status,
        "slower": any(row["verdict"] == "slower" for row in rows),
        "ratios": {row["phase"]: row["ratio"] for row in rows},
        "verdicts": {row["phase"]: row["verdict"] for row in rows},
        "rounds": {row["phase"]: row["rounds"] for row in rows},
    }


def main() -> None:
    """Parse, run, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal", type=int, default=40)
    parser.add_argument("--planted", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="every run as a line of JSON")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        tree = copied_checkout(Path(name))
        planted = [SHARES[i % len(SHARES)] for i in range(args.planted)]
        for number in range(max(args.equal, args.planted)):  # both kinds meet the same hours of the machine
            shares: list[float | None] = [None] if number < args.equal else []
            shares += planted[number : number + 1]
            for share in shares:
                found.append(trial(tree, share))
                if args.json:
                    print(json.dumps(found[-1]), flush=True)
    alarms = sum(run["status"] != 0 for run in found if run["share"] is None)
    caught = sum(run["slower"] for run in found if run["share"] is not None)
    print(f"{caught} of {args.planted} slow-downs caught; {alarms} false alarms in {args.equal} runs of equal code")


if __name__ == "__main__":
    main()
