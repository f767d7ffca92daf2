"""Run a sweep: skip, resume or train each run, and stop settings at rungs."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from penchant.base.text import did_you_mean
from penchant.errors import CheckpointError, ConfigError, PenchantError
from penchant.report import LiveReport
from penchant.runfolder import IDENTITY, PIPELINE, SWEEP, RunLock, differences, write_summed
from penchant.runfolder.values import format_decimals
from penchant.runs import Run
from penchant.runs.sharing import ObjectCache
from penchant.runs.state import (
    Inputs,
    Planned,
    changes,
    check_models,
    check_reward,
    file_hashes,
    planned_action,
    read_state,
    run_inputs,
)
from penchant.sweep import Sweep, SweepRun
from penchant.sweep.cluster import Cluster, open_cluster
from penchant.sweep.halving import Halving, Standing, standings
from penchant.sweep.search import SearchConfig, draw
from penchant.sweep.table import Table, make_table
from penchant.sweep.worker import job_of_order, result_path, train_one
from penchant.sweep.workers import Finished, Jobs, Workers
from penchant.training.checkpoint import latest_checkpoint
from penchant.training.console import PlainConsole, QuietConsole, duration
from penchant.training.loop import Interrupted

# ---- Successive halving: ranking settings at a rung by the runs' records, and stopping the worse ones ----

Records = Mapping[str, dict[str, Any]]


def at_rung(record: Mapping[str, Any], rung: int) -> Mapping[str, Any] | None:
    """Held-out metrics of a run at a rung, or None if it has not reached it."""
    entry = record.get("rungs", {}).get(str(rung))
    return None if entry is None else entry["metrics"]


def standings_at(runs: Sequence[SweepRun], records: Records, halving: Halving, rung: int) -> list[Standing]:
    """Rank the settings that entered a rung, best first. Depends on the records alone, so it can be repeated."""
    settings = list(dict.fromkeys(r.setting for r in runs))
    ranking: list[Standing] = []
    for k in range(1, rung + 1):
        values = {s: [_value(records, r, halving, k) for r in runs if r.setting == s] for s in settings}
        ranking = standings(values, halving)
        settings = [s.setting for s in ranking if s.kept]
    return ranking


def mark_cut_runs(
    runs: Sequence[SweepRun], records: Records, halving: Halving, rung: int, ranked: Sequence[Standing]
) -> None:
    """Mark the paused runs of every dropped setting as cut. Runs that stopped themselves keep their state."""
    for standing in ranked:
        for run in runs:
            record = records.get(run.name, {})
            if not standing.kept and run.setting == standing.setting and record.get("state") == "paused":
                cut: dict[str, Any] = {"rung": rung, "of": halving.rungs, "rank": standing.rank, "among": len(ranked)}
                cut |= {"metric": halving.metric, "mean": standing.mean}
                by_rank = f"rank {standing.rank} of {len(ranked)}"
                reason = by_rank if standing.mean is not None else "another seed of it stopped itself"
                why = f"stopped at rung {rung} of {halving.rungs}: {reason}"
                record |= {"state": "cut", "cut": cut, "why": why}


def _value(records: Records, run: SweepRun, halving: Halving, rung: int) -> float | None:
    metrics = at_rung(records.get(run.name, {}), rung)
    value = None if metrics is None else metrics.get(halving.metric)
    return None if value is None else float(value)


# ---- The state of a sweep, `sweep.json`, and what it implies for the next call ----

RESULTS = "sweep.jsonl"
ENDED = ("finished", "stopped")  # a run that stopped itself counts as a result, an interrupted one does not


@dataclass(slots=True)
class State:
    """`sweep.json`: a record of each run, the search that drew them, the table, and a description of the last call.

    A record holds the run's state (``running``, ``interrupted``, ``finished``, ``stopped``; with halving ``paused`` at a rung and ``cut``),
    its varied keys, the inputs that it started with, seconds, and its steps and held-out metrics or why it stopped itself. With halving,
    final metrics and metrics at rungs are kept separately. `about` holds the metric, its direction, every run's name, and halving with
    the standings at its rungs.
    """

    path: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    table: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State:
        """Read the state of the sweep in `folder`, or an empty state if there is none.

        Raises:
            CheckpointError: the file is damaged, or the folder holds something else.
        """
        path = folder / SWEEP
        for other, what in ((IDENTITY, "one run"), (PIPELINE, "a pipeline")):
            if not path.exists() and (folder / other).exists():
                raise CheckpointError(str(folder), f"is the folder of {what}", "choose another output")
        values = read_state(path, ("runs", "search", "table"))
        return cls(path, about=values.pop("sweep", {}), **values)

    def save(self) -> None:
        """Write the file atomically."""
        content = {"sweep": self.about, "table": self.table, "search": self.search, "runs": self.runs}
        write_summed(self.path, json.dumps(content, indent=1, ensure_ascii=False))

    def write_lines(self, runs: Sequence[SweepRun]) -> None:
        """Write `sweep.jsonl`: one line per finished, stopped or cut run, in the sweep's order."""
        lines = []
        for run in runs:
            record = self.runs.get(run.name)
            if record is not None and record["state"] in (*ENDED, "cut"):
                entry = {k: v for k, v in record.items() if k != "inputs"}
                lines.append({"run": run.name, "setting": run.setting, "seed": run.seed, **entry})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_summed(self.path.with_name(RESULTS), text)

    def record_search(self, search: SearchConfig, where: str) -> None:
        """Record the search. Raises CheckpointError if it differs from the one that drew the existing trials."""
        current = json.loads(search.model_dump_json(by_alias=True, exclude={"trials"}))
        trials = [name for name in self.runs if name.startswith("trial-")]
        changed = differences(self.search, current) if trials and self.search is not None else []
        if changed:
            what = f"search has changed since {len(trials)} of its trials were drawn: {'; '.join(changed)}"
            raise CheckpointError(where, what, "undo the change, or choose another output")
        self.search = current

    def record_halving(self, halving: Halving | None, runs: Sequence[str], where: str) -> None:
        """Record the halving rule. Raises CheckpointError if runs began under a different one; dropping halving is allowed."""
        old, started = self.about.get("halving"), [name for name in runs if name in self.runs]
        if halving is None or not started:
            self.about["halving"] = None if halving is None else {**halving.to_json(), "runs": list(runs), "judged": []}
            return
        current = {**halving.to_json(), "runs": list(runs), "judged": (old or {}).get("judged", [])}
        changed = "there was no halving" if old is None else ""
        if old is not None:
            previous = {k: v for k, v in old.items() if k not in ("runs", "judged")}
            changed = "; ".join(differences(previous, halving.to_json()))
            if not changed and old["judged"] and set(old["runs"]) != set(runs):
                changed = "runs were added or left out after a rung was judged"
        if changed:
            what = f"halving has changed since {len(started)} of the runs were begun: {changed}"
            how = "undo the change, choose another output, or leave halving out to have every run trained to its end"
            raise CheckpointError(where, what, how)
        self.about["halving"] = current


def judge_run(run: SweepRun, record: Mapping[str, Any] | None, inputs: Inputs, has_halving: bool = False) -> Planned:
    """Decide whether a run is done, is to be trained or resumed, or has changed.

    Args:
        record: the run's record in `sweep.json`, or None; inputs: its current inputs; has_halving: whether cut runs stay cut.
    """
    if record is not None and record["state"] == "cut" and has_halving and not changes(record["inputs"], inputs):
        return Planned(run.name, "done", record["why"])  # even if its folder is gone
    planned = planned_action(run, record, inputs, "sweep", ENDED)
    if planned is not None:
        return planned
    assert record is not None
    if record["state"] == "stopped":
        return Planned(run.name, "done", f"stopped itself: {record['why']}")
    if record["state"] == "finished":
        return Planned(run.name, "done", f"{record['steps']} steps")
    checkpoint, _ = latest_checkpoint(run.folder)
    assert checkpoint is not None
    return Planned(run.name, "resume", f"at a rung, {checkpoint.name.replace('-', ' ')}")


def _refusal(run: SweepRun, reason: str) -> CheckpointError:
    return run.refusal(reason, f"undo the change, choose another output, or move {run.folder} away to retrain it")


# ---- Running a sweep: runs one after another in this process, or several at a time in worker processes or cluster jobs ----

WORDS = {"done": "unchanged", "run": "to run", "resume": "to continue", "wait": "to wait for", "changed": "CHANGED"}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Result of a sweep.

    Args:
        folder: the sweep's folder; table: its settings; runs: record of each run, by name.
    """

    folder: Path
    table: Table
    runs: Mapping[str, Mapping[str, Any]]

    def to_text(self) -> str:
        return self.table.to_text()


class _RunConsole(PlainConsole):
    """Progress of one of several runs: an occasional line with the run's name, without the usual header."""

    def __init__(self, prefix: str, report: Callable[[str], None]) -> None:
        super().__init__(every_seconds=15.0)
        self.prefix = prefix
        self.report = report
        self.last = time.monotonic()  # so that short runs print only their last line

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.report("eval")

    def note(self, text: str) -> None:
        pass

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if step != total:
            super().step(step, total, metrics)

    def _print(self, text: str) -> None:
        super()._print(f"{self.prefix}: {text}")


class SweepConductor:
    """Carries out one call of `penchant sweep`.

    Args:
        jobs: concurrent runs; None: one on this machine, all runs of a grid on a cluster; quiet: no progress.
        check_memory: returns a warning about a run, or None.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        jobs: int | None = None,
        quiet: bool = False,
        check_memory: Callable[[Run], str | None] | None = None,
    ) -> None:
        if jobs is not None and jobs < 1:
            raise ConfigError("--jobs", f"is {jobs}", "give 1 or more")
        self.sweep = sweep
        self.on_cluster = sweep.cluster.on != "local"
        self.jobs = jobs or (max(1, len(sweep.runs)) if self.on_cluster else 1)
        self.quiet = quiet
        self.console = QuietConsole() if quiet else PlainConsole()
        self.check_memory, self._memory_checked = check_memory, set[str]()
        self.shared = ObjectCache()
        self.state = State.read(sweep.output)
        self.runs: list[SweepRun] = []  # known so far; a search draws them one by one
        self.report = LiveReport(sweep.output, self.console.note)
        self._inputs: dict[str, Inputs] = {}
        self._steps: dict[str, int] = {}  # total optimizer steps of each run
        self._durations: list[float] = []  # seconds of each run of this call, or of the current rung
        self._clusters: dict[str, Cluster] = {}
        self.rung = 0  # the rung that runs are being trained to; 0 without halving

    # ---- Before training ------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self.sweep.search.trials if self.sweep.search is not None else len(self.sweep.runs)

    def inputs(self, run: SweepRun) -> Inputs:
        """A run's current inputs: its settings, rows, models and reward files."""
        if run.name in self._inputs:
            return self._inputs[run.name]
        config = run.config
        rewards = [None if r is None else r.model_dump(mode="json") for r in (config.reward, config.evaluation.reward)]
        model = config.model
        file_key = (model.path, model.tokenizer, model.adapter, config.reference.path, json.dumps(rewards))
        with run.naming():
            if config.train.gradient_checkpointing == "auto":
                what = "auto decides for each run by itself, and runs of a sweep are compared"
                raise ConfigError("train.gradient_checkpointing", what, "set layers or off for all of them")
            check_models(config)
            for reward in rewards:
                check_reward(reward)
            training_run = Run(config, quiet=True, shared=self.shared)
            splits = training_run.rows.datasets
            self._note_memory_warning(training_run)
            files = self.shared.once(("files", *file_key), lambda: file_hashes(config, *rewards))
            self._inputs[run.name] = run_inputs(config, splits, files)
        return self._inputs[run.name]

    def _note_memory_warning(self, run: Run) -> None:
        """Note it if a run may not fit. Runs with the same memory-related settings are checked once."""
        config, t = run.config, run.config.train
        train_key = (t.tokens_per_step, t.batch_size, t.optimizer, t.gradient_checkpointing, t.packing)
        key = (config.model, config.lora, config.data.max_length, config.reference, config.method.name, *train_key)
        if self.check_memory is None or str(key) in self._memory_checked:
            return
        self._memory_checked.add(str(key))
        try:
            warning = self.check_memory(run)
        except Exception:  # a failed estimate must not stop the sweep
            warning = None
        if warning:
            self.console.note(warning)

    def known_runs(self) -> list[SweepRun]:
        """The runs of a grid, or the already drawn trials of a search."""
        if self.sweep.search is None:
            return list(self.sweep.runs)
        names = [f"trial-{i}" for i in range(self.sweep.search.trials)]
        assert self.sweep.trial is not None
        return [self.sweep.trial(i, self.state.runs[n]["varied"]) for i, n in enumerate(names) if n in self.state.runs]

    def plan(self) -> list[Planned]:
        """What a call would do with each run, in order. Nothing is trained or written."""
        halved = self.sweep.halving is not None
        planned = [
            self._wait_if_submitted(run, judge_run(run, self.state.runs.get(run.name), self.inputs(run), halved))
            for run in self.known_runs()
        ]
        if self.sweep.halving is not None:
            for run in self.sweep.runs:
                self._rungs(self.sweep.halving, run)
        return planned

    def _active_job(self, run: SweepRun, take_back: bool = False) -> Mapping[str, Any] | None:
        """The cluster job of a run if it is still active or left a result that was not collected, else None.

        Args:
            take_back: if the sweep was killed while submitting, delete the order unless a job has taken it.
        """
        record = self.state.runs.get(run.name, {})
        job = record.get("job") if record.get("state") == "running" else None
        if job is not None and "id" not in job:  # the sweep was killed while submitting the job
            order = Path(job["order"])
            if take_back:
                order.unlink(missing_ok=True)
            taker = job_of_order(order)
            job = None if taker is None else {**job, "id": taker}
        if job is None or result_path(Path(job["order"])).exists():
            return job
        return job if self._cluster(job["on"]).ended(job["id"]) is None else None

    def _cluster(self, backend: str) -> Cluster:
        if backend not in self._clusters:
            config = self.sweep.cluster
            self._clusters[backend] = open_cluster(config.model_copy(update={"on": backend}), self.sweep.output)
        return self._clusters[backend]

    def _wait_if_submitted(self, run: SweepRun, planned: Planned) -> Planned:
        """Change the action to ``wait`` if a cluster job already has the run.

        Raises:
            CheckpointError: the job is still active, and this call would train the run elsewhere.
        """
        job = self._active_job(run) if planned.action in ("run", "resume") else None
        if job is None:
            return planned
        if job["on"] != self.sweep.cluster.on:
            if result_path(Path(job["order"])).exists():
                return planned
            raise CheckpointError(
                f"run {run.name}",
                f"{self._cluster(job['on']).title} {job['id']} has it, and this call trains on {self.sweep.cluster.on}",
                f"give --on {job['on']} to wait for it, or end that job first",
            )
        return Planned(run.name, "wait", f"{self._cluster(job['on']).title} {job['id']} has it")

    def _rungs(self, halving: Halving, run: SweepRun) -> list[int]:
        """Steps of a run's rungs, the last one its end. Raises ConfigError if the run is too short for them."""
        if run.name not in self._steps:
            with run.naming():
                self._steps[run.name] = Run(run.config, quiet=True, shared=self.shared).schedule.total_steps
        total = self._steps[run.name]
        steps = halving.steps(total)
        if len(set(steps)) < len(steps):
            raise ConfigError(
                halving.place,
                f"run {run.name} has {total} optimizer steps, too few for {halving.rungs} rungs with a factor of {halving.factor}",
                "lower rungs or factor, or train for longer",
            )
        return steps

    def plan_text(self) -> str:
        """Format the plan for the terminal."""
        planned = self.plan()
        width = max((len(p.name) for p in planned), default=0)
        digits = len(str(self.total))
        lines = [f"{i:>{digits}}  {p.name:<{width}}  {WORDS[p.action]}: {p.why}" for i, p in enumerate(planned, 1)]
        if self.total > len(planned):
            lines.append(f"{self.total - len(planned)} trials are still to be drawn")
        if self.sweep.halving is not None:
            lines.append(self.sweep.halving.to_text())
        return "\n".join([*lines, f"in {self.sweep.output}; best by {self.sweep.metric}"])

    # ---- Training -------------------------------------------------------------------------------------------------

    def run(self) -> SweepResult:
        """Train every run that is not done, in order.

        Raises:
            ConfigError, DataError, ModelError, RewardError: an error that the user can fix.
            CheckpointError: a run was trained with other inputs, or the folder is in use.
            Interrupted: a signal arrived; the same command continues.
        """
        with RunLock(self.sweep.output):
            self.state = State.read(self.sweep.output)
            if self.sweep.search is not None:
                self.state.record_search(self.sweep.search, self.sweep.source)
            for run, planned in zip(self.known_runs(), self.plan(), strict=True):
                if planned.action == "changed":
                    raise _refusal(run, planned.why)
            self._note_foreign_runs()
            self._record_sweep()
            try:
                if self.on_cluster:
                    jobs = Jobs(
                        self._cluster(self.sweep.cluster.on),
                        self.jobs,
                        self.sweep.output,
                        self._pause_at,
                        partial(self._active_job, take_back=True),
                        self._record_job,
                        self.console.note,
                    )
                    self._train_by_rungs(lambda todo: jobs.run(todo, self._begin, self._end))
                elif self.jobs == 1:
                    self._train_by_rungs(self._train_sequentially)
                else:
                    with Workers(self.jobs, self.sweep.output, self.quiet, self._pause_at) as workers:
                        self._train_by_rungs(lambda todo: workers.run(todo, self._begin, self._end))
            finally:
                table = self._write()
                self.report.now()
        return SweepResult(self.sweep.output, table, {r.name: self.state.runs[r.name] for r in self.runs})

    def _record_sweep(self) -> None:
        """Record the metric, the runs and the halving rule in `sweep.json`, for `penchant watch` and others."""
        trials = [f"trial-{i}" for i in range(self.total)] if self.sweep.search is not None else []
        names = [r.name for r in self.sweep.runs] or trials
        self.state.record_halving(self.sweep.halving, names, self.sweep.source)
        direction = "max" if self.sweep.higher else "min"
        self.state.about |= {"metric": self.sweep.metric, "direction": direction, "runs": names}

    def _train_by_rungs(self, train: Callable[[Iterator[SweepRun]], None]) -> None:
        """Train every run to its end. With halving, train all of them to a rung before any continues to the next."""
        halving = self.sweep.halving
        if halving is None:
            train(self._pending_runs())
            return
        self.console.note(halving.to_text())
        for self.rung in range(1, halving.rungs + 1):
            self._durations.clear()
            train(self._pending_runs())
            if self.rung < halving.rungs:
                self._judge_rung(halving)

    def _judge_rung(self, halving: Halving) -> None:
        """Stop the settings that are not among the best at this rung, and report the rest."""
        ranking = standings_at(self.runs, self.state.runs, halving, self.rung)
        mark_cut_runs(self.runs, self.state.runs, halving, self.rung, ranking)
        judged = self.state.about["halving"]["judged"]
        judged[self.rung - 1 :] = [[s.to_json() for s in ranking]]
        self.state.save()
        names = ", ".join(s.setting for s in ranking if s.kept)
        kept_count = sum(s.kept for s in ranking)
        verb = "goes" if kept_count == 1 else "go"
        self.console.note(
            f"rung {self.rung} of {halving.rungs}: {kept_count} of {len(ranking)} settings {verb} on: {names}"
        )

    def _pause_at(self, run: SweepRun) -> int | None:
        """Step at which a run pauses next, or None if it runs to its end."""
        halving = self.sweep.halving
        if halving is None or self.rung == halving.rungs:
            return None
        return self._rungs(halving, run)[self.rung - 1]

    def _is_settled(self, run: SweepRun) -> bool:
        """Whether a run is done, or done until the next rung."""
        record = self.state.runs.get(run.name, {})
        return record.get("state") in (*ENDED, "cut") or (self.rung > 0 and at_rung(record, self.rung) is not None)

    def _write(self) -> Table:
        table = make_table(self.runs, self.state.runs, self.sweep.metric, self.sweep.higher)
        self.state.table = table.to_json()
        self.state.save()
        self.state.write_lines(self.runs)
        return table

    def _note_foreign_runs(self) -> None:
        own_names = {r.name for r in self.sweep.runs} | {f"trial-{i}" for i in range(self.total)}
        foreign = [name for name in self.state.runs if name not in own_names]
        if foreign:
            self.console.note(
                f"not touched, and not in the table: {', '.join(foreign)} (from earlier sweeps in this folder)"
            )

    def _pending_runs(self) -> Iterator[SweepRun]:
        """Yield the runs that are not done, in order. A search's trials are drawn lazily."""
        if self.sweep.search is None:
            self.runs = list(self.sweep.runs)
        for number in range(self.total):
            run = self._draw_trial(number) if self.sweep.search is not None else self.sweep.runs[number]
            if self.rung and at_rung(self.state.runs.get(run.name, {}), self.rung) is not None:
                continue  # it has already reached this rung
            planned = judge_run(run, self.state.runs.get(run.name), self.inputs(run), self.rung > 0)
            if planned.action == "changed":
                raise _refusal(run, planned.why)
            if planned.action != "done":
                yield run
                continue
            if self.rung in (0, 1) or self.state.runs[run.name]["state"] == "finished":
                self.console.note(f"{self._run_label(run)}: unchanged, {planned.why}")
            self._check_metric(run)

    def _draw_trial(self, number: int) -> SweepRun:
        search, trial = self.sweep.search, self.sweep.trial
        assert search is not None and trial is not None
        record = self.state.runs.get(f"trial-{number}")
        if record is None:
            ended_runs = [r for r in self.runs if self.state.runs[r.name]["state"] in ENDED]
            earlier = [(r.varied, self._value(r)) for r in ended_runs]
            run = trial(number, draw(search, number, earlier, self.sweep.higher))
        else:
            run = trial(number, record["varied"])
        self.runs.append(run)
        return run

    def _value(self, run: SweepRun) -> float | None:
        value = self.state.runs[run.name].get("metrics", {}).get(self.sweep.metric)
        return None if value is None else float(value)

    def _train_sequentially(self, runs: Iterator[SweepRun]) -> None:
        for run in runs:
            self._begin(run)
            started = time.monotonic()
            console = None if self.quiet else _RunConsole(self._run_label(run), self.report.on_event)
            try:
                outcome = train_one(run.config, self.shared, console, self._pause_at(run))
            except BaseException as error:
                outcome = {"state": "interrupted", "seconds": time.monotonic() - started}
                self._end(run, outcome)
                if isinstance(error, PenchantError) and not isinstance(error, Interrupted):
                    raise run.named(error) from error
                raise
            gc.collect()  # free memory for the next run
            self._end(run, {**outcome, "seconds": time.monotonic() - started})

    def _begin(self, run: SweepRun) -> None:
        """Record that a run has begun, so that after a SIGKILL it does not count as finished."""
        previous = self.state.runs.get(run.name, {})
        resumed = previous.get("state") in ("running", "interrupted", "paused", "cut")
        seconds = previous.get("seconds", 0.0) if resumed else 0.0
        record = {"state": "running", "varied": dict(run.varied), "inputs": self.inputs(run), "seconds": seconds}
        if self.rung:
            record["rungs"] = previous.get("rungs", {})
        self.state.runs[run.name] = record
        self.state.save()
        self.report.on_event("step")

    def _record_job(self, run: SweepRun, job: Mapping[str, Any]) -> None:
        self.state.runs[run.name]["job"] = dict(job)
        self.state.save()

    def _end(self, run: SweepRun, outcome: Finished) -> None:
        """Record a run's outcome, and print a line about it."""
        record = self.state.runs[run.name]
        record.pop("job", None)
        seconds = round(record["seconds"] + outcome["seconds"], 2)
        self._durations.append(outcome["seconds"])
        if outcome["state"] == "paused":  # metrics at a rung are kept there, not as the run's result
            rungs = {**record["rungs"], str(self.rung): {"step": outcome["steps"], "metrics": outcome["metrics"]}}
            outcome = {"state": "paused", "steps": outcome["steps"], "rungs": rungs}
        self.state.runs[run.name] = {**record, **outcome, "seconds": seconds}
        self._write()
        self.report.on_event("eval")
        if outcome["state"] not in (*ENDED, "paused"):
            return
        remaining = self.total - len(self.runs) + sum(not self._is_settled(r) for r in self.runs)
        time_left = duration(sum(self._durations) / len(self._durations) * remaining / self.jobs)
        summary = f"stopped itself: {outcome['why']}" if outcome["state"] == "stopped" else f"{outcome['steps']} steps"
        metric, value = self._ranking_value(run)
        if value is not None:
            summary = f"{metric} {format_decimals(value, '.4f')}, {summary}"
        rung = f" in rung {self.rung}" if self.rung else ""
        suffix = f"; left{rung} {time_left}" if remaining else ""
        self.console.note(f"{self._run_label(run)}: {summary}, {duration(seconds)}{suffix}")
        self._check_metric(run)

    def _ranking_value(self, run: SweepRun) -> tuple[str, float | None]:
        """(name, value) of the metric that ranks a run, at its end or at the current rung."""
        metrics, halving = at_rung(self.state.runs[run.name], self.rung), self.sweep.halving
        if metrics is None or halving is None:
            return self.sweep.metric, self._value(run)
        return halving.metric, metrics.get(halving.metric)

    def _check_metric(self, run: SweepRun) -> None:
        metrics = self.state.runs[run.name].get("metrics") or at_rung(self.state.runs[run.name], self.rung)
        required = [(self.sweep.metric, self.sweep.metric_place)]
        if self.sweep.halving is not None:
            required.append((self.sweep.halving.metric, self.sweep.halving.place))
        for metric, place in required:
            if metrics is not None and metric not in metrics:
                available = sorted(m for m in metrics if m.startswith("eval/") and not m.endswith("/ci"))
                how = did_you_mean(metric, available) + " (what is trained is kept; fix it and run the command again)"
                raise ConfigError(place, f"metric is {metric}, which run {run.name} does not have", how)

    def _run_label(self, run: SweepRun) -> str:
        position = next(i for i, r in enumerate(self.runs, 1) if r.name == run.name)
        varied = ""
        if self.sweep.search is not None:
            varied = " (" + ", ".join(f"{k}={v}" for k, v in run.varied.items()) + ")"
        return f"[{position}/{self.total}] {run.name}{varied}"
