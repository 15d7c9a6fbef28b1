"""What a card would run that is not here: judged as a real one is, said to be an estimate, never taken for a build."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import (
    AttentionConfig,
    AttentionPlan,
    ConfigError,
    Dilated,
    Full,
    Local,
    Pattern,
    PluginError,
    Random,
    build_attention,
    explain,
)
from dilated_attention.backends import libraries
from dilated_attention.core.plan import BackendRow
from dilated_attention.registry import BackendSpec, Range, Refusal, device, hookimpl
from dilated_attention.registry.device import describe_card
from dilated_attention.registry.discovery import Registry, default_registry, installed_sources
from dilated_attention.registry.plugins import Source
from dilated_attention.registry.selection import select
from dilated_attention.registry.specs import Device, KernelBackend, Request

from .conftest import Invoke
from .kernel_kit import H100, request

LONGNET = ("--heads", "8", "--head-dim", "64", "--segment-lengths", "1024,2048", "--dilation-rates", "1,2")
SHAPE: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": "bfloat16"}
NO_CARD = Device(type="cuda", available=False, torch_name="cuda")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a card, whose PyTorch is for CPUs; with a compiler, so that Triton's backends are asked."""
    look = device.describe_device
    monkeypatch.setattr(device, "describe_device", lambda name: NO_CARD if name == "cuda" else look(name))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(libraries, "can_compile", lambda: True)


def serving(monkeypatch: pytest.MonkeyPatch, *archs: str) -> None:
    """A PyTorch for CUDA with kernels for those cards."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


def row(plan: AttentionPlan, name: str) -> BackendRow:
    (found,) = [row for row in plan.rows if row.name == name]
    return found


class Asks(KernelBackend):
    """Cannot judge without the card."""

    name = "toy"

    def refusals(self, request: Request) -> list[Refusal]:
        """Asks the driver."""
        raise RuntimeError("no NVIDIA driver")


class Pins(Asks):
    """Accepts, and needs the card to pin a kernel."""

    def refusals(self, request: Request) -> list[Refusal]:
        """None."""
        return []

    def pin(self, request: Request) -> str:
        """Asks the driver."""
        raise RuntimeError("no NVIDIA driver")


def with_toy(target: str, *, strict: bool = False, **fields: Any) -> Registry:
    """Our backends and one more for cards, ranked before them all."""
    able = {"device_types": ("cuda",), "dtypes": ("bfloat16",), "head_dims": Range(8, 256), "layouts": ("dense",)}
    able["backward"] = True
    spec = BackendSpec(name="toy", target=target, priority=99, capabilities=able, **fields)

    class Plugin:
        @hookimpl
        def dilated_attention_backends(self) -> list[BackendSpec]:
            return [spec]

    source = Source(name="toy", distribution="toys", version="2.0", load=Plugin)
    environment = {"DILATED_ATTENTION_STRICT_PLUGINS": "1"} if strict else {}
    return Registry.discover(environment, [*installed_sources(), source])


def test_the_command_says_what_would_run_and_that_the_card_is_not_here(invoke: Invoke) -> None:
    done = invoke("explain", *LONGNET, "--dtype", "bfloat16", "--arch", "sm_80")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "sdpa (flash) would be chosen on sm_80; torch.compile: opaque"
    assert "bfloat16 on cuda (sm_80, assumed)" in lines[1]
    assert lines[3].startswith("  card    no card is here: sm_80 was judged by manifests and by what is installed here")
    assert lines[3].endswith("nothing was tried on it")
    assert lines[4].strip().startswith("PyTorch here is built without CUDA: a build for CUDA with cuDNN and kernels")
    assert "; plan " not in done.stdout
    assert "device_available" not in done.stdout
    assert "device=" not in done.stdout
    data = json.loads(invoke("explain", *LONGNET, "--dtype", "bfloat16", "--arch", "A100", "--json").stdout)
    assert (data["backend"], data["device"]["arch"], data["config"]["device"]) == ("sdpa", "sm_80", "cuda")
    assert (data["device"]["is_assumed"], data["device"]["available"], len(data["premises"])) == (True, False, 2)


@pytest.mark.parametrize(
    ("arch", "dtype", "expected"),
    [
        ("sm_90", "bfloat16", "triton"),
        ("sm_80", "float32", "sdpa (efficient)"),
        ("sm_75", "float16", "sdpa (efficient)"),
        ("sm_100", "bfloat16", "sdpa (flash)"),
    ],
)
def test_cards_get_what_their_manifests_and_kernels_say(arch: str, dtype: str, expected: str) -> None:
    plan = explain(SHAPE, dtype=dtype, arch=arch, pattern=Dilated((64, 128), (1, 2)))
    assert plan.explain().startswith(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("seq_len", [None, 4096])
@pytest.mark.parametrize("pattern", [Full(), Dilated((64, 128), (1, 2)), Local(70)])
def test_an_absent_card_is_judged_as_the_same_card_is_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, seq_len: int | None, dtype: str
) -> None:
    serving(monkeypatch, "sm_80", "sm_90")
    fields: dict[str, Any] = {"pattern": pattern, "seq_len": seq_len, "dtype": dtype}
    there = select(request(H100, **fields), default_registry())
    here = select(request(describe_card("h100", None), **fields), default_registry())
    assert there.chosen is not None
    assert here.chosen is not None
    assert (here.chosen.registered, here.chosen.kernel) == (there.chosen.registered, there.chosen.kernel)
    for real in there.rows:
        (estimated,) = [each for each in here.rows if each.name == real.name]
        assert (estimated.kernel, estimated.refusals) == (real.kernel, real.refusals)
        assert estimated.status == real.status or (estimated.status, real.status) == ("unjudged", "refused")


def test_what_pytorch_serves_is_asked_where_it_can_tell_and_else_said_to_be_taken_for_granted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert explain(SHAPE, arch="sm_90", seq_len=4096, backend="sdpa").kernel == "cudnn"
    serving(monkeypatch)
    plan = explain(SHAPE, arch="sm_80", backend="sdpa")
    assert (plan.backend, len(plan.premises)) == ("sdpa", 2)
    assert "does not tell what it has kernels for: sm_80 is taken for granted" in plan.premises[1]
    serving(monkeypatch, "sm_80", "sm_90")
    assert len(explain(SHAPE, arch="sm_80").premises) == 1
    plan = explain(SHAPE, arch="sm_75", dtype="float16", backend="sdpa")
    assert plan.backend is None
    assert "arch: needs sm_75, has sm_80, sm_90" in plan.explain()


def test_a_library_that_is_not_installed_is_unjudged_at_its_rank_with_what_installs_it() -> None:
    plan = explain(SHAPE, arch="sm_80", registry=with_toy("no_such_module:Toy", requires=("no-such-library>=9",)))
    assert (plan.backend, [each.name for each in plan.rows[:2]]) == ("sdpa", ["toy", "sdpa"])
    found = row(plan, "toy")
    assert (found.status, [refusal.code for refusal in found.refusals]) == ("unjudged", ["not_installed"])
    text = plan.explain()
    assert "  open    toy would rank before sdpa and could not be judged here" in text.splitlines()
    assert "-> could be usable with pip install 'no-such-library>=9' (by its manifest; it cannot be asked here)" in text


def test_what_the_card_itself_rules_out_is_refused_whatever_is_installed() -> None:
    missing = with_toy("no_such_module:Toy", requires=("no-such-library>=9",))
    found = row(explain(SHAPE, dtype="float16", arch="sm_80", registry=missing), "toy")
    assert (found.status, {refusal.code for refusal in found.refusals}) == ("refused", {"dtypes", "not_installed"})


@pytest.mark.parametrize("target", [Asks, Pins])
def test_a_backend_that_needs_the_card_is_unjudged_and_never_guessed(target: type) -> None:
    registry = with_toy(f"{__name__}:{target.__name__}", strict=True)
    plan = explain(SHAPE, arch="sm_80", registry=registry)
    found = row(plan, "toy")
    assert (plan.backend, found.status, found.kernel) == ("sdpa", "unjudged", "")
    assert found.detail == "raised RuntimeError: no NVIDIA driver"
    named = explain(SHAPE, arch="sm_80", registry=registry, backend="toy")
    assert named.backend is None
    assert named.explain().startswith("backend 'toy', asked for by name, could not be judged here")
    assert "  open" not in named.explain()
    with pytest.raises(PluginError, match="no NVIDIA driver"):  # over a card that is here it is broken
        select(request(H100), registry)


def test_none_that_could_be_judged_is_not_none_at_all() -> None:
    registry = with_toy(f"{__name__}:Asks")
    only = attrs.evolve(registry, backends={"toy": registry.backends["toy"]})
    plan = explain(SHAPE, arch="sm_80", registry=only)
    assert plan.backend is None
    lines = plan.explain().splitlines()
    assert lines[0] == "no backend fits that could be judged here"
    assert lines[-2:] == ["toy      unjudged  -       toys 2.0", "    raised RuntimeError: no NVIDIA driver"]
    assert explain(SHAPE, dtype="float16", arch="sm_80", registry=only).explain().startswith("no backend fits\n")


def test_near_misses_are_asked_of_the_same_card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(explain(SHAPE, dtype="float64", arch="sm_80"), "sdpa")
    assert found.status == "refused"
    assert str(found.near_miss) == "would be usable with dtype=float32"
    serving(monkeypatch, "sm_90")
    found = row(explain(SHAPE, arch="sm_80"), "sdpa")
    assert (found.status, found.near_miss) == ("refused", None)  # not device=cpu, which takes the request


def test_an_estimate_is_no_plan_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, "sm_90")
    plan = explain(SHAPE, arch="sm_90")
    again = AttentionPlan.from_json(plan.to_json())
    assert (again, again.digest, again.explain()) == (plan, plan.digest, plan.explain())
    monkeypatch.setattr(device, "describe_device", lambda name: H100)
    real = explain(SHAPE, arch="sm_90")
    assert real.premises == ()
    assert (real.config, real.backend, real.kernel, real.versions) == (
        plan.config,
        plan.backend,
        plan.kernel,
        plan.versions,
    )
    assert real.digest != plan.digest
    assert f"; plan {real.digest}" in real.explain()
    assert "would be" not in real.explain().splitlines()[0]


def test_a_card_that_is_here_is_described_as_it_is_and_others_are_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "describe_device", lambda name: H100)
    assert describe_card("sm_90", "cuda") is H100
    plan = explain(SHAPE, arch="sm_80", pattern=Dilated((64,), (2,)))
    assert plan.premises[0].startswith("the card here is another, sm_90: sm_80 was judged by manifests")
    assert row(plan, "triton").status == "refused"


@pytest.mark.parametrize("given", [{"arch": "sm_80"}, {"device": "sm_80"}])
@pytest.mark.parametrize("config", [SHAPE, AttentionConfig(**SHAPE)])
def test_nothing_is_built_for_an_absent_card(config: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}|sm_80"):
        build_attention(config, **given)


@pytest.mark.parametrize("arch", ["sm90", "sm_9", "sm_90a", "sm_ 90", "SM_90", "gfx942", "v1000", "", "9.0"])
def test_what_is_no_arch_is_an_error_with_the_allowed_form(invoke: Invoke, arch: str) -> None:
    done = invoke("explain", *LONGNET, "--arch", arch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: arch must be sm_ and the digits of a compute capability, such as sm_90 for")
    assert done.stderr.endswith(f"got {arch!r}\n")


@pytest.mark.parametrize(
    ("arch", "capability"), [("sm_30", "3.0"), ("sm_49", "4.9"), ("sm_200", "20.0"), ("sm_900", "90.0")]
)
def test_a_capability_that_no_card_has_is_told_which_there_are(invoke: Invoke, arch: str, capability: str) -> None:
    done = invoke("explain", *LONGNET, "--arch", arch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: arch must name a compute capability from 5.0 (sm_50), the oldest that PyTorch has kernels for, to 19.9 "
        f"(sm_199); got {arch!r}, which is {capability}\n"
    )
    for first_and_last in ("sm_50", "sm_199"):
        assert describe_card(first_and_last, None).arch == first_and_last


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_an_arch_is_of_cuda_and_has_no_number(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device must be 'cuda' or left out, got '{name}'"):
        explain(SHAPE, arch="sm_80", device=name)
    arch: Callable[..., AttentionPlan] = explain
    with pytest.raises(ConfigError, match="arch must be"):
        arch(SHAPE, arch=90)


@pytest.mark.gpu
def test_the_arch_of_the_card_here_is_the_explanation_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = device.describe_device("cuda")
    assert explain(SHAPE, arch=found.arch) == explain(SHAPE, device="cuda")
    assert explain(SHAPE, arch="sm_75").device["is_assumed"]


@pytest.mark.parametrize(
    ("backend", "fields", "near"),
    [
        ("math", {"head_dim": 300}, "sdpa would be usable with head_dim=256"),
        ("math", {"head_dim": 300, "dropout_p": 0.1, "arch": "sm_90"}, "triton would be usable with head_dim=256"),
        ("reference", {"head_dim": 300, "dropout_p": 0.1, "deterministic": True, "arch": "sm_90"}, ""),
    ],
)
def test_what_is_slow_is_chosen_only_where_nothing_else_fits(backend: str, fields: dict[str, Any], near: str) -> None:
    assert explain(num_heads=2, head_dim=16).backend == "sdpa"
    plan = explain(num_heads=2, **fields)
    assert plan.backend == backend
    said = next(line for line in plan.explain().splitlines() if "  slow  " in line)
    assert f"as nothing faster takes this; {near}" in said
    assert "  slow  " not in explain(num_heads=2, head_dim=16, backend=backend).explain()  # asked for, no surprise


def test_blocks_that_no_kernel_computes_are_slow() -> None:
    asked: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": "bfloat16", "pattern": Random(2, 128)}
    assert explain(**asked, dropout_p=0.1, arch="sm_90").backend == "triton"
    plan = explain(**asked, dropout_p=0.1, arch="sm_80")
    assert plan.backend == "sdpa"
    said = (
        "  slow    sdpa leaves blocks to PyTorch's matrix products, as nothing faster takes this; flex would be usable"
    )
    assert any(line.startswith(f"{said} with dropout_p=0.0") for line in plan.explain().splitlines())
    for fields in ({"device": "cpu"}, {"arch": "sm_90", "pattern": Local(8)}):
        assert "  slow  " not in explain(**(asked | {"dropout_p": 0.1} | fields)).explain()
