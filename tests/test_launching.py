"""A kernel that is launched again is given addresses and constants, and is never one compiled for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dilated_attention import build_attention
from dilated_attention.backends import launching
from dilated_attention.backends.launching import launch


class Compiled:
    """What Triton returns of a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.kernel.again.append((grid, args))


class Kernel:
    """In the place of one of Triton's."""

    arg_names = ("x_ptr", "y_ptr", "length", "scale", "BLOCK", "HAS_Y")

    def __init__(self, *, is_interpreted: bool = False) -> None:
        self.first: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []
        self.is_interpreted = is_interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> Compiled | None:
            self.first.append((grid, args, named))
            return None if self.is_interpreted else Compiled(self)

        return run


class Elsewhere(torch.Tensor):
    """On another device."""

    @staticmethod
    def __new__(cls: type[Elsewhere], x: torch.Tensor) -> Elsewhere:
        return torch.Tensor._make_subclass(cls, x)

    def get_device(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_KNOWN", {})


CONSTANTS = {"HAS_Y": True, "BLOCK": 64, "num_warps": 4}  # in another order than the kernel's, and options


def test_the_second_launch_is_given_what_the_first_was_compiled_for() -> None:
    kernel: Any = Kernel()
    x, y, z = torch.zeros(8), torch.zeros(4, dtype=torch.int32), torch.ones(8)
    launch(kernel, (3, 2), (x, y), (5, 0.5), CONSTANTS)
    ((grid, args, named),) = kernel.first
    assert grid == (3, 2)
    assert args[0] is x
    assert args[1] is y
    assert args[2:] == (5, 0.5)
    assert named == {**CONSTANTS, "enable_fp_fusion": True}
    for other in (x, z):
        launch(kernel, (3, 2), (other, y), (5, 0.5), dict(CONSTANTS))
    assert len(kernel.first) == 1
    assert kernel.again == [((3, 2, 1), (p.data_ptr(), y.data_ptr(), 5, 0.5, 64, True)) for p in (x, z)]


def test_tensors_in_tuples_are_given_as_addresses_in_tuples() -> None:
    kernel: Any = Kernel()
    x, y, z = torch.zeros(8), torch.zeros(4), torch.zeros(4)
    for pair in ((y, z), (z, y)):
        launch(kernel, (3,), (x, pair), (((1, 2), 3), 0.5), {"BLOCK": 64, "HAS_Y": True})
    assert len(kernel.first) == 1
    assert kernel.first[0][1][1] == (y, z)
    ((_, args),) = kernel.again
    assert args == (x.data_ptr(), (z.data_ptr(), y.data_ptr()), ((1, 2), 3), 0.5, 64, True)


def test_what_is_fresh_is_no_other_launch() -> None:
    kernel: Any = Kernel()
    x, y = torch.zeros(8), torch.zeros(4)
    for seed in (7, 16, 1):
        launch(kernel, (3,), (x, y), (5,), {"BLOCK": 64, "HAS_Y": True}, (seed,))
    assert [args[2:] for _, args, _ in kernel.first] == [(5, 7)]
    assert [args[2:] for _, args in kernel.again] == [(5, 16, 64, True), (5, 1, 64, True)]


def test_whatever_triton_could_have_compiled_for_is_compared() -> None:
    kernel, other = (Kernel() for _ in range(2))
    x, y = torch.zeros(16), torch.zeros(16)
    given: dict[str, Any] = {"grid": (3,), "pointers": (x, y), "numbers": (5, 0.5), "constants": CONSTANTS}
    changes: list[dict[str, Any]] = [
        {},
        {"grid": (4,)},
        {"grid": (3, 1)},
        {"pointers": (x, y.double())},
        {"pointers": (x, y[1:])},  # no multiple of 16 bytes
        {"pointers": (x, object())},
        {"pointers": (Elsewhere(x), y)},
        {"pointers": (x, (y, y))},
        {"pointers": (x, (y, y, y))},
        {"pointers": (x, (y, y[1:]))},
        {"pointers": (x, (y, y.double()))},
        {"numbers": (((5, 2), (3,)), 0.5)},
        {"numbers": (((5, 2), (4,)), 0.5)},
        {"numbers": (16, 0.5)},
        {"numbers": (1, 0.5)},
        {"numbers": (5, 0.25)},
        {"constants": CONSTANTS | {"BLOCK": 32}},
        {"constants": CONSTANTS | {"num_warps": 8}},
    ]
    for change in changes:
        launch(kernel, **(given | change))  # type: ignore[arg-type]
    assert len(kernel.first) == len(changes)
    launch(other, **given)  # type: ignore[arg-type]
    assert len(other.first) == 1
    for change in changes:
        launch(kernel, **(given | change))  # type: ignore[arg-type]
    assert (len(kernel.first), len(kernel.again)) == (len(changes), len(changes))


def test_the_interpreter_is_always_given_the_tensors() -> None:
    kernel: Any = Kernel(is_interpreted=True)
    for _ in range(2):
        launch(kernel, (1,), (torch.zeros(4), torch.zeros(4)), (4, 1.0), CONSTANTS)
    assert (len(kernel.first), len(kernel.again)) == (2, 0)


def test_ever_new_lengths_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel: Any = Kernel()
    x = torch.zeros(4)
    for length in range(50):
        launch(kernel, (1,), (x, x), (length, 1.0), CONSTANTS)
        assert len(launching._KNOWN) <= 3
    launch(kernel, (1,), (x, x), (49, 1.0), CONSTANTS)
    assert (len(kernel.first), len(kernel.again)) == (50, 1)


def test_a_whole_number_as_scale_is_launched_as_a_float() -> None:
    attention = build_attention(num_heads=1, head_dim=8, scale=2)
    assert isinstance(attention._engine.scale, float)
