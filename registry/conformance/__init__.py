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

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .kit import Kit, Outcome, Trial
from .measure import Finding
from .report import Report, Row

if TYPE_CHECKING:
    from ..discovery import Registry

__all__ = ["Conformance", "Finding", "Kit", "Outcome", "Report", "Row", "Trial", "run"]


def run(
    backend: str,
    *,
    registry: Registry | None = None,
    device: str | None = None,
    quick: bool = False,
    patterns: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    large: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Make every check that applies to `backend`.

    Args:
        backend: its name.
        registry: where it is registered; by default the process's own registry.
        device: the one to test on; by default one of each type that is declared and is here.
        quick: a smaller grid, of seconds instead of minutes.
        patterns: mappings of further patterns to test with (`{"kind": ...}`), beside the kit's own.
        options: of the backend, as `backend_options` has them.
        large: also try tensors of more than 2**31 elements, which takes several GB.
        progress: called after each check with the number made and the number of all.

    Returns:
        The report; `print(report)` shows the table, `report.passed` says whether all is well.

    Raises:
        ConfigError: for an unknown backend, pattern or option, or where no declared device is here.
    """
    kit = Kit(backend, registry=registry, device=device, quick=quick, patterns=patterns, options=options, large=large)
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
        backend: the backend's name.
        device: the one to test on; by default one of each type that is declared and is here.
        quick: a smaller grid, of seconds instead of minutes.
        patterns: mappings of further patterns to test with (`{"kind": ...}`), beside the kit's own.
        options: of the backend, as `backend_options` has them.
        large: also try tensors of more than 2**31 elements.
        registry: where the backend is registered; by default the process's own registry.
    """

    backend: ClassVar[str]
    device: ClassVar[str | None] = None
    quick: ClassVar[bool] = False
    patterns: ClassVar[Sequence[Mapping[str, Any]]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    large: ClassVar[bool] = False
    registry: ClassVar[Registry | None] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest while it collects: one parameter for each check on each case."""
        if "trial" in metafunc.fixturenames:
            kit = Kit(
                self.backend,
                registry=self.registry,
                device=self.device,
                quick=self.quick,
                patterns=self.patterns,
                options=self.options,
                large=self.large,
            )
            trials = list(kit.trials())
            metafunc.parametrize("trial", trials, ids=[str(trial).replace(" ", "-") for trial in trials])

    def test_conformance(self, trial: Trial) -> None:
        """The check holds on the case."""
        outcome = trial.run()
        if outcome.skipped:
            import pytest

            pytest.skip(outcome.skipped)
        assert outcome.passed, str(outcome)
