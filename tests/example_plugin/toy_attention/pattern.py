from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from dilated_attention import ConfigError, Pattern
from dilated_attention.registry import Geometry

Ints = NDArray[np.int64]


@attrs.frozen
class LogSparse(Pattern):
    kind: ClassVar[str] = "log_sparse"
    heads_alike: ClassVar[bool] = True
    base: int = 2

    def __attrs_post_init__(self) -> None:
        if self.base < 2:
            raise ConfigError(f"LogSparse.base must be at least 2, got {self.base}")

    def multiplicity(self, query: Ints, key: Ints, head: Ints, geometry: Geometry) -> Ints:
        distances = [0, *(self.base**i for i in range(63) if self.base**i <= geometry.seq_len)]
        return np.isin(np.abs(query - key) + 0 * head, distances).astype(np.int64)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "base": self.base}
