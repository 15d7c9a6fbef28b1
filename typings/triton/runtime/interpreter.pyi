from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

@dataclass(frozen=True)
class InterpreterOptions:
    sanitize_overflow: bool = ...

class InterpreterBuilder:
    options: InterpreterOptions

class _LangPatchScope:
    restore: Callable[[], None]

interpreter_builder: InterpreterBuilder

def _patch_lang(fn: Any, /) -> _LangPatchScope: ...
