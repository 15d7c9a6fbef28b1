"""What the commands say: plain data, and the same as text."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Final, TextIO

import attrs

from .core.checks import did_you_mean
from .core.explain import amount, columns
from .core.version import VERSION
from .registry.capabilities import plain, unmet_requirements, words_of
from .registry.discovery import Registry
from .registry.plugins import PLUGIN_FAULTS, describe
from .registry.specs import AXES

_COLOURS: Final = {
    "chosen": "green",
    "usable": "cyan",
    "unjudged": "yellow",
    "ok": "green",
    "refused": "yellow",
    "slow": "yellow",
    "disabled": "yellow",
    "skipped": "bright_black",
    "failed": "red",
    "broken": "red",
}
_LIBRARIES: Final = ("torch", "numpy", "numba", "attrs", "cattrs", "pluggy", "safetensors", "typer", "rich")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether people look on as it is written. It is None where the process was started with it closed.

    Rich takes anything for a terminal under FORCE_COLOR, which CI sets.
    """
    return stream is not None and stream.isatty()


def paint(text: str) -> str:
    """`text` with the words for a status coloured, where stdout is a terminal; its lines are left as they are."""
    if not is_terminal(sys.stdout):
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    painted = Text(text)
    for word, colour in _COLOURS.items():
        painted.highlight_regex(rf"(?m)^\S+ +{word}\b", f"{colour}")
    with console.capture() as capture:
        console.print(painted, end="")
    return capture.get()


@contextmanager
def progress_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; what it yields is told how many of how many steps are done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    parts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[part]}"), TimeElapsedColumn())
    with Progress(*parts, console=console, transient=True, disable=not is_terminal(sys.stderr)) as bar:
        task = bar.add_task(words, total=None, part="")  # until somebody counts there is nothing to say but the time
        yield lambda done, of: bar.update(task, completed=done, total=of, part=f"{done}/{of}")


def backends_data(registry: Registry) -> list[dict[str, Any]]:
    """One mapping a backend: its manifest, where it comes from, and which of its requirements are not met."""
    return [
        {
            "name": name,
            "distribution": registered.source.distribution,
            "version": registered.source.version,
            "priority": registered.spec.priority,
            "api_version": registered.spec.api_version,
            "target": registered.spec.target,
            "requires": list(registered.spec.requires),
            "options": dict(registered.spec.options),
            "missing": [text for text, _ in unmet_requirements(registered.spec.requires)],
            "capabilities": {axis: plain(value) for axis, value in registered.spec.capabilities.items()},
        }
        for name, registered in registry.backends.items()
    ]


def backends_text(registry: Registry) -> str:
    """The backends with their capabilities, an axis a line; then the broken plugins."""
    lines: list[str] = []
    for name, registered in registry.backends.items():
        spec = registered.spec
        lines.append(f"{name}  (priority {spec.priority}, from {registered.source.origin})")
        rows = [(axis, words_of(value) + _unknown(axis)) for axis, value in spec.capabilities.items()]
        missing = dict(unmet_requirements(spec.requires))
        rows += [("requires", f"{text}{_lack(text, missing)}") for text in spec.requires]
        rows += [("option", f"{option}: {what}") for option, what in spec.options.items()]
        lines += [f"    {line}" for line in columns(rows)] if rows else []
        lines.append("")
    lines += _broken_lines(registry)
    return "\n".join(lines).rstrip() or "no backends are registered"


def plugins_data(registry: Registry) -> list[dict[str, Any]]:
    """One mapping a plugin."""
    return [attrs.asdict(row) for row in registry.plugins]


def plugins_text(registry: Registry) -> str:
    """One line a plugin, its causes below it."""
    header = ("plugin", "status", "from", "import", "brings")
    cells = [
        (
            row.name,
            row.status,
            f"{row.distribution} {row.version}".strip(),
            f"{row.import_seconds * 1000:.0f} ms",
            ", ".join((*row.backends, *row.patterns)) or "-",
        )
        for row in registry.plugins
    ]
    table = list(columns([header, *cells]))
    lines = table[:1]
    for row, line in zip(registry.plugins, table[1:], strict=True):
        lines += [line, *(f"    {cause}" for cause in row.causes)]
    return "\n".join(lines)


def doctor_data(registry: Registry) -> dict[str, Any]:
    """Versions, devices, the libraries that backends need, and plugins that are not well."""
    return {
        "versions": {
            "dilated-attention": VERSION,
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: _installed(name) for name in _LIBRARIES},
        },
        "devices": _devices(),
        "libraries": list(_libraries(registry)),
        "plugins": [attrs.asdict(row) for row in registry.plugins if row.status != "ok"],
    }


def doctor_text(data: dict[str, Any]) -> str:
    """`doctor_data` for people."""
    lines = ["versions", *_indented(columns([(k, v or "not installed") for k, v in data["versions"].items()]))]
    lines += ["", "devices", *_indented(columns([_device_cells(device) for device in data["devices"]]))]
    lines += ["", "libraries that backends need beside torch"]
    for library in data["libraries"]:
        state = "met" if library["met"] else f"missing ({library['found']}): {library['install']}"
        lines.append(f"    {library['requirement']} for {library['backend']}: {state}")
    if not data["libraries"]:
        lines.append("    none: every registered backend runs on torch alone")
    lines += ["", "plugins"]
    for row in data["plugins"]:
        lines.append(f"    {row['name']} ({row['distribution']} {row['version']}) is {row['status']}")
        lines += [f"        {cause}" for cause in row["causes"]]
    if not data["plugins"]:
        lines.append("    all well")
    return "\n".join(lines)


def _libraries(registry: Registry) -> Iterator[dict[str, Any]]:
    for name, registered in registry.backends.items():
        missing = dict(unmet_requirements(registered.spec.requires))
        for text in registered.spec.requires:
            yield {
                "requirement": text,
                "backend": name,
                "met": text not in missing,
                "found": missing.get(text, ""),
                "install": f"pip install {text!r}" if text in missing else "",
            }


def _devices() -> list[dict[str, Any]]:
    """Every device that torch can use here; a torch that cannot be imported is one entry with the cause."""
    try:
        from .registry.device import describe_device, local_device_types

        return [attrs.asdict(describe_device(name)) for name in local_device_types()]
    except PLUGIN_FAULTS as error:  # doctor is what one runs when torch is broken: it has to say so and go on
        return [{"torch_name": "torch", "error": f"cannot be used: {describe(error)}"}]


def _device_cells(device: dict[str, Any]) -> tuple[str, ...]:
    if "error" in device:
        return device["torch_name"], device["error"], "", ""
    memory = device["memory_bytes"]
    size = amount(memory / 2**30, "GiB") if memory else ""
    return device["torch_name"], device["arch"], device["name"], size


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unknown(axis: str) -> str:
    return "" if axis in AXES else f"  (not in this release's vocabulary){did_you_mean(axis, AXES)}"


def _lack(text: str, missing: dict[str, str]) -> str:
    return f"  ({missing[text]}; pip install {text!r})" if text in missing else "  (installed)"


def _broken_lines(registry: Registry) -> Iterator[str]:
    for row in registry.plugins:
        if row.status == "broken":
            yield f"{row.name}  broken, from {row.distribution} {row.version}"
            yield from _indented(row.causes)


def _indented(lines: object) -> Iterator[str]:
    assert hasattr(lines, "__iter__")
    for line in lines:
        yield f"    {line}"
