"""Cores and memory on systems that report them, report them in other units, or do not report them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penchant.base import machine
from penchant.base.machine import cores, device_name, in_fp64, machine_memory, moved, peak_memory, resident
from penchant.errors import ConfigError
from penchant.models.load import resolve_device, resolve_dtype


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", gone)


def test_figures_are_of_this_process_and_machine() -> None:
    held = torch.zeros(32 << 20, dtype=torch.uint8) + 1
    total, free = machine_memory()
    assert len(held) < peak_memory() <= total and 0 <= free <= total
    assert resident() == 0 or len(held) < resident() <= 1.01 * peak_memory()
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("unit", [1, 1024])
def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    """macOS counts ru_maxrss in bytes, Linux in KiB."""
    monkeypatch.setattr(machine, "MAXRSS_UNIT", unit)
    monkeypatch.setattr(machine.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=(3 << 30) // unit))
    without_proc(monkeypatch)
    assert peak_memory() == 3 << 30 and resident() == 0
    total, free = machine_memory()
    assert total == free > 0


def test_the_unit_is_this_systems() -> None:
    used = machine.resource.getrusage(machine.resource.RUSAGE_SELF).ru_maxrss * machine.MAXRSS_UNIT
    assert peak_memory() / 2 < used < 100 * peak_memory()


def test_where_processes_are_not_restricted_to_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_every_kind_of_device_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.mps` has no device names."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert device_name("cuda") == "NVIDIA X" and not hasattr(torch.mps, "get_device_name")
    assert device_name("mps") == machine.NAMES["mps"]


def test_of_a_gpu_it_is_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    assert peak_memory(torch.device("cuda", 1)) == 7 and asked == [torch.device("cuda", 1)]
    assert peak_memory(torch.device("cpu")) > 7


def test_a_device_that_torch_cannot_use_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in machine.NAMES:
        there: Any = SimpleNamespace(is_available=lambda: False, _is_compiled=lambda: False)
        monkeypatch.setattr(torch, kind, there)
        with pytest.raises(ConfigError, match=r"model\.device.*set model\.device=cpu"):
            resolve_device(kind)
        there.is_available = lambda: True
        assert resolve_device(kind) == torch.device(kind)
        for native in (True, False):  # torch emulates bf16 on GPUs without bf16 matmuls (Volta, Turing)
            there.is_bf16_supported = lambda including_emulation=True, native=native: native or including_emulation
            expected = torch.bfloat16 if native and kind != "mps" else torch.float32
            assert resolve_dtype("auto", torch.device(kind)) == expected
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert resolve_device("auto").type == "cpu"  # no other device is used unasked


@pytest.mark.parametrize(
    ("capability", "native", "dtype"),
    [
        ("AVX512", True, torch.bfloat16),
        ("AVX512", False, torch.float32),
        ("AVX2", True, torch.float32),
        ("DEFAULT", True, torch.float32),
    ],
)
def test_a_cpu_has_bf16_where_torch_uses_it(
    capability: str, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert resolve_dtype("auto", torch.device("cpu")) == dtype


def test_mps_gets_no_fp64() -> None:
    """torch refuses fp64 on MPS; a stand-in replaces the tensor."""

    class Double:
        device = SimpleNamespace(type="cpu")

        def is_floating_point(self) -> bool:
            return True

        def element_size(self) -> int:
            return 8

        def float(self) -> Any:
            return SimpleNamespace(device=SimpleNamespace(type="mps"), to=lambda _: "in fp32", float=lambda: "fp32")

    assert moved(Double(), SimpleNamespace(type="mps")) == "in fp32"
    assert in_fp64(Double().float()) == "fp32" and in_fp64(torch.ones(1)).dtype == torch.float64
