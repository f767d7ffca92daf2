"""Table of a sweep by epoch: training loss, and held-out metrics at the end of the epoch, mean ± standard deviation over seeds.

.venv/bin/python recipes/epoch_table.py runs/hh-harmless-beta
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = {  # metric -> heading, digits
    "eval/loss": ("held-out loss", 3),
    "eval/rewards/chosen": ("chosen", 2),
    "eval/rewards/rejected": ("rejected", 2),
    "eval/rewards/margins": ("margin", 2),
    "eval/rewards/accuracies": ("accuracy", 3),
    "eval/kl/policy_ref": ("KL", 2),
}
Line = Mapping[str, Any]


def epochs(lines: list[Line]) -> Iterator[dict[str, float | None]]:
    """Yield the mean training loss and the metrics of each evaluation of a run. The first evaluation is before training."""
    before = -1
    for line in lines:
        if line["kind"] != "eval":
            continue
        losses = [x["loss"] for x in lines if x["kind"] == "train" and before < x["step"] <= line["step"]]
        yield {"loss": mean(losses) if losses else None, **{name: line.get(name) for name in COLUMNS}}
        before = line["step"]


def mean_and_spread(values: list[float | None], digits: int) -> str:
    """Format mean and standard deviation over seeds, "" if no value is known."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ±{stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    folder = parser.parse_args().sweep
    settings: dict[str, list[list[dict[str, float | None]]]] = defaultdict(list)
    for name, record in json.loads((folder / "sweep.json").read_text())["runs"].items():
        if record["state"] == "finished":
            lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
            settings[", ".join(f"{k}={v}" for k, v in record["varied"].items() if k != "train.seed")].append(
                list(epochs(lines))
            )
    print(f"| setting | epoch | seeds | training loss | {' | '.join(h for h, _ in COLUMNS.values())} |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    for setting, runs in settings.items():
        for number, of_seeds in enumerate(zip(*runs, strict=True)):
            cells = [mean_and_spread([e["loss"] for e in of_seeds], 3)]
            cells += [mean_and_spread([e[name] for e in of_seeds], digits) for name, (_, digits) in COLUMNS.items()]
            print(f"| {setting} | {number} | {len(of_seeds)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
