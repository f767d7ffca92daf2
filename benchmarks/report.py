"""Markdown tables of the benchmarks (standard library only)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

# targets: least speed ratio, largest memory ratio to the peer's, least share of the matrix-multiply peak
TARGETS: Mapping[str, tuple[float, float, float | None]] = {
    **dict.fromkeys(("bf16-full-live", "bf16-full-cached", "bf16-lora-live", "bf16-lora-cached"), (4.0, 0.5, None)),
    "fp32-full-live": (3.5, 0.8, 0.7),
    "fp32-full-cached": (3.0, 0.8, 0.7),
    **dict.fromkeys(("fp32-lora-live", "fp32-lora-cached"), (4.0, 0.7, None)),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned Markdown table."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines)


def result_table(lines: Sequence[Line]) -> str:
    """Table of each side's speed, memory and share of the peak, with the ratios."""
    header = ["case", "side", "pairs/s", "unique tok/s", "peak GB", "% of GEMM peak", "ratio", "memory"]
    rows = []
    for line in lines:
        for side, r in line["sides"].items():
            if "failed" in r:
                rows.append([line["case"], side, "failed", "", "", "", "", ""])
                continue
            ours = side == "penchant" and "ratio" in line
            rows.append(
                [
                    line["case"],
                    side,
                    f"{r['pairs_per_second']:.3f}",
                    f"{r['unique_tokens_per_second']:.0f}",
                    f"{r['peak_gb']:.2f}",
                    f"{r['share_of_peak']:.1%}",
                    f"{line['ratio']:.2f}x" if ours else "",
                    f"{line['memory_ratio']:.2f}x" if ours else "",
                ]
            )
    return markdown(header, rows)


def loss_table(lines: Sequence[Line]) -> str:
    """Mean loss of each optimizer step (warm-up included) of both sides."""
    rows = []
    for line in lines:
        for side, r in line["sides"].items():
            if "failed" not in r:
                rows.append([line["case"], side, " ".join(f"{v:.4f}" for v in r["losses"])])
    return markdown(["case", "side", "loss at each step"], rows)


def targets(lines: Sequence[Line]) -> str:
    """Table of the targets and whether each was reached."""
    rows = []
    for line in lines:
        if line["case"] not in TARGETS or "ratio" not in line:
            continue
        ratio, memory, share = TARGETS[line["case"]]
        measured_share = line["sides"]["penchant"]["share_of_peak"]
        rows.append(
            [
                line["case"],
                "pairs/s against TRL",
                f">= {ratio}x",
                f"{line['ratio']:.2f}x",
                _verdict(line["ratio"] >= ratio),
            ]
        )
        rows.append(
            [
                line["case"],
                "peak memory against TRL",
                f"<= {memory}x",
                f"{line['memory_ratio']:.2f}x",
                _verdict(line["memory_ratio"] <= memory),
            ]
        )
        if share is not None:
            rows.append(
                [
                    line["case"],
                    "share of GEMM peak",
                    f">= {share:.0%}",
                    f"{measured_share:.1%}",
                    _verdict(measured_share >= share),
                ]
            )
    return (
        markdown(["case", "figure", "target", "measured", ""], rows)
        if rows
        else "no case with a target ran on both sides"
    )


def _verdict(reached: bool) -> str:
    return "met" if reached else "MISSED"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [s.split(":", 1)[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
