"""What a run's folder says of it, kept up to date as the run goes on. Nothing is ever written there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from penchant.watch.follow import Tail, Whole, json_object, json_rows, yaml_object
from penchant.watch.lock import Held, lock_of
from penchant.watch.plot import Point
from penchant.watch.text import clean, interval, number, whole

State = Literal["waiting", "preparing", "running", "paused", "finished", "stopped", "interrupted"]
RECENT = 20  # steps whose mean speed the time left follows from
EDGE = 10  # a training figure's first and last value are means over a tenth of its steps, at most so many

TRAIN = (
    *("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "reward", "kl/policy_ref"),
    *("completions/length", "grad_norm", "lr"),
)
HELD_OUT = (
    *("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen", "eval/logps/rejected"),
    *("eval/reward", "eval/win_rate", "eval/kl/policy_ref", "eval/completions/length", "eval/perplexity"),
    *("eval/calibration/ece",),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """The mean over recent steps."""

    seconds: float
    tokens: float
    trees: float


@dataclass(slots=True)
class RunView:
    """One run, followed.

    Args:
        folder: the run's, which may not exist yet; name: what it is called on the screen.
    """

    folder: Path
    name: str
    line: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # training figures over steps
    points: dict[str, list[Point]] = field(default_factory=dict)  # held-out figures over steps
    last: dict[str, Any] = field(default_factory=dict)  # the last training line
    first_eval: dict[str, Any] = field(default_factory=dict)
    last_eval: dict[str, Any] = field(default_factory=dict)
    memory: float | None = None
    state: State = "waiting"
    why: str = ""
    _perf: deque[tuple[int, float, float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _files: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = self.folder
        self._files = {
            "metrics": Tail(at / "metrics.jsonl"),
            "perf": Tail(at / "perf.jsonl"),
            "manifest": Whole(at / "manifest.json", json_object, {}),
            "config": Whole(at / "config.resolved.yaml", yaml_object, {}),
            "samples": Whole(at / "samples.jsonl", json_rows, []),
            "before": Whole(at / "samples.before.jsonl", json_rows, []),
            "flags": Whole(at / "flags.json", _flags, []),
        }

    # ---- reading --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what is new."""
        anew, rows = self._files["metrics"].read()
        if anew:
            self.line, self.points = {}, {}
            self.last, self.first_eval, self.last_eval = {}, {}, {}
        for row in rows:
            self._take(row)
        anew, rows = self._files["perf"].read()
        if anew:
            self._perf.clear()
        for row in rows:
            self._take_speed(row)
        for name in ("manifest", "config", "samples", "before", "flags"):
            self._files[name].read()
        self.state, self.why = self._state(lock_of(self.folder))

    def _take(self, row: Mapping[str, Any]) -> None:
        step = whole(row.get("step"))
        if step is None:
            return
        if row.get("kind") == "train":
            self.last = dict(row)
            for key in TRAIN:
                value = number(row.get(key))
                if value is not None:
                    known = self.line.setdefault(key, [])
                    while known and known[-1][0] >= step:
                        known.pop()
                    known.append((step, value))
        elif row.get("kind") == "eval":
            self.first_eval = self.first_eval or dict(row)
            self.last_eval = dict(row)
            for key in HELD_OUT:
                value = number(row.get(key))
                if value is not None:
                    self.points.setdefault(key, []).append(Point(step, value, interval(row.get(f"{key}/ci"))))

    def _take_speed(self, row: Mapping[str, Any]) -> None:
        step, seconds = whole(row.get("step")), number(row.get("seconds"))
        if step is None or seconds is None:
            return
        while self._perf and self._perf[-1][0] >= step:  # a resumed run does these steps again
            self._perf.pop()
        tokens, trees = number(row.get("tokens_per_second")) or 0.0, number(row.get("trees_per_second")) or 0.0
        self._perf.append((step, seconds, tokens * seconds, trees * seconds))
        self.memory = number(row.get("peak_memory_gb"))

    # ---- what follows ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        return self._files["config"].value

    @property
    def manifest(self) -> dict[str, Any]:
        return self._files["manifest"].value

    @property
    def unreadable(self) -> int:
        return int(self._files["metrics"].unreadable + self._files["perf"].unreadable)

    @property
    def exists(self) -> bool:
        return any((self.folder / n).exists() for n in ("identity.json", "config.resolved.yaml", "metrics.jsonl"))

    @property
    def step(self) -> int:
        """Optimiser steps done: of metrics.jsonl, which a resumed run cuts back; of perf.jsonl where that logs only every n-th."""
        logged = whole(self.last.get("step")) or whole(self.last_eval.get("step")) or 0
        every = whole(_section(self.config, "logging").get("every")) or 1
        timed = self._perf[-1][0] if self._perf else 0
        return timed if logged <= timed < logged + every else logged

    @property
    def total(self) -> int | None:
        """Optimiser steps of the whole run: as the manifest says, or from epochs where an older run's does not."""
        said = whole(self.manifest.get("total_steps"))
        if said:
            return said
        if self.state == "finished":
            return whole(self.manifest.get("steps"))
        train = _section(self.config, "train")
        epochs, most = number(train.get("epochs")), whole(train.get("max_steps"))
        step, epoch = whole(self.last.get("step")), number(self.last.get("epoch"))
        if not epochs or not step or not epoch:
            return most
        steps = max(1, round(epochs * round(step / epoch)))
        return steps if most is None else min(steps, most)

    @property
    def epoch(self) -> tuple[float | None, float | None]:
        """(done, of)."""
        train = _section(self.config, "train")
        epochs, total, epoch = number(train.get("epochs")), self.total, number(self.last.get("epoch"))
        step = whole(self.last.get("step"))
        if epochs is not None and total and step and epoch:
            epochs = min(epochs, total * epoch / step)  # train.max_steps may end it sooner
        return epoch, epochs

    @property
    def speed(self) -> Speed | None:
        rows = [r for r in self._perf if r[0] <= self.step]
        seconds = sum(r[1] for r in rows)
        if not rows or seconds <= 0:
            return None
        return Speed(seconds / len(rows), sum(r[2] for r in rows) / seconds, sum(r[3] for r in rows) / seconds)

    @property
    def left(self) -> float | None:
        """Seconds to the end at the speed of the last steps, without evaluations and checkpoints."""
        speed, total = self.speed, self.total
        return None if speed is None or total is None else max(0, total - self.step) * speed.seconds

    @property
    def took(self) -> float | None:
        """Seconds of the last session: so far, where it goes on."""
        if self.state not in ("running", "preparing"):
            return number(self.manifest.get("seconds"))
        try:
            started = datetime.strptime(str(self.manifest.get("started")), "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            return None
        return max(0.0, time.time() - started.timestamp())

    @property
    def algorithm(self) -> str | None:
        """An algorithm's name; None for the losses on given answers."""
        found = self.config.get("algorithm")
        name = found.get("name") if isinstance(found, dict) else found
        return name if isinstance(name, str) else None

    @property
    def method(self) -> str:
        loss = self.config.get("loss")
        name = self.algorithm or self.manifest.get("loss") or (loss.get("name") if isinstance(loss, dict) else loss)
        return clean(name, 40) if isinstance(name, str) else ""

    @property
    def online(self) -> bool:
        return "reward" in self.last or self.algorithm not in (None, "reward_model")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The last answers: before and after training, or only those before where it goes on."""
        return self._files["samples"].value or self._files["before"].value

    @property
    def flags(self) -> list[dict[str, Any]]:
        return self._files["flags"].value

    def edges(self, key: str) -> tuple[float, float] | None:
        """A training figure's mean over its first and over its last steps: a tenth of all, at most EDGE."""
        values = [y for _, y in self.line.get(key, ())]
        n = min(EDGE, max(1, len(values) // 10))
        return (sum(values[:n]) / n, sum(values[-n:]) / n) if len(values) > 1 else None

    def _state(self, lock: Held) -> tuple[State, str]:
        said = self.manifest.get("status")
        if not self.exists:
            return "waiting", ""
        if said == "finished":
            return "finished", ""
        if lock == "held" or (lock == "elsewhere" and said == "running"):
            where = "" if lock == "held" else "on another machine, as its files say"
            return ("running" if said == "running" and self.step else "preparing"), where
        if said == "paused":
            return "paused", clean(self.manifest.get("why", ""), 300)
        if said == "stopped":
            return self._stopped()
        if said == "running":
            return "interrupted", "its process ended without a word; the same command continues"
        if said is None:
            return "interrupted", "it has no manifest.json" if self.step else "before its first step"
        return "interrupted", "the same command continues"

    def _stopped(self) -> tuple[State, str]:
        """A run that ended before its end: by itself, or by a signal (older ones do not say which)."""
        why = self.manifest.get("why")
        if isinstance(why, str):
            return "stopped", clean(why, 300)
        batch = self.folder / f"stopped-batch-step-{self.manifest.get('steps')}.json"
        found = Whole(batch, json_object, {}).read().get("what")
        return (
            ("stopped", clean(found, 300))
            if isinstance(found, str)
            else ("interrupted", "it ended before its last step")
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _flags(text: str) -> list[dict[str, Any]]:
    """The flags of flags.json: a list, or a list under `flags`."""
    import json

    value = json.loads(text)
    listed = value.get("flags") if isinstance(value, dict) else value
    return [f for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
