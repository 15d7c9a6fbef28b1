"""Why a backend cannot take a request, as data with a stable code."""

from __future__ import annotations

import attrs


@attrs.frozen
class Refusal:
    """One reason for which a backend was not usable.

    Attributes:
        code: stable identifier, for programs (`dtypes`, `layouts`, `not_installed`, ...).
        required: what the request needs, in words.
        actual: what the backend, the machine or the installation offers.
        remedy: what the user can do about it, or an empty string.
    """

    code: str
    required: str
    actual: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.code}: needs {self.required}, has {self.actual}"
        return f"{text}; {self.remedy}" if self.remedy else text
