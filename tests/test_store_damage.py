"""Damaged, foreign and forged files of the store: each an error of ours, none believed."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dilated_attention.core.errors import PatternFileError
from dilated_attention.core.pattern import Pattern
from dilated_attention.patterns import _format
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.store import PatternStore

DRAWN = [Random(2, block_size=8), Random(density=0.3, block_size=8) | Local(3)]


def save(store: PatternStore, name: str, pattern: Pattern) -> Path:
    return store.save(name, pattern, seq_len=60, num_heads=4, is_causal=True)


@pytest.fixture
def store(tmp_path: Path) -> PatternStore:
    return PatternStore(tmp_path / "root")


def rewritten(path: Path, change: Callable[[dict[str, object], dict[str, np.ndarray]], None]) -> None:
    """Change a file's document or arrays and give it a digest that fits again."""
    document, arrays = _format.decode(path.read_bytes(), "x")
    writable = {name: array.copy() for name, array in arrays.items()}
    change(document, writable)
    path.write_bytes(_format.encode(document, writable))


def test_a_right_digest_does_not_make_wrong_content_right(store: PatternStore) -> None:
    path = save(store, "r", DRAWN[1])
    whole = path.read_bytes()

    def set_item(name: str, index: object, value: int) -> Callable[..., None]:
        return lambda _, arrays: arrays[name].__setitem__(index, value)

    def set_field(name: str, value: object) -> Callable[..., None]:
        return lambda document, _: document.__setitem__(name, value)

    changes: list[Callable[..., None]] = [
        set_item("cols", 0, -1), set_item("cols", 3, 8), set_item("cols", 0, 1 << 30), set_item("cols", slice(None), 0),
        set_item("row_ptr", (0, 0), 1), set_item("row_ptr", (0, 2), 1 << 40), set_item("row_ptr", (1, 0), -1),
        set_item("row_ptr", (-1, -1), 0), set_item("head_table", 0, 4), set_item("head_table", 0, -1),
        set_item("weights", 0, -1), set_item("weights", 0, 256), set_item("mask_ids", 0, 1000),
        set_item("mask_ids", 0, -2), set_item("mask_ids", slice(None), 0), set_item("weights", slice(None), 0),
        lambda _, arrays: arrays.pop("masks"), lambda _, arrays: arrays.update(extra=arrays["cols"]),
        lambda _, arrays: arrays.update(cols=arrays["cols"].astype(np.int64)),
        lambda _, arrays: arrays.update(cols=arrays["cols"][:-1]),
        lambda _, arrays: arrays.update(weights=arrays["weights"][:-1]),
        lambda _, arrays: arrays.update(mask_ids=arrays["mask_ids"][:-1]),
        lambda _, arrays: arrays["row_ptr"].__setitem__((1, 0), arrays["row_ptr"][1, 0] + 1),
        lambda _, arrays: arrays.update(masks=arrays["masks"][:, :-1]),
        lambda _, arrays: arrays.update(row_ptr=arrays["row_ptr"].ravel()),
        lambda _, arrays: arrays.update(head_table=arrays["head_table"][:-1]),
        set_field("schema", 2), set_field("schema", True), set_field("schema", 1.0), set_field("schema", None),
        set_field("form", "parameters"), set_field("form", "code"), set_field("seq_len", 65), set_field("seq_len", -1),
        set_field("seq_len", 1 << 70), set_field("num_heads", 0), set_field("num_heads", 5),
        set_field("num_heads", "4"), set_field("is_causal", 1), set_field("block_size", 0), set_field("block_size", 9),
        set_field("block_size", None), set_field("pattern", [1]), set_field("more", 1),
        lambda document, _: document.pop("pattern"),
    ]  # fmt: skip
    for change in changes:
        path.write_bytes(whole)
        rewritten(path, change)
        with pytest.raises(PatternFileError):
            store.load("r")
    path.write_bytes(whole)
    store.load("r")


def test_parameters_are_judged_as_any_input(store: PatternStore) -> None:
    path = save(store, "p", Local(1))
    deep: dict[str, object] = {"kind": "full"}
    for _ in range(200):
        deep = {"kind": "sum", "of": [deep]}
    mappings: list[object] = [
        {"kind": "local", "window_size": [-1, 0]}, {"kind": "local"}, {"kind": "local", "window_size": [1, 1], "x": 1},
        {"kind": "local", "window_size": 1}, {"kind": "random", "blocks_per_row": 2}, {"kind": "os.system"},
        {"kind": 3}, {"kind": "stored", "name": "p", "root": "/"}, {}, [], None, "full", {"kind": "sum", "of": []},
        deep, {"kind": "sum", "of": [{"kind": "random", "blocks_per_row": 1}]}, {"kind": "sum", "of": {"kind": "full"}},
        {"kind": "dilated", "segment_lengths": [4, 8], "dilation_rates": [1]},
    ]  # fmt: skip
    for mapping in mappings:
        rewritten(path, lambda document, _, mapping=mapping: document.__setitem__("pattern", mapping))  # type: ignore[misc]
        with pytest.raises(PatternFileError):
            store.load("p")


def test_a_pattern_that_does_not_take_the_heads_it_names_is_refused(store: PatternStore) -> None:
    path = save(store, "p", Dilated((8, 16), (1, 2), heads="split"))
    rewritten(path, lambda document, _: document.__setitem__("num_heads", 1))
    with pytest.raises(PatternFileError, match="heads"):
        store.load("p")


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """One of many ways in which a file can be wrong."""
    length = 8 + int.from_bytes(whole[:8], "little")
    data, at = bytearray(whole), rng.randrange(len(whole))
    way = rng.randrange(10)
    if way == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        data = data[:at]
    elif way == 2:
        data += rng.randbytes(rng.randrange(1, 64))
    elif way == 3:
        data[:8] = rng.choice((rng.randrange(1 << 64), 1 << 62, length + 8, 0, 1)).to_bytes(8, "little")
    elif way == 4:
        at = rng.randrange(8, length)
        data[at : at + rng.randrange(1, 8)] = rng.randbytes(rng.randrange(9))
    elif way == 5:  # another number somewhere in the header
        digits = [i for i in range(8, length) if chr(data[i]).isdigit()]
        where = rng.choice(digits)
        data[where] = ord(rng.choice([d for d in "0123456789" if d != chr(data[where])]))
    elif way == 6:  # a repeated key, white space, or a foreign tensor, with the length put right
        extra = rng.choice(
            (b'"cols":1,', b" ", b'"x":{"dtype":"I64","shape":[0],"data_offsets":[0,0]},', b'"__metadata__":{},')
        )
        head = whole[8:9] + extra + whole[9:length]
        data = bytearray(len(head).to_bytes(8, "little") + head + whole[length:])
    elif way == 7:
        names = rng.choice(
            ((b"I32", b"I64"), (b"I64", b"F64"), (b"U8", b"I8"), (b"schema", b"schemb"), (b"digest", b"digets"))
        )
        data = bytearray(whole.replace(*names, 1))
    elif way == 8:
        data[at : at + 16] = data[max(0, at - 16) : at]
    else:
        data = bytearray(
            rng.choice((b"", b"PK\3\4" + whole, pickle.dumps([1, 2]), rng.randbytes(200), b"{}", whole[::-1]))
        )
    return bytes(data)


def test_a_file_that_is_cut_off_is_told_as_such(store: PatternStore) -> None:
    path = save(store, "r", DRAWN[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(PatternFileError, match=f"cut off: it has {len(whole) - 1:,} bytes, .* after {len(whole):,};"):
        store.load("r")


def test_five_thousand_damaged_files_are_all_refused(store: PatternStore, tmp_path: Path) -> None:
    rng = random.Random(0)
    bases = []
    for number, pattern in enumerate((Local(2) | Global(3), DRAWN[0], DRAWN[1])):
        bases.append(save(store, f"base{number}", pattern).read_bytes())
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", pickle.dumps({"a": 1}))
    path = store.root / "victim.safetensors"
    cases = [archive.read_bytes()]
    while len(cases) < 5200:
        whole = rng.choice(bases)
        case = damaged(whole, rng)
        if case != whole:
            cases.append(case)
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(PatternFileError):
            store.load("victim")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "x.zip"]
