"""The conformance kit: one table, or one pytest class, that says whether a backend does all that it declares.

Held against float64 (`dilated_attention.reference`) on the grid that the backend's capabilities declare: out, lse, dq,
dk, dv and gradients through lse; what must hold without an oracle (weights add up to 1, no future leaks, one token
moves exactly the rows that see it); lengths, offsets, strides, memory, determinism; PyTorch's operators, compilation,
CUDA graphs, streams and devices; and the contract (what is declared is accepted, what is not is refused, never a
crash).

With pytest:

    class TestMine(Conformance):
        backend = "mine"

Without: `run("mine")`, or `dilated-attention conformance mine`. As a plugin of pytest, without a file of tests:
`pytest -p dilated_attention.registry.conformance.pytest_plugin --conformance mine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs

from .kit import Kit, Outcome, Trial
from .measure import Finding
from .report import Report, Row
from .settings import DEFAULTS, KitSettings

__all__ = ["Conformance", "Finding", "Kit", "KitSettings", "Outcome", "Report", "Row", "Trial", "run"]


def run(
    backend: str,
    settings: KitSettings = DEFAULTS,
    *,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> Report:
    """Make every check that applies to `backend`.

    Args:
        backend: its name.
        settings: how to test it.
        progress: called after each check with the number made and the number of all.
        fields: fields of `KitSettings`, instead of those of `settings`: `run("mine", quick=True)`.

    Returns:
        The report; `print(report)` shows the table, `report.passed` says whether all is well.

    Raises:
        ConfigError: for an unknown backend, pattern or option, or where no declared device is here.
    """
    kit = Kit(backend, attrs.evolve(settings, **fields))
    trials = list(kit.trials())
    outcomes = []
    for number, trial in enumerate(trials, start=1):
        outcomes.append(trial.run())
        if progress is not None:
            progress(number, len(trials))
    return Report.of(kit, outcomes)


class Conformance:
    """Subclass it as `Test...`, name the backend, and pytest runs the kit: one test for each check on each case.

    Attributes:
        backend: the backend's name. An attribute with the name of a field of `KitSettings` sets that: `quick = True`.
    """

    backend: ClassVar[str]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest while it collects: one parameter for each check on each case."""
        if "trial" in metafunc.fixturenames:
            names = [field.name for field in attrs.fields(KitSettings) if hasattr(self, field.name)]
            kit = Kit(self.backend, KitSettings(**{name: getattr(self, name) for name in names}))
            trials = list(kit.trials())
            metafunc.parametrize("trial", trials, ids=[str(trial).replace(" ", "-") for trial in trials])

    def test_conformance(self, trial: Trial) -> None:
        """The check holds on the case."""
        outcome = trial.run()
        if outcome.skipped:
            import pytest

            pytest.skip(outcome.skipped)
        assert outcome.passed, str(outcome)
