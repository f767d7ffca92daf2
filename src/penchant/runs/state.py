"""A run's inputs, and the state of several runs from one file (a sweep's runs, a pipeline's stages)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.base.files import file_sha256
from penchant.base.functions import imported_sha256
from penchant.config import RunConfig, default_settings, result_settings
from penchant.config.several import Member
from penchant.data.load import Dataset
from penchant.errors import CheckpointError
from penchant.models.lora import is_adapter
from penchant.models.merge import model_sha256
from penchant.models.options import check_model_path
from penchant.rewards import load_reward
from penchant.rewards.functions import reward_config, reward_device
from penchant.rewards.reward_model import check_reward_folder, find_reward_model
from penchant.runfolder import (
    CHECKPOINTS,
    IDENTITY,
    MANIFEST,
    PIPELINE,
    check_intact,
    checkpoint_state,
    checkpoints,
    differences,
    write_summed,
)
from penchant.training.checkpoint import latest_checkpoint

Inputs = dict[str, Any]

# ---- The state of several runs from one file, and what to do with each ----


@dataclass(frozen=True, slots=True)
class Planned:
    """What to do with a run (``done``: nothing; ``run``, ``resume``, ``changed``, ``later``), and why."""

    name: str
    action: str
    why: str


def planned_action(
    member: Member, record: Mapping[str, Any] | None, inputs: Inputs, what: str, ended: Collection[str] = ("finished",)
) -> Planned | None:
    """Decide what to do with a run that is new, changed or interrupted; None for any other, whose record decides.

    Args:
        record: its stored record, or None; inputs: the current ones; what: "sweep" or "pipeline", whichever made it.
        ended: states of runs that have ended.
    """
    last, _ = latest_checkpoint(member.folder)
    if record is None:
        if last is not None or (member.folder / IDENTITY).exists():
            return Planned(member.name, "changed", f"its folder holds a run that this {what} did not make")
        return Planned(member.name, "run", "not started")
    state = record["state"]
    if last is None and not (state == "stopped" and state in ended and member.folder.exists()):
        had_checkpoints = state in ended or state in ("paused", "cut")
        return Planned(
            member.name, "run", "its checkpoints are gone" if had_checkpoints else "started, no checkpoint yet"
        )
    changed = changes(record["inputs"], inputs)
    if changed:
        return Planned(member.name, "changed", "; ".join(changed))
    if state not in (*ended, "paused", "cut"):
        assert last is not None
        return Planned(member.name, "resume", f"interrupted at {last.name.replace('-', ' ')}")
    return None


def read_state(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read the state of several runs; empty if nothing is stored yet."""
    if not path.exists():
        return {}
    check_intact(path, "restore it, or choose another output")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {**values, **{key: values[key] for key in keys}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "restore it, or choose another output") from error


CHANGE_MESSAGES = {  # inputs other than settings, with the message for a change in each
    "data": "the {} rows have changed",
    "upstream": "the model of {} has changed",
    "models": "the model of {} has changed",
    "rewards": "{} has changed",
    "losses": "the file of {} has changed",
}


@dataclass(slots=True)
class State:
    """`pipeline.json`: the names of all stages, one record per stage that has begun, and one for the comparison.

    A stage's record holds its state (``running``, ``stopped``, ``finished``), the inputs it was started with, seconds, steps, and
    the checkpoints it left with the SHA-256 of their models. Only a completed run is ``finished``.
    """

    path: Path
    pipeline: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State:
        """Read the state of the pipeline in `folder`, empty if there is none."""
        return cls(folder / PIPELINE, **read_state(folder / PIPELINE, ("stages", "comparison")))

    def save(self) -> None:
        """Write the file atomically."""
        content = {"pipeline": self.pipeline, "stages": self.stages, "comparison": self.comparison}
        write_summed(self.path, json.dumps(content, indent=1, ensure_ascii=False))


# ---- The inputs of a run ----


def model_folder(folder: Path, checkpoint_name: str | None) -> Path:
    """The model folder of a run's checkpoint.

    Args:
        folder: the run folder.
        checkpoint_name: ``last``, ``best``, a step number, or None: the best if it is tracked and kept, else the last.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    last, _ = latest_checkpoint(folder)
    if last is None:
        raise CheckpointError(str(folder), "has no checkpoint", "train it first")
    name = last.name
    if checkpoint_name not in ("last", None, "best"):
        name = f"step-{checkpoint_name}"
    elif checkpoint_name != "last":
        best = checkpoint_state(last).get("best_step")
        has_best = best is not None and (folder / CHECKPOINTS / f"step-{best}" / MANIFEST).exists()
        if checkpoint_name == "best" and not has_best:
            how = "hold something out and set checkpoint.keep_best, or use @last"
            raise CheckpointError(str(folder), "has no best checkpoint", how)
        name = f"step-{best}" if has_best else last.name
    path = folder / CHECKPOINTS / name
    if not (path / MANIFEST).exists():
        names = ", ".join(p.name for p in checkpoints(folder))
        how = f"there are {names}; checkpoint.keep_last says how many are kept"
        raise CheckpointError(str(path), "no such checkpoint", how)
    return path / "model"


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """``{checkpoint: SHA-256 of its model}`` for the best and the last checkpoint."""
    folders = {model_folder(folder, which) for which in (None, "last")}
    return {model.parent.name: model_sha256(model) for model in sorted(folders)}


def run_inputs(
    config: RunConfig, splits: Sequence[Dataset | None], files: Inputs, upstream: Mapping[str, Path] | None = None
) -> Inputs:
    """Everything that a run's result depends on, apart from the program.

    Args:
        config: with references to stages as written (so moving a folder changes nothing); splits: training and held-out rows.
        files: from `file_hashes`; upstream: the model folder behind each reference.
    """
    data = {n: d.fingerprint for n, d in zip(("training", "held-out"), splits, strict=True) if d is not None}
    return {
        "config": result_settings(config),
        "data": data,
        "upstream": {text: model_sha256(folder) for text, folder in (upstream or {}).items()},
        **files,
        "losses": config.own_contents(),
    }


def file_hashes(config: RunConfig, *rewards: Any) -> Inputs:
    """SHA-256 of the models that a config names, and of the files behind its rewards (given as written in the config)."""
    paths = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "model.adapter": config.model.adapter,
        "reference.path": config.reference.path,
    }
    folders = {k: _resolve_model_folder(Path(p).expanduser()) for k, p in paths.items() if p is not None}
    existing = {k: folder for k, folder in folders.items() if folder.is_dir()}
    hashes = {name: sha256 for reward in rewards for name, sha256 in reward_hashes(reward).items()}
    return {"models": {key: model_sha256(folder) for key, folder in existing.items()}, "rewards": hashes}


def _resolve_model_folder(folder: Path) -> Path:
    """A model folder; for a run or checkpoint folder, the one inside it."""
    if (folder / CHECKPOINTS).is_dir():
        return model_folder(folder, None)
    return folder / "model" if (folder / MANIFEST).exists() and (folder / "model").is_dir() else folder


def check_models(config: RunConfig, *, stages: bool = False) -> None:
    """Raise ModelError or CheckpointError for missing model folders; `stages` allows ``stage:NAME`` for one made later."""
    for path in (config.model.path, config.reference.path):
        if path is not None and not (stages and path.startswith("stage:")):
            folder = _resolve_model_folder(Path(path).expanduser())
            if not is_adapter(folder):
                check_model_path(str(folder) if folder.is_dir() else path)


def reward_terms(reward: Any) -> list[str]:
    """The names in a reward as written in a config, without references to stages."""
    names = [reward] if isinstance(reward, str) else list(reward_config(reward).terms) if reward else []
    return [n for n in names if not n.startswith("stage:")]


def reward_hashes(reward: Any) -> dict[str, str]:
    """SHA-256 of every file and model folder that a reward names."""
    hashes = {}
    for name in reward_terms(reward):
        file = Path(name.rpartition(":")[0]).expanduser()
        folder = Path(name).expanduser()
        if file.suffix == ".py" and file.is_file():
            hashes[str(file.resolve())] = file_sha256(file)
            hashes |= {f"{file.resolve()}: {imported}": sha256 for imported, sha256 in imported_sha256(name).items()}
        elif folder.is_dir():
            is_run = (folder / CHECKPOINTS).is_dir()
            hashes[str(folder.resolve())] = model_sha256(model_folder(folder, None) if is_run else folder)
    return hashes


def changes(old: Inputs, new: Inputs) -> list[str]:
    """Describe each difference between two inputs of a stage; empty if there is none."""
    defaults = json.loads(json.dumps(default_settings()))
    new = json.loads(json.dumps(new))
    messages = differences(old.get("config"), new.get("config"), defaults=defaults)
    for part, template in CHANGE_MESSAGES.items():
        before, now = old.get(part, {}), new.get(part, {})
        for key in sorted({*before, *now}):
            if ": " in key and part not in ("data", "models") and not any(": " in k for k in before):
                continue  # an older version did not hash a file's imports
            if before.get(key) != now.get(key):
                messages.append(template.format(key) + f" ({_short(before.get(key))} -> {_short(now.get(key))})")
    return messages


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else sha256[:12]


def check_reward(reward: Any) -> None:
    """Check that a reward's functions exist and can be called, and that a model folder's config fits.

    Raises:
        ConfigError: no such reward, file or function, or a folder with another kind of model.
        ModelError, CheckpointError: a folder without a model.
    """
    if not reward:
        return
    config = reward_config(reward)
    reward_device(config.device)
    for name in reward_terms(reward):
        folder = find_reward_model(name)
        if folder is None:
            load_reward(config.model_copy(update={"terms": {name: 1.0}}))
        else:
            check_reward_folder(name, folder)
