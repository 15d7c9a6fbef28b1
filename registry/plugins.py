"""One plugin at a time: load it, register it, call its hooks, check what they return.

Whatever goes wrong is an outcome with a cause, never an exception that reaches another plugin.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar, cast

import attrs
import pluggy

from ..core.errors import PluginError
from . import hooks
from .specs import API_VERSION, BackendSpec, PatternSpec, Request

# Importing a manifest should cost milliseconds; torch alone takes more than a second.
SLOW_IMPORT_SECONDS: Final = 0.25

# What a plugin may raise that must not reach others. KeyboardInterrupt and the like still do.
PLUGIN_FAULTS: Final = (Exception, SystemExit)

PluginStatus = Literal["ok", "broken", "slow", "disabled"]

S = TypeVar("S", BackendSpec, PatternSpec)


class Hooks(Protocol):
    """The hook of a plugin that is called after discovery, typed."""

    def dilated_attention_rank_backends(self, *, request: Request, candidates: Sequence[BackendSpec]) -> object:
        """The answer, or None."""


@attrs.frozen(kw_only=True, eq=False)
class Source:
    """Where a plugin comes from, before anything of it is imported."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]

    @property
    def origin(self) -> str:
        """`distribution version`."""
        return f"{self.distribution} {self.version}".strip()


@attrs.frozen(kw_only=True)
class PluginRow:
    """What became of one plugin.

    Attributes:
        name: of its entry point, or of the module for our own.
        distribution: the installed package that it comes from.
        version: of that package.
        status: "ok", "broken" (with causes; what it brought and is sound stays usable), "slow" (works, but its import
            took longer than `SLOW_IMPORT_SECONDS` or pulled in torch), or "disabled".
        causes: what is wrong, one sentence each.
        backends: names of the backends in use from it.
        patterns: kinds of the patterns in use from it.
        import_seconds: what loading it took.
    """

    name: str
    distribution: str
    version: str
    status: PluginStatus = "ok"
    causes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    import_seconds: float = 0.0


@attrs.frozen(kw_only=True, eq=False)
class Loaded:
    """A plugin after loading: its own hook caller (None where it has none), its sound specs, and what was wrong."""

    source: Source
    hooks: Hooks | None = None
    ranks: bool = False
    backends: tuple[BackendSpec, ...] = ()
    patterns: tuple[PatternSpec, ...] = ()
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    import_seconds: float = 0.0


def load_plugin(source: Source) -> Loaded:
    """Load, register and call one plugin, each step guarded."""
    had_torch = "torch" in sys.modules
    start = time.perf_counter()
    try:
        plugin = source.load()
    except PLUGIN_FAULTS as error:  # recorded as this plugin's fault; the others are loaded all the same
        return Loaded(source=source, faults=(f"import failed: {describe(error)}",))
    seconds = time.perf_counter() - start
    warnings = []
    if not had_torch and "torch" in sys.modules:
        warnings.append("its manifest imports torch; name the code as a string in `target` instead")
    if seconds > SLOW_IMPORT_SECONDS:
        warnings.append(f"its import took {seconds:.2f} s (more than {SLOW_IMPORT_SECONDS} s)")
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    try:
        manager.register(plugin, name=source.name)
        manager.check_pending()
    except PLUGIN_FAULTS as error:  # a misspelt hook or wrong arguments, as pluggy words it
        return Loaded(source=source, faults=(f"registration failed: {describe(error)}",), import_seconds=seconds)
    callers = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    if not callers:
        fault = f"{plugin!r} carries no hook; mark its functions with dilated_attention.registry.hookimpl"
        return Loaded(source=source, faults=(fault,), import_seconds=seconds)
    backends, backend_faults = _specs(manager.hook.dilated_attention_backends, BackendSpec)
    patterns, pattern_faults = _specs(manager.hook.dilated_attention_patterns, PatternSpec)
    return Loaded(
        source=source,
        hooks=cast(Hooks, manager.hook),
        ranks="dilated_attention_rank_backends" in callers,
        backends=backends,
        patterns=patterns,
        faults=(*backend_faults, *pattern_faults),
        warnings=tuple(warnings),
        import_seconds=seconds,
    )


def _specs(hook: pluggy.HookCaller, kind: type[S]) -> tuple[tuple[S, ...], tuple[str, ...]]:
    """The sound specs among a hook's answers, and a fault for everything else."""
    name = f"dilated_attention_{'backends' if kind is BackendSpec else 'patterns'}"
    try:
        answers = [(answer, _items(answer)) for answer in hook()]
    except PLUGIN_FAULTS as error:  # the hook may be a generator, so its items are drawn in here too
        return (), (f"{name} raised {describe(error)}",)
    specs, faults = [], []
    if len(answers) < len(hook.get_hookimpls()):  # pluggy leaves out whoever returns None
        faults.append(f"{name} returned None, not an iterable of {kind.__name__}")
    for answer, items in answers:
        if items is None:
            faults.append(f"{name} returned {answer!r}, not an iterable of {kind.__name__}")
            continue
        for item in items:
            if not isinstance(item, kind):
                faults.append(f"{name} returned {item!r} among its items, not a {kind.__name__}")
            elif item.api_version != API_VERSION:
                label = item.name if isinstance(item, BackendSpec) else item.kind
                faults.append(f"{label!r} has api_version {item.api_version!r}; this release knows {API_VERSION}")
            else:
                specs.append(item)
    return tuple(specs), tuple(faults)


def _items(answer: object) -> tuple[object, ...] | None:
    return tuple(answer) if isinstance(answer, Iterable) and not isinstance(answer, str) else None


def import_target(target: str) -> Any:
    """What "package.module:attribute" names.

    Raises:
        PluginError: for anything that goes wrong on the way, with its cause.
    """
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except PLUGIN_FAULTS as error:  # named as the plugin's fault by whoever asked
        raise PluginError(f"{target} cannot be imported: {describe(error)}") from error
    return found


def describe(error: BaseException) -> str:
    """`ImportError: libfoo.so: cannot open shared object file`, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
