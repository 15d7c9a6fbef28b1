"""Asking every backend about a request, keeping every refusal, and choosing among those that accept it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, cast

import attrs

from ..core.checks import did_you_mean
from ..core.config import AttentionConfig
from ..core.errors import ConfigError, PluginError
from ..core.plan import BackendRow
from ..core.refusal import Refusal
from ..core.structure import check_keys
from .capabilities import NOT_INSTALLED, capability_refusals, device_refusals, requirement_refusals
from .discovery import RegisteredBackend, Registry
from .near import near_miss
from .plugins import PLUGIN_FAULTS, PluginRow, describe, import_target
from .specs import Backend, BackendSpec, Request

AUTO: Final = "auto"
_ANY_LENGTH: Final = 4096  # tokens of a rank, where it only matters that they are known


@attrs.frozen(kw_only=True, eq=False)
class Verdict:
    """What one backend says about one request: it accepts it (no refusals, no fault), refuses it, or is broken."""

    registered: RegisteredBackend
    backend: Backend | None = None
    kernel: str = ""
    refusals: tuple[Refusal, ...] = ()
    fault: str = ""

    @property
    def accepts(self) -> bool:
        """No refusal and no fault."""
        return not self.refusals and not self.fault


@attrs.frozen(kw_only=True, eq=False)
class Selection:
    """The outcome.

    Attributes:
        chosen: the chosen backend's verdict, or None.
        rows: one for each backend and broken plugin.
        companion: the verdict on the backend that computes dense pieces beside the chosen one, where ranks share a
            sequence and the chosen one takes whole layouts.
    """

    chosen: Verdict | None
    rows: tuple[BackendRow, ...]
    companion: Verdict | None = None


def select(request: Request, registry: Registry) -> Selection:
    """Ask every backend and choose: the one asked for by name, or the best ranked that accepts.

    Raises:
        ConfigError: for the name of an unknown backend, in `backend` or in `backend_options`, and as `judge`.
        PluginError: for a broken plugin, where the registry is strict.
    """
    check_names(request.config, registry)
    verdicts = {name: judge(registered, request) for name, registered in registry.backends.items()}
    dense = [v.registered.spec for v in verdicts.values() if v.accepts and takes_dense(v.registered.spec)]
    if not dense:
        verdicts = {name: _alone(verdict, request) for name, verdict in verdicts.items()}
    usable = [verdict.registered.spec for verdict in verdicts.values() if verdict.accepts]
    faults: list[PluginRow] = []
    if request.config.backend == AUTO:
        # What could not be judged has its place among the others: it may be what such a card would run.
        candidates = [v.registered.spec for v in verdicts.values() if v.accepts or _is_unjudged(v, request)]
        order, faults = registry.rank(request, candidates)
        chosen = next((verdicts[name] for name in order if verdicts[name].accepts), None)
    else:
        order = (request.config.backend, *(s.name for s in usable if s.name != request.config.backend))
        chosen = verdicts[request.config.backend]
        chosen = chosen if chosen.accepts else None
    companion = None
    if chosen is not None and _needs_companion(chosen.registered.spec, request):
        ranked, more = registry.rank(request, dense)
        companion = verdicts[ranked[0]]
        faults += [fault for fault in more if fault not in faults]
    rest = tuple(name for name in verdicts if name not in order)
    rows = [_row(verdicts[name], request, registry, is_chosen=verdicts[name] is chosen) for name in (*order, *rest)]
    if chosen is not None and request.config.seq_len is None:
        name, told = _at_a_length(request, registry, usable, chosen)
        rows = [_told(row, told) if row.name == name and told else row for row in rows]
    broken = [row for row in rows if row.status == "broken"] + list(plugin_rows((*registry.plugins, *faults)))
    if registry.strict and broken:
        raise PluginError("; ".join(f"{row.name} of {row.distribution} {row.version}: {row.detail}" for row in broken))
    rows = [row for row in rows if row.status != "broken"] + broken
    return Selection(chosen=chosen, rows=tuple(rows), companion=companion)


def _at_a_length(
    request: Request, registry: Registry, usable: Sequence[BackendSpec], chosen: Verdict
) -> tuple[str, str]:
    """What would change if the length were known: a backend, and what is to be said of it, "" if nothing would."""
    config = attrs.evolve(request.config, seq_len=_ANY_LENGTH * request.config.ring_size)
    known, name = attrs.evolve(request, config=config), chosen.registered.spec.name
    if request.config.backend == AUTO:
        (first, *_), _ = registry.rank(known, usable)
        if first != name:
            return first, "would be chosen if seq_len were given"
    try:
        kernel = judge(chosen.registered, known).kernel
    except ConfigError:  # at a length that nobody has asked for
        return name, ""
    is_other = kernel not in ("", chosen.kernel)  # "": it refuses
    return name, f"would take its kernel {kernel!r} if seq_len were given" if is_other else ""


def _told(row: BackendRow, what: str) -> BackendRow:
    return attrs.evolve(row, detail=f"{row.detail}; {what}" if row.detail else what)


def takes_dense(spec: BackendSpec) -> bool:
    """Its kernel is one for dense pieces; else one for whole layouts."""
    return "dense" in spec.capabilities.get("layouts", ())


def _leaves_blocks(spec: BackendSpec, request: Request) -> bool:
    """Its kernel is one for dense pieces alone, or the tables of blocks are made at every call."""
    return takes_dense(spec) and ("block" not in spec.capabilities["layouts"] or "dynamic_tables" in request.needs)


def _needs_companion(spec: BackendSpec, request: Request) -> bool:
    return "context_parallel" in request.needs and not takes_dense(spec)


def _alone(verdict: Verdict, request: Request) -> Verdict:
    """The verdict where no backend takes dense pieces."""
    if not verdict.accepts or not _needs_companion(verdict.registered.spec, request):
        return verdict
    refusal = Refusal(
        "companion",
        "another backend for dense pieces over the rows that other ranks send",
        "none that takes this request",
        "see the other rows",
    )
    return attrs.evolve(verdict, kernel="", refusals=(refusal,))


def judge(registered: RegisteredBackend, request: Request) -> Verdict:
    """What a backend says about `request`; it is imported and asked only if its manifest admits the request.

    Raises:
        ConfigError: for an option that the manifest does not name, or a value that the backend does not take.
    """
    spec = registered.spec
    check_keys(request.options(spec.name), spec.options, name=f"backend_options[{spec.name!r}]")
    refusals = [*device_refusals(request), *capability_refusals(request, spec), *requirement_refusals(spec)]
    if refusals:
        return Verdict(registered=registered, refusals=tuple(refusals))
    try:
        target = import_target(spec.target)
        backend = cast(Backend, target() if isinstance(target, type) else target)
        own = _checked(spec.name, backend.refusals(request))
        kernel = "" if own else _kernel_name(backend.pin(request))
    except ConfigError as error:
        if request.options(spec.name):
            raise  # the backend's judgement of the options that the user gave it
        return Verdict(registered=registered, fault=f"raised {describe(error)}")
    except PluginError as error:
        return Verdict(registered=registered, fault=str(error))
    except PLUGIN_FAULTS as error:  # a broken backend becomes a row with its cause; the others stay usable
        return Verdict(registered=registered, fault=f"raised {describe(error)}")
    return Verdict(registered=registered, backend=backend, kernel=kernel, refusals=own)


def plugin_rows(plugins: Iterable[PluginRow]) -> Iterator[BackendRow]:
    """The broken among plugins, as rows of a plan."""
    for plugin in plugins:
        if plugin.status == "broken":
            yield BackendRow(
                name=plugin.name,
                status="broken",
                distribution=plugin.distribution,
                version=plugin.version,
                detail="; ".join(plugin.causes),
            )


def _row(verdict: Verdict, request: Request, registry: Registry, *, is_chosen: bool) -> BackendRow:
    source, spec = verdict.registered.source, verdict.registered.spec
    status: Any = "chosen" if is_chosen else "broken" if verdict.fault else "refused" if verdict.refusals else "usable"
    if _is_unjudged(verdict, request):
        status = "unjudged"

    def accepts(changed: Request) -> bool:
        others = () if not _needs_companion(spec, changed) else registry.backends.values()
        dense = (other for other in others if takes_dense(other.spec))
        try:
            return judge(verdict.registered, changed).accepts and (
                not others or any(judge(other, changed).accepts for other in dense)
            )
        except ConfigError:
            return False

    manifest = verdict.refusals if verdict.backend is None else ()  # a backend that was asked had been admitted
    return BackendRow(
        name=spec.name,
        status=status,
        kernel=verdict.kernel,
        refusals=verdict.refusals,
        near_miss=near_miss(spec, request, manifest, accepts) if verdict.refusals else None,
        distribution=source.distribution,
        version=source.version,
        detail=verdict.fault or "; ".join(verdict.registered.notes),
        slow=spec.slow,
        blocks_by_core=_leaves_blocks(spec, request),
    )


def _is_unjudged(verdict: Verdict, request: Request) -> bool:
    """On a card that is not here: nothing speaks against the backend but what this machine lacks.

    A fault counts as that: it may have asked the card.
    """
    lacks = bool(verdict.fault) or {refusal.code for refusal in verdict.refusals} == {NOT_INSTALLED}
    return request.device.is_assumed and lacks


def _checked(name: str, answer: object) -> tuple[Refusal, ...]:
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise TypeError(f"{name}.refusals() returned {answer!r}, not an iterable of Refusal")
    refusals = tuple(answer)
    for refusal in refusals:
        if not isinstance(refusal, Refusal):
            raise TypeError(f"{name}.refusals() returned {refusal!r} among its items, not a Refusal")
    return refusals


def _kernel_name(answer: object) -> str:
    if not isinstance(answer, str):
        raise TypeError(f"pin() returned {answer!r}, not the name of a kernel")
    return answer


def check_names(config: AttentionConfig, registry: Registry) -> None:
    """Raise `ConfigError` for the name of an unknown backend, in `backend` or in `backend_options`."""
    known = tuple(registry.backends)
    named = [("backend", config.backend)] if config.backend != AUTO else []
    named += [("backend_options", name) for name in config.backend_options]
    for where, name in named:
        if name not in known:
            broken = [f"{row.name} ({row.distribution})" for row in registry.plugins if row.status == "broken"]
            hint = f"; broken plugins: {', '.join(broken)} (see `dilated-attention plugins`)" if broken else ""
            raise ConfigError(
                f"{where}: unknown backend {name!r}{did_you_mean(name, (AUTO, *known))}; "
                f"registered are {', '.join(known) or 'none'}{hint}"
            )
