"""Run a pipeline: skip, resume or train its stages in order, then compare their models."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from penchant.base.files import yaml_value
from penchant.errors import CheckpointError
from penchant.models.lora import is_adapter
from penchant.models.merge import merge_to_folder, model_sha256
from penchant.pipeline import Pipeline, Ref, Stage
from penchant.pipeline.compare import Comparer, Outcome
from penchant.plan import checkpointing, memory_warning
from penchant.runfolder import CHECKPOINTS, CONFIG, IDENTITY, RunLock, write_summed
from penchant.runs import Run
from penchant.runs.state import (
    Inputs,
    Planned,
    State,
    check_models,
    check_reward,
    checkpoint_hashes,
    file_hashes,
    model_folder,
    planned_action,
    run_inputs,
)
from penchant.training.console import console, duration

# ---- The state of a pipeline, `pipeline.json`, and what it implies for the next call ----


def judge_stage(stage: Stage, record: Mapping[str, Any] | None, inputs: Inputs) -> Planned:
    """Decide whether a stage whose inputs all exist is done, is to be trained or resumed, or has changed.

    Args:
        record: the stage's record in `pipeline.json`, or None; inputs: its current inputs.
    """
    planned = planned_action(stage, record, inputs, "pipeline")
    if planned is not None:
        return planned
    assert record is not None
    for name, sha256 in record["checkpoints"].items():
        model = stage.folder / CHECKPOINTS / name / "model"
        if not model.is_dir():
            return Planned(stage.name, "changed", f"its {name} is gone")
        if model_sha256(model) != sha256:
            return Planned(stage.name, "changed", f"its own model ({name}) was changed after training")
    return Planned(stage.name, "done", f"{record['steps']} steps")


def _check_unchanged(stage: Stage, planned: Planned) -> None:
    """Raise if a stage's inputs or models have changed since it was trained."""
    if planned.action == "changed":
        how = f"--redo {stage.name} moves its folder aside and retrains it, with every stage that uses it; "
        raise stage.refusal(planned.why, how + "or undo the change, or choose another output")


def move_aside(pipeline: Pipeline, names: Sequence[str], state: State) -> list[str]:
    """Rename stages' folders to ``NAME.1`` (or the first number that is free for all of them) and delete their records.

    Paths in a moved run's config that point into a moved folder are updated, so that `penchant eval` of an old run uses the old models.

    Returns:
        One sentence per folder.
    """
    if not names:
        return []
    existing = [pipeline.stages[n] for n in names if pipeline.stages[n].folder.exists()]
    number = 1
    while any(_numbered(s.folder, number).exists() for s in existing):
        number += 1
    moved = {str(s.folder): str(_numbered(s.folder, number)) for s in existing}
    with ExitStack() as locks:
        for stage in existing:
            locks.enter_context(RunLock(stage.folder))  # fails if a run is still training there
        for stage in existing:
            os.rename(stage.folder, moved[str(stage.folder)])
            state.stages.pop(stage.name, None)
            state.save()
    for name in names:
        state.stages.pop(name, None)
    state.save()
    for folder in moved.values():
        _update_paths(Path(folder), moved)
    return [f"{Path(old).name}: moved aside to {Path(new).name}" for old, new in moved.items()]


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def _update_paths(folder: Path, moved: Mapping[str, str]) -> None:
    def replace_paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {replace_paths(k): replace_paths(v) for k, v in value.items()}
        if isinstance(value, list):
            return [replace_paths(v) for v in value]
        for old, new in moved.items():
            if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
                return new + value[len(old) :]
        return value

    config, identity = folder / CONFIG, folder / IDENTITY
    if config.exists():
        values = replace_paths(yaml_value(config.read_text(encoding="utf-8")))
        write_summed(config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    if identity.exists():
        write_summed(identity, json.dumps(replace_paths(json.loads(identity.read_text())), indent=1))


# ---- Running a pipeline: each stage is an ordinary run that is trained, resumed or skipped, and the comparison comes last ----

WORDS = {
    "done": "unchanged",
    "run": "to run",
    "resume": "to continue",
    "changed": "CHANGED",
    "later": "to be checked again",
}


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """Result of a pipeline.

    Args:
        folder: the pipeline's folder; models: ``{stage: model folder that stage:NAME refers to}``; done: what was done with each
            requested stage; outcome: the comparison, or None.
    """

    folder: Path
    models: dict[str, Path]
    done: dict[str, str]
    outcome: Outcome | None

    def to_text(self) -> str:
        """Format one line per stage, then the comparison."""
        width = max(map(len, self.done), default=0)
        lines = [f"{name:<{width}}  {action}  {self.models[name]}" for name, action in self.done.items()]
        return "\n".join([*lines, *(["", self.outcome.to_text()] if self.outcome is not None else [])])


class Conductor:
    """Carries out one call of `penchant pipeline`.

    Args:
        quiet: no progress.
    """

    def __init__(self, pipeline: Pipeline, *, quiet: bool = False) -> None:
        self.pipeline = pipeline
        self.quiet = quiet
        self.console = console(quiet)
        self.state = State.read(pipeline.output)

    # ---- Before training ------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> dict[str, Run]:
        """A run per stage, with its data read. References are unresolved, so these runs cannot be trained."""
        runs = {}
        for stage in self.pipeline.stages.values():
            with stage.naming():
                check_models(stage.config, stages=True)
                check_reward(stage.values.get("reward"))
                runs[stage.name] = run = Run(stage.config, quiet=True)
                _ = run.rows.datasets
        return runs

    @cached_property
    def comparer(self) -> Comparer | None:
        """The comparison, checked, or None if the pipeline has none."""
        if self.pipeline.compare is None:
            return None
        return Comparer(self.pipeline, self.data, self.console)

    def inputs(self, stage: Stage) -> Inputs:
        """A stage's current inputs. Every stage that it uses must be done."""
        evaluation_reward = (stage.values.get("evaluation") or {}).get("reward")
        files = file_hashes(stage.config, stage.values.get("reward"), evaluation_reward)
        upstream = {ref.text: self.folder_of(ref) for ref in stage.refs}
        return run_inputs(stage.config, self.data[stage.name].rows.datasets, files, upstream)

    def folder_of(self, ref: Ref) -> Path:
        """The model folder that a reference points to. For an adapter, the adapter's folder."""
        try:
            return model_folder(self.pipeline.stages[ref.stage].folder, ref.which)
        except CheckpointError as error:
            raise CheckpointError(error.where, f"{ref.text}: {error.what}", error.how) from error

    def plan(self) -> list[Planned]:
        """What a call would do with each stage, in order. Nothing is trained or written."""
        planned: dict[str, Planned] = {}
        for stage in self.pipeline.stages.values():
            record = self.state.stages.get(stage.name)
            unfinished = [n for n in stage.upstream if planned[n].action != "done"]
            if unfinished and record is not None and stage.folder.exists():
                entry = Planned(stage.name, "later", f"after {', '.join(unfinished)}")
            elif unfinished:
                entry = judge_stage(stage, record, {})
                entry = (
                    entry if entry.action == "changed" else Planned(stage.name, "run", f"after {', '.join(unfinished)}")
                )
            else:
                entry = judge_stage(stage, record, self.inputs(stage))
            planned[stage.name] = entry
        return list(planned.values())

    def plan_text(self, redo: Sequence[str] = ()) -> str:
        """Format the plan for the terminal. `redo` marks the stages that would be moved aside."""
        moved = set(self._stages_to_redo(redo))
        planned = self.plan()
        width = max(len(n) for n in (*self.pipeline.stages, "compare"))
        lines = []
        for i, p in enumerate(planned, 1):
            word, reason = WORDS[p.action], p.why
            if p.name in moved:
                word, reason = "to redo", "its folder is moved aside first" if self._folder(p.name).exists() else p.why
            lines.append(f"{i}  {p.name:<{width}}  {word}: {reason}")
        if self.comparer is not None:
            ready = not moved and all(p.action == "done" for p in planned)
            unchanged = ready and self.comparer.unchanged(self.state.comparison, self.resolve, self.folder_of)
            lines.append(f"{len(planned) + 1}  {'compare':<{width}}  {'unchanged' if unchanged else 'to run'}")
        return "\n".join(lines)

    # ---- Training -------------------------------------------------------------------------------------------------

    def run(self, only: str | None = None, redo: Sequence[str] = ()) -> PipelineResult:
        """Train every stage that is not done, in order, and compare the models.

        Args:
            only: train only this stage, whose inputs must be done; nothing is compared.
            redo: stages to retrain, with every stage that uses them; their folders are moved aside.

        Raises:
            ConfigError, DataError, ModelError, RewardError: an error that the user can fix.
            CheckpointError: a stage was trained with other inputs, or the folder is in use.
            TrainingStopped: NaN/Inf or a signal; the same command continues.
        """
        if only is not None:
            self.pipeline.stage(only, "--only")
        to_redo = self._stages_to_redo(redo)
        _ = self.data, self.comparer  # check everything before anything trains
        with RunLock(self.pipeline.output):
            self.state = State.read(self.pipeline.output)
            self.state.pipeline = {"stages": list(self.pipeline.stages)}
            for sentence in move_aside(self.pipeline, to_redo, self.state):
                self.console.note(sentence)
            planned = {p.name: p for p in self.plan()}
            if only is not None:
                self._check_needed(only, planned)
            targets = [only] if only is not None else list(self.pipeline.stages)
            for name in targets:
                _check_unchanged(self.pipeline.stages[name], planned[name])
            done = {}
            for number, name in enumerate(targets, 1):
                done[name] = self._run_stage(self.pipeline.stages[name], f"[{number}/{len(targets)}]")
            outcome = None
            if only is None and self.comparer is not None:
                outcome = self.comparer.run(self.state, self.resolve, self.folder_of)
        models = {name: model_folder(self._folder(name), None) for name in done}
        return PipelineResult(self.pipeline.output, models, done, outcome)

    def _stages_to_redo(self, redo: Sequence[str]) -> list[str]:
        redo = [redo] if isinstance(redo, str) else redo
        for name in redo:
            self.pipeline.stage(name, "--redo")
        return self.pipeline.downstream(redo)

    def _folder(self, name: str) -> Path:
        return self.pipeline.stages[name].folder

    def _check_needed(self, stage: str, planned: dict[str, Planned]) -> None:
        for name in self.pipeline.needed(stage):
            _check_unchanged(self.pipeline.stages[name], planned[name])
            if planned[name].action != "done":
                what = f"stages.{stage} needs {name}, which is not finished"
                how = f"run --only {name} first, or leave --only out"
                raise CheckpointError(self.pipeline.stages[stage].place, what, how)

    def _run_stage(self, stage: Stage, number: str) -> str:
        """Skip, resume or train one stage, and return a phrase that says what was done."""
        inputs = self.inputs(stage)
        planned = judge_stage(stage, self.state.stages.get(stage.name), inputs)
        _check_unchanged(stage, planned)
        self.console.note(f"{number} {stage.name}: {WORDS[planned.action]}, {planned.why}")
        if planned.action == "done":
            return f"unchanged, {planned.why}"
        with stage.naming():
            return self._train(stage, inputs, planned)

    def _train(self, stage: Stage, inputs: Inputs, planned: Planned) -> str:
        config = stage.resolved(self.resolve)
        previous = self.state.stages.get(stage.name, {}) if planned.action == "resume" else {}
        record = {"state": "running", "inputs": inputs, "seconds": previous.get("seconds", 0.0)}
        self.state.stages[stage.name] = record
        self.state.save()
        started = time.monotonic()
        end_state: dict[str, Any] = {"state": "stopped"}
        try:
            result = Run(config, quiet=self.quiet, check_memory=memory_warning, checkpointing=checkpointing).train()
            end_state = {"state": "finished", "steps": result.steps, "checkpoints": checkpoint_hashes(stage.folder)}
        finally:  # after a SIGKILL the record stays "running", which does not count as finished either
            seconds = round(record["seconds"] + time.monotonic() - started, 1)
            self.state.stages[stage.name] = {**record, **end_state, "seconds": seconds}
            self.state.save()
            gc.collect()  # free memory for the next stage
        return f"{result.steps} steps, {duration(seconds)}"

    def resolve(self, ref: Ref) -> str:
        """The model folder that replaces a reference in a config. Merges an adapter first if a whole model is needed."""
        folder = self.folder_of(ref)
        if not (ref.needs_full_model and is_adapter(folder)):
            return str(folder)
        stage = self.pipeline.stages[ref.stage]
        config = stage.resolved(self.resolve)
        target = stage.folder / "merged" / folder.parent.name
        if not target.exists():
            self.console.note(f"{ref.text}: merging its adapter into {target}")
        return str(merge_to_folder(config.model, folder, target, config.train.seed))
