"""Real installed distributions, written to a folder: modules, metadata and entry points, as pip leaves them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dilated_attention.registry.discovery import default_registry

ROOT = Path(__file__).resolve().parents[1]

# A dense backend that accepts everything that its manifest declares, and the manifest.
BACKEND = """
from dilated_attention.registry import BackendSpec, hookimpl

@hookimpl
def dilated_attention_backends():
    return [BackendSpec(name="{name}", target="{module}_code:Toy", priority={priority}, capabilities={capabilities})]
"""
CAPABILITIES: dict[str, Any] = {
    "device_types": ["cpu"],
    "dtypes": ["float32"],
    "head_dims": [32, 64],
    "layouts": ["dense"],
    "causal": True,
    "backward": True,
}
CODE = """
class Toy:
    def refusals(self, request):
        return []
    def pin(self, request):
        return "toy kernel"
    def build(self, request):
        raise NotImplementedError
"""


def install(
    site: Path, name: str, code: str, *, version: str = "1.0", entry: str = "plugin", attribute: str = ""
) -> str:
    """Install the distribution `name` with one module and one entry point of ours; returns the module's name."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[dilated_attention]\n{entry} = {module}{attribute}\n", encoding="utf-8")
    return module


def install_backend(
    site: Path,
    name: str,
    *,
    backend: str = "toy",
    priority: int = 50,
    capabilities: dict[str, Any] | None = None,
    code: str = CODE,
    extra: str = "",
) -> None:
    """Install a distribution that brings one backend; `extra` is appended to its manifest."""
    module = name.replace("-", "_")
    declared = repr(CAPABILITIES if capabilities is None else capabilities)
    manifest = BACKEND.format(name=backend, module=module, priority=priority, capabilities=declared)
    install(site, name, manifest + textwrap.dedent(extra))
    (site / f"{module}_code.py").write_text(textwrap.dedent(code), encoding="utf-8")


@contextlib.contextmanager
def installed(site: Path) -> Iterator[None]:
    """This process, with the distributions in `site` installed and yet to be found; afterwards as if never there."""
    before = set(sys.modules)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    default_registry.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        default_registry.cache_clear()
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
                del sys.modules[name]


def run(site: Path | None, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` with the package and the distributions in `site` on its path."""
    paths = [str(ROOT / "src")] + ([str(site)] if site else [])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DILATED_ATTENTION_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"PYTHONPATH": os.pathsep.join(paths)} | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def command(site: Path | None, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `dilated-attention *arguments` in that environment."""
    return run(site, "-m", "dilated_attention", *arguments, **environ)


def as_json(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a command printed."""
    return json.loads(result.stdout)
