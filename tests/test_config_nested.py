"""Values of configurations that are nested, numpy's or paths, and files with names that none can have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dilated_attention.core.config import AttentionConfig
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.pattern import Pattern
from dilated_attention.registry.patterns import resolve_pattern


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(num_heads=8, head_dim=64, **fields)


def nested(times: int) -> dict[str, Any]:
    """A union of a union of a union ..."""
    pattern: dict[str, Any] = {"kind": "full"}
    for _ in range(times):
        pattern = {"kind": "union", "of": [pattern]}
    return pattern


def test_unions_in_each_other_end() -> None:
    for times in (65, 300, 900):
        with pytest.raises(ConfigError, match="patterns may be nested 64 deep"):
            resolve_pattern(nested(times))
    for fields in ({"pattern": nested(300)}, {"backend_options": {"sdpa": {"a": nested(900)}}}):
        with pytest.raises(ConfigError, match="may be nested 64 deep"):
            config(**fields)
    pattern: Pattern = resolve_pattern(nested(30))
    assert pattern.max_multiplicity == 1


def test_a_mapping_with_numbers_of_numpy_becomes_plain() -> None:
    given = {"kind": "dilated", "segment_lengths": [np.int64(8), 16], "dilation_rates": np.array([1, 2])}
    shares = {"kind": "random", "block_size": np.int32(8), "density": np.float32(0.1)}
    both = config(pattern={"kind": "sum", "of": (given, shares)}).to_dict()["pattern"]
    assert json.loads(json.dumps(both)) == {
        "kind": "sum",
        "of": [
            {"kind": "dilated", "segment_lengths": [8, 16], "dilation_rates": [1, 2]},
            {"kind": "random", "block_size": 8, "density": 0.1},
        ],
    }


@pytest.mark.parametrize("name", ["a\0b.toml", "a\ud800b.json"])
def test_a_name_that_no_file_can_have_is_one_clear_error(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        AttentionConfig.from_file(name)
