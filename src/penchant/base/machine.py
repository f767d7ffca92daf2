"""Resources of this machine and their use: cores, memory and devices, on Linux and macOS."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's ru_maxrss


def cores() -> int:
    """CPU cores that this process may run on; all of them if the system does not restrict processes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_processor(key: str) -> str:
    """A field of Linux's `/proc/cpuinfo` (``model name``, ``vendor_id``); elsewhere Python's name for the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return platform.processor()


def gpu_visible() -> bool:
    """Whether this process can use an NVIDIA GPU, judged by its device files, as asking torch would import it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


# ---- Devices by their torch names. Only ``cpu`` and ``cuda`` are ever chosen automatically ----

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
DEVICES: tuple[str, ...] = get_args(Device)
INDEXED = ("cuda", "xpu")  # kinds of which a machine may have several
NAMES = {"cuda": "CUDA device", "mps": "Apple GPU (MPS)", "xpu": "Intel GPU (XPU)"}


_META = ["cpu"]


def kind_of(device: Any) -> str:
    """A device's type; for torch's meta device, that of the device it stands for (see `meta_as`; by default the CPU)."""
    return _META[-1] if device.type == "meta" else str(device.type)


@contextmanager
def meta_as(kind: str) -> Iterator[None]:
    """Make the meta device stand for a kind of device, to count the memory that would be used there."""
    _META.append(kind)
    try:
        yield
    finally:
        _META.pop()


def accelerator(kind: str) -> Any:
    """torch's module for a kind of device (`torch.cuda`, `torch.mps`, `torch.xpu`)."""
    import torch

    return getattr(torch, kind)


def why_not(kind: str) -> str:
    """Why this process cannot compute on a kind of device; empty if it can."""
    import torch

    if kind == "cpu" or accelerator(kind).is_available():
        return ""
    built = {
        "cuda": torch.backends.cuda.is_built() or torch.version.hip is not None,
        "mps": torch.backends.mps.is_built(),
        "xpu": torch.xpu._is_compiled(),
    }[kind]
    return f"no {NAMES[kind]} is visible" + ("" if built else f" (torch {torch.__version__} is built without {kind})")


def device_name(kind: str) -> str:
    """The name of a device of this kind; a generic one if torch has none."""
    return str(getattr(accelerator(kind), "get_device_name", lambda: NAMES[kind])())


def set_precision(device: Any, tf32: bool) -> None:
    """Set a GPU's matmul precision: fp32 as is or in TF32; bf16 products are never accumulated in bf16."""
    if device.type == "cuda":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def full_precision(device: Any) -> Iterator[None]:
    """Context in which a GPU's fp32 products use fp32, not TF32; everything that `set_precision` sets is restored afterwards."""
    if device.type != "cuda":
        yield
        return
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    previous = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    set_precision(device, tf32=False)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = previous


def in_fp64(tensor: Any) -> Any:
    """A tensor in fp64; in fp32 on MPS, which has no fp64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def machine_memory() -> tuple[int, int]:
    """(total, free) bytes of this machine, or of this process's control group if that is less."""
    total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            total, free = min(total, int(limit)), min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # no /proc, or no control group
    return total, max(0, free)


def resident() -> int:
    """Resident memory of this process in bytes; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: Any = None) -> int:
    """Peak memory in bytes so far: of this process's tensors on a GPU, otherwise of the whole process.

    Args:
        device: a `torch.device`; None, the CPU and MPS (which shares its memory) mean the process.
    """
    if device is not None and device.type in ("cuda", "xpu"):
        return int(accelerator(device.type).max_memory_allocated(device))
    try:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return int(line.split()[1]) * 1024


def place_of(model: Any) -> Any:
    """The device that a model computes on, even while its shards are in host memory."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or parameter.device.type == mesh.device_type:
        return parameter.device
    import torch

    return torch.device(mesh.device_type, accelerator(mesh.device_type).current_device())


def moved(tensor: Any, device: Any) -> Any:
    """Move a tensor to a device: to a GPU from pinned memory without blocking, to MPS in fp32 at most."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.requires_grad:
        return tensor.pin_memory().to(device, non_blocking=True)
    if device.type == "mps" and tensor.is_floating_point() and tensor.element_size() == 8:
        tensor = tensor.float()
    return tensor.to(device)
