"""Speed of the studio: first pages with 200 runs and a file of a million rows, saving a judgment, following 20 live runs.

    .venv/bin/python benchmarks/studio_speed.py                    # about a minute and 300 MB of disk; Linux
    .venv/bin/python benchmarks/studio_speed.py --quick            # 20 runs and 10,000 rows, to check that everything runs

`penchant studio` is started on a generated folder, and pages are requested after it prints its address. A page's time is measured
to its last byte. The studio's CPU seconds (all threads, from /proc) are shown next to it, since other load on the machine does not
affect them. Standard library only: the studio is a separate process.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar
from os import sysconf
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, Request, build_opener

from harness import environment

PAGE, JUDGMENT, FOLLOWING = 0.5, 0.05, 0.03  # targets, in seconds, seconds and cores
STEPS = 300  # of each run
LIVE = 20  # runs that are still training
TICK = sysconf("SC_CLK_TCK")


# ---- A folder ----


def step_line(step: int) -> str:
    """A line of metrics.jsonl like DPO's, with the same number of metrics."""
    names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/per_token",
        "grad_norm",
    )
    more = ("logps/chosen", "logps/rejected", "logps/accuracies", "logratios/chosen", "logratios/rejected")
    figures = dict.fromkeys((*names, *more), 0.6931471824645996 + step / 10000.0)
    return (
        json.dumps({"kind": "train", "step": step, "epoch": step / 100, **figures, "lr": 1e-5, "tokens": 100 * step})
        + "\n"
    )


def make_run(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    (folder / "config.resolved.yaml").write_text(
        "loss: {name: dpo}\nalgorithm: null\ntrain: {epochs: 10.0, max_steps: null}\n"
    )
    (folder / "metrics.jsonl").write_text("".join(step_line(step) for step in range(1, steps + 1)))
    manifest = {
        "status": "running",
        "started": "2026-01-01T00:00:00+0000",
        "seconds": 60.0,
        "steps": steps,
        "loss": "dpo",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | {"total_steps": 10 * STEPS}))


def make_folder(root: Path, runs: int, rows: int) -> None:
    for number in range(runs):
        make_run(root / f"runs/{number:03d}", STEPS)
    with (root / "rows.jsonl").open("w") as file:
        for i in range(rows):
            row = {
                "prompt": f"Question {i}?",
                "chosen": f"A good answer, number {i}.",
                "rejected": f"A bad answer, number {i}.",
            }
            file.write(json.dumps(row) + "\n")
    with (root / "pairs.jsonl").open("w") as file:
        for i in range(400):
            file.write(json.dumps({"prompt": f"Q{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."}) + "\n")


# ---- A studio ----


class Studio:
    """A running studio process and a logged-in HTTP client."""

    def __init__(self, root: Path) -> None:
        began = time.perf_counter()
        command = [sys.executable, "-m", "penchant", "studio", str(root), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(1))
        assert self.process.stdout is not None
        address = re.search(r"(http://\S+/)\?token=\S+", self.process.stdout.readline())
        assert address is not None
        self.started = time.perf_counter() - began
        self.address = address[1].rstrip("/")
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(CookieJar()))
        first = time.perf_counter()
        page = self.open(address[0].removeprefix(self.address))
        self.first = time.perf_counter() - first
        token = re.search(r"X-CSRF-Token[^0-9a-f]+([0-9a-f]{32,})", page)
        assert token is not None
        self._csrf = token[1]

    def stream(self, path: str) -> Any:
        return self._opener.open(self.address + path, timeout=120)

    def open(self, path: str) -> str:
        with self.stream(path) as reply:
            return str(reply.read().decode())

    def post(self, path: str, **form: str) -> tuple[str, Any]:
        headers = {
            "x-csrf-token": self._csrf,
            "hx-request": "true",
            "content-type": "application/x-www-form-urlencoded",
        }
        with self._opener.open(Request(self.address + path, urlencode(form).encode(), headers), timeout=120) as reply:
            return reply.read().decode(), reply.headers

    def cpu(self) -> float:
        """CPU seconds of the studio so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


@contextmanager
def studio_of(root: Path) -> Iterator[Studio]:
    studio = Studio(root)
    try:
        yield studio
    finally:
        studio.process.terminate()
        studio.process.wait()


# ---- Measurements ----


def timed(studio: Studio, call: Callable[[], Any]) -> tuple[float, float]:
    """Call and return (wall seconds, CPU seconds of the studio)."""
    cpu, began = studio.cpu(), time.perf_counter()
    call()
    return time.perf_counter() - began, studio.cpu() - cpu


def judgments(studio: Studio, number: int) -> list[float]:
    """Seconds of each judgment, from the request until the reply with the next pair, sent once the judgment is on disk."""
    form = {"name": "speed", "source": "pairs", "file": "pairs.jsonl"}
    address = studio.post("/arena/new", **form)[1]["hx-redirect"]
    studio.post(f"{address}/who", annotator="Ada")
    page, times = studio.open(f"{address}/item"), []
    for _ in range(number):
        fields = {name: page.split(f'name="{name}" value="')[1].split('"')[0] for name in ("order", "pair")}
        began = time.perf_counter()
        page, _ = studio.post(f"{address}/judge", **fields, verdict="left", seconds="3")
        times.append(time.perf_counter() - began)
    return times


def following(studio: Studio, root: Path, seconds: float) -> tuple[float, int]:
    """Return (CPU cores that one page of live runs takes, number of events it received)."""
    paths = [f"runs/{number:03d}" for number in range(LIVE)]
    events, ended = 0, threading.Event()

    def read() -> None:
        nonlocal events
        with studio.stream("/runs/feed?" + urlencode([("run", path) for path in paths])) as reply:
            for line in reply:
                events += line.startswith(b"data:")
                if ended.is_set():
                    return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    time.sleep(3)  # let the existing curves arrive
    before, cpu, began = events, studio.cpu(), time.perf_counter()
    step = STEPS
    while time.perf_counter() - began < seconds:
        step += 1
        for path in paths:
            with (root / path / "metrics.jsonl").open("a") as file:
                file.write(step_line(step))
        time.sleep(1)
    cost = (studio.cpu() - cpu) / (time.perf_counter() - began)
    ended.set()
    return cost, events - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 runs, 10,000 rows, 20 judgments, 5 s")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    runs, rows, count, seconds = (LIVE, 10_000, 20, 5.0) if args.quick else (200, 1_000_000, 200, 20.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, runs, rows)
        with studio_of(root) as studio:
            print(f"{runs} runs of {STEPS} steps, {rows:,} rows; started in {studio.started:.2f} s")
            pages = {
                "first page (arena)": None,
                "list of runs": "/runs",
                "list of runs, again": "/runs",
                "one run": "/runs/view?run=runs/000",
                "first rows of the file": "/data/view?file=rows.jsonl",
                "first rows, again": "/data/view?file=rows.jsonl",
                "last rows": f"/data/view?file=rows.jsonl&line={rows - 9}",
                "search": "/data/view?file=rows.jsonl&q=number+77",
            }
            figures: dict[str, Any] = {"started": studio.started, "pages": {}}
            for name, path in pages.items():
                wall, cpu = (studio.first, 0.0) if path is None else timed(studio, lambda path=path: studio.open(path))  # type: ignore[misc]
                figures["pages"][name] = {"seconds": wall, "cpu": cpu}
                print(f"  {name:<26} {wall:6.3f} s" + (f"   {cpu:5.2f} s of CPU time" if path else ""))
            times = judgments(studio, count)
            figures["judgement"] = {
                "median": statistics.median(times),
                "p95": sorted(times)[int(0.95 * len(times))],
                "max": max(times),
            }
            print(
                "  judgment                   "
                + ", ".join(f"{k} {v * 1000:.0f} ms" for k, v in figures["judgement"].items())
            )
            cost, events = following(studio, root, seconds)
            figures["following"] = {"cores": cost, "events": events}
            print(f"  following {LIVE} live runs     {cost:.1%} of a core, {events} events in {seconds:.0f} s")
    first = {
        name: figures["pages"][name]["seconds"]
        for name in ("first page (arena)", "list of runs", "first rows of the file")
    }
    goals_met = max(first.values()) < PAGE and figures["judgement"]["median"] < JUDGMENT and cost < FOLLOWING
    print(
        f"targets (first pages {PAGE} s, a judgment {JUDGMENT * 1000:.0f} ms, following {FOLLOWING:.0%}): {'met' if goals_met else 'MISSED'}"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0 if goals_met or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
