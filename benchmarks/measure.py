"""What both workers share: a clock on whole optimizer steps, peak memory, the closing line (torch for a GPU only)."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Clock:
    """Marks the end of each optimizer step; step i takes from the end of step i-1, so nothing falls between."""

    warmup_steps: int
    device: str = "cpu"
    ends: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """An optimizer step has ended."""
        wait_for(self.device)
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def result(self, **more: Any) -> dict[str, Any]:
        """Seconds of each timed step (warm-up left out), their CPU seconds, losses of every step, peak memory."""
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
    """Wait until a GPU has done its queued work; a CPU has no queue."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peaks(device: str) -> dict[str, int]:
    """Peak memory so far, bytes: of this process, or on a GPU of its tensors and of what its allocator reserved for them."""
    if device != "cuda":
        return {"peak_bytes": peak_bytes()}
    import torch

    reserved = torch.cuda.max_memory_reserved()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}


def peak_bytes() -> int:
    """The process's highest resident memory so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes where there is no /proc


def finish(result: dict[str, Any]) -> None:
    """The worker protocol's last line of standard output."""
    print("\n" + json.dumps(result), flush=True)
