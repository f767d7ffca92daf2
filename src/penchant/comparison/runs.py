"""Runs as a comparison sees them: what they were, which of them are one setting with several seeds, and where they started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from penchant.algorithms.options import RewardModelConfig
from penchant.comparison.models import Entrant, trained_prompts
from penchant.config import WATCHING_ONLY, RunConfig, load_config, with_absolute_paths
from penchant.errors import CheckpointError, ConfigError, ModelError, PenchantError
from penchant.models.load import cast_parameters, load_causal_model, resolve_device, weights_sha256
from penchant.models.merge import is_adapter
from penchant.models.options import ModelConfig
from penchant.pipeline_state import STATE, model_folder
from penchant.run import Run

CONFIG, MANIFEST = "config.resolved.yaml", "manifest.json"
START = "start"


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder, read.

    Args:
        manifest: `manifest.json`; contents: SHA-256 of what its rewards were made of; model: folder of the checkpoint to compare.
    """

    name: str
    folder: Path
    config: RunConfig
    manifest: Mapping[str, Any]
    contents: Mapping[str, Any]
    model: Path

    @property
    def step(self) -> int:
        return int(self.model.parent.name.removeprefix("step-"))

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def setting(self) -> str:
        """Everything that a run's result depends on but its seed; equal for runs that are one setting."""
        values = self.config.model_dump(mode="json")
        for name in WATCHING_ONLY:
            values.pop(name)
        values["train"].pop("seed")
        data = self.manifest["data"]
        whole = {name: data[name]["fingerprint"] for name in ("train", "heldout") if name in data}
        start = self.manifest["model"]["sha256"] if self.config.model.init == "pretrained" else None
        return json.dumps([values, whole, start, dict(self.contents)], sort_keys=True)

    @cached_property
    def data(self) -> Run:
        """The run as its config says, for its rows, its tokens and its precision; a GPU that is not here is not asked for."""
        device = self.config.model.device
        if device == "cuda" and not torch.cuda.is_available():
            device = "auto"
        model = self.config.model.model_copy(update={"device": device})
        return Run(self.config.model_copy(update={"model": model}), quiet=True)

    def entrant(self) -> Entrant:
        """Its model."""
        if is_adapter(self.model):
            return Entrant(self.name, self.config.model, self.model, self.seed)
        return Entrant(self.name, ModelConfig(path=str(self.model)))


def read_runs(paths: Sequence[str | Path], step: str | None) -> list[TrainedRun]:
    """Runs by their folders, each with a name of its own: its folder's, with so many parents as tell it from the others.

    Raises:
        CheckpointError: no run, a pipeline's folder, no such checkpoint, or one run twice. ConfigError: a reward model.
    """
    folders = [Path(p).expanduser().resolve() for p in paths]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise CheckpointError(str(paths[i]), "is given twice", "give each run once")
    return [_read(f, name, step) for f, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    def tail(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    found = []
    for folder in folders:
        others = [f for f in folders if f != folder]
        parts = 1
        while tail(folder, parts) in {START, *(tail(o, parts) for o in others)} and parts < len(folder.parts):
            parts += 1
        found.append(tail(folder, parts))
    return found


def _read(folder: Path, name: str, step: str | None) -> TrainedRun:
    missing = [file for file in (CONFIG, MANIFEST) if not (folder / file).exists()]
    if len(missing) == 1:
        raise CheckpointError(str(folder), f"has no {missing[0]}", "restore it, or train the run again")
    if missing:
        how = "give a folder that penchant train has written"
        if (folder / STATE).exists():
            stages = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
            how = f"it is a pipeline: give its stages, such as {folder / stages[0] if stages else 'PIPELINE/STAGE'}"
        raise CheckpointError(str(folder), "is no run" if folder.is_dir() else "no such run", how)
    config = load_config(folder / CONFIG)
    if isinstance(config.algorithm, RewardModelConfig):
        raise ConfigError(str(folder), "is a reward model, which writes nothing", "leave it out; it can be --reward")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["data"]["train"]["fingerprint"], manifest["model"]["sha256"], manifest["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(folder / MANIFEST), f"cannot be read ({error})", "train the run again") from error
    identity = folder / "identity.json"
    known = json.loads(identity.read_text(encoding="utf-8")) if identity.exists() else {}
    contents = {k: v for k, v in known.items() if k.startswith("content of reward")}
    return TrainedRun(name, folder, with_absolute_paths(config), manifest, contents, model_folder(folder, step))


def by_setting(runs: Sequence[TrainedRun]) -> dict[str, list[TrainedRun]]:
    """Runs that differ in nothing but their seed are one setting, named after the shortest of their names.

    Raises:
        CheckpointError: two runs of one setting have the same seed, so one of them says nothing new.
    """
    groups: dict[str, list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    for group in groups.values():
        seeds: dict[int, str] = {}
        for run in group:
            if run.seed in seeds:
                raise CheckpointError(
                    str(run.folder),
                    f"is the same setting as {seeds[run.seed]} with the same seed ({run.seed}), so it is no second seed",
                    "give one of them",
                )
            seeds[run.seed] = run.name
    return {min((r.name for r in group), key=len): group for group in groups.values()}


# ---------------------------------------------------------------------------------------------------------------------
# where they start


def check_tokenizers(runs: Sequence[TrainedRun]) -> None:
    """All runs make the same tokens.

    Raises:
        ConfigError: two of them do not.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
            raise ConfigError(
                "compare",
                f"{run.name} and {first.name} have different tokenizers, so their tokens, KL and likelihoods are of different things",
                "compare runs that have the same one",
            )


def common_start(runs: Sequence[TrainedRun]) -> Entrant:
    """The model that all runs start from, checked to be still the one that it was.

    Raises:
        ConfigError: they start from different weights. ModelError: the start has changed since.
    """
    first = runs[0]
    dtype_of = {r.name: r.manifest["hardware"]["dtype"] for r in runs}
    kinds: dict[tuple[str, str], TrainedRun] = {}
    for run in runs:
        kinds.setdefault((run.manifest["model"]["sha256"], dtype_of[run.name]), run)
    for (sha256, dtype), run in kinds.items():
        # in another precision the same weights have another sum: those are looked at below
        if dtype == dtype_of[first.name] and sha256 != first.manifest["model"]["sha256"]:
            raise _other_start(first, run)
    wide = {run.name: start_sha256(run) for run in kinds.values()}
    for name, sha256 in wide.items():
        if sha256 != wide[first.name]:
            raise _other_start(first, next(r for r in runs if r.name == name))
    return Entrant(START, first.data.config.model, seed=first.seed)


def _other_start(one: TrainedRun, other: TrainedRun) -> ConfigError:
    return ConfigError(
        "compare",
        f"{one.name} and {other.name} start from different weights, so there is no common start to compare with",
        f"give --against RUN, for instance --against {one.folder}: all others are compared with that one",
    )


def start_sha256(run: TrainedRun) -> str:
    """SHA-256 in fp32 of the weights that a run starts from.

    Raises:
        ModelError: they are not there any more, or not what they were.
    """
    config = run.data.config.model
    model = load_causal_model(config, resolve_device("cpu"), run.seed)
    wide = weights_sha256(model)
    cast_parameters(model, getattr(torch, run.manifest["hardware"]["dtype"]))
    if weights_sha256(model) != run.manifest["model"]["sha256"]:
        raise ModelError(config.path, f"is not the model any more that {run.name} started from", "restore it")
    return wide


def check_bases(runs: Sequence[TrainedRun]) -> None:
    """The models that adapters go on are what they were.

    Raises:
        ModelError: one has changed.
    """
    seen = set()
    for run in runs:
        key = (run.config.model.path, run.config.model.revision, run.manifest["model"]["sha256"])
        if is_adapter(run.model) and key not in seen:
            seen.add(key)
            start_sha256(run)


# ---------------------------------------------------------------------------------------------------------------------
# what they were trained on


def lineage(run: TrainedRun) -> list[RunConfig]:
    """Configs of the runs whose models it started from, the nearest first; a start that no run made ends it."""
    found: list[RunConfig] = []
    seen = {run.folder}
    path = run.config.model.path
    while (folder := _run_of(Path(path))) is not None and folder not in seen:
        seen.add(folder)
        found.append(with_absolute_paths(load_config(folder / CONFIG)))
        path = found[-1].model.path
    return found


def _run_of(model: Path) -> Path | None:
    """The run that a model's folder belongs to: ``RUN/checkpoints/step-N/model`` or ``RUN/merged/step-N``."""
    for parents in (3, 2):
        folder = model.parents[parents - 1] if len(model.parents) >= parents else None
        if folder is not None and (folder / CONFIG).exists():
            return folder
    return None


def all_trained_prompts(runs: Sequence[TrainedRun], *, lenient: bool) -> tuple[set[str], list[str]]:
    """Keys of the prompts that the runs, and the runs that they started from, were trained on; and what could not be looked at.

    Args:
        lenient: rows that are gone or have changed are a sentence rather than an error.

    Raises:
        CheckpointError: the data is not what a run was trained on.
    """
    trained: set[str] = set()
    notes: list[str] = []
    for run in runs:
        try:
            _check_data(run)
            trained |= trained_prompts(run.data)
        except PenchantError as error:
            if not lenient:
                raise
            notes.append(
                f"What {run.name} was trained on cannot be looked at, so its prompts are not left out ({error})."
            )
        for config in lineage(run):
            try:
                trained |= trained_prompts(Run(config, quiet=True))
            except PenchantError as error:
                notes.append(
                    f"What the start of {run.name} was trained on cannot be looked at, so its prompts are not left out ({error})."
                )
    return trained, list(dict.fromkeys(notes))


def _check_data(run: TrainedRun) -> None:
    known = run.manifest["data"].get("train split", run.manifest["data"]["train"])["fingerprint"]
    if run.data.datasets[0].fingerprint != known:
        raise CheckpointError(
            str(run.config.data.path),
            f"does not hold the rows any more that {run.name} was trained on, so nothing says which rows are held out",
            "restore the file, or give --data with other rows",
        )
