"""Importing the package is cheap, and every public name is there when it is asked for."""

from __future__ import annotations

import importlib
import tomllib

import pytest

import dilated_attention
from dilated_attention import registry
from dilated_attention.core import kernel

from .distributions import ROOT, run


def test_every_public_name_resolves() -> None:
    assert sorted(dilated_attention.__all__) == dilated_attention.__all__
    for name in dilated_attention.__all__:
        assert getattr(dilated_attention, name) is not None
        assert name in dir(dilated_attention)
    with pytest.raises(AttributeError, match="no attribute 'build_atention'"):
        dilated_attention.build_atention  # noqa: B018


def test_the_names_are_those_of_the_lazy_table() -> None:
    homes, modules = dilated_attention._HOMES, dilated_attention._MODULES
    assert {*homes, *modules, "__version__"} == {*dilated_attention.__all__, "metrics"}
    assert len(homes) == sum(map(len, dilated_attention._NAMES.values()))
    for name, home in homes.items():
        module = importlib.import_module(f"dilated_attention.{home}")
        assert getattr(module, name) is getattr(dilated_attention, name)


def test_modules_are_there_without_an_import_of_their_own() -> None:
    names = [*dilated_attention._MODULES, "metrics.Collector"]
    code = "import dilated_attention\n" + "\n".join(f"print(dilated_attention.{name})" for name in names)
    done = run(None, "-c", code)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, len(names)), done.stderr


def test_what_plugins_need_is_in_the_registry() -> None:
    """Every class of core.kernel is: pieces, protocols, and what a kernel may have besides."""
    assert sorted(registry.__all__) == registry.__all__
    for name in registry.__all__:
        assert getattr(registry, name) is not None
        assert name in dir(registry)
    own = {name for name, value in vars(kernel).items() if getattr(value, "__module__", "") == kernel.__name__}
    assert {name for name in own if isinstance(vars(kernel)[name], type)} <= {*registry.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Join'"):
        registry.Join  # noqa: B018


def test_import_brings_neither_torch_nor_numpy_nor_attrs() -> None:
    code = (
        "import sys; before = set(sys.modules); import dilated_attention; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert run(None, "-c", code).stdout.strip() == "['dilated_attention']"


def test_import_takes_less_than_150_ms() -> None:
    code = "import time; start = time.perf_counter(); import dilated_attention; print(time.perf_counter() - start)"
    assert min(float(run(None, "-c", code).stdout) for _ in range(3)) < 0.15


def test_errors_and_specs_can_be_imported_by_their_path_without_torch() -> None:
    code = (
        "from dilated_attention.errors import ConfigError, DilatedAttentionError\n"
        "from dilated_attention.registry import BackendSpec, PatternSpec, Refusal, hookimpl\n"
        "import sys; print('torch' in sys.modules, issubclass(ConfigError, ValueError))"
    )
    done = run(None, "-c", code)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dilated_attention.__version__ == project["version"]
