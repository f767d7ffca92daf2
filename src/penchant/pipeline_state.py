"""What a pipeline has done: `pipeline.json`, the inputs of its stages, and what follows from them for the next call."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from penchant.config import WATCHING_ONLY, RunConfig, default_settings
from penchant.errors import CheckpointError
from penchant.files import file_sha256
from penchant.models.merge import model_sha256
from penchant.pipeline import Pipeline, Stage
from penchant.training.checkpoint import checkpoints, latest_checkpoint
from penchant.training.runfolder import RunLock, differences

Action = Literal["done", "run", "resume", "stale", "later"]
Inputs = dict[str, Any]
STATE = "pipeline.json"
CHANGED = {  # parts of the inputs other than settings, and how a change in them is said
    "data": "the {} rows have changed",
    "upstream": "the model of {} has changed",
    "models": "the model of {} has changed",
    "rewards": "{} has changed",
    "losses": "the file of {} has changed",
}


@dataclass(slots=True)
class State:
    """`pipeline.json`: one record a stage, and one of the comparison.

    A stage's record holds its state (``running``, ``stopped``, ``finished``), the inputs it was started with, seconds, steps, and
    the checkpoints it left with the SHA-256 of their models. Only a run that came to its end is ever ``finished``.
    """

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state of the pipeline in `folder`; an empty one where there is none.

        Raises:
            CheckpointError: the file was damaged.
        """
        path = folder / STATE
        if not path.exists():
            return cls(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(values["stages"]), dict(values["comparison"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                str(path), f"cannot be read ({error})", "restore it, or choose another output"
            ) from error

    def save(self) -> None:
        """Write the file so that a reader, or a crash, sees the old or the new one."""
        write_atomically(self.path, {"stages": self.stages, "comparison": self.comparison})


def write_atomically(path: Path, value: Any) -> None:
    """JSON, written aside, fsynced and renamed."""
    write_text_atomically(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text_atomically(path: Path, text: str) -> None:
    """A text file, written aside, fsynced and renamed."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------------------------
# what a stage leaves, and what it starts from


def model_folder(folder: Path, which: str | None) -> Path:
    """The model folder of a run's checkpoint.

    Args:
        folder: the run's; which: ``last``, ``best``, a step's number, or None: the best where it is tracked and kept, else the last.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    last, _ = latest_checkpoint(folder)
    if last is None:
        raise CheckpointError(str(folder), "has no checkpoint", "train it first")
    name = last.name
    if which not in ("last", None, "best"):
        name = f"step-{which}"
    elif which != "last":
        best = json.loads((last / "state.json").read_text())["best_step"]
        kept = best is not None and (folder / "checkpoints" / f"step-{best}" / "manifest.json").exists()
        if which == "best" and not kept:
            raise CheckpointError(
                str(folder), "has no best checkpoint", "hold something out and set checkpoint.keep_best, or use @last"
            )
        name = f"step-{best}" if kept else last.name
    path = folder / "checkpoints" / name
    if not (path / "manifest.json").exists():
        there = ", ".join(p.name for p in checkpoints(folder))
        raise CheckpointError(
            str(path), "no such checkpoint", f"there are {there}; checkpoint.keep_last says how many are kept"
        )
    return path / "model"


def outputs_of(folder: Path) -> dict[str, str]:
    """``{checkpoint: SHA-256 of its model}`` for the best and the last one."""
    found = {model_folder(folder, which) for which in (None, "last")}
    return {model.parent.name: model_sha256(model) for model in sorted(found)}


def stage_inputs(
    config: RunConfig,
    rewards: Any,
    data: Mapping[str, str],
    upstream: Mapping[str, Path],
    judging: Any = None,
) -> Inputs:
    """Everything that a stage's result depends on, apart from the program.

    Args:
        config: the stage's, with its references as written (a folder that is moved changes nothing); rewards, judging: reward and evaluation.reward as written;
        data: fingerprints of its splits; upstream: the model folder behind each reference.
    """
    settings = config.model_dump(mode="json")
    for watching_only in WATCHING_ONLY:
        settings.pop(watching_only)
    paths = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "reference.path": config.reference.path,
    }
    local = {k: Path(p).expanduser() for k, p in paths.items() if p is not None and Path(p).expanduser().is_dir()}
    return {
        "config": settings,
        "data": dict(data),
        "upstream": {text: model_sha256(folder) for text, folder in upstream.items()},
        "models": {key: model_sha256(folder) for key, folder in local.items()},
        "rewards": reward_hashes(rewards) | reward_hashes(judging),
        "losses": config.loss.contents(),
    }


def reward_terms(reward: Any) -> list[str]:
    """The names in a reward as it is written in a config; references to stages are left out."""
    names = [reward] if isinstance(reward, str) else list(reward or ())
    return [n for n in names if not n.startswith("stage:")]


def reward_hashes(reward: Any) -> dict[str, str]:
    """SHA-256 of every file and model folder that a reward names."""
    found = {}
    for name in reward_terms(reward):
        file = Path(name.rpartition(":")[0]).expanduser()
        folder = Path(name).expanduser()
        if file.suffix == ".py" and file.is_file():
            found[str(file.resolve())] = file_sha256(file)
        elif folder.is_dir():
            run = (folder / "checkpoints").is_dir()
            found[str(folder.resolve())] = model_sha256(model_folder(folder, None) if run else folder)
    return found


def changes(old: Inputs, new: Inputs) -> list[str]:
    """What differs between two stages' inputs, in words; empty where nothing does."""
    defaults = json.loads(json.dumps(default_settings()))
    new = json.loads(json.dumps(new))
    found = differences(old.get("config"), new.get("config"), defaults=defaults)
    for part, words in CHANGED.items():
        before, now = old.get(part, {}), new.get(part, {})
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                found.append(words.format(key) + f" ({_short(before.get(key))} -> {_short(now.get(key))})")
    return found


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else sha256[:12]


# ---------------------------------------------------------------------------------------------------------------------
# what is to be done


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done with a stage, and why."""

    name: str
    action: Action
    why: str


def judge(stage: Stage, record: Mapping[str, Any] | None, inputs: Inputs) -> Planned:
    """What is to be done with a stage whose inputs are all there.

    Args:
        record: what `pipeline.json` says of it, None where it says nothing; inputs: as they are now.
    """
    last, _ = latest_checkpoint(stage.folder)
    if record is None:
        if last is not None or (stage.folder / "identity.json").exists():
            return Planned(stage.name, "stale", "its folder holds a run that this pipeline did not make")
        return Planned(stage.name, "run", "not started")
    finished = record["state"] == "finished"
    if last is None:
        return Planned(stage.name, "run", "its checkpoints are gone" if finished else "started, no checkpoint yet")
    found = changes(record["inputs"], inputs)
    if found:
        return Planned(stage.name, "stale", "; ".join(found))
    if not finished:
        return Planned(stage.name, "resume", f"interrupted at {last.name.replace('-', ' ')}")
    for name, sha256 in record["checkpoints"].items():
        model = stage.folder / "checkpoints" / name / "model"
        if not model.is_dir():
            return Planned(stage.name, "stale", f"its {name} is gone")
        if model_sha256(model) != sha256:
            return Planned(stage.name, "stale", f"its own model ({name}) was changed after training")
    return Planned(stage.name, "done", f"{record['steps']} steps")


def refusal(planned: Planned, source: str) -> CheckpointError:
    """Why a stale stage is neither skipped nor overwritten, and how to go on."""
    return CheckpointError(
        source,
        f"stages.{planned.name} is done or half done with other inputs: {planned.why}",
        f"--redo {planned.name} moves its folder aside and trains it anew, with every stage that uses it; "
        "or undo the change, or choose another output",
    )


def move_aside(pipeline: Pipeline, names: Sequence[str], state: State) -> list[str]:
    """Rename stages' folders to ``NAME.1`` (the first number that is free for all of them) and forget their records.

    Paths into a moved folder that stand in a moved run's own config follow it, so that `penchant eval` of an old run looks at the
    old models.

    Returns:
        One sentence a folder.
    """
    if not names:
        return []
    there = [pipeline.stages[n] for n in names if pipeline.stages[n].folder.exists()]
    number = 1
    while any(_numbered(s.folder, number).exists() for s in there):
        number += 1
    moved = {str(s.folder): str(_numbered(s.folder, number)) for s in there}
    with ExitStack() as locks:
        for stage in there:
            locks.enter_context(RunLock(stage.folder))  # a run that still trains there is left alone
        for stage in there:
            os.rename(stage.folder, moved[str(stage.folder)])
            state.stages.pop(stage.name, None)
            state.save()
    for name in names:
        state.stages.pop(name, None)
    state.save()
    for folder in moved.values():
        _follow(Path(folder), moved)
    return [f"{Path(old).name}: moved aside to {Path(new).name}" for old, new in moved.items()]


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def _follow(folder: Path, moved: Mapping[str, str]) -> None:
    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(k): renamed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v) for v in value]
        for old, new in moved.items():
            if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
                return new + value[len(old) :]
        return value

    config, identity = folder / "config.resolved.yaml", folder / "identity.json"
    if config.exists():
        values = renamed(yaml.safe_load(config.read_text(encoding="utf-8")))
        config.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if identity.exists():
        identity.write_text(json.dumps(renamed(json.loads(identity.read_text())), indent=1))
