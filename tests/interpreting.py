"""A plugin of pytest: Triton's interpreter without what takes most of its time and tells nothing.

It computes integers twice to find those that overflow, which it would report in its debug mode alone; and it prepares
Triton's modules again whenever one function of a kernel calls another. `kernel_kit.run_interpreted` loads this.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType, ModuleType

import triton.language as tl
from triton.runtime import interpreter

_prepared: set[ModuleType] = set()  # of those below
_MODULES = (tl, tl.core)
_prepare = interpreter._patch_lang


def _prepare_once(function: FunctionType) -> interpreter._LangPatchScope:
    needed = {module for module in _MODULES if module in function.__globals__.values()}
    if needed <= _prepared:
        return interpreter._LangPatchScope()  # of nothing
    scope = _prepare(function)
    new, undo = needed - _prepared, scope.restore

    def restore() -> None:
        undo()
        _prepared.difference_update(new)

    _prepared.update(new)
    scope.restore = restore
    return scope


def pytest_configure() -> None:
    """Before any test is collected."""
    interpreter._patch_lang = _prepare_once
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
