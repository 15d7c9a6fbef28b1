"""`benchmarks.ring_profile`: how a trace is read."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ring_profile import table_of
from benchmarks.ring_trace import (
    STEP,
    gaps_of,
    kernels_of,
    plain_kernel,
    plain_range,
    steps_of,
    summarised,
    timeline_of,
)

MERGE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, ...>"


def host(name: str, start: float, end: float, kind: str = "user_annotation", **arguments: object) -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": start, "dur": end - start, "tid": 7, "args": arguments}


def launched(name: str, at: float, start: float, end: float, number: int) -> list[dict[str, Any]]:
    """A launch by the host, and the kernel."""
    launch = host("cuLaunchKernel", at, at + 2, "cuda_driver", correlation=number)
    return [launch, host(name, start, end, "kernel", correlation=number)]


EVENTS: list[dict[str, Any]] = [
    host(STEP, 1000, 1300),
    host("dilated_attention triton forward (plan 1f)", 1005, 1100),
    host("own keys", 1020, 1040),
    host("ring step 1 receive from 0", 1050, 1090),
    host("aten::add", 1020, 1030, "cpu_op"),
    *launched("attend", 1025, 1030, 1130, 1),
    *launched("ncclDevKernel_SendRecv(...)", 1045, 1050, 1150, 2),
    *launched(MERGE, 1095, 1180, 1200, 3),
    *launched("Memset (Device)", 1150, 1200, 1205, 4),
    {"name": "process_name"},
]


def test_a_trace_is_told_by_range_and_kernel() -> None:
    (step,) = steps_of(EVENTS)
    assert [(work.name[:6], work.inside) for work in step.work] == [
        ("attend", "own keys"), ("ncclDe", "forward"), ("void a", "forward"), ("Memset", "elsewhere"),
    ]  # fmt: skip
    found = summarised([step, step])
    assert found == pytest.approx(
        {
            "step": 300, "device: computing": 125, "device: NCCL": 100, "device: NCCL while computing": 80,
            "device: before the first kernel": 30, "device: idle between kernels": 50,
            "device: after the last kernel": 95, "device in own keys": 100, "device in forward": 20,
            "device in elsewhere": 5, "host in forward": 95, "host in own keys": 20, "host in ring step 1": 40,
        }
    )  # fmt: skip
    assert kernels_of([step])[0] == ("own keys", "attend", 1, 100)
    assert [(at, us) for at, us, *_ in gaps_of(step)] == [(0, 30), (130, 50), (205, 95)]
    assert timeline_of(step)[1] == (20, 20, "own keys")


def test_names_are_cut_to_what_they_tell() -> None:
    assert plain_kernel(MERGE) == "vectorized_elementwise_kernel:CUDAFunctor_add"[:44]
    assert plain_kernel("_attend") == "_attend"
    assert plain_range("dilated_attention triton backward (plan 1f2e)") == "backward"
    assert plain_range("ring step 2 receive from 0, 3") == "ring step 2"


def test_the_table_has_a_column_for_each_rank_and_way() -> None:
    (step,) = steps_of(EVENTS)
    traced = {
        "summary": summarised([step]), "kernels": kernels_of([step]), "gaps": gaps_of(step),
        "timeline": timeline_of(step),
    }  # fmt: skip
    figures = {
        "error": 1e-3, "single": {"ring": 2.0, "alone": 1.0}, "in a row": {"ring": 2.0, "alone": 1.9},
        "traced": {"ring": traced, "alone": traced},
    }  # fmt: skip
    said = table_of("longnet", [{"longnet": figures}] * 2)
    assert "efficiency 0.500" in said
    assert "efficiency 0.950" in said
    assert "    ring 0   alone 0    ring 1   alone 1" in said
    assert "idle at 130 for 50: attend -> vectorized_elementwise_kernel:CUDAFunctor_ad" in said
