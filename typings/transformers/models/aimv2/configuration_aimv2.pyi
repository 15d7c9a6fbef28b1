from typing import Any

class Aimv2TextConfig:
    def __init__(self, **fields: Any) -> None: ...
