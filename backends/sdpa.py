"""The `sdpa` backend: PyTorch's own kernels, one of which is pinned when the attention is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import torch

from ..core.checks import require_choice
from ..core.errors import ConfigError
from ..core.kernel import DenseKernel
from ..core.refusal import Refusal
from ..registry.specs import compute_capability
from .aten import CpuFlash, CudaCudnn, CudaCudnnForOneLength, CudaEfficient, CudaFlash
from .dense_products import DenseProducts
from .joining import joining

if TYPE_CHECKING:
    from ..registry.specs import Request

CudaKernel = CudaCudnn | CudaFlash | CudaEfficient
# From the fastest to the slowest, as measured on an H100 (docs/performance_log.md, "Dense kernels on one H100").
_CUDA_KERNELS: dict[str, CudaKernel] = {k.name: k for k in (CudaCudnn(), CudaFlash(), CudaEfficient())}
_HALVES = ("bfloat16", "float16")
# Of kernels that drop no weights themselves, which do it for them.
_DROPS_BY = {CpuFlash().name: DenseProducts().name, CudaCudnn().name: CudaFlash().name}


class SdpaBackend:
    """Chooses among PyTorch's kernels; on CUDA `backend_options={"sdpa": {"kernel": "flash"}}` forces one."""

    def refusals(self, request: Request) -> list[Refusal]:
        """What device, dtype, head_dim and options rule out, beyond the capabilities of the manifest."""
        candidates = _candidates(request)
        if request.device.type == "cpu":
            return []
        served = torch.cuda.get_arch_list()
        if not (_is_served(request.device.arch, served) or _takes_build_for_granted(request)):
            remedy = "install a PyTorch that was built for this card"
            return [Refusal("arch", request.device.arch, ", ".join(served) or "no CUDA kernels", remedy)]
        config = request.config
        if config.deterministic and config.requires_grad and not torch.are_deterministic_algorithms_enabled():
            remedy = "call torch.use_deterministic_algorithms(True) before building"
            return [Refusal("deterministic", "a deterministic backward", "PyTorch's switch for it is off", remedy)]
        found = {name: list(_kernel_refusals(name, request)) for name in candidates}
        if any(not reasons for reasons in found.values()):
            return []
        return [reason for reasons in found.values() for reason in reasons]

    def pin(self, request: Request) -> str:
        """The name of the kernel that `build` returns."""
        return self.build(request).name

    def build(self, request: Request) -> DenseKernel:
        """The fastest kernel that takes the request, or the forced one."""
        candidates = _candidates(request)
        if request.device.type == "cpu":
            return _named(CpuFlash(workspace_bytes=request.config.limits.workspace_bytes), request)
        for name, kernel in candidates.items():
            if not any(_kernel_refusals(name, request)):
                return joining(_named(kernel, request))
        raise ConfigError("sdpa was asked to build what it refused")


def _named(kernel: CpuFlash | CudaKernel, request: Request) -> DenseKernel:
    """The kernel, which names the one that computes while weights are dropped, if that is another."""
    other = _DROPS_BY.get(kernel.name) if request.config.dropout_p else None
    return kernel if other is None else attrs.evolve(kernel, name=f"{kernel.name}, dropout by {other}")


def _forced_kernel(request: Request) -> str | None:
    """The CUDA kernel that the options name, checked."""
    options = request.options("sdpa")
    if "kernel" not in options:
        return None
    if request.device.type == "cpu":
        raise ConfigError(
            f"backend_options['sdpa']['kernel'] chooses among CUDA kernels, got {options['kernel']!r}; "
            "there is one kernel on cpu, leave the option out"
        )
    return require_choice("backend_options['sdpa']['kernel']", options["kernel"], _CUDA_KERNELS)


def _candidates(request: Request) -> dict[str, CudaKernel]:
    """The CUDA kernels to choose among: the forced one, for any length, or all, cuDNN's where it would get calls."""
    forced = _forced_kernel(request)
    if forced is not None:
        return {forced: _CUDA_KERNELS[forced]}
    chosen = _CUDA_KERNELS | {"cudnn": CudaCudnnForOneLength()}
    has_one_length = request.config.seq_len is not None and "branch" in request.needs["layouts"]
    return {name: kernel for name, kernel in chosen.items() if name != "cudnn" or has_one_length}


def _takes_build_for_granted(request: Request) -> bool:
    """A card that is not here, and a PyTorch that cannot tell what it has for it; the plan's premises say so."""
    return request.device.is_assumed and (torch.version.cuda is None or not torch.cuda.get_arch_list())


def _is_served(arch: str, served: list[str]) -> bool:
    """True where PyTorch carries machine code that runs on `arch`: the same major version, no newer minor one."""
    major, minor = compute_capability(arch)
    return any(
        (major, minor) >= known and known[0] == major
        for known in (compute_capability(name) for name in served if name.startswith("sm_"))
    )


def _kernel_refusals(name: str, request: Request) -> Iterator[Refusal]:
    """Why one of the CUDA kernels cannot take the request."""
    config = request.config
    major, minor = compute_capability(request.device.arch)
    half = config.dtype in _HALVES
    oldest, widest, multiple = {"cudnn": (9, 128, 8), "flash": (8, 256, 8), "efficient": (5, None, 8 if half else 4)}[
        name
    ]
    if not half and name != "efficient":
        yield Refusal("dtypes", config.dtype, f"{', '.join(_HALVES)} ({name})")
    if major < oldest:
        yield Refusal("arch", request.device.arch, f"sm_{oldest}0 or newer ({name})")
    if config.head_dim % multiple or (widest is not None and config.head_dim > widest):
        bound = "" if widest is None else f" up to {widest}"
        yield Refusal("head_dims", str(config.head_dim), f"multiples of {multiple}{bound} ({name})", "pad with zeros")
    most_lacking = 256 if config.dropout_p else 224
    has_small_cores = (major == 8 and minor >= 6) or major == 12  # without the shared memory for the widest gradients
    if name == "flash" and has_small_cores and config.requires_grad and 192 < config.head_dim <= most_lacking:
        others = "" if most_lacking == 256 else " and from 232"
        yield Refusal(
            "head_dims", str(config.head_dim), f"up to 192{others}, with gradients ({name})", "pad with zeros"
        )
    if name == "efficient" and config.dtype == "float64":
        yield Refusal("dtypes", "float64", f"float32, {', '.join(_HALVES)} (efficient)", "use float32")
    if name == "efficient" and config.dtype == "bfloat16" and major < 8:
        yield Refusal("dtypes", "bfloat16", f"float16, float32 on {request.device.arch} (efficient)", "use float16")
    has_cudnn = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    if name == "cudnn" and not (has_cudnn or _takes_build_for_granted(request)):
        yield Refusal("not_installed", "cuDNN", "a PyTorch without it (cudnn)")
    if name != "flash" and config.deterministic and config.requires_grad:
        yield Refusal("deterministic", "a deterministic backward", f"atomic additions ({name})")
