"""Plugins of other distributions, really installed: they are found, and a broken one hurts nobody else.

Commands that need torch run in this process; the environment and what an import brings are seen in one of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import AttentionConfig, Full, PluginError, build_attention, explain, resolve_pattern
from dilated_attention.registry import PatternSpec, hookimpl
from dilated_attention.registry.capabilities import make_request
from dilated_attention.registry.conformance import Kit, KitSettings
from dilated_attention.registry.device import describe_device
from dilated_attention.registry.discovery import Registry
from dilated_attention.registry.plugins import Source
from dilated_attention.registry.selection import select

from . import distributions
from .conftest import Invoke
from .distributions import as_json, command, install, install_backend, installed, run

# Kinds of broken: the module behind the entry point, and words that its cause must have.
BROKEN: dict[str, tuple[str, list[str]]] = {
    "import-error": ("import no_such_library", ["import failed", "no_such_library"]),
    "os-error": ("import ctypes; ctypes.CDLL('libnothing.so.7')", ["import failed", "OSError", "libnothing.so.7"]),
    "exits": ("import sys; sys.exit(3)", ["import failed", "SystemExit"]),
    "raising-hook": (
        "from dilated_attention.registry import hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n    raise RuntimeError('no licence found')",
        ["dilated_attention_backends", "RuntimeError", "no licence found"],
    ),
    "misspelt-hook": (
        "from dilated_attention.registry import hookimpl\n@hookimpl\ndef dilated_attention_backend():\n    return []",
        ["registration failed", "dilated_attention_backend"],
    ),
    "wrong-arguments": (
        "from dilated_attention.registry import hookimpl\n@hookimpl\ndef dilated_attention_backends(x):\n    return []",
        ["registration failed", "dilated_attention_backends"],
    ),
    "unmarked": ("def dilated_attention_backends():\n    return []", ["no hook", "hookimpl"]),
    "wrong-type": (
        "from dilated_attention.registry import hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n    return {'name': 'fast'}",
        ["'name'", "BackendSpec"],
    ),
    "no-iterable": (
        "from dilated_attention.registry import hookimpl\n@hookimpl\ndef dilated_attention_patterns():\n    return 3",
        ["returned 3", "PatternSpec"],
    ),
    "no-return": (
        "from dilated_attention.registry import hookimpl\n@hookimpl\ndef dilated_attention_backends():\n    pass",
        ["returned None", "BackendSpec"],
    ),
    "generator": (
        "from dilated_attention.registry import hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n    yield from ()\n    raise KeyError('late')",
        ["KeyError", "late"],
    ),
    "future": (
        "from dilated_attention.registry import BackendSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n"
        "    return [BackendSpec(name='future', target='a:b', api_version=7, capabilities={})]",
        ["'future'", "api_version 7", "knows 1"],
    ),
    "bad-spec": (
        "from dilated_attention.registry import BackendSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n"
        "    return [BackendSpec(name='auto', target='a:b', capabilities={})]",
        ["ConfigError", "'auto'"],
    ),
    "priority": (
        "from dilated_attention.registry import BackendSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n"
        "    return [BackendSpec(name='proud', target='a:b', priority='high', capabilities={})]",
        ["priority must be an integer, got 'high'"],
    ),
    "bytes": (
        "from dilated_attention.registry import BackendSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n"
        "    return [BackendSpec(name='bytes', target='a:b', capabilities={'dtypes': b'float32'})]",
        ["capabilities['dtypes'] must be a collection of names, got b'float32'"],
    ),
    "reserved-kind": (
        "from dilated_attention.registry import PatternSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_patterns():\n    return [PatternSpec(kind='union', target='a:b')]",
        ["kind must be", "'auto', 'union', 'sum', 'head_shard'; got 'union'"],
    ),
    "thief": (
        "from dilated_attention.registry import BackendSpec, hookimpl\n"
        "@hookimpl\ndef dilated_attention_backends():\n"
        "    return [BackendSpec(name='sdpa', target='a:b', priority=999, capabilities={})]",
        ["'sdpa'", "thief 1.0", "dilated-attention 0.1.0"],
    ),
}
PLAIN = ("--heads", "4", "--head-dim", "32")


def row_of(rows: list[dict[str, Any]], distribution: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["distribution"] == distribution]
    return row


def test_a_backend_of_another_distribution_is_found_and_chosen(tmp_path: Path, invoke_at: Invoke) -> None:
    install_backend(tmp_path, "fast-attention", backend="fast")
    listed = as_json(command(tmp_path, "backends", "--json"))
    names = [row["name"] for row in listed]
    assert names[0] == "fast"
    assert names.index("sdpa") < names.index("reference")
    assert (listed[0]["distribution"], listed[0]["version"]) == ("fast-attention", "1.0")
    plan = as_json(invoke_at(tmp_path, "explain", *PLAIN, "--json"))
    assert (plan["backend"], plan["kernel"]) == ("fast", "toy kernel")
    plan = as_json(invoke_at(tmp_path, "explain", *PLAIN, "--dtype", "bfloat16", "--json"))
    assert plan["backend"] == "sdpa"
    assert row_of(plan["rows"], "fast-attention")["near_miss"]["changes"] == {"dtype": "float32"}


def test_all_kinds_of_broken_plugin_at_once(tmp_path: Path, invoke_at: Invoke) -> None:
    for name, (code, _) in BROKEN.items():
        install(tmp_path, name, code)
    install_backend(tmp_path, "sound", backend="sound")
    for arguments in (["backends"], ["plugins"], ["doctor"], ["explain", *PLAIN]):
        done = invoke_at(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        for name in BROKEN:
            assert f"{name} 1.0" in done.stdout, (arguments, name)
    assert done.stdout.startswith("sound (toy kernel) chosen")
    stored = invoke_at(tmp_path, "pattern", "list", "--root", str(tmp_path))
    assert (stored.returncode, stored.stderr) == (0, "")
    with installed(tmp_path):
        attention = build_attention(num_heads=4, head_dim=32, backend="sdpa", device="cpu")
        assert attention(*torch.zeros(3, 1, 5, 4, 32)).shape == (1, 5, 4, 32)
        for trial in list(Kit("sdpa", KitSettings(device="cpu", quick=True)).trials())[:3]:
            assert trial.run().passed, trial
    rows = as_json(command(tmp_path, "plugins", "--json"))
    for name, (_, words) in BROKEN.items():
        row = row_of(rows, name)
        assert (row["status"], row["version"]) == ("broken", "1.0")
        for word in words:
            assert word in " ".join(row["causes"]), name
    assert row_of(rows, "sound")["status"] == "ok"


def test_what_is_sound_in_a_broken_plugin_stays_usable(tmp_path: Path) -> None:
    extra = """
    from dilated_attention.registry import PatternSpec
    @hookimpl
    def dilated_attention_patterns():
        return [PatternSpec(kind="local", target="a:b"), 5]
    """
    install_backend(tmp_path, "half", backend="half", extra=extra)
    row = row_of(as_json(command(tmp_path, "plugins", "--json")), "half")
    assert row["status"] == "broken"
    assert row["backends"] == ["half"]
    assert "already registered by dilated-attention" in " ".join(row["causes"])
    assert "returned 5" in " ".join(row["causes"])


def test_two_distributions_with_one_name_are_both_named(tmp_path: Path) -> None:
    install_backend(tmp_path, "alpha", backend="same")
    install_backend(tmp_path, "beta", backend="same")
    rows = as_json(command(tmp_path, "plugins", "--json"))
    assert row_of(rows, "alpha")["backends"] == ["same"]
    (cause,) = row_of(rows, "beta")["causes"]
    assert "'same' of beta 1.0" in cause
    assert "registered by alpha 1.0" in cause


def test_a_slow_import_is_recorded_and_usable(tmp_path: Path, invoke_at: Invoke) -> None:
    install_backend(tmp_path, "sleepy", backend="sleepy", extra="import time\ntime.sleep(0.4)")
    install_backend(tmp_path, "heavy", backend="heavy", extra="import torch")
    (tmp_path / "torch.py").touch()  # what matters is that the name is imported; the real one takes seconds
    rows = as_json(command(tmp_path, "plugins", "--json"))
    assert row_of(rows, "sleepy")["status"] == "slow"
    assert row_of(rows, "sleepy")["import_seconds"] >= 0.4
    assert "import took" in row_of(rows, "sleepy")["causes"][0]
    assert "imports torch" in row_of(rows, "heavy")["causes"][0]
    assert row_of(rows, "sleepy")["backends"] == ["sleepy"]
    explained = invoke_at(tmp_path, "explain", *PLAIN).stdout
    assert explained.startswith("heavy (toy kernel) chosen")
    assert "    its import took" in explained


def test_strict_raises_and_names_the_plugin(tmp_path: Path) -> None:
    install(tmp_path, "import-error", BROKEN["import-error"][0])
    done = command(tmp_path, "backends", DILATED_ATTENTION_STRICT_PLUGINS="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: plugin 'plugin' of import-error 1.0 is broken: import failed")
    assert "Traceback" not in done.stderr
    wrong = command(tmp_path, "backends", DILATED_ATTENTION_STRICT_PLUGINS="yes")
    assert (wrong.returncode, wrong.stderr.count("must be 0 or 1, got 'yes'")) == (2, 1)


def test_plugins_are_disabled_by_name_without_being_imported(tmp_path: Path) -> None:
    install(tmp_path, "loud", "print('imported')", entry="loud-entry")
    install_backend(tmp_path, "other", backend="other")
    for name in ("loud", "loud-entry"):
        done = command(tmp_path, "plugins", DILATED_ATTENTION_DISABLE_PLUGINS=f"{name}, other")
        assert "imported" not in done.stdout
        assert done.stdout.count("disabled by DILATED_ATTENTION_DISABLE_PLUGINS") == 2
        assert done.stderr == ""
    done = command(tmp_path, "plugins", DILATED_ATTENTION_DISABLE_PLUGINS="lou")
    assert "names 'lou', which is not installed (did you mean 'loud'?)" in done.stderr
    assert "imported" in done.stdout


def test_unknown_variables_are_warned_about() -> None:
    done = command(None, "backends", DILATED_ATTENTION_DISABLE_PLUGIN="x")
    assert done.returncode == 0
    assert "warning: the environment variable DILATED_ATTENTION_DISABLE_PLUGIN means nothing here" in done.stderr
    assert "did you mean 'DILATED_ATTENTION_DISABLE_PLUGINS'" in done.stderr
    code = "from dilated_attention.registry.discovery import default_registry; default_registry()"
    warned = run(None, "-W", "error::UserWarning", "-c", code, DILATED_ATTENTION_X="1")
    assert "UserWarning: the environment variable DILATED_ATTENTION_X means nothing here" in warned.stderr


def test_the_environment_is_read_at_discovery_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_backend(tmp_path, "fast-attention", backend="fast")
    with installed(tmp_path):
        assert explain(num_heads=4, head_dim=32, device="cpu").backend == "fast"
        monkeypatch.setenv("DILATED_ATTENTION_DISABLE_PLUGINS", "fast-attention")
        assert explain(num_heads=4, head_dim=32, device="cpu").backend == "fast"


def test_a_site_ranks_backends(tmp_path: Path, invoke_at: Invoke) -> None:
    install_backend(tmp_path, "fast-attention", backend="fast")
    rank = """
    from dilated_attention.registry import hookimpl
    @hookimpl
    def dilated_attention_rank_backends(request, candidates):
        names = [spec.name for spec in candidates]
        assert request.device.type == "cpu" and names.index("fast") < names.index("sdpa")
        return ["sdpa"] if request.config.head_dim == 32 else None
    """
    install(tmp_path, "site-preference", rank)
    assert as_json(invoke_at(tmp_path, "explain", *PLAIN, "--json"))["backend"] == "sdpa"
    assert as_json(invoke_at(tmp_path, "explain", "--heads", "4", "--head-dim", "64", "--json"))["backend"] == "fast"


def test_a_preference_for_known_lengths_is_told(tmp_path: Path, invoke_at: Invoke) -> None:
    install_backend(tmp_path, "fast-attention", backend="fast")
    rank = """
    from dilated_attention.registry import hookimpl
    @hookimpl
    def dilated_attention_rank_backends(request, candidates):
        return ["fast"] if request.config.seq_len else ["sdpa"]
    """
    install(tmp_path, "site-preference", rank)
    for more, chosen, told in ([], "sdpa", "would be chosen if seq_len were given"), (["--seq-len", "128"], "fast", ""):
        plan = as_json(invoke_at(tmp_path, "explain", *PLAIN, *more, "--json"))
        assert plan["backend"] == chosen
        details = {row["name"]: row["detail"] for row in plan["rows"]}
        assert (details["fast"], details["sdpa"]) == (told, "")


WRONG_RANKINGS = {
    "unknown-name": ("['nobody']", "returned ['nobody']"),
    "a-string": ("'sdpa'", "returned 'sdpa'"),
    "raises": ("1 / 0", "ZeroDivisionError"),
    "nested": ("[[]]", "returned [[]]"),
}


def test_wrong_rankings_are_rows_and_are_ignored(tmp_path: Path, invoke_at: Invoke) -> None:
    for name, (answer, _) in WRONG_RANKINGS.items():
        hook = (
            "from dilated_attention.registry import hookimpl\n"
            f"@hookimpl\ndef dilated_attention_rank_backends(request, candidates):\n    return {answer}\n"
        )
        install(tmp_path, name, hook)
    plan = as_json(invoke_at(tmp_path, "explain", *PLAIN, "--json"))
    assert plan["backend"] == "sdpa"
    for name, (_, cause) in WRONG_RANKINGS.items():
        row = row_of(plan["rows"], name)
        assert row["status"] == "broken"
        assert row["detail"].startswith("dilated_attention_rank_backends")
        assert cause in row["detail"]


SHAKY = {
    "no-library": ("raise OSError('libfast.so: no such file')", "libfast.so: no such file"),
    "no-attribute": ("Tay = 1", "no attribute 'Toy'"),
    "raises": ("class Toy:\n    def refusals(self, request): raise ValueError('bad day')", "ValueError: bad day"),
    "a-string": ("class Toy:\n    def refusals(self, request): return 'no'", "returned 'no'"),
    "strings": ("class Toy:\n    def refusals(self, request): return ['no']", "not a Refusal"),
    "no-pin": ("class Toy:\n    def refusals(self, request): return []", "no attribute 'pin'"),
    "no-name": (
        "class Toy:\n    def refusals(self, request): return []\n    def pin(self, request): return None",
        "not the name of a kernel",
    ),
}


def test_backends_that_break_when_asked_are_rows(tmp_path: Path, invoke_at: Invoke) -> None:
    for name, (code, _) in SHAKY.items():
        install_backend(tmp_path, name, backend=name, code=code)
    plan = as_json(invoke_at(tmp_path, "explain", *PLAIN, "--json"))
    assert plan["backend"] == "sdpa"
    for name, (_, cause) in SHAKY.items():
        row = row_of(plan["rows"], name)
        assert (row["name"], row["status"], row["version"]) == (name, "broken", "1.0")
        assert cause in row["detail"]
    asked = invoke_at(tmp_path, "explain", *PLAIN, "--backend", "raises")
    assert asked.returncode == 3
    assert asked.stdout.startswith("backend 'raises' does not fit, and was asked for by name")
    assert "ValueError: bad day" in asked.stdout


def test_an_axis_of_tomorrow_is_refused_by_plugins_of_today_without_a_call(tmp_path: Path) -> None:
    install_backend(tmp_path, "today", backend="today", code="raise AssertionError('was imported')")
    request = make_request(AttentionConfig(num_heads=4, head_dim=32), Full(), describe_device("cpu"))
    later = attrs.evolve(request, needs={**request.needs, "telepathy": True})
    with installed(tmp_path):
        rows = select(later, Registry.discover({})).rows
    assert all("telepathy" in [refusal.code for refusal in row.refusals] and row.near_miss is None for row in rows)
    told = {row.name: (row.status, [refusal.code for refusal in row.refusals]) for row in rows}
    assert told["today"] == told["sdpa"] == ("refused", ["telepathy"])


def test_unknown_capabilities_are_kept_and_shown(tmp_path: Path, invoke_at: Invoke) -> None:
    capabilities = distributions.CAPABILITIES | {"quantum": {"qubits": 3}, "unequal_length": True}
    install_backend(tmp_path, "odd", backend="odd", capabilities=capabilities)
    (odd,) = [b for b in as_json(invoke_at(tmp_path, "backends", "--json")) if b["name"] == "odd"]
    assert odd["capabilities"]["quantum"] == {"qubits": 3}
    shown = invoke_at(tmp_path, "backends").stdout
    assert "qubits=3  (not in this release's vocabulary)\n" in shown
    assert "(not in this release's vocabulary) (did you mean 'unequal_lengths'?)" in shown


def test_listing_backends_imports_neither_torch_nor_numpy_nor_plugin_code(tmp_path: Path) -> None:
    install_backend(tmp_path, "fast-attention", backend="fast", code="raise AssertionError('was imported')")
    code = (
        "import sys; sys.argv[1:] = ['backends']\n"
        "from dilated_attention.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n"
        "    print(stop.code, [m for m in ('torch', 'numpy', 'numba', 'cattrs', 'fast_attention_code') "
        "if m in sys.modules])"
    )
    assert run(tmp_path, "-c", code).stdout.splitlines()[-1] == "0 []"


def test_discovery_adds_little_with_twenty_plugins(tmp_path: Path) -> None:
    for number in range(20):
        install_backend(tmp_path, f"plugin-{number}", backend=f"backend-{number}")
    code = (
        "import time; from dilated_attention.registry.discovery import Registry\n"
        "start = time.process_time(); found = Registry.discover(); took = time.process_time() - start\n"
        "print(sum(name.startswith('backend-') for name in found.backends), took)"
    )
    times = []
    for _ in range(5):
        count, took = run(tmp_path, "-c", code).stdout.split()
        assert int(count) == 20
        times.append(float(took))
    # Of the processor, which a loaded machine too tells within a factor of two: it is 20 ms on a quiet one.
    assert min(times) < 0.06, times


def test_a_pattern_that_cannot_be_imported_is_told_with_its_distribution() -> None:
    class Plugin:
        @hookimpl
        def dilated_attention_patterns(self) -> list[PatternSpec]:
            return [PatternSpec(kind="lost", target="no_such_module:Lost")]

    registry = Registry.discover({}, [Source(name="lost", distribution="losers", version="2", load=Plugin)])
    with pytest.raises(PluginError, match=r"pattern 'lost' of losers 2: no_such_module:Lost cannot be imported: Mod"):
        resolve_pattern({"kind": "lost"}, registry)
