"""What a killed writer leaves behind: never listed, removed by the next save of its name, and only then."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dilated_attention.core import files
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.store import PatternStore

from .distributions import ROOT

KILLED = """
import os, signal, sys
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.store import PatternStore
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
PatternStore(sys.argv[1]).save(sys.argv[2], Local(9), seq_len=8, num_heads=1, is_causal=False, overwrite=True)
"""


def save(root: Path, name: str, window: int) -> None:
    PatternStore(root).save(name, Local(window), seq_len=8, num_heads=1, is_causal=False, overwrite=True)


def kill_a_writer(root: Path, name: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), name], env=environment, timeout=60, check=False)
    assert done.returncode == -9


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def test_the_next_save_of_the_name_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    save(tmp_path, "a", 1)
    kill_a_writer(tmp_path, "a")
    kill_a_writer(tmp_path, "a.b")
    assert len(hidden(tmp_path)) == 2
    store = PatternStore(tmp_path)
    assert store.list() == ("a",)
    assert store.load("a") == Local(1)
    save(tmp_path, "b", 1)
    assert len(hidden(tmp_path)) == 2
    save(tmp_path, "a", 2)
    assert [name[:5] for name in hidden(tmp_path)] == [".a.b."]
    save(tmp_path, "a.b", 3)
    assert hidden(tmp_path) == []
    assert store.list() == ("a", "a.b", "b")
    assert store.load("a") == Local(2)


def test_a_live_writers_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on, real = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        if threading.current_thread() is writer and not writing.is_set():
            writing.set()
            assert go_on.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    writer = threading.Thread(target=save, args=(tmp_path, "a", 7))
    writer.start()
    assert writing.wait(30)
    before = hidden(tmp_path)
    save(tmp_path, "a", 1)
    assert hidden(tmp_path) == before != []
    assert PatternStore(tmp_path).load("a") == Local(1)
    go_on.set()
    writer.join()
    assert PatternStore(tmp_path).load("a") == Local(7)
    assert hidden(tmp_path) == []


def test_a_file_removed_before_its_writer_could_lock_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removed: list[Path] = []

    def late(file: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not removed:
            removed.extend(tmp_path.glob(".a.*.tmp"))
            files._remove_abandoned(tmp_path / "a.safetensors")
            assert not any(path.exists() for path in removed)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    save(tmp_path, "a", 4)
    assert len(removed) == 1
    assert PatternStore(tmp_path).load("a") == Local(4)
    assert hidden(tmp_path) == []


def test_only_regular_files_with_a_temporary_name_are_removed(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    victim = tmp_path / "victim"
    victim.write_text("kept")
    root = tmp_path / "root"
    root.mkdir()
    (root / f".a.{token}.tmp").symlink_to(victim)
    os.mkfifo(root / f".a.{token[::-1]}.tmp")
    others = [f".a.{token}x.tmp", f"a.{token}.tmp", f".a.x.{token}.tmp", f".a.{token}.tmp.safetensors"]
    for name in others:
        (root / name).touch()
    save(root, "a", 1)
    left = {path.name for path in root.iterdir()}
    assert left == {"a.safetensors", f".a.{token}.tmp", f".a.{token[::-1]}.tmp", *others}
    assert victim.read_text() == "kept"
    assert PatternStore(root).list() == ("a",)
