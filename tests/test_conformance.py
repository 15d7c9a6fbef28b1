"""The conformance kit on our own backends, through the doors that third parties use: a command, a plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention import ConfigError, Local, Pattern
from dilated_attention.registry.conformance import Kit, KitSettings, run
from dilated_attention.registry.conformance.checks import CHECKS
from dilated_attention.registry.conformance.grid import LENGTH, LONGER, ODD_HEAD_DIMS, QUICK_HEAD_DIMS
from dilated_attention.registry.conformance.measure import Finding, compare

from .conftest import Invoke
from .covering import covering
from .distributions import install_backend, installed
from .distributions import run as python

WRONG = "class Toy:\n    def refusals(self, request): return []\n    def pin(self, request): return 'toy'\n"


@pytest.mark.parametrize(
    ("backend", "no_few"),
    [
        ("sdpa", ()),
        pytest.param("math", ("local|global",), marks=pytest.mark.slow),  # whose blocks are core's, as those of sdpa
        pytest.param("reference", ("local|global",), marks=pytest.mark.slow),  # the oracle against itself
    ],
)
def test_ours_by_every_check_on_half_of_the_grid(backend: str, no_few: tuple[str, ...]) -> None:
    report = covering(Kit(backend, KitSettings(device="cpu", quick=True)), no_few)
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["sdpa", "math", "reference"])
def test_the_whole_grid(backend: str) -> None:
    report = run(backend)
    assert report.passed, str(report)


@pytest.mark.slow
def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    kit = Kit("sdpa", KitSettings(device="cpu", quick=True, large=True))
    (trial,) = (trial for trial in kit.trials() if trial.check.name == "large-strides")
    assert trial.run().passed, str(trial.run())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_the_quick_grid_on_a_card(backend: str) -> None:
    report = run(backend, device="cuda", quick=True)
    assert report.passed, str(report)


def test_nan_never_passes() -> None:
    zeros, nans = torch.zeros(4), torch.full((4,), torch.nan)
    for actual, expected in ((nans, zeros), (zeros, nans), (nans, nans), (zeros + torch.inf, zeros)):
        assert not compare("x", actual, expected, 1e9).passed
    assert not Finding(what="x", error=float("nan"), bound=1.0).passed
    assert compare("x", torch.full((4,), -torch.inf), torch.full((4,), -torch.inf), 0.0).passed
    assert not compare("x", torch.zeros(3), zeros, 1.0).passed


def test_the_grid_is_what_is_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = Kit("sdpa", KitSettings(device="cpu", quick=True)).cases
    assert {case.dtype for case in cases} == {"float64", "float32", "bfloat16", "float16"}
    assert {case.head_dim for case in cases} == {*QUICK_HEAD_DIMS, ODD_HEAD_DIMS[0]}
    assert {case.is_causal for case in cases} == {True, False}
    assert any(case.num_heads != case.num_kv_heads for case in cases)
    capabilities = {"device_types": ["cpu"], "dtypes": ["float32"], "head_dims": [40], "layouts": ["branch"]}
    install_backend(tmp_path, "narrow", backend="narrow", capabilities=capabilities, code=WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    from dilated_attention.registry.discovery import Registry

    narrow = Kit("narrow", KitSettings(registry=Registry.discover({}), quick=True))
    branches = {"full", "dilated", "repeated", "ragged", "strided", "split", "shard"}
    assert {case.pattern_name for case in narrow.cases} == branches
    assert {(case.dtype, case.head_dim, case.is_causal) for case in narrow.cases} == {("float32", 40, False)}
    assert {case.num_heads // case.num_kv_heads for case in narrow.cases} == {1}
    assert not any(case.requires_grad for case in narrow.cases)


def test_a_further_pattern_is_tested_too() -> None:
    patterns: list[Pattern | Mapping[str, Any]] = [{"kind": "local", "window_size": 3}, Local(5)]
    kit = Kit("sdpa", KitSettings(device="cpu", quick=True, patterns=patterns))
    assert {"local(window_size=3)", "local(window_size=[5,5])"} <= {case.pattern_name for case in kit.cases}
    lengths = {case.q_len for case in kit.cases if case.pattern_name == "local(window_size=3)"}
    assert lengths == {LENGTH, LONGER}
    with pytest.raises(ConfigError, match="unknown pattern 'lokal'"):
        Kit("sdpa", KitSettings(patterns=[{"kind": "lokal"}]))
    with pytest.raises(ConfigError, match="or a mapping with 'kind', its name; got 'local'"):
        Kit("sdpa", KitSettings(patterns=["local"]))  # type: ignore[list-item]


def test_names_that_do_not_exist_and_devices_that_are_not_here() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'sdap' \(did you mean 'sdpa'\?\)"):
        Kit("sdap")
    with pytest.raises(ConfigError, match="declares cpu, cuda, not 'meta'"):
        Kit("sdpa", KitSettings(device="meta"))
    with pytest.raises(ConfigError, match=r"^device 'cuda:99': there is none on this machine$"):
        Kit("sdpa", KitSettings(device="cuda:99"))
    without_names: Any = "kernel"
    with pytest.raises(ConfigError, match=r"^options must map option names of 'sdpa' to values, got 'kernel'$"):
        Kit("sdpa", KitSettings(options=without_names))
    with pytest.raises(ConfigError, match=r"backend_options\['sdpa'\] has no 'kernal' \(did you mean 'kernel'\?\)"):
        run("sdpa", quick=True, options={"kernal": "flash"})


def test_every_check_says_what_it_asserts() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.title.endswith(".") for check in CHECKS), [check.name for check in CHECKS]


def test_the_command_prints_the_table_and_its_status(tmp_path: Path, invoke_at: Invoke) -> None:
    """A backend whose build fails: each of its cases is a failure, and nothing is measured."""
    code = WRONG + "    def build(self, request): raise RuntimeError('not today')\n"
    capabilities = {"device_types": ["cpu"], "dtypes": ["float32"], "head_dims": [24], "layouts": ["dense"]}
    install_backend(tmp_path, "sick", backend="sick", capabilities=capabilities, code=code)
    done = invoke_at(tmp_path, "conformance", "sick", "--quick")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "sick of sick 1.0 on cpu: 10 cases (quick grid)"
    assert any(line.startswith("builds") and " failed " in line for line in lines)
    assert "RuntimeError: not today" in done.stdout
    assert any(line.startswith("manifest") and " ok " in line for line in lines)
    assert any(line.startswith("out ") and "skipped" in line for line in lines)
    data = json.loads(invoke_at(tmp_path, "conformance", "sick", "--quick", "--json").stdout)
    assert not data["passed"]
    assert {row["check"] for row in data["checks"]} == {check.name for check in CHECKS}
    assert {failure["check"] for failure in data["failures"]} >= {"builds"}
    unknown = invoke_at(tmp_path, "conformance", "sik")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "did you mean 'sick'" in unknown.stderr


def test_a_manifest_that_imports_what_takes_long_is_caught(tmp_path: Path) -> None:
    capabilities = {"device_types": ["cpu"], "dtypes": ["float32"], "head_dims": [24], "layouts": ["dense"]}
    install_backend(
        tmp_path, "heavy", backend="heavy", capabilities=capabilities, code=WRONG, extra="import cattrs  # noqa"
    )
    with installed(tmp_path):
        trial = next(t for t in Kit("heavy", KitSettings(quick=True)).trials() if t.check.name == "manifest")
        assert "its import brings cattrs" in str(trial.run())


def test_the_kit_is_a_plugin_of_pytest_for_those_who_ask(
    tmp_path: Path, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-p", "no:cacheprovider", "-p", "dilated_attention.registry.conformance.pytest_plugin"]
    arguments += ["--conformance", "sdpa", "--conformance-quick", "--conformance-device", "cpu"]
    arguments += ["--conformance-pattern", '{kind = "local", window_size = 3}', "--conformance-large"]
    arguments += ["--conformance-drawn", "3", "--conformance-seed", "8"]
    chosen = "declared or undeclared or cuda-graph or (builds and window_size and float64) or (builds and 2-of-seed-8)"
    arguments += ["--rootdir", str(tmp_path), str(tmp_path), "-q", "-k", chosen, "-rs"]
    done = python(None, "-m", "pytest", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed, 1 skipped" in done.stdout
    assert "not on a CUDA device" in done.stdout
    for workers in ([], ["-n", "1"]):  # a pytest within this one, which has torch already
        code = pytest.main([*(word.replace("sdpa", "spda") for word in arguments), *workers])
        printed = capfd.readouterr()
        assert code == pytest.ExitCode.USAGE_ERROR
        said = printed.out + printed.err
        assert "ERROR: --conformance spda: unknown backend 'spda' (did you mean 'sdpa'?)" in said
    assert pytest.main([*arguments, "--conformance-pattern", "local"]) == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --conformance sdpa: --conformance-pattern must be a TOML table" in capfd.readouterr().err
    assert pytest.main([*arguments, "--collect-only", "-k", "large-strides"]) == pytest.ExitCode.OK
    with pytest.raises(ValueError, match="no option named '--conformance'"):  # nobody has asked this pytest
        pytestconfig.getoption("--conformance")
