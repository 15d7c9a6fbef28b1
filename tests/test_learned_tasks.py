"""What the learned attention is worth: recall from far away and language, against dense, local and random attention."""

from __future__ import annotations

import pytest

from benchmarks.learned import Budget, language_rows, recall_rows
from dilated_attention.demo.text import standard_library
from dilated_attention.demo.training import one_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_recall_keeps_the_mass_and_the_accuracy_of_dense_attention() -> None:
    with one_thread():
        rows = recall_rows(Budget(), "cpu")
    assert rows["dense"]["accuracy"] > 0.9  # there is something to lose
    assert rows["learned"]["mass"] >= 0.9
    assert rows["learned"]["accuracy"] >= rows["dense"]["accuracy"] - 0.02
    for other in ("local", "random"):
        assert rows[other]["accuracy"] < 0.5 * rows["dense"]["accuracy"]


def test_language_costs_at_most_one_and_a_half_percent() -> None:
    with one_thread():
        rows = language_rows(Budget(), standard_library(), "cpu")
    assert rows["dense"]["bits"] < 4  # it has learned
    assert rows["learned"]["bits"] <= 1.015 * rows["dense"]["bits"]
    assert rows["learned"]["bits"] < rows["random"]["bits"]
