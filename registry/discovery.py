"""Finding plugins: our own manifests and every installed entry point, on one path.

The environment is read here and nowhere else: DILATED_ATTENTION_STRICT_PLUGINS=1 raises at the first broken plugin,
DILATED_ATTENTION_DISABLE_PLUGINS=a,b leaves out plugins by the name of their entry point or distribution.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Final

import attrs

from ..core.checks import did_you_mean
from ..core.errors import ConfigError, PluginError
from ..core.version import VERSION
from .plugins import PLUGIN_FAULTS, Loaded, PluginRow, PluginStatus, Source, describe, load_plugin
from .specs import BackendSpec, PatternSpec, Request

ENTRY_POINT_GROUP: Final = "dilated_attention"
OUR_DISTRIBUTION: Final = "dilated-attention"
OUR_MANIFESTS: Final = ("dilated_attention.backends.manifest", "dilated_attention.patterns.manifest")

_PREFIX: Final = "DILATED_ATTENTION_"
_STRICT: Final = "DILATED_ATTENTION_STRICT_PLUGINS"
_DISABLE: Final = "DILATED_ATTENTION_DISABLE_PLUGINS"


@attrs.frozen(eq=False)
class RegisteredBackend:
    """A backend's manifest, where it comes from, and what was noted about its plugin (a slow import)."""

    spec: BackendSpec
    source: Source
    notes: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class RegisteredPattern:
    """A pattern's manifest and where it comes from."""

    spec: PatternSpec
    source: Source


@attrs.frozen(kw_only=True, eq=False)
class Registry:
    """Everything that was found, sound or broken.

    Attributes:
        backends: by name, in order of descending priority.
        patterns: by kind.
        plugins: one row a plugin, our own first.
        notices: what was odd about the environment, one sentence each.
        strict: faults found later (while choosing) raise too.
    """

    backends: Mapping[str, RegisteredBackend]
    patterns: Mapping[str, RegisteredPattern]
    plugins: tuple[PluginRow, ...]
    notices: tuple[str, ...]
    strict: bool
    _rankers: tuple[Loaded, ...] = ()

    @classmethod
    def discover(cls, environ: Mapping[str, str] | None = None, sources: Sequence[Source] | None = None) -> Registry:
        """Load every plugin by itself.

        Args:
            environ: where the two variables are read from; by default the process's environment.
            sources: the plugins; by default ours and those of all installed distributions.

        Raises:
            PluginError: for a broken plugin, where DILATED_ATTENTION_STRICT_PLUGINS is 1.
            ConfigError: for a value of that variable other than 0, 1 or nothing.
        """
        environ = os.environ if environ is None else environ
        strict, disabled = _strict(environ), _disabled(environ)
        found = tuple(installed_sources() if sources is None else sources)
        names = {name for source in found for name in (source.name, source.distribution)}
        notices = [
            *_unknown_variables(environ),
            *(f"{_DISABLE} names {n!r}, which is not installed{did_you_mean(n, names)}" for n in disabled - names),
        ]
        backends: dict[str, RegisteredBackend] = {}
        patterns: dict[str, RegisteredPattern] = {}
        rows, rankers = [], []
        for source in found:
            if disabled & {source.name, source.distribution}:
                rows.append(_row(source, status="disabled", causes=(f"disabled by {_DISABLE}",)))
                continue
            loaded = load_plugin(source)
            row = _admit(loaded, backends, patterns)
            if strict and row.status == "broken":
                raise PluginError(f"plugin {source.name!r} of {source.origin} is broken: {'; '.join(row.causes)}")
            rows.append(row)
            if loaded.ranks:
                rankers.append(loaded)
        return cls(
            backends=dict(sorted(backends.items(), key=lambda item: (-item[1].spec.priority, item[0]))),
            patterns=patterns,
            plugins=tuple(rows),
            notices=tuple(notices),
            strict=strict,
            # A site's own preference comes before ours.
            rankers=tuple(sorted(rankers, key=lambda loaded: loaded.source.distribution == OUR_DISTRIBUTION)),
        )

    def rank(self, request: Request, candidates: Sequence[BackendSpec]) -> tuple[tuple[str, ...], list[PluginRow]]:
        """Names of `candidates`, best first, by the first plugin that has a preference, then by priority.

        Also returns a row for each plugin whose answer could not be used.
        """
        by_priority = [spec.name for spec in sorted(candidates, key=lambda spec: (-spec.priority, spec.name))]
        faults: list[PluginRow] = []
        for ranker in self._rankers:
            assert ranker.hooks is not None
            try:
                answer = ranker.hooks.dilated_attention_rank_backends(request=request, candidates=tuple(candidates))
            except PLUGIN_FAULTS as error:  # a broken preference must not keep anyone from an attention
                fault = f"dilated_attention_rank_backends raised {describe(error)}"
            else:
                if answer is None:
                    continue
                if isinstance(answer, list | tuple) and all(name in by_priority for name in answer):
                    return tuple(dict.fromkeys([*answer, *by_priority])), faults
                fault = f"dilated_attention_rank_backends returned {answer!r}, not a list of names among {by_priority}"
            faults.append(_row(ranker.source, status="broken", causes=(fault,)))
        return tuple(by_priority), faults


@functools.cache
def default_registry() -> Registry:
    """The registry of this process, discovered at the first use; what is odd about the environment is warned about."""
    registry = Registry.discover()
    for notice in registry.notices:
        warnings.warn(notice, UserWarning, stacklevel=2)
    return registry


def installed_sources() -> Iterator[Source]:
    """Our own manifests, then the entry points of all distributions, by distribution and name."""
    for name in OUR_MANIFESTS:
        yield Source(
            name=name,
            distribution=OUR_DISTRIBUTION,
            version=VERSION,
            load=functools.partial(importlib.import_module, name),
        )
    points = [
        (point.dist.name if point.dist else "unknown", point.dist.version if point.dist else "", point)
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
    for distribution, version, point in sorted(points, key=lambda entry: (entry[0], entry[2].name)):
        yield Source(name=point.name, distribution=distribution, version=version, load=point.load)


def _admit(loaded: Loaded, backends: dict[str, RegisteredBackend], patterns: dict[str, RegisteredPattern]) -> PluginRow:
    """Enter what a plugin brings; a name that is taken stays with who had it first."""
    source, causes = loaded.source, list(loaded.faults)
    own_backends, own_patterns = [], []
    for backend in loaded.backends:
        if taken := backends.get(backend.name):
            causes.append(_duplicate("backend", backend.name, source, taken.source))
            continue
        backends[backend.name] = RegisteredBackend(backend, source, loaded.warnings)
        own_backends.append(backend.name)
    for pattern in loaded.patterns:
        if holder := patterns.get(pattern.kind):
            causes.append(_duplicate("pattern", pattern.kind, source, holder.source))
            continue
        patterns[pattern.kind] = RegisteredPattern(pattern, source)
        own_patterns.append(pattern.kind)
    status: PluginStatus = "broken" if causes else "slow" if loaded.warnings else "ok"
    return PluginRow(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        status=status,
        causes=(*causes, *loaded.warnings),
        backends=tuple(own_backends),
        patterns=tuple(own_patterns),
        import_seconds=loaded.import_seconds,
    )


def _duplicate(what: str, name: str, source: Source, holder: Source) -> str:
    return f"{what} {name!r} of {source.origin} is already registered by {holder.origin}, which keeps the name"


def _row(source: Source, *, status: PluginStatus, causes: tuple[str, ...]) -> PluginRow:
    return PluginRow(
        name=source.name, distribution=source.distribution, version=source.version, status=status, causes=causes
    )


def _strict(environ: Mapping[str, str]) -> bool:
    value = environ.get(_STRICT, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{_STRICT} must be 0 or 1, got {value!r}")
    return value == "1"


def _disabled(environ: Mapping[str, str]) -> set[str]:
    return {name.strip() for name in environ.get(_DISABLE, "").split(",")} - {""}


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in (_STRICT, _DISABLE):
            near = did_you_mean(name, (_STRICT, _DISABLE))
            yield f"the environment variable {name} means nothing here{near}"
