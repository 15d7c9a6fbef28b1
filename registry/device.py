"""The device that an attention is built for, described once. The only module of the registry that asks torch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.checks import did_you_mean
from ..core.errors import ConfigError
from .specs import Device

if TYPE_CHECKING:
    import torch

_KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


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
