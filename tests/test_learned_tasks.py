"""What the learned attention is worth: recall from far away and language, against dense, local and random attention."""

from __future__ import annotations

import pytest
import torch

from benchmarks.learned import BLOCK, SEQ_LEN, Budget, Recall, language_rows, recall_rows
from dilated_attention.demo.text import standard_library
from dilated_attention.demo.training import one_thread

on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)


@pytest.mark.timeout(3600)
@on_each_device
def test_recall_keeps_the_mass_and_the_accuracy_of_dense_attention(device: str) -> None:
    with one_thread():
        rows = recall_rows(Budget(), device)
    assert rows["dense"]["accuracy"] > 0.9  # there is something to lose
    assert rows["learned"]["mass"] >= 0.9
    assert rows["learned"]["accuracy"] >= rows["dense"]["accuracy"] - 0.02
    for other in ("local", "random"):
        assert rows[other]["accuracy"] < 0.5 * rows["dense"]["accuracy"]


@pytest.mark.timeout(3600)
@on_each_device
def test_language_costs_at_most_one_and_a_half_percent(device: str) -> None:
    with one_thread():
        rows = language_rows(Budget(), standard_library(), device)
    assert rows["dense"]["bits"] < 4  # it has learned
    assert rows["learned"]["bits"] <= 1.015 * rows["dense"]["bits"]
    assert rows["learned"]["bits"] < rows["random"]["bits"]


@pytest.mark.parametrize("shrink", [1, 2, 8, 16])
def test_what_a_question_asks_for_stands_once_far_ahead_and_anywhere(shrink: int) -> None:
    tokens, asked = Recall.batch(16, torch.Generator().manual_seed(0), "cpu", shrink)
    assert tokens.shape == (16, SEQ_LEN // shrink)
    first = (Recall.HAYSTACK + Recall.APART) // shrink
    assert first % BLOCK == 0
    questions = tokens[:, first::BLOCK]
    assert questions.shape == asked.shape == (16, Recall.QUESTIONS // shrink)
    places = set()
    for row, keys, values in zip(tokens, questions, asked, strict=True):
        for key, value in zip(keys, values, strict=True):
            at = torch.nonzero(row == key).flatten()
            assert at.numel() == 2  # in its pair and in the question
            assert at[0] + 1 < Recall.HAYSTACK // shrink
            assert row[at[0] + 1] == value
            places.add(int(at[0]) % BLOCK)
    assert places == set(range(BLOCK))
    assert torch.equal(Recall.asking(tokens, asked.shape[1]), questions)
