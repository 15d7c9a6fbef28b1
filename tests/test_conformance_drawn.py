"""Cases that the conformance kit draws at random beside its grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from dilated_attention import ConfigError, Pattern
from dilated_attention.registry.conformance import Kit, KitSettings, Outcome, Report
from dilated_attention.registry.conformance.checks import LEARNED
from dilated_attention.registry.conformance.drawn import LONGEST
from dilated_attention.registry.conformance.grid import DTYPES, LONGER

from . import plain_backends, wrong_backends
from .conftest import Invoke
from .distributions import install_backend
from .test_conformance import WRONG
from .test_conformance_wrong import DENSE, registry_of


def drawn(count: int, seed: int = 0, **fields: Any) -> Kit:
    return Kit("sdpa", KitSettings(device="cpu", quick=True, drawn=count, seed=seed, **fields))


def outcomes(kit: Kit, check: str) -> list[Outcome]:
    return [trial.run() for trial in kit.trials() if trial.check.name == check and trial.case in kit.drawn]


def kinds(pattern: Pattern) -> set[str]:
    """The kinds of a pattern and of what it is made of."""
    of = getattr(pattern, "of", ())
    return {pattern.kind}.union(*map(kinds, [of] if isinstance(of, Pattern) else of))


def test_a_seed_and_a_number_give_a_case() -> None:
    first, more, other = drawn(5, 3).drawn, drawn(9, 3).drawn, drawn(5, 4).drawn
    assert len(first) == 5
    assert more[:5] == first
    assert not {*first} & {*other}
    assert [case.pattern_name for case in first] == [f"drawn {number} of seed 3" for number in range(5)]
    assert drawn(0).drawn == ()


def test_all_that_is_declared_is_drawn_and_nothing_else() -> None:
    cases = drawn(300).drawn
    assert set().union(*(kinds(case.pattern) for case in cases)) == {
        "full", "dilated", "local", "global", "strided", "random", "union", "sum", "head_shard",
    }  # fmt: skip
    assert {case.dtype for case in cases} == {*DTYPES}
    assert {case.is_causal for case in cases} == {True, False}
    lengths = {case.q_len for case in cases}
    assert min(lengths) == 1
    assert LONGER < max(lengths) <= LONGEST
    declared = {"device_types": ("cpu",), "dtypes": ("float32",), "head_dims": (40,), "layouts": ("branch",)}
    registry = registry_of(plain_backends.Dense, declared)
    narrow = Kit("dense", KitSettings(registry=registry, quick=True, drawn=100)).drawn
    assert 5 < len(narrow) < 100
    assert {(case.dtype, case.head_dim, case.is_causal) for case in narrow} == {("float32", 40, False)}
    assert set().union(*(kinds(case.pattern) for case in narrow)) <= {"full", "dilated", "strided", "sum", "head_shard"}


def test_every_check_is_made_on_what_is_drawn() -> None:
    kit = drawn(8)
    of_grid = {trial.check.name for trial in kit.trials() if trial.case in kit.grid}
    of_drawn = {trial.check.name for trial in kit.trials() if trial.case in kit.drawn}
    assert of_drawn >= {"builds", "out", "dv", "future", "ragged", "offsets", "documents", "decoding"}
    assert of_drawn <= of_grid
    assert not {case.pattern_name for case in kit.templates} & {case.pattern_name for case in kit.drawn}


def test_what_the_grid_does_not_see_is_found_and_told_with_its_pattern() -> None:
    target = wrong_backends.HoldsTwoHundred
    registry = registry_of(target, DENSE)
    kit = Kit(target.__name__.lower(), KitSettings(registry=registry, quick=True, drawn=10))
    grid = [trial.run() for trial in kit.trials() if trial.check.name == "out" and trial.case in kit.grid]
    assert all(outcome.passed for outcome in grid)
    found = outcomes(kit, "out")
    wrong = [outcome for outcome in found if not outcome.passed]
    assert 0 < len(wrong) < len(found)
    (case, *_) = [case for case in kit.drawn if str(case) == wrong[0].case]
    assert case.kv_len > target.room
    heading, pattern, *findings = str(wrong[0]).splitlines()
    assert heading == f"out: {case}"
    assert pattern == f"    {case.pattern!r}"
    assert findings
    report = Report.of(kit, [*grid, *found])
    assert f"cases (quick grid) and {len(kit.drawn)} drawn" in str(report).splitlines()[0]
    assert pattern in str(report)
    (failure, *_) = json.loads(json.dumps(report.to_dict()))["failures"]
    assert failure["pattern"] == repr(case.pattern)


# A union of many, causal, and one of two in half precision.
@pytest.mark.parametrize("number", [17, 25])
def test_what_is_drawn_for_ours_passes(number: int) -> None:
    kit = drawn(number + 1)
    (case,) = (case for case in kit.drawn if case.pattern_name == f"drawn {number} of seed 0")
    of_gate = attrs.evolve(case, pattern_name=LEARNED, batch=1)
    found = [
        trial.run()
        for trial in kit.trials()
        if trial.case is not None and (trial.case.pattern_name == case.pattern_name or str(trial.case) == str(of_gate))
    ]
    assert len(found) > 20
    assert "chosen-blocks" in {outcome.check for outcome in found}
    assert all(outcome.passed for outcome in found), "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["sdpa", "math", "reference"])
def test_fifty_that_are_drawn_for_ours_pass(backend: str) -> None:
    kit = Kit(backend, KitSettings(device="cpu", quick=True, drawn=50, seed=1))
    for trial in kit.trials():
        if trial.case is not None and trial.case.pattern_name.startswith(("drawn", LEARNED)):
            outcome = trial.run()
            assert outcome.passed, str(outcome)


@pytest.mark.parametrize(("field", "given"), [("drawn", -1), ("seed", -1), ("drawn", 2.5), ("seed", "x")])
def test_numbers_that_are_none_are_an_error(field: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"KitSettings\.{field} must be (at least 0, got -1|an integer, got )"):
        KitSettings(**{field: given})


def test_the_command_takes_them(tmp_path: Path, invoke_at: Invoke) -> None:
    code = WRONG + "    def build(self, request): raise RuntimeError('not today')\n"
    capabilities = {"device_types": ["cpu"], "dtypes": ["float32"], "head_dims": [24], "layouts": ["dense"]}
    install_backend(tmp_path, "sick", backend="sick", capabilities=capabilities, code=code)
    done = invoke_at(tmp_path, "conformance", "sick", "--quick", "--drawn", "40", "--seed", "2")
    assert (done.returncode, done.stderr) == (1, "")
    number = int(done.stdout.partition(" drawn")[0].split()[-1])
    assert 0 < number < 40
    wrong = invoke_at(tmp_path, "conformance", "sick", "--drawn", "-1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "at least 0" in wrong.stderr
