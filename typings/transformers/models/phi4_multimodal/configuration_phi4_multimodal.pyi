from typing import Any

class Phi4MultimodalVisionConfig:
    def __init__(self, **fields: Any) -> None: ...
