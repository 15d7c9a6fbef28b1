"""The configuration: what it takes, what it refuses, and how it travels through files."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from dilated_attention import build_attention, resolve_pattern
from dilated_attention.core.config import AttentionConfig
from dilated_attention.core.config_fields import ConfigFields
from dilated_attention.core.context_parallel import ContextParallel
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.limits import Limits
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.models.longnet_config import LongNetConfig
from dilated_attention.models.multihead import MultiheadAttention
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.learned import Learned
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.strided import Strided
from dilated_attention.presets import bigbird, longformer

NP: Any = np  # whose numbers type checkers do not take for int and float; they are taken all the same
FILE = """
num_heads = 8
head_dim = 64
num_kv_heads = 2
is_causal = true
dtype = "bfloat16"
seq_len = 4096

[pattern]
kind = "dilated"
segment_lengths = [1024, 2048]
dilation_rates = [1, 2]

[limits]
pattern_cache_bytes = 1000

[backend_options.sdpa]
kernel = "flash"
"""


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 8, "head_dim": 64} | fields)


def test_defaults_are_the_documented_ones() -> None:
    fields = attrs.asdict(config(), recurse=False)
    assert fields == {
        "num_heads": 8,
        "head_dim": 64,
        "num_kv_heads": None,
        "pattern": Full(),
        "is_causal": False,
        "scale": None,
        "dropout_p": 0.0,
        "dtype": "float32",
        "device": None,
        "tensor_layout": "bshd",
        "seq_len": None,
        "varlen": False,
        "requires_grad": True,
        "deterministic": False,
        "activation_checkpointing": False,
        "backend": "auto",
        "backend_options": {},
        "context_parallel": None,
        "limits": Limits(),
    }
    assert config().kv_heads == 8
    assert config().softmax_scale == 0.125
    assert config(head_dim=24).softmax_scale == 1 / math.sqrt(24) != 24**-0.5  # as torch computes it


def test_a_config_knows_the_geometry_of_its_calls() -> None:
    made = config(num_kv_heads=2, is_causal=True)
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "is_causal": True}
    assert made.geometry(5) == Geometry(q_len=5, kv_len=5, **heads)
    assert made.geometry(5, 9) == Geometry(q_len=5, kv_len=9, q_offset=4, **heads)
    assert made.geometry(5, 9, q_offset=0, kv_offset=3) == Geometry(q_len=5, kv_len=9, q_offset=0, kv_offset=3, **heads)
    assert made.one_token == made.geometry(1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_heads": 0}, ["num_heads", "at least 1", "0"]),
        ({"num_heads": 2.0}, ["num_heads", "integer", "2.0"]),
        ({"num_heads": 10**18}, ["num_heads", "at most 65,536", "1,000,000,000"]),
        ({"num_heads": True}, ["num_heads", "integer", "True"]),
        ({"head_dim": -64}, ["head_dim", "at least 1", "-64"]),
        ({"num_kv_heads": 3}, ["num_kv_heads", "8 and 3", "1, 2, 4, 8"]),
        ({"num_kv_heads": 0}, ["num_kv_heads", "at least 1"]),
        ({"seq_len": 0}, ["seq_len", "at least 1", "0"]),
        ({"scale": float("nan")}, ["scale", "finite", "nan"]),
        ({"scale": float("inf")}, ["scale", "finite", "inf"]),
        ({"scale": -(10**400)}, ["scale", "finite", "-1000"]),
        ({"scale": 0}, ["scale", "not 0"]),
        ({"scale": "0.1"}, ["scale", "number", "'0.1'"]),
        ({"dropout_p": 1.0}, ["dropout_p", "below 1", "1.0"]),
        ({"dropout_p": -0.1}, ["dropout_p", "at least 0", "-0.1"]),
        ({"dropout_p": float("nan")}, ["dropout_p", "nan"]),
        ({"dropout_p": 10**400}, ["dropout_p", "below 1"]),
        ({"dtype": "bfloat"}, ["dtype", "'bfloat'", "did you mean 'bfloat16'"]),
        ({"dtype": torch.int64}, ["dtype", "'int64'", "float16"]),
        ({"dtype": 16}, ["dtype", "16"]),
        ({"device": "cuda:x"}, ["device", "cuda:x", "cuda:0"]),
        ({"device": 0}, ["device", "0"]),
        ({"tensor_layout": "bsdh"}, ["tensor_layout", "'bsdh'", "bshd, bhsd"]),
        ({"is_causal": "false"}, ["is_causal", "True or False", "'false'"]),
        ({"requires_grad": 1}, ["requires_grad", "True or False"]),
        ({"backend": None}, ["backend", "None"]),
        ({"backend_options": ["sdpa"]}, ["backend_options", "sdpa"]),
        ({"backend_options": {"sdpa": 3}}, ["backend_options['sdpa']", "3"]),
        ({"backend_options": {"sdpa": {1: 2}}}, ["backend_options['sdpa']", "option names", "{1: 2}"]),
        ({"backend_options": {"sdpa": {"hook": float("nan")}}}, ["backend_options", "plain values"]),
        ({"backend_options": {"sdpa": {"hook": print}}}, ["backend_options", "plain values"]),
        ({"pattern": "dilated"}, ["pattern", "'dilated'"]),
        ({"pattern": {"segment_lengths": [4]}}, ["kind", "segment_lengths"]),
        ({"varlen": 1}, ["varlen", "True or False"]),
        ({"varlen": True, "context_parallel": ContextParallel(size=2)}, ["varlen=True", "context_parallel"]),
        ({"context_parallel": "2"}, ["context_parallel", "ContextParallel(size=...)", "'2'"]),
        ({"limits": 5}, ["limits", "5"]),
        ({"head_dim": 10**400}, ["head_dim", "at most 1,048,576"]),
        ({"pattern": Dilated((64, 64, 64), (1, 2, 4), heads="split"), "num_heads": 2}, ["heads"]),
    ],
)
def test_bad_values_name_the_actual_and_the_allowed(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    for words in said:
        assert words in str(caught.value)


def test_torch_objects_stand_for_their_names() -> None:
    built = config(dtype=torch.bfloat16, device=torch.device("cuda", 1))
    assert (built.dtype, built.device) == ("bfloat16", "cuda:1")
    assert config(dtype="torch.float16").dtype == "float16"


def test_a_toml_and_a_json_file_say_the_same(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text(FILE)
    built = AttentionConfig.from_file(toml)
    assert (built.num_heads, built.kv_heads, built.limits.pattern_cache_bytes) == (8, 2, 1000)
    assert built.pattern == {"kind": "dilated", "segment_lengths": [1024, 2048], "dilation_rates": [1, 2]}
    assert built.backend_options == {"sdpa": {"kernel": "flash"}}
    as_json.write_text(json.dumps(built.to_dict()))
    assert AttentionConfig.from_file(str(as_json)) == built


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "num_heads = 4\nhead_dim = 32"), ("a.json", '{"num_heads": 4, "head_dim": 32}')]
)
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert AttentionConfig.from_file(tmp_path / name) == AttentionConfig(num_heads=4, head_dim=32)


def test_a_pattern_object_is_written_as_its_mapping() -> None:
    built = config(pattern=Dilated((8, 16), (1, 2)) | Full())
    again = AttentionConfig.from_dict(json.loads(json.dumps(built.to_dict())))
    assert again.pattern == built.to_dict()["pattern"]
    assert [member["kind"] for member in built.to_dict()["pattern"]["of"]] == ["dilated", "full"]


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Dilated((8, 16), (1, 2)),
        Local((3, 0)),
        Global(2),
        Strided(4),
        Random(2, 16),
        Learned(block_size=8, blocks_per_row=2),
        Dilated((8,), (2,)) | Global(1),
        Local(2) + Full(),
    ],
)
def test_a_config_is_the_same_again_once_its_pattern_is_resolved(pattern: Pattern) -> None:
    built = config(pattern=pattern, backend_options={"sdpa": {"kernel": "flash"}})
    again = AttentionConfig.from_dict(json.loads(json.dumps(built.to_dict())))
    assert attrs.evolve(again, pattern=resolve_pattern(again.pattern)) == built
    assert resolve_pattern(pattern) is pattern


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.toml", None, ["cannot read", "missing.toml", "No such file"]),
        ("bad.toml", "num_heads = \nhead_dim = 8", ["malformed", "bad.toml", "line 1"]),
        ("bad.json", "{", ["malformed", "bad.json", "line 1"]),
        ("deep.json", '{"a":' * 100_000, ["malformed", "deep.json", "recursion"]),
        ("deep.toml", "a = " + "[" * 10_000, ["malformed", "deep.toml"]),
        ("list.json", "[1]", ["table", "list"]),
        (
            "twice.json",
            '{"num_heads": 8, "head_dim": 8, "num_heads": 4}',
            ["malformed", "twice.json", "'num_heads' twice"],
        ),
        ("conf.yaml", "num_heads: 8", [".toml or .json", "conf.yaml"]),
        ("typo.toml", "num_heads = 8\nhead_dim = 8\nis_casual = true", ["is_casual", "did you mean 'is_causal'"]),
        ("few.toml", "num_heads = 8", ["needs head_dim", "got num_heads"]),
        ("order.toml", 'num_heads = 8\nhead_dim = 8\ntoken_order = "natural"', ["has no 'token_order'"]),
        ("limits.toml", "num_heads = 8\nhead_dim = 8\nlimits.layout_byte = 1", ["layout_byte", "'layout_bytes'"]),
        ("text.toml", 'num_heads = "8"\nhead_dim = 8', ["num_heads", "integer", "'8'"]),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, name: str, text: str | None, said: list[str]) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.from_file(path)
    for words in said:
        assert words in str(caught.value)


def test_a_file_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        AttentionConfig.from_file(path)


@pytest.mark.parametrize(("key", "meant"), [("segment_length", "segment_lengths"), ("dilated_ratio", "dilation_rates")])
def test_arguments_of_torchscale_are_told_their_names(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean '{meant}' of the pattern"):
        AttentionConfig.from_dict({"num_heads": 8, "head_dim": 64, key: [1024]})


def test_a_config_is_a_value() -> None:
    options = {"sdpa": {"kernel": "flash"}}
    built = config(backend_options=options)
    options["sdpa"]["kernel"] = "other"
    assert built.backend_options["sdpa"]["kernel"] == "flash"
    assert built == config(backend_options={"sdpa": {"kernel": "flash"}})
    assert hash(built) == hash(config(backend_options={"sdpa": {"kernel": "flash"}}))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        built.num_heads = 4  # type: ignore[misc]


def test_a_config_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(FILE)
    code = (
        "import sys; from dilated_attention import AttentionConfig; "
        f"AttentionConfig.from_file({str(path)!r}).to_dict(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (AttentionConfig, {"num_heads": 2, "patern": Full()}, "no 'patern' (did you mean 'pattern'?)"),
        (AttentionConfig, {"segment_lengths": (4,)}, "did you mean 'segment_lengths' of the pattern"),
        (Limits, {"workspace": 1}, "Limits has no parameter 'workspace' (did you mean 'workspace_bytes'?)"),
        (Limits, {"zzz": 1}, "no parameter 'zzz'; it takes pattern_cache_bytes, layout_bytes, workspace_bytes, ex"),
        (ContextParallel, {"sise": 2}, "ContextParallel has no parameter 'sise' (did you mean 'size'?)"),
        (LongNetConfig, {"num_layer": 2}, "LongNetConfig has no parameter 'num_layer' (did you mean 'num_layers'?)"),
    ],
)
def test_classes_name_the_parameter_that_was_meant(cls: Callable[..., Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        cls(**fields)


def test_classes_that_judge_names_keep_their_signatures_and_slots() -> None:
    assert list(inspect.signature(ContextParallel).parameters) == ["size", "transport", "timeout_s"]
    config = AttentionConfig(num_heads=2, head_dim=8, limits=Limits(layout_bytes=5))
    wrong: dict[str, Any] = {"head_dims": 16}
    assert not hasattr(config, "__dict__")
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError, match=r"did you mean 'head_dim'"):
        attrs.evolve(config, **wrong)


def test_numbers_of_numpy_are_taken_and_kept_as_plain_ones() -> None:
    given: dict[str, Any] = {
        "num_heads": NP.int64(4),
        "head_dim": NP.int32(8),
        "num_kv_heads": NP.uint8(2),
        "seq_len": NP.int64(64),
        "scale": NP.float32(0.5),
        "dropout_p": NP.float64(0.25),
        "limits": Limits(workspace_bytes=NP.int64(1 << 20)),
    }
    plain: dict[str, Any] = {
        "num_heads": 4,
        "head_dim": 8,
        "num_kv_heads": 2,
        "seq_len": 64,
        "scale": 0.5,
        "dropout_p": 0.25,
    }
    expected = AttentionConfig(**plain, limits=Limits(workspace_bytes=1 << 20))
    config = AttentionConfig(**given)
    assert (config, hash(config), repr(config)) == (expected, hash(expected), repr(expected))
    assert json.dumps(config.to_dict()) == json.dumps(expected.to_dict())
    assert repr(AttentionConfig.from_dict(given)) == repr(attrs.evolve(config, head_dim=NP.int64(8))) == repr(expected)
    ring = ContextParallel(size=NP.int64(2), timeout_s=NP.float32(1.5))
    assert repr(ring) == repr(ContextParallel(size=2, timeout_s=1.5))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (lambda: Dilated(NP.array([16, 32]), (NP.int8(1), 2)), Dilated((16, 32), (1, 2))),
        (lambda: Local(NP.int64(4)), Local(4)),
        (lambda: Local(NP.array([4, 0])), Local((4, 0))),
        (lambda: Local((NP.int64(4), 0)), Local((4, 0))),
        (lambda: Local.from_sliding_window(NP.int64(5)), Local((4, 0))),
        (lambda: Global(NP.uint16(3)), Global(3)),
        (lambda: Strided(NP.int64(3)), Strided(3)),
        (lambda: Random(NP.int64(3), NP.int64(16), NP.uint64(7)), Random(3, 16, 7)),
        (lambda: Random(density=NP.float64(0.5)), Random(density=0.5)),
        (lambda: Learned(NP.int64(2), NP.int64(16)), Learned(2, 16)),
        (lambda: Learned(density=NP.float64(0.5)), Learned(density=0.5)),
        (lambda: bigbird(block_size=NP.int64(8), window_blocks=NP.int64(3)), bigbird(block_size=8, window_blocks=3)),
        (lambda: longformer(window_size=NP.int64(8)), longformer(window_size=8)),
    ],
)
def test_patterns_keep_numbers_of_numpy_as_plain_ones(given: Callable[[], Pattern], plain: Pattern) -> None:
    pattern = given()
    assert (pattern, hash(pattern), repr(pattern)) == (plain, hash(plain), repr(plain))
    assert json.dumps(pattern.to_dict()) == json.dumps(plain.to_dict())


@pytest.mark.parametrize("value", [True, NP.True_, 4.0, NP.float64(4), NP.array(4), NP.array([4]), "4", Fraction(4)])
def test_what_is_no_integer_is_refused_as_one(value: Any) -> None:
    for make in (lambda: Limits(layout_bytes=value), lambda: Dilated((value,), (1,)), lambda: Local((value, 0))):
        with pytest.raises(ConfigError, match=r"must be an integer, got .*" + re.escape(f"({type(value).__name__})")):
            make()


@pytest.mark.parametrize("value", [True, NP.True_, "1", NP.complex64(1), NP.array(1.0), torch.tensor(1.0)])
def test_what_is_no_number_is_refused_as_one(value: Any) -> None:
    for fields in ({"scale": value}, {"dropout_p": value}):
        with pytest.raises(ConfigError, match="must be a number, got"):
            AttentionConfig(num_heads=2, head_dim=8, **fields)


def test_models_calls_and_caches_take_numbers_of_numpy() -> None:
    shape: dict[str, Any] = {"embed_dim": NP.int64(16), "num_layers": NP.int64(1), "num_heads": NP.int64(2)}
    config = LongNetConfig(**shape, dropout=NP.float32(0.1), rotary_base=NP.float64(100))
    assert repr(config) == repr(LongNetConfig(embed_dim=16, num_layers=1, num_heads=2, dropout=0.1, rotary_base=100.0))
    wide = MultiheadAttention(NP.int64(16), NP.int64(2))
    assert {type(number) for number in (wide.embed_dim, wide.num_heads, wide.head_dim)} == {int}
    attention = build_attention(num_heads=2, head_dim=8, is_causal=True)
    attention.prepare(NP.int64(12), kv_len=NP.int64(16))
    attention.prepare(12, kv_len=16)
    assert attention.counters().layouts.misses == 1
    cache = attention.make_cache(NP.int64(2), NP.int64(6))
    assert (type(cache.batch_size), type(cache.max_seq_len)) == (int, int)


@pytest.mark.parametrize(("given", "name"), [("half", "float16"), ("float", "float32"), ("torch.double", "float64")])
def test_dtypes_have_torchs_other_names(given: str, name: str) -> None:
    assert AttentionConfig(num_heads=1, head_dim=8, dtype=given).dtype == name
    assert str(getattr(torch, given.removeprefix("torch."))) == f"torch.{name}"


def test_fields_as_keywords_are_those_of_the_class() -> None:
    """`build_attention(**fields)` is typed by `ConfigFields`, which names them once more."""
    assert list(ConfigFields.__annotations__) == [field.name for field in attrs.fields(AttentionConfig)]
