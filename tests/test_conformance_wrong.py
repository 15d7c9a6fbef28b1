"""The conformance kit against backends that are wrong on purpose: each is caught, by the check that should.

And, through the class that third parties use, against one that is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dilated_attention.registry import BackendSpec, Range, hookimpl
from dilated_attention.registry.conformance import Conformance, Kit, KitSettings, Outcome, run
from dilated_attention.registry.discovery import Registry

from . import meddling_backends, plain_backends, wrong_backends
from .registries import registry_with

DENSE: dict[str, Any] = {
    "device_types": ("cpu",),
    "dtypes": ("float32",),
    "head_dims": (24, 48, 64, 72, 256),
    "layouts": ("dense",),
    "gqa": True,
    "causal": True,
    "offsets": True,
    "unequal_lengths": True,
    "backward": True,
    "lse": True,
    "deterministic": ("forward", "backward"),
}
WHOLE = {**DENSE, "layouts": ("branch", "block"), "weights": True, "per_head": True, "dlse": True}
RINGS = {**WHOLE, "context_parallel": True, "staged_blocks": True}
DROPPING = {**WHOLE, "dropout": True}

# The fault, and the checks that have to find it.
FAULTS: list[tuple[type, dict[str, Any], set[str]]] = [
    (wrong_backends.StrictlyCausal, DENSE, {"one-token", "out"}),
    (wrong_backends.SeesOneAhead, DENSE, {"future", "one-token"}),
    (wrong_backends.IgnoresScale, DENSE, {"out", "lse"}),
    (wrong_backends.ScalesByHeadDim, {**DENSE, "head_dims": (64, 128)}, {"scale", "negative-scale"}),
    (wrong_backends.WholeScalesByHeadDim, WHOLE, {"scale"}),
    (wrong_backends.ScalesBySize, WHOLE, {"negative-scale"}),
    (wrong_backends.LseInBaseTwo, DENSE, {"lse", "lse-base"}),
    (wrong_backends.LseNegated, DENSE, {"lse", "lse-base"}),
    (wrong_backends.LseRounded, DENSE, {"lse"}),
    (wrong_backends.LseWithoutWeights, WHOLE, {"lse"}),
    (wrong_backends.CountsOnce, WHOLE, {"out", "lse"}),
    (wrong_backends.SumsWithoutMaximum, DENSE, {"large-scores"}),
    (wrong_backends.SumsFromZero, DENSE, {"large-scores"}),
    (wrong_backends.DividesByAll, DENSE, {"ones", "out"}),
    (wrong_backends.LseWithRowsFirst, DENSE, {"returns"}),
    (wrong_backends.LseInFloat64, DENSE, {"returns"}),
    (wrong_backends.ReturnsOutAlone, DENSE, {"returns"}),
    (wrong_backends.ForgetsDv, DENSE, {"returns"}),
    (wrong_backends.KeepsAGraph, DENSE, {"returns"}),
    (wrong_backends.OwnLse, DENSE, {"dq", "dk", "dv"}),
    (wrong_backends.SumForDk, DENSE, {"dk"}),
    (wrong_backends.UnscaledDq, DENSE, {"dq"}),
    (wrong_backends.HalvedDv, DENSE, {"dv"}),
    (wrong_backends.HeadsTakeTurns, DENSE, {"out", "one-token"}),
    (wrong_backends.ReadsInOrder, DENSE, {"strided"}),
    (wrong_backends.ReadsInOrder, {**DENSE, "varlen": True}, {"documents"}),
    (wrong_backends.OneStrideForAll, DENSE, {"strided"}),
    (wrong_backends.DropsTheLastKey, DENSE, {"ragged", "one-token"}),
    (wrong_backends.HoldsAThousand, DENSE, {"long-rows"}),
    (wrong_backends.ColumnsInPairs, {**DENSE, "head_dims": Range(2, 128)}, {"out", "dq"}),
    (wrong_backends.ColumnsInPairs, {**DENSE, "head_dims": (24, 35)}, {"lse"}),
    (wrong_backends.IgnoresOffsets, WHOLE, {"offsets"}),
    (wrong_backends.AlignsAtTheStart, WHOLE, {"unequal-lengths"}),
    (wrong_backends.PartForWhole, RINGS, {"ring", "staged-blocks"}),
    (wrong_backends.StagedByPosition, RINGS, {"staged-blocks"}),
    (wrong_backends.OwnLse, DENSE, {"ring"}),
    (wrong_backends.IgnoresDlse, WHOLE, {"through-lse"}),
    (wrong_backends.NanOnEmptyRows, WHOLE, {"empty-rows"}),
    (wrong_backends.Restless, DENSE, {"same-bits"}),
    (wrong_backends.ShortSums, {**DENSE, "dtypes": ("bfloat16",)}, {"out", "lse"}),
    (wrong_backends.LeavesGaps, WHOLE, {"fresh-memory"}),
    (meddling_backends.KeepsItsBuffer, DENSE, {"own-results"}),
    (meddling_backends.WritesIntoInputs, DENSE, {"own-results"}),
    (meddling_backends.KeepsItsInputs, DENSE, {"released"}),
    (meddling_backends.Seeds, DENSE, {"random-state"}),
    (meddling_backends.DrawsInBackward, DENSE, {"random-state"}),
    (meddling_backends.RoundsProducts, DENSE, {"process-state"}),
    (wrong_backends.CrashesAt48, DENSE, {"out"}),
    (wrong_backends.CrashesWhenAsked, DENSE, {"declared"}),
    (wrong_backends.NeverAccepts, DENSE, {"declared"}),
    (wrong_backends.PinsAnother, DENSE, {"builds"}),
    (wrong_backends.CannotBuild, DENSE, {"builds"}),
    (wrong_backends.CannotDrop, {**DENSE, "dropout": True}, {"dropout"}),
    (wrong_backends.DropsNothing, DROPPING, {"dropout"}),
    (wrong_backends.DropsWithoutScaling, DROPPING, {"dropout"}),
]
# Every check that finds a fault, for those that few can see; all others must pass.
EXACTLY: dict[str, set[str]] = {
    "ScalesByHeadDim": {"scale", "negative-scale"},
    "WholeScalesByHeadDim": {"scale", "negative-scale"},
    "ScalesBySize": {"negative-scale"},
    "SumsWithoutMaximum": {"large-scores"},
    "SumsFromZero": {"large-scores"},
    "IgnoresOffsets": {"offsets", "empty-rows"},
    "AlignsAtTheStart": {"unequal-lengths", "offsets", "empty-rows", "decoding"},
    "PartForWhole": {"ring", "staged-blocks"},
    "StagedByPosition": {"staged-blocks"},
    "OneStrideForAll": {"strided"},
    "HoldsAThousand": {"long-rows"},
    "IgnoresDlse": {"through-lse", "scale", "negative-scale"},  # which send gradients through lse too
    "Restless": {"same-bits", "random-state", "one-token", "future"},
    "KeepsItsBuffer": {"own-results", "one-token", "ring", "decoding", "released"},  # a buffer has its call's graph
    "KeepsItsInputs": {"released"},
    "Seeds": {"random-state"},
    "DrawsInBackward": {"random-state"},
    "RoundsProducts": {"process-state"},
    "CrashesWhenAsked": {"declared"},
    "NeverAccepts": {"declared"},
    "PinsAnother": {"builds"},
    "DropsNothing": {"dropout"},
    "DropsWithoutScaling": {"dropout"},
}


def registry_of(target: type, capabilities: dict[str, Any]) -> Registry:
    """Our patterns and one backend."""
    name = target.__name__.lower()
    spec = BackendSpec(name=name, target=f"{target.__module__}:{target.__name__}", capabilities=capabilities)

    class Plugin:
        @hookimpl
        def dilated_attention_backends(self) -> list[BackendSpec]:
            return [spec]

    return registry_with(name, Plugin)


def kit_of(target: type, capabilities: dict[str, Any]) -> Kit:
    return Kit(target.__name__.lower(), KitSettings(registry=registry_of(target, capabilities), quick=True))


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """That of products, which one of the wrong changes."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class TestDense(Conformance):
    backend = "dense"
    quick = True
    registry = registry_of(
        plain_backends.Dense,
        {name: DENSE[name] for name in ("device_types", "dtypes", "layouts", "lse")} | {"head_dims": (24,)},
    )


def failing(kit: Kit, check: str) -> Outcome | None:
    """The first case on which a check fails."""
    outcomes = (trial.run() for trial in kit.trials() if trial.check.name == check)
    return next((outcome for outcome in outcomes if not outcome.passed), None)


def test_what_cannot_be_built_is_told_by_one_check_and_ends_no_other() -> None:
    """Whether a check applies may be asked of the built attention, as `through-lse` does."""
    kit = kit_of(wrong_backends.CannotBuild, DENSE)
    trials = [trial for trial in kit.trials() if trial.case is not None and trial.case.is_causal]
    through_lse = [trial.run() for trial in trials if trial.check.name == "through-lse"]
    assert {outcome.skipped for outcome in through_lse} == {"the case cannot be built"}
    assert not any(trial.run().passed for trial in trials if trial.check.name == "builds")


@pytest.mark.parametrize(("target", "capabilities", "checks"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_each_fault_is_caught_by_the_checks_that_should(
    target: type, capabilities: dict[str, Any], checks: set[str]
) -> None:
    kit = kit_of(target, capabilities)
    for check in sorted(checks):
        outcome = failing(kit, check)
        assert outcome is not None, f"{check} passes"
        assert str(outcome).startswith(check)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (wrong_backends.LseWithRowsFirst, "forward: returns lse of the shape (2, 131, 6), not (2, 6, 131)"),
        (wrong_backends.LseInFloat64, "forward: returns lse in torch.float64, not in torch.float32"),
        (wrong_backends.ReturnsOutAlone, "forward: returns a Tensor, not the 2 tensors out, lse"),
        (wrong_backends.ForgetsDv, "backward: returns 2 values, not the 3 tensors dq, dk, dv"),
        (wrong_backends.KeepsAGraph, "forward: returns out with a graph of its own"),
    ],
)
def test_what_a_kernel_returns_is_told_in_the_words_of_the_contract(target: type, says: str) -> None:
    assert says in str(failing(kit_of(target, DENSE), "returns"))


def test_a_scale_that_is_not_taken_is_told_with_what_to_do() -> None:
    outcome = failing(kit_of(wrong_backends.WholeScalesByHeadDim, WHOLE), "scale")
    assert "; if `out` passes, take piece.scale, not 1/sqrt(head_dim)" in str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "capabilities"),
    [(plain_backends.Dense, DENSE), (plain_backends.Whole, WHOLE), (plain_backends.Ring, RINGS)],
)
def test_those_that_the_wrong_ones_are_made_of_are_right(target: type, capabilities: dict[str, Any]) -> None:
    report = run(target.__name__.lower(), registry=registry_of(target, capabilities), quick=True)
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACTLY)
def test_a_fault_of_one_kind_fails_nothing_else(name: str) -> None:
    target, capabilities, _ = next(fault for fault in FAULTS if fault[0].__name__ == name)
    report = run(name.lower(), registry=registry_of(target, capabilities), quick=True)
    assert {row.check for row in report.rows if row.status == "failed"} == EXACTLY[name], str(report)
