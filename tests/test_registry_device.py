"""What is found out about a device before anything is chosen for it."""

from __future__ import annotations

import platform

import pytest
import torch

from dilated_attention import ConfigError, explain
from dilated_attention.registry.device import describe_device, local_device_types


def test_the_default_device_is_torchs() -> None:
    assert describe_device(None).type == torch.get_default_device().type
    with torch.device("meta"):
        assert describe_device(None).type == "meta"
        assert explain(num_heads=1, head_dim=8).backend is None


def test_a_cpu_has_a_name_an_architecture_and_no_number() -> None:
    for name in ("cpu", "cpu:0"):
        found = describe_device(name)
        assert (found.type, found.index, found.torch_name, found.available) == ("cpu", None, "cpu", True)
        assert found.arch == platform.machine()


@pytest.mark.parametrize("name", ["xpu", "mps", "hpu", "privateuseone"])
def test_a_device_that_torch_knows_and_does_not_find_is_not_available(name: str) -> None:
    if name in local_device_types():
        pytest.skip(f"this machine has an {name}")
    assert not describe_device(name).available
    plan = explain(num_heads=1, head_dim=8, device=name)
    assert plan.backend is None
    assert {refusal.code for row in plan.rows for refusal in row.refusals} >= {"device_available", "device_types"}


def test_a_device_that_torch_does_not_know_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no device 'cudda:1' \(did you mean 'cuda'\?\)"):
        describe_device("cudda:1")


@pytest.mark.gpu
def test_a_card_has_its_number_architecture_and_memory() -> None:
    found, (major, minor) = describe_device("cuda"), torch.cuda.get_device_capability()
    assert found.type == "cuda"
    assert found.index == torch.cuda.current_device()
    assert found.torch_name == f"cuda:{found.index}"
    assert found.arch == f"sm_{major}{minor}"
    assert found.name == torch.cuda.get_device_name()
    assert found.memory_bytes is not None
    assert found.memory_bytes > 1 << 30
    with pytest.raises(ConfigError, match=f"this machine has {torch.cuda.device_count()} cuda device"):
        describe_device(f"cuda:{torch.cuda.device_count()}")
