"""The kit itself: one backend's grid, each check on each case, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import attrs

from ...core.attention import Attention
from ...core.checks import did_you_mean
from ...core.errors import ConfigError, NoBackendError, PluginError
from ..build import build_from
from ..capabilities import covers
from ..discovery import default_registry
from ..plugins import PLUGIN_FAULTS, describe
from ..selection import judge
from .case import Case, Subject
from .checks import BUILDS, CHECKS, Check
from .drawn import drawn_cases
from .grid import FEW, USUAL_DTYPES, admitted, candidates, devices_of, patterns_of, request_of
from .measure import Finding
from .settings import DEFAULTS, KitSettings


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """What came of one check on one case.

    Attributes:
        check: its name.
        case: in words, or an empty string for a check of the backend as such.
        pattern: of the case, as Python has it.
        findings: what was looked at.
        skipped: why it was not made, or an empty string.
        seconds: what it took.
    """

    check: str
    case: str = ""
    pattern: str = ""
    findings: tuple[Finding, ...] = ()
    skipped: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Every finding passed, or the check was not made."""
        return all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding | None:
        """The finding nearest to its bound or furthest beyond."""
        return max(self.findings, key=lambda finding: finding.severity, default=None)

    def __str__(self) -> str:
        failed = [str(finding) for finding in self.findings if not finding.passed]
        of = [self.pattern] if self.pattern and failed else []
        return "\n".join([f"{self.check}: {self.case}".rstrip(": "), *(f"    {line}" for line in (*of, *failed))])


@attrs.frozen(eq=False)
class Trial:
    """A check on a case, ready to be made."""

    kit: Kit
    check: Check
    case: Case | None = None

    def __str__(self) -> str:
        return f"{self.check.name}-{self.case}" if self.case else self.check.name

    def run(self) -> Outcome:
        """Make the check; whatever the backend raises is a finding."""
        start = time.perf_counter()
        case, pattern = (str(self.case), repr(self.case.pattern)) if self.case else ("", "")
        outcome = partial(Outcome, check=self.check.name, case=case, pattern=pattern)
        findings: list[Finding] = []
        try:
            skipped = self.check.why_not(self.kit, self.case)  # may build, to see what the kernel can do
            if skipped:
                return outcome(skipped=skipped)
            subject: Any = self.kit if self.case is None else self.kit.subject(self.case)
            findings.extend(self.check.run(subject))
        except NotBuilt as error:
            if error.reason:
                return outcome(skipped=f"refused: {error.reason}")
            if self.check.name != BUILDS and self.case in self.kit.cases:  # the check of that name tells it
                return outcome(skipped="the case cannot be built")
            findings.append(Finding(what="build_attention", problem=str(error)))
        except PLUGIN_FAULTS as error:  # the backend's, and exactly what the kit is there to tell
            findings.append(Finding(what="the call", problem=f"raised {describe(error)}"))
        return outcome(findings=tuple(findings), seconds=time.perf_counter() - start)


class NotBuilt(Exception):  # noqa: N818 - no error of a caller: it only carries the reason to the check that tells it
    """A case could not be built; `reason` is the backend's own, where it refused."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Kit:
    """One backend's grid and checks.

    Args:
        backend: its name.
        settings: how to test it.

    Raises:
        ConfigError: for an unknown backend or pattern, options without names, or where no declared device is here.
    """

    def __init__(self, backend: str, settings: KitSettings = DEFAULTS) -> None:
        self.name = backend
        self.registry = default_registry() if settings.registry is None else settings.registry
        if backend not in self.registry.backends:
            known = tuple(self.registry.backends)
            raise ConfigError(
                f"unknown backend {backend!r}{did_you_mean(backend, known)}; known are {', '.join(known)}"
            )
        if not isinstance(settings.options, Mapping | None):
            raise ConfigError(f"options must map option names of {backend!r} to values, got {settings.options!r}")
        self.registered = self.registry.backends[backend]
        self.quick, self.large, self.options = settings.quick, settings.large, dict(settings.options or {})
        self.devices = devices_of(self.registered.spec, settings.device)
        self.refusals: dict[str, int] = {}
        self._patterns = patterns_of(self.registry, settings.patterns)
        self._drawn, self._seed = settings.drawn, settings.seed
        self._added = set(self._patterns) - set(patterns_of(self.registry, ()))
        self._last: tuple[Case, Subject] | None = None

    @property
    def capabilities(self) -> Mapping[str, Any]:
        """What the backend declares."""
        return self.registered.spec.capabilities

    def declares(self, axis: str, needed: object = True) -> bool:
        """Whether the backend declares `needed` of `axis`."""
        return covers(self.capabilities.get(axis, False), needed)

    @cached_property
    def grid(self) -> tuple[Case, ...]:
        """Every candidate that is declared and that the backend does not refuse by itself."""
        spec, options = self.registered.spec, self.options
        found = self._admitted(candidates(spec, self.devices, self._patterns, quick=self.quick, options=options))
        if not found:
            refused = "; ".join(self.refusals) or "no dtype, head_dim and layout of the kit is declared"
            raise ConfigError(f"backend {self.name!r} takes no case of the kit on {', '.join(self.devices)}: {refused}")
        return found

    @cached_property
    def drawn(self) -> tuple[Case, ...]:
        """Those that are drawn at random and that the backend takes."""
        spec, count, seed = self.registered.spec, self._drawn, self._seed
        cases = drawn_cases(spec, self.devices, self.registry, count=count, seed=seed, options=self.options)
        return self._admitted(cases)

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """The grid and what is drawn beside it."""
        return self.grid + self.drawn

    def _admitted(self, cases: Iterable[Case]) -> tuple[Case, ...]:
        found = []
        for case in cases:
            belongs, refusals = admitted(self.registered, case)
            if belongs:
                found.append(case)
            for refusal in refusals:
                self.refusals[str(refusal)] = self.refusals.get(str(refusal), 0) + 1
        return tuple(found)

    @cached_property
    def templates(self) -> tuple[Case, ...]:
        """One sound case for each pattern of the grid."""
        return tuple({case.pattern_name: case for case in reversed(self.grid)}.values())[::-1]

    def trials(self) -> Iterator[Trial]:
        """Every check on every case that it is made on, case by case."""
        for check in CHECKS:
            if check.where == "backend":
                yield Trial(self, check)
        few, ones = {*self._few(), *self.drawn}, self._ones()
        for case in self.cases:
            wheres = ("every case", "every causal case") if case.is_causal else ("every case",)
            for check in CHECKS:
                if check.where in wheres or (check.where == "few cases" and case in few):
                    yield from self._trial(check, case)
        for case in ones:
            yield from (trial for check in CHECKS if check.where == "one case" for trial in self._trial(check, case))

    def _trial(self, check: Check, case: Case) -> Iterator[Trial]:
        yield Trial(self, check, check.change(self, case))

    def _few(self) -> set[Case]:
        """For each device, dtype (one, if quick), causality and one of a few patterns the first case."""
        dtypes = {case.dtype for case in self.grid}
        if self.quick:
            dtypes = {*sorted(dtypes, key=USUAL_DTYPES.index)[:1]}
        first: dict[tuple[object, ...], Case] = {}
        for case in self.grid:
            if case.dtype not in dtypes:
                continue
            if case.pattern_name in FEW or case.pattern_name in self._added:
                first.setdefault((case.device, case.dtype, case.is_causal, case.pattern_name), case)
        return set(first.values()) or set(self.grid[:1])

    def _ones(self) -> tuple[Case, ...]:
        """For each device one case: dilated, causal, in float32, as far as these are there."""
        chosen: dict[str, tuple[tuple[bool, ...], Case]] = {}
        for case in self.grid:
            rank = (case.pattern_name == "dilated", case.is_causal, case.dtype == "float32")
            if case.device not in chosen or rank > chosen[case.device][0]:
                chosen[case.device] = (rank, case)
        return tuple(case for _, case in chosen.values())

    def subject(self, case: Case) -> Subject:
        """The case with its attention built; the last one is kept.

        Raises:
            NotBuilt: when it cannot be built.
        """
        if self._last is None or self._last[0] != case:
            self._last = None
            self._last = (case, Subject(case, self._build(case), self.capabilities))
        return self._last[1]

    def _build(self, case: Case) -> Attention:
        try:
            return build_from(case.config(self.name), self.registry)
        except NoBackendError as error:
            refusals = judge(self.registered, request_of(case, self.name)).refusals
            raise NotBuilt(str(error), "; ".join(map(str, refusals))) from error
        except (ConfigError, PluginError) as error:
            raise NotBuilt(str(error)) from error
