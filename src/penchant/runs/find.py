"""From what a person calls a model to the model: a run, a config, a checkpoint, an adapter, a model folder or a hub id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from penchant.base.text import closest
from penchant.config import RunConfig, load_config, with_absolute_paths
from penchant.errors import CheckpointError, ConfigError, ModelError
from penchant.models.load import load_causal_model
from penchant.models.merge import is_adapter, merged_model
from penchant.models.options import ModelConfig, looks_like_folder
from penchant.runfolder import CHECKPOINTS, CONFIG, IDENTITY, check_whole
from penchant.training.checkpoint import find_checkpoint

START = "start"


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be loaded.

    Args:
        name: as a person gave it; base: the whole model, or the one that `adapter` goes on; seed: where the base starts from random
            weights. tokenizer: folder or hub id, where it is asked for.
        run: the config of the run that made it, or of the run that would start from it; folder: that run's, where there is one.
        checkpoint: ``step-N``, ``start``, or "" for a model by itself.
        start: what it started from, where that is known.
    """

    name: str
    base: ModelConfig
    tokenizer: str = ""
    adapter: Path | None = None
    seed: int = 0
    run: RunConfig | None = None
    folder: Path | None = None
    checkpoint: str = ""
    start: Source | None = None

    @property
    def step(self) -> int | None:
        """Optimizer steps of a run's checkpoint, 0 at its start; None for a model by itself."""
        if not self.checkpoint:
            return None
        return 0 if self.checkpoint == START else int(self.checkpoint.removeprefix("step-"))

    def load(self, device: torch.device) -> Any:
        """The model in fp32; an adapter is merged into its base."""
        if self.adapter is not None:
            return merged_model(self.base, self.adapter, device, self.seed)
        return load_causal_model(self.base, device, self.seed)


def trained_source(name: str, model: Path, config: RunConfig) -> Source:
    """A checkpoint's model by its folder, of the run with this config."""
    if is_adapter(model):
        return Source(name, config.model, adapter=model, seed=config.train.seed)
    return Source(name, ModelConfig(path=str(model)))


def find_run(given: str, step: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str] | None:
    """The config and the step that `given` means where it is a config, a run's folder or a checkpoint in one; None: it is another thing.

    Raises:
        CheckpointError: a run's folder without its config. ConfigError: a step beside a checkpoint that has one.
    """
    path = Path(given).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return load_config(path, list(overrides)), step
    inside = _checkpoint_of(path)
    if inside is not None:
        folder, own = inside
        if step not in ("last", own):
            raise ConfigError(
                "--step", f"is {step}, but {given} is step {own} already", "leave it out, or give the run"
            )
        return _config_of(folder, overrides), own
    if (path / CONFIG).exists():
        return _config_of(path, overrides), step
    if (path / CHECKPOINTS).is_dir():
        raise CheckpointError(given, f"has checkpoints but no {CONFIG}", "give the model folder in a checkpoint")
    return None


def find_model(given: str, *, step: str = "last", base: str | None = None, overrides: Sequence[str] = ()) -> Source:
    """What `given` names.

    Args:
        given: a run's folder, a config, a checkpoint's folder (``RUN/checkpoints/step-N``), an adapter's or a model's folder, a hub id.
        step: of a run; base: of an adapter, where its own name for it does not help; overrides: of a run's or a config's settings.

    Raises:
        CheckpointError: no such run, checkpoint or folder. ConfigError: an option that does not go with it. ModelError: no whole model.
    """
    run = find_run(given, step, overrides)
    if run is not None:
        return of_config(run[0], run[1], base, given)
    check_there(given)
    path = Path(given).expanduser()
    if step != "last":
        raise ConfigError("--step", f"{given} is not a run, so it has no steps", "leave it out, or give the run")
    if path.is_dir() and is_adapter(path):
        return _of_adapter(given, path, base)
    _no_base(given, base)
    return Source(given, ModelConfig(path=given), given)


def _config_of(folder: Path, overrides: Sequence[str]) -> RunConfig:
    check_whole(folder / CONFIG)
    config = load_config(folder / CONFIG, list(overrides))
    return config.model_copy(update={"output": str(folder.resolve())})  # it may have been moved


def runs_in(given: str, limit: int = 4) -> list[str]:
    """The run folders right inside a folder (a sweep's, a pipeline's), the first `limit` of them."""
    found = sorted(str(p.parent) for p in Path(given).expanduser().glob(f"*/{CONFIG}"))
    return found if len(found) <= limit else [*found[:limit], "..."]


def check_there(given: str) -> None:
    """Refuse what looks like a path and is none of a folder (CheckpointError), before the hub does in its own words."""
    path = Path(given).expanduser()
    if path.exists():
        if path.is_file():
            raise CheckpointError(given, "is a file", "give a run, a model's folder, a hub id or a CONFIG.yaml")
        return
    if looks_like_folder(given):
        names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = closest(path.name, names, 0.7)
        how = "give a run, a CONFIG.yaml, a model's folder or a hub id"
        how = f"did you mean {path.parent / near}?" if near else how
        raise CheckpointError(given, "no such run or config, nor a model", how)


def _checkpoint_of(path: Path) -> tuple[Path, str] | None:
    """(run, step) where a folder is a run's checkpoint, or the model in it."""
    whole = path.resolve()
    for at in (whole, whole.parent if whole.name == "model" else whole):
        run = at.parent.parent
        if at.name.startswith("step-") and at.parent.name == CHECKPOINTS and (run / CONFIG).exists():
            return run, at.name.removeprefix("step-")
    return None


def _no_base(given: str, base: str | None) -> None:
    if base is not None:
        raise ConfigError("--base", f"{given} is no adapter by itself", "leave it out")


def of_config(config: RunConfig, step: str, base: str | None = None, given: str = "") -> Source:
    """The model of a config: a checkpoint of its run, or what it starts from where there is none.

    Raises:
        CheckpointError: no such checkpoint. ConfigError: a reward model, or a base for what is no adapter.
    """
    config = with_absolute_paths(config)
    folder, given = Path(config.output), given or config.output
    if config.method.learns_reward:
        raise ConfigError(
            given,
            "is a reward model, which writes nothing and has no log-probs",
            "penchant eval on its run, without options, gives accuracy and calibration; it can be --reward of a language model",
        )
    checkpoint = find_checkpoint(folder, step)
    if checkpoint is None and step != "0" and (folder / IDENTITY).exists():
        raise CheckpointError(given, "this run has no checkpoint yet", "train it on, or give --step 0 for its start")
    seed, tokenizer = config.train.seed, config.model.tokenizer or config.model.path
    first = Source(START, config.model, tokenizer, seed=seed, run=config, folder=folder, checkpoint=START)
    named = _named_start(config)
    model = None if checkpoint is None else checkpoint / "model"
    if model is None or not is_adapter(model):
        _no_base(given, base)
    if model is None or checkpoint is None:
        return replace(first, name=given, start=named)
    own = str(model) if (model / "tokenizer_config.json").exists() else tokenizer
    made = replace(first, name=given, checkpoint=checkpoint.name, tokenizer=own, start=named or first)
    if is_adapter(model):
        return replace(made, base=config.model if base is None else ModelConfig(path=base), adapter=model)
    return replace(made, base=ModelConfig(path=str(model)))


def _named_start(config: RunConfig) -> Source | None:
    """The reference that a run names itself."""
    path = config.reference.path
    if path is None:
        return None
    return Source(path, ModelConfig(path=path), config.model.tokenizer or path, run=config)


def _of_adapter(given: str, path: Path, base: str | None) -> Source:
    try:
        stored = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        named = base or stored.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(str(path / "adapter_config.json"), f"cannot be read ({error})", "export it again") from error
    if not isinstance(named, str) or not named:
        raise ModelError(given, "the adapter does not say what its base model is", "name it with --base")
    if looks_like_folder(named) and not Path(named).expanduser().is_dir():
        raise ModelError(given, f"its base model {named!r} is not there", "name the base with --base")
    model = ModelConfig(path=named)
    own = str(path) if (path / "tokenizer_config.json").exists() else named
    return Source(given, model, own, path, start=Source(named, model, named))
