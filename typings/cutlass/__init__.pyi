"""CuTe DSL (nvidia-cutlass-dsl), as far as it is used here."""

from typing import Any

Boolean: Any
