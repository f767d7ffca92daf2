"""Helpers shared by the workers: optimizer step clock, peak memory, result line (imports torch only for a GPU)."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Clock:
    """Records the end of each optimizer step. Step i lasts from the end of step i-1, so no time is left out."""

    warmup_steps: int
    device: str = "cpu"
    ends: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Mark the end of an optimizer step."""
        wait_for(self.device)
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def result(self, **more: Any) -> dict[str, Any]:
        """Wall seconds of each timed step, total wall and CPU seconds (all without warm-up), all losses, peak memory."""
        first = self.warmup_steps - 1
        seconds = [b - a for a, b in zip(self.ends[first:-1], self.ends[first + 1 :], strict=True)]
        return {
            "step_seconds": seconds,
            "seconds": sum(seconds),
            "cpu_seconds": self.cpu[-1] - self.cpu[first],
            "losses": self.losses,
            **peaks(self.device),
            **more,
        }


def wait_for(device: str) -> None:
    """Synchronize the GPU. On a CPU there is nothing to wait for."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peaks(device: str) -> dict[str, int]:
    """Peak memory so far, bytes: resident memory on a CPU; allocated and reserved memory on a GPU."""
    if device != "cuda":
        return {"peak_bytes": peak_bytes()}
    import torch

    reserved = torch.cuda.max_memory_reserved()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}


def peak_bytes() -> int:
    """Peak resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, which has no /proc, reports bytes


def finish(result: dict[str, Any]) -> None:
    """Print the result as a JSON line, which ends a measurement in the worker protocol."""
    print("\n" + json.dumps(result), flush=True)
