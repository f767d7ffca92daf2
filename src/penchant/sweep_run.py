"""Running a sweep: its runs one after another in this process, or n at a time in others, each skipped, resumed or trained."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.config import WATCHING_ONLY
from penchant.errors import CheckpointError, ConfigError, PenchantError
from penchant.models.load import check_model_path
from penchant.pipeline import did_you_mean
from penchant.pipeline_compare import check_reward
from penchant.pipeline_state import Inputs, stage_inputs
from penchant.run import Run
from penchant.sharing import Shared
from penchant.sweep import Sweep, SweepRun, named
from penchant.sweep_jobs import Finished, Workers
from penchant.sweep_search import draw
from penchant.sweep_state import ENDED, Planned, State, judge, refusal
from penchant.sweep_table import Table, make_table
from penchant.sweep_worker import train_one
from penchant.training.loop import Interrupted
from penchant.training.progress import PlainConsole, QuietConsole, duration
from penchant.training.runfolder import RunLock

WORDS = {"done": "unchanged", "run": "to run", "resume": "to continue", "changed": "CHANGED"}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a call left.

    Args:
        folder: the sweep's; table: its settings; runs: the record of each run.
    """

    folder: Path
    table: Table
    runs: Mapping[str, Mapping[str, Any]]

    def to_text(self) -> str:
        return self.table.to_text()


class _Lines(PlainConsole):
    """Progress of one run of several: now and then a line with its name, nothing of how it began."""

    def __init__(self, prefix: str) -> None:
        super().__init__(every_seconds=15.0)
        self.prefix = prefix
        self.last = time.monotonic()  # short runs have no line but that of their end

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if step != total:
            super().step(step, total, metrics)

    def _print(self, text: str) -> None:
        super()._print(f"{self.prefix}: {text}")


class SweepConductor:
    """One call of a sweep.

    Args:
        sweep: checked; jobs: runs at a time; quiet: no progress.
    """

    def __init__(self, sweep: Sweep, *, jobs: int = 1, quiet: bool = False) -> None:
        if jobs < 1:
            raise ConfigError("--jobs", f"is {jobs}", "give 1 or more")
        self.sweep = sweep
        self.jobs = jobs
        self.quiet = quiet
        self.console = QuietConsole() if quiet else PlainConsole()
        self.shared = Shared()
        self.state = State.read(sweep.output)
        self.runs: list[SweepRun] = []  # as far as they are known: a search draws them one by one
        self._inputs: dict[str, Inputs] = {}
        self._trained: list[float] = []  # seconds of each run of this call

    # ---- before anything trains -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self.sweep.search.trials if self.sweep.search is not None else len(self.sweep.runs)

    def inputs(self, run: SweepRun) -> Inputs:
        """What a run starts from as things are: its settings, rows, models and reward files.

        Raises:
            ConfigError, DataError, ModelError: with the run's name.
        """
        if run.name not in self._inputs:
            with _named(run):
                self._inputs[run.name] = self._read_inputs(run)
        return self._inputs[run.name]

    def _read_inputs(self, run: SweepRun) -> Inputs:
        config = run.config
        for path in (config.model.path, config.reference.path):
            if path is not None:
                check_model_path(path)
        reward = None if config.reward is None else dict(config.reward.terms)
        judging = config.evaluation.reward
        judged = None if judging is None else dict(judging.terms)
        for one in (reward, judged):
            check_reward(one)
        splits = Run(config, quiet=True, shared=self.shared).datasets
        data = {n: d.fingerprint for n, d in zip(("training", "held-out"), splits, strict=True) if d is not None}
        named = (config.model.path, config.model.tokenizer, config.reference.path, json.dumps([reward, judged]))
        files = self.shared.once(("files", *named), lambda: stage_inputs(config, reward, {}, {}, judged))
        settings = config.model_dump(mode="json", exclude=set(WATCHING_ONLY))
        return {**files, "config": settings, "data": data}

    def known_runs(self) -> list[SweepRun]:
        """The runs of a grid, or the trials of a search that were drawn already."""
        if self.sweep.search is None:
            return list(self.sweep.runs)
        names = [f"trial-{i}" for i in range(self.sweep.search.trials)]
        assert self.sweep.trial is not None
        return [self.sweep.trial(i, self.state.runs[n]["varied"]) for i, n in enumerate(names) if n in self.state.runs]

    def plan(self) -> list[Planned]:
        """What would be done with each run, in order; nothing is trained or written."""
        return [judge(run, self.state.runs.get(run.name), self.inputs(run)) for run in self.known_runs()]

    def plan_text(self) -> str:
        """The plan as a person reads it."""
        planned = self.plan()
        width = max((len(p.name) for p in planned), default=0)
        digits = len(str(self.total))
        lines = [f"{i:>{digits}}  {p.name:<{width}}  {WORDS[p.action]}: {p.why}" for i, p in enumerate(planned, 1)]
        if self.total > len(planned):
            lines.append(f"{self.total - len(planned)} trials are still to be drawn")
        return "\n".join([*lines, f"in {self.sweep.output}; best by {self.sweep.metric}"])

    # ---- doing it -------------------------------------------------------------------------------------------------

    def run(self) -> SweepResult:
        """Train what is to be trained, in order.

        Raises:
            ConfigError, DataError, ModelError, RewardError: a person can mend it. CheckpointError: a run is done with other inputs, or
            the folder is in use. Interrupted: a signal; the same command continues.
        """
        with _locked(self.sweep.output):
            self.state = State.read(self.sweep.output)
            if self.sweep.search is not None:
                self.state.same_search(self.sweep.search, self.sweep.source)
            for planned in self.plan():
                if planned.action == "changed":
                    raise refusal(planned, self.sweep.output, self.sweep.source)
            self._say_what_is_not_ours()
            try:
                if self.jobs == 1:
                    self._one_by_one()
                else:
                    Workers(self.jobs, self.sweep.output, self.quiet).run(self._to_train(), self._begin, self._end)
            finally:
                table = self._write()
        return SweepResult(self.sweep.output, table, {r.name: self.state.runs[r.name] for r in self.runs})

    def _write(self) -> Table:
        table = make_table(self.runs, self.state.runs, self.sweep.metric, self.sweep.higher)
        self.state.table = table.to_json()
        self.state.save()
        self.state.write_lines(self.runs)
        return table

    def _say_what_is_not_ours(self) -> None:
        ours = {r.name for r in self.sweep.runs} | {f"trial-{i}" for i in range(self.total)}
        others = [name for name in self.state.runs if name not in ours]
        if others:
            self.console.note(
                f"left alone, and not in the table: {', '.join(others)} (runs of this folder's earlier sweeps)"
            )

    def _to_train(self) -> Iterator[SweepRun]:
        """The runs that are not done, in order; those of a search are drawn when they are asked for."""
        if self.sweep.search is None:
            self.runs = list(self.sweep.runs)
        for number in range(self.total):
            run = self._drawn(number) if self.sweep.search is not None else self.sweep.runs[number]
            planned = judge(run, self.state.runs.get(run.name), self.inputs(run))
            if planned.action == "changed":
                raise refusal(planned, self.sweep.output, self.sweep.source)
            if planned.action != "done":
                yield run
                continue
            self.console.note(f"{self._number(run)}: unchanged, {planned.why}")
            self._check_metric(run)

    def _drawn(self, number: int) -> SweepRun:
        search, trial = self.sweep.search, self.sweep.trial
        assert search is not None and trial is not None
        known = self.state.runs.get(f"trial-{number}")
        if known is None:
            ended = [r for r in self.runs if self.state.runs[r.name]["state"] in ENDED]
            earlier = [(r.varied, self._value(r)) for r in ended]
            run = trial(number, draw(search, number, earlier, self.sweep.higher))
        else:
            run = trial(number, known["varied"])
        self.runs.append(run)
        return run

    def _value(self, run: SweepRun) -> float | None:
        found = self.state.runs[run.name].get("metrics", {}).get(self.sweep.metric)
        return None if found is None else float(found)

    def _one_by_one(self) -> None:
        for run in self._to_train():
            self._begin(run)
            started = time.monotonic()
            lines = None if self.quiet else _Lines(self._number(run))
            try:
                made = train_one(run.config, self.shared, lines)
            except BaseException as error:
                made = {"state": "interrupted", "seconds": time.monotonic() - started}
                self._end(run, made)
                if isinstance(error, PenchantError) and not isinstance(error, Interrupted):
                    raise named(run, error) from error
                raise
            gc.collect()  # the next run needs the room
            self._end(run, {**made, "seconds": time.monotonic() - started})

    def _begin(self, run: SweepRun) -> None:
        """Remember that a run has begun: a kill that nothing can catch leaves that it is not finished."""
        before = self.state.runs.get(run.name, {})
        resumed = before.get("state") in ("running", "interrupted")
        seconds = before.get("seconds", 0.0) if resumed else 0.0
        record = {"state": "running", "varied": dict(run.varied), "inputs": self.inputs(run), "seconds": seconds}
        self.state.runs[run.name] = record
        self.state.save()

    def _end(self, run: SweepRun, made: Finished) -> None:
        """Remember what a run brought, and say it in a line."""
        record = self.state.runs[run.name]
        seconds = round(record["seconds"] + made["seconds"], 2)
        self.state.runs[run.name] = {**record, **made, "seconds": seconds}
        self.state.save()
        if made["state"] not in ENDED:
            return
        self._trained.append(made["seconds"])
        to_come = self.total - sum(self.state.runs.get(r.name, {}).get("state") in ENDED for r in self.runs)
        left = duration(sum(self._trained) / len(self._trained) * to_come / self.jobs)
        said = f"stopped itself: {made['why']}" if made["state"] == "stopped" else f"{made['steps']} steps"
        value = self._value(run)
        if value is not None:
            said = f"{self.sweep.metric} {value:.4f}, {said}"
        end = f"; left {left}" if to_come else ""
        self.console.note(f"{self._number(run)}: {said}, {duration(seconds)}{end}")
        self._check_metric(run)

    def _check_metric(self, run: SweepRun) -> None:
        metrics = self.state.runs[run.name].get("metrics")
        if metrics is not None and self.sweep.metric not in metrics:
            there = sorted(m for m in metrics if m.startswith("eval/") and not m.endswith("/ci"))
            raise ConfigError(
                self.sweep.place_of_metric,
                f"metric is {self.sweep.metric}, which run {run.name} does not have",
                did_you_mean(self.sweep.metric, there)
                + " (what is trained is kept; mend it and run the command again)",
            )

    def _number(self, run: SweepRun) -> str:
        at = next(i for i, r in enumerate(self.runs, 1) if r.name == run.name)
        varied = ""
        if self.sweep.search is not None:
            varied = " (" + ", ".join(f"{k}={v}" for k, v in run.varied.items()) + ")"
        return f"[{at}/{self.total}] {run.name}{varied}"


@contextmanager
def _named(run: SweepRun) -> Iterator[None]:
    try:
        yield
    except PenchantError as error:
        raise named(run, error) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.__enter__()
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(str(folder), "output is a file, or lies below one", "choose another output") from error
    except OSError as error:
        raise CheckpointError(str(folder), f"cannot be written ({error.strerror})", "choose another output") from error
    try:
        yield
    finally:
        lock.__exit__()
