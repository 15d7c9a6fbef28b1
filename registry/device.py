"""The device that an attention is built for, described once. The only module of the registry that asks torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..core.checks import did_you_mean
from ..core.errors import ConfigError
from .specs import Device

if TYPE_CHECKING:
    import torch

_KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
_ARCH: Final = re.compile(r"sm_([1-9][0-9]{0,3})([0-9])")  # major and minor number of the compute capability
_MAJORS: Final = range(5, 20)  # no PyTorch that we take has kernels for older ones
_CARDS: Final = {"t4": "sm_75", "a100": "sm_80", "l4": "sm_89", "h100": "sm_90", "h200": "sm_90", "b200": "sm_100"}


def describe_device(name: str | None) -> Device:
    """The device `name` ("cuda", "cuda:1"), or torch's default device for None.

    A device that torch knows but does not find on this machine is described as not available.

    Raises:
        ConfigError: for a device that torch does not know, or an index beyond those present.
    """
    import torch

    if name is None:
        device = torch.get_default_device()
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            word = name.partition(":")[0]
            near = did_you_mean("cuda" if word == "gpu" else word, _KNOWN)  # by its letters "gpu" is nearest to "xpu"
            raise ConfigError(f"torch knows no device {name!r}{near}") from error
    if device.type == "cpu":
        return Device(type="cpu", name=_cpu_name(), arch=platform.machine(), torch_name="cpu")
    return _accelerator(device)


def describe_card(arch: str, device: str | None) -> Device:
    """A CUDA card by its architecture ("sm_90") or one of a few names ("h100"), whether one is here or not.

    Where torch's current card has that architecture it is described as it is; else as one that is assumed.

    Args:
        arch: the architecture.
        device: what a configuration says; "cuda", or None for it.

    Raises:
        ConfigError: for anything else.
    """
    known = _CARDS.get(arch.lower(), arch) if isinstance(arch, str) else ""
    form = _ARCH.fullmatch(known)
    if not form:
        raise ConfigError(
            f"arch must be sm_ and the digits of a compute capability, such as sm_90 for 9.0, "
            f"or one of {', '.join(_CARDS)}; got {arch!r}"
        )
    if int(form[1]) not in _MAJORS:
        oldest, last = _MAJORS[0], _MAJORS[-1]
        raise ConfigError(
            f"arch must name a compute capability from {oldest}.0 (sm_{oldest}0), the oldest that PyTorch has kernels "
            f"for, to {last}.9 (sm_{last}9); got {arch!r}, which is {form[1]}.{form[2]}"
        )
    if device not in (None, "cuda"):
        raise ConfigError(f"arch={arch!r} names a kind of card, so device must be 'cuda' or left out, got {device!r}")
    here = describe_device("cuda")
    if here.arch == known:
        return here
    return Device(type="cuda", arch=known, available=False, torch_name="cuda", is_assumed=True)


def premises_of(device: Device) -> tuple[str, ...]:
    """What judging an assumed device takes for granted, in sentences; nothing for one that is real."""
    import torch

    if not device.is_assumed:
        return ()
    here = describe_device("cuda")
    other = f"the card here is another, {here.arch}" if here.available else "no card is here"
    said = f"{other}: {device.arch} was judged by manifests and by what is installed here, and nothing was tried on it"
    if torch.version.cuda is None:
        granted = f"a build for CUDA with cuDNN and kernels for {device.arch} is taken for granted"
        return said, f"PyTorch here is built without CUDA: {granted}"
    if not torch.cuda.get_arch_list():  # some releases tell only where there is a card
        return said, f"PyTorch here does not tell what it has kernels for: {device.arch} is taken for granted"
    return (said,)


def local_device_types() -> tuple[str, ...]:
    """The device types, in torch's words, that torch can use on this machine; "cpu" last."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else (accelerator.type, "cpu")


def device_type_of_torch(torch_type: str) -> str:
    """The capability vocabulary's word for a device type of torch: AMD's devices are "hip", not "cuda"."""
    import torch

    return "hip" if torch_type == "cuda" and torch.version.hip else torch_type


def _accelerator(device: torch.device) -> Device:
    import torch

    kind = device_type_of_torch(device.type)
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # a device type that this build of torch has nothing for, or "meta", which needs nothing
        return Device(type=kind, index=device.index, available=device.type == "meta", torch_name=str(device))
    if not module.is_available():
        return Device(type=kind, index=device.index, available=False, torch_name=str(device))
    count: int = module.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device {str(device)!r} is not there: this machine has {count} {device.type} device(s)")
    index: int = module.current_device() if device.index is None and hasattr(module, "current_device") else device.index
    torch_name = device.type if index is None else f"{device.type}:{index}"
    if device.type != "cuda":
        return Device(type=kind, index=index, torch_name=torch_name)
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.partition(":")[0] if kind == "hip" else f"sm_{properties.major}{properties.minor}"
    return Device(
        type=kind,
        index=index,
        name=properties.name,
        arch=arch,
        memory_bytes=properties.total_memory,
        torch_name=torch_name,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
