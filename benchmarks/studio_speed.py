"""Speed of the studio: first pages with 200 runs and a file of a million rows, saving a judgement, following 20 live runs.

    .venv/bin/python benchmarks/studio_speed.py                    # about a minute and 300 MB of disk; Linux
    .venv/bin/python benchmarks/studio_speed.py --quick            # 20 runs and 10,000 rows: shows that everything runs

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

PAGE, JUDGEMENT, FOLLOWING = 0.5, 0.05, 0.03  # seconds, seconds, cores: the goals
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
    said = {"status": "running", "started": "2026-01-01T00:00:00+0000", "seconds": 60.0, "steps": steps, "loss": "dpo"}
    (folder / "manifest.json").write_text(json.dumps(said | {"total_steps": 10 * STEPS}))


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
        found = re.search(r"(http://\S+/)\?token=\S+", self.process.stdout.readline())
        assert found is not None
        self.started = time.perf_counter() - began
        self.address = found[1].rstrip("/")
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(CookieJar()))
        first = time.perf_counter()
        page = self.open(found[0].removeprefix(self.address))
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
    made = Studio(root)
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait()


# ---- Measurements ----


def timed(studio: Studio, call: Callable[[], Any]) -> tuple[float, float]:
    """Call and return (wall seconds, CPU seconds of the studio)."""
    cpu, began = studio.cpu(), time.perf_counter()
    call()
    return time.perf_counter() - began, studio.cpu() - cpu


def judgements(studio: Studio, number: int) -> list[float]:
    """Seconds of each judgement, from the request until the reply with the next pair, sent once the judgement is on disk."""
    form = {"name": "speed", "source": "pairs", "file": "pairs.jsonl"}
    at = studio.post("/arena/new", **form)[1]["hx-redirect"]
    studio.post(f"{at}/who", annotator="Ada")
    page, took = studio.open(f"{at}/item"), []
    for _ in range(number):
        hidden = {name: page.split(f'name="{name}" value="')[1].split('"')[0] for name in ("order", "pair")}
        began = time.perf_counter()
        page, _ = studio.post(f"{at}/judge", **hidden, verdict="left", seconds="3")
        took.append(time.perf_counter() - began)
    return took


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
    parser.add_argument("--quick", action="store_true", help="20 runs, 10,000 rows, 20 judgements, 5 s")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    asked = parser.parse_args()
    runs, rows, said, seconds = (LIVE, 10_000, 20, 5.0) if asked.quick else (200, 1_000_000, 200, 20.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, runs, rows)
        with studio_of(root) as studio:
            print(f"{runs} runs of {STEPS} steps, {rows:,} rows; started in {studio.started:.2f} s")
            pages = {
                "the first page (arena)": None,
                "the list of runs": "/runs",
                "the list of runs, again": "/runs",
                "a run": "/runs/view?run=runs/000",
                "the file's first rows": "/data/view?file=rows.jsonl",
                "its first rows, again": "/data/view?file=rows.jsonl",
                "its last rows": f"/data/view?file=rows.jsonl&line={rows - 9}",
                "a search": "/data/view?file=rows.jsonl&q=number+77",
            }
            found: dict[str, Any] = {"started": studio.started, "pages": {}}
            for name, path in pages.items():
                took, cpu = (studio.first, 0.0) if path is None else timed(studio, lambda path=path: studio.open(path))  # type: ignore[misc]
                found["pages"][name] = {"seconds": took, "cpu": cpu}
                print(f"  {name:<26} {took:6.3f} s" + (f"   {cpu:5.2f} s of the processor" if path else ""))
            words = judgements(studio, said)
            found["judgement"] = {
                "median": statistics.median(words),
                "p95": sorted(words)[int(0.95 * len(words))],
                "max": max(words),
            }
            print(
                "  a judgement                "
                + ", ".join(f"{k} {v * 1000:.0f} ms" for k, v in found["judgement"].items())
            )
            cost, events = following(studio, root, seconds)
            found["following"] = {"cores": cost, "events": events}
            print(f"  {LIVE} live runs, followed    {cost:.1%} of a core, {events} events in {seconds:.0f} s")
    first = {
        name: found["pages"][name]["seconds"]
        for name in ("the first page (arena)", "the list of runs", "the file's first rows")
    }
    met = max(first.values()) < PAGE and found["judgement"]["median"] < JUDGEMENT and cost < FOLLOWING
    print(
        f"goals (first pages {PAGE} s, a judgement {JUDGEMENT * 1000:.0f} ms, following {FOLLOWING:.0%}): {'met' if met else 'not met'}"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1))
    return 0 if met or asked.quick else 1


if __name__ == "__main__":
    sys.exit(main())
