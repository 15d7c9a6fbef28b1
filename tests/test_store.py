"""The store: what goes in comes out, nothing leaves the root, nothing damaged is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.numpy
import torch

from dilated_attention.core import reference
from dilated_attention.core.config import AttentionConfig
from dilated_attention.core.errors import ConfigError, PatternFileError, UnsafePathError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import layout_kinds, lower
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.patterns._stored_blocks import StoredBlocks
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.store import PatternStore, Stored, load_pattern, save_pattern
from dilated_attention.patterns.strided import Strided
from dilated_attention.registry.build import build_attention
from dilated_attention.registry.patterns import resolve_pattern

PARAMETRIC = [
    Full(),
    Dilated((8, 16), (1, 2), offsets="blocked", offsets_by="kv_head"),
    Dilated((8, 16), (1, 2), heads="split"),
    Local((3, 0)),
    Global(2),
    Strided(5),
    Local(2) | Global(3),
    (Local(2) | Dilated((8,), (2,))) + Full(),
]
DRAWN = [Random(2, block_size=8), Random(density=0.3, block_size=8) | Local(3), Random(2, block_size=8) + Local(1)]

HOSTILE = [
    "", ".", "..", "../x", "..\\x", "a/b", "a\\b", "/etc/passwd", "/", "C:x", "C:\\x", "\\\\host\\share", "~", "~root",
    "~/x", "a\0b", "\0", "a\nb", "a\r", "a\tb", "\x1b[31m", "\x7f", "a\u202eb", "\u2066a", "\u200fx", "-rf", "--help",
    ".hidden", "_x", "a b", " a", "a ", "a..b", "a:b", "a*", "a?", "a|b", "<a>", '"a"', "a;b", "$HOME", "`id`",
    "%2e%2e", "a%00", "é", "ａ", "名前", "con", "CON", "nul.txt", "Com1", "LPT9.x", "aux", "prn", "x" * 121, "a'b",
    "a&b", "a\u2028b", "file://x", "x\ud800",
]  # fmt: skip


def save(store: PatternStore, name: str, pattern: Pattern, *, is_causal: bool = True, overwrite: bool = False) -> Path:
    return store.save(name, pattern, seq_len=60, num_heads=4, is_causal=is_causal, overwrite=overwrite)


@pytest.fixture
def store(tmp_path: Path) -> PatternStore:
    return PatternStore(tmp_path / "root")


@pytest.mark.parametrize("number", ["seq_len", "num_heads"])
def test_what_could_not_be_read_again_is_not_stored(store: PatternStore, number: str) -> None:
    sizes: dict[str, Any] = {"seq_len": 60, "num_heads": 4} | {number: 1 << 40}
    with pytest.raises(ConfigError, match=rf"{number} must be at most 1,099,511,627,775 to be stored, got 1,099,511,6"):
        store.save("x", Local(3), seq_len=sizes["seq_len"], num_heads=sizes["num_heads"], is_causal=True)
    assert store.list() == ()


@pytest.mark.parametrize("pattern", PARAMETRIC)
def test_parameters_come_back_equal(store: PatternStore, pattern: Pattern) -> None:
    path = save(store, "p", pattern)
    assert path == store.root / "p.safetensors"
    assert store.load("p") == pattern
    info = store.verify("p")
    assert (info.form, info.parameters, info.nbytes) == ("parameters", pattern.to_dict(), path.stat().st_size)
    assert (info.seq_len, info.num_heads, info.is_causal, info.schema) == (60, 4, True, 1)
    named = Stored("p", str(store.root))
    config = AttentionConfig(num_heads=4, head_dim=8, pattern=named)
    assert config.to_dict()["pattern"] == {"kind": "stored", "name": "p", "root": str(store.root)}
    for geometry in (Geometry.self_attention(60, 4), Geometry.self_attention(33, 4, is_causal=True)):
        assert lower(named, geometry).digest == lower(pattern, geometry).digest
        assert torch.equal(reference.multiplicity(named, geometry), reference.multiplicity(pattern, geometry))


@pytest.mark.parametrize("pattern", DRAWN)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seq_len", [0, 1, 60, 64])
def test_drawn_blocks_come_back_equal(store: PatternStore, pattern: Pattern, is_causal: bool, seq_len: int) -> None:
    store.save("r", pattern, seq_len=seq_len, num_heads=4, is_causal=is_causal)
    geometry = Geometry(q_len=seq_len, kv_len=seq_len, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    expected = reference.multiplicity(pattern, geometry)
    for loaded in (store.load("r"), Stored("r", str(store.root))):
        assert torch.equal(reference.multiplicity(loaded, geometry), expected)
        for block_size in (None, 3, 8, 20):
            ours = lower(loaded, geometry, block_size=block_size)
            theirs = lower(pattern, geometry, block_size=block_size or 8)
            assert (ours.pairs, ours.distinct_pairs) == (theirs.pairs, theirs.distinct_pairs)
    assert store.load("r") == store.load("r")
    assert store.verify("r").parameters == pattern.to_dict()


def test_stored_blocks_attend_as_the_oracle_says(store: PatternStore) -> None:
    pattern = DRAWN[1]
    save(store, "r", pattern)
    q, k, v = torch.randn(3, 2, 60, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mapping = {"kind": "stored", "name": "r", "root": str(store.root)}
    for given in (store.load("r"), mapping):
        out = build_attention(pattern=given, like=q, is_causal=True, backend="sdpa")(q, k, v)
        expected, _ = reference.attention(q, k, v, pattern=pattern, is_causal=True)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_stored_blocks_continue_a_sequence(store: PatternStore) -> None:
    save(store, "r", DRAWN[0])
    whole = reference.multiplicity(store.load("r"), Geometry.self_attention(60, 4, is_causal=True))
    last = Geometry(q_len=5, kv_len=60, num_heads=4, num_kv_heads=4, is_causal=True)
    assert torch.equal(reference.multiplicity(store.load("r"), last), whole[:, -5:])


def test_stored_blocks_fit_nothing_else(store: PatternStore) -> None:
    save(store, "r", DRAWN[0])
    loaded = store.load("r")
    assert isinstance(loaded, StoredBlocks)
    with pytest.raises(PatternFileError, match="drawn for seq_len=60 and fits nothing else, got seq_len=61"):
        lower(loaded, Geometry.self_attention(61, 4, is_causal=True))
    with pytest.raises(PatternFileError, match="drawn for num_heads=4"):
        loaded.validate(8, 8)
    with pytest.raises(PatternFileError, match="drawn for is_causal=True"):
        layout_kinds(loaded, Geometry.self_attention(60, 4))


def test_names_are_taken_once(store: PatternStore) -> None:
    save(store, "a", Local(1))
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save(store, "a", Local(2))
    assert store.load("a") == Local(1)
    save(store, "a", Local(2), overwrite=True)
    assert load_pattern(store.root, "a") == Local(2)
    save_pattern(store.root, "B.b-2", Global(1), seq_len=4, num_heads=1, is_causal=False)
    (store.root / "foreign file.safetensors").touch()
    (store.root / "x.txt").touch()
    assert store.list() == ("B.b-2", "a")
    store.delete("a")
    assert store.list() == ("B.b-2",)
    missing = (
        store.delete,
        store.load,
        store.verify,
        partial(load_pattern, store.root),
        lambda n: Stored(n, store.root),
    )
    for call in missing:
        for kind in (FileNotFoundError, PatternFileError):
            with pytest.raises(kind, match=r"there is no stored pattern 'B.b-3' in .* \(did you mean 'B.b-2'\?\)"):
                call("B.b-3")
    assert PatternStore(store.root / "nowhere").list() == ()


@pytest.mark.parametrize("attempt", range(20))
def test_writers_at_once_leave_one_whole_file(store: PatternStore, attempt: int) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def write(n: int) -> None:
        start.wait()
        try:
            save(store, "new", Local(n))
        except FileExistsError:
            return
        won.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.load("new") == Local(won[0])
    assert [path.name for path in store.root.iterdir()] == ["new.safetensors"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_everywhere(store: PatternStore, name: str, tmp_path: Path) -> None:
    save(store, "good", Local(1))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    uses: list[Callable[[], object]] = [
        lambda: save(store, name, Local(1), overwrite=True),
        lambda: store.load(name),
        lambda: store.verify(name),
        lambda: store.delete(name),
        lambda: Stored(name, str(store.root)),
        lambda: build_attention(num_heads=1, head_dim=8, pattern={"kind": "stored", "name": name, "root": "."}),
    ]
    for use in uses:
        with pytest.raises(UnsafePathError):
            use()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_name_that_is_no_string_is_refused(store: PatternStore) -> None:
    assert len(HOSTILE) >= 40
    for name in (None, 3, b"a", Path("a"), ["a"]):
        with pytest.raises(UnsafePathError):
            store.load(name)  # type: ignore[arg-type]


def test_links_may_not_leave_the_root(store: PatternStore, tmp_path: Path) -> None:
    save(store, "good", Local(1))
    outside = PatternStore(tmp_path / "outside")
    victim = save(outside, "victim", Local(9))
    for name, target in (("out", victim), ("up", Path("../outside/victim.safetensors")), ("gone", tmp_path / "none")):
        (store.root / f"{name}.safetensors").symlink_to(target)
        for use in (store.load, store.verify, store.delete, lambda n: save(store, n, Local(2), overwrite=True)):
            with pytest.raises(UnsafePathError, match="outside the store"):
                use(name)
    (store.root / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(UnsafePathError):
        store.load("loop")
    (store.root / "alias.safetensors").symlink_to("good.safetensors")
    assert store.load("alias") == Local(1)
    assert store.list() == ("alias", "good")
    assert outside.load("victim") == Local(9)


def test_what_is_no_regular_file_is_refused(store: PatternStore) -> None:
    save(store, "good", Local(1))
    (store.root / "folder.safetensors").mkdir()
    os.mkfifo(store.root / "pipe.safetensors")
    for name in ("folder", "pipe"):
        with pytest.raises(PatternFileError, match="no regular file"):
            store.load(name)


def test_files_beyond_the_limit_are_neither_written_nor_read(store: PatternStore) -> None:
    path = save(store, "r", DRAWN[1])
    small = PatternStore(store.root, limit_bytes=path.stat().st_size - 1)
    with pytest.raises(PatternFileError, match="allowed are"):
        small.load("r")
    with pytest.raises(ConfigError, match="allowed are"):
        save(small, "r2", DRAWN[1])
    with pytest.raises(ConfigError, match="limit_bytes must be at least 1"):
        PatternStore(store.root, limit_bytes=0)


def test_what_depends_on_shared_keys_is_not_stored_as_blocks(store: PatternStore) -> None:
    pattern = Random(2, block_size=8) | Dilated((16,), (2,), offsets_by="kv_head")
    with pytest.raises(ConfigError, match="depends on the number of key-value heads"):
        save(store, "r", pattern)
    with pytest.raises(ConfigError, match="needs at least as many, got num_heads=1"):
        store.save("d", Dilated((4, 8), (1, 2), heads="split"), seq_len=8, num_heads=1, is_causal=False)


def test_files_are_plain_safetensors(store: PatternStore) -> None:
    path = save(store, "r", DRAWN[1])
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {"cols", "head_table", "mask_ids", "masks", "row_ptr", "weights"}
    with safetensors.safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["pattern"])["pattern"] == DRAWN[1].to_dict()


KILLED = """
import os, random, signal, sys, time
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.store import PatternStore
store, rng = PatternStore(sys.argv[1]), random.Random(0)
save = lambda n: store.save("p", Local(n), seq_len=64, num_heads=2, is_causal=True, overwrite=True)
save(0)
for attempt in range(200):
    child = os.fork()
    if child == 0:
        for n in range(1, 1 << 30):
            save(n)
    time.sleep(rng.uniform(0.0, 0.012))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert isinstance(store.load("p"), Local)
    assert store.list() == ("p",)
print(store.load("p").window_size[0])
"""


@pytest.mark.slow
def test_a_killed_writer_never_loses_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_stored_values_are_frozen_and_small_to_print(store: PatternStore) -> None:
    save(store, "r", DRAWN[0])
    loaded = store.load("r")
    assert isinstance(loaded, StoredBlocks)
    assert repr(loaded) == f"StoredBlocks(table={loaded.table.digest[:16]}, name='r', root='{store.root}')"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        loaded.name = "s"  # type: ignore[misc]


@pytest.mark.parametrize("patterns", [(Local(3), Local(4)), (Random(2, 8, 0), Random(2, 8, 1))], ids=str)
def test_a_repr_says_what_was_stored(store: PatternStore, patterns: tuple[Pattern, Pattern]) -> None:
    """Engines of several processes, a ring's for one, compare their patterns by it."""
    seen = set()
    for pattern in (*patterns, patterns[0]):
        store.save("p", pattern, seq_len=60, num_heads=4, is_causal=True, overwrite=True)
        seen.add((repr(Stored("p", str(store.root))), repr(store.load("p"))))
    assert len(seen) == 2
    assert all(len(set(reprs)) == 2 for reprs in zip(*seen, strict=True))


def test_only_patterns_are_stored(store: PatternStore) -> None:
    mapping: Any = {"kind": "full"}
    with pytest.raises(
        ConfigError, match=r"only patterns such as Full\(\) are stored, got \{'kind': 'full'\} \(dict\)"
    ):
        store.save("p", mapping, seq_len=60, num_heads=4, is_causal=True)
    assert not store.root.exists()


@attrs.frozen
class Folder:
    """A path that is no `Path`."""

    name: Any

    def __fspath__(self) -> Any:
        return self.name


def test_a_root_is_any_path(store: PatternStore) -> None:
    class Text(str):
        __slots__ = ()

    save(store, "p", Local(3))
    for root in (str(store.root), Text(store.root), Folder(str(store.root))):
        assert PatternStore(root).load("p") == load_pattern(root, "p") == Local(3)
        mapping = {"kind": "stored", "name": "p", "root": root}
        assert resolve_pattern(mapping).to_dict() == mapping | {"root": str(store.root)}
        config = AttentionConfig(num_heads=1, head_dim=8, pattern=mapping)
        assert json.loads(json.dumps(config.to_dict()))["pattern"]["root"] == str(store.root)
    roots: list[Any] = [b"root", Folder(b"root"), 3, None, "a\0b", "a\ud800b"]
    for root in roots:
        for make in (PatternStore, lambda root: resolve_pattern({"kind": "stored", "name": "p", "root": root})):
            with pytest.raises(ConfigError, match="the root of a store must be the path of a folder, got"):
                make(root)


def test_overwriting_is_asked_for_by_a_bool(store: PatternStore) -> None:
    save(store, "p", Local(3))
    values: list[Any] = ["no", 1, None]
    for overwrite in values:
        with pytest.raises(ConfigError, match=f"overwrite must be True or False, got {overwrite!r}"):
            save(store, "p", Local(4), overwrite=overwrite)
    assert store.load("p") == Local(3)


def test_a_stored_pattern_that_the_system_refuses_is_no_fault_of_the_plugin(store: PatternStore) -> None:
    store.save("p", Local(3), seq_len=60, num_heads=4, is_causal=True)
    (store.root / "file").touch()
    with pytest.raises(PatternFileError, match=r"cannot read the stored pattern 'p' in '.*file': Not a directory"):
        Stored("p", str(store.root / "file"))
