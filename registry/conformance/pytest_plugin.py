"""The kit as a plugin of pytest, for those who ask: no file of tests is needed.

    pytest -p dilated_attention.registry.conformance.pytest_plugin --conformance NAME [--conformance-quick] [-n 8]

or `pytest_plugins = ["dilated_attention.registry.conformance.pytest_plugin"]` in a conftest.py. Each check on each case
is an item of its own, so that `-k`, `-x`, `--lf` and `-n` work on them.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from ...core.config import named_values
from ...core.errors import ConfigError
from . import Kit, KitSettings, Trial
from .settings import read_pattern

_OPTION: Final = "--conformance-option"
_PATTERN: Final = "--conformance-pattern"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--conformance NAME`, and the flags of `dilated-attention conformance` with this word before them."""
    group = parser.getgroup("dilated-attention")
    group.addoption("--conformance", action="append", default=[], metavar="NAME", help="backend to put to the kit")
    group.addoption("--conformance-quick", action="store_true", help="the smaller grid, of seconds")
    group.addoption("--conformance-large", action="store_true", help="also tensors of more than 2**31 elements")
    group.addoption(
        _OPTION, action="append", default=[], metavar="NAME=VALUE", help="an option of the backend; repeatable"
    )
    group.addoption(
        _PATTERN,
        action="append",
        default=[],
        metavar="TOML",
        help="a further pattern: '{kind = \"local\", window_size = 8}'; repeatable",
    )
    group.addoption("--conformance-drawn", type=int, default=0, metavar="N", help="further cases, drawn at random")
    group.addoption("--conformance-seed", type=int, default=0, metavar="SEED", help="of what is drawn")
    group.addoption("--conformance-device", metavar="DEVICE", help="device to test on; by default all declared ones")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a backend that cannot be tested before pytest-xdist starts workers, whose own errors it does not show."""
    if getattr(config.option, "dist", "no") != "no":
        for name in config.getoption("--conformance"):
            _trials(config, name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the kit's items to those that were collected, before -k and -m choose among them."""
    for name in config.getoption("--conformance"):
        for trial in _trials(config, name):
            label = str(trial).replace(" ", "-")
            items.append(ConformanceItem.from_parent(session, name=f"conformance[{name}-{label}]", trial=trial))


def _trials(config: pytest.Config, name: str) -> list[Trial]:
    try:
        settings = KitSettings(
            device=config.getoption("--conformance-device"),
            quick=config.getoption("--conformance-quick"),
            patterns=[read_pattern(text, flag=_PATTERN) for text in config.getoption(_PATTERN)],
            options=named_values(config.getoption(_OPTION), flag=_OPTION),
            large=config.getoption("--conformance-large"),
            drawn=config.getoption("--conformance-drawn"),
            seed=config.getoption("--conformance-seed"),
        )
        return list(Kit(name, settings).trials())
    except ConfigError as error:
        raise pytest.UsageError(f"--conformance {name}: {error}") from error


class ConformanceItem(pytest.Item):
    """One check on one case."""

    def __init__(self, *, trial: Trial, **others: Any) -> None:
        super().__init__(**others)
        self.trial = trial

    def runtest(self) -> None:
        """Make the check."""
        outcome = self.trial.run()
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if not outcome.passed:
            raise NonConforming(str(outcome))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What was found, without the kit's own frames."""
        if isinstance(excinfo.value, NonConforming):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where it stands: in no file."""
        return self.path, None, self.name


class NonConforming(Exception):  # noqa: N818 - the outcome of a test, not an error of the program
    """A check failed; the message is the outcome."""
