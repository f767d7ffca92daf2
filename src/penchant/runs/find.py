"""Find the model behind a name: a run, a config, a checkpoint, an adapter, a model folder or a hub id."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from penchant.base.files import cache_folder, writing
from penchant.config import RunConfig, default_settings, load_config, with_absolute_paths
from penchant.errors import CheckpointError, ConfigError, ModelError, PenchantError
from penchant.models.load import load_causal_model, source_sha256
from penchant.models.lora import adapter_base, is_adapter, lora_section
from penchant.models.merge import merge_to_folder, merged_model, model_sha256
from penchant.models.options import LoraConfig, ModelConfig, check_exists, looks_like_folder
from penchant.runfolder import (
    CHECKPOINTS,
    CONFIG,
    IDENTITY,
    MANIFEST,
    SUMS,
    differences,
    is_intact,
    leads_to_model,
)
from penchant.runfolder.read import START, read_folder
from penchant.runfolder.values import mapping, text
from penchant.runs.identity import run_identity
from penchant.runs.state import model_folder
from penchant.training.checkpoint import find_checkpoint

TRAINING_ONLY = ("checkpoint", "logging", "trust")  # sections whose settings do not change an evaluation
USED_BY_EVALUATION = ("tokens_per_step", "packing", "deterministic", "tf32", "threads", "seed")  # of `train`


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be loaded.

    Args:
        name: as the user gave it; base: the whole model, or the base of `adapter`; seed: for a base with random weights.
        tokenizer: folder or hub id, if needed.
        run: the config of the run that trained it, or of the run that would start from it; folder: that run's, if any.
        checkpoint: ``step-N``, ``start``, or "" for a standalone model.
        start: the model that it started from, if known.
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
        """Optimizer steps of a run's checkpoint, 0 at its start; None for a standalone model."""
        if not self.checkpoint:
            return None
        return 0 if self.checkpoint == START else int(self.checkpoint.removeprefix("step-"))

    def load(self, device: torch.device) -> Any:
        """Load the model in fp32, with the adapter merged into its base."""
        if self.adapter is not None:
            check = None
            if self.folder is not None and self.run is not None and self.base == self.run.model:
                check = partial(check_base, self.folder, self.base)
            return merged_model(self.base, self.adapter, device, self.seed, check)
        return load_causal_model(self.base, device, self.seed)


def trained_source(name: str, model: Path, config: RunConfig) -> Source:
    """The model in a checkpoint's model folder, for a run with this config."""
    if is_adapter(model):
        return Source(name, config.model, adapter=model, seed=config.train.seed)
    return Source(name, _model_config(model, config))


def _model_config(model: Path, config: RunConfig) -> ModelConfig:
    """The config of a checkpoint's whole model, with the run's vision settings."""
    vision_settings = config.model.model_dump(include={"vision", "image_options"}, exclude_defaults=True)
    return ModelConfig(path=str(model), **vision_settings)


def find_run(spec: str, step: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str] | None:
    """The config and step if `spec` is a config, a run folder or a checkpoint in one; None otherwise.

    Raises:
        CheckpointError: a run folder without its config. ConfigError: a step given together with a checkpoint.
    """
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return load_config(path, list(overrides)), step
    checkpoint = _parse_checkpoint_path(path)
    if checkpoint is not None:
        folder, own_step = checkpoint
        if step not in ("last", own_step):
            what = f"is {step}, but {spec} is step {own_step} already"
            raise ConfigError("--step", what, "leave it out, or give the run")
        return _load_run_config(folder, overrides), own_step
    if (path / CONFIG).exists():
        return _load_run_config(path, overrides), step
    if (path / CHECKPOINTS).is_dir():
        raise CheckpointError(spec, f"has checkpoints but no {CONFIG}", "give the model folder in a checkpoint")
    return None


def find_model(spec: str, *, step: str = "last", base: str | None = None, overrides: Sequence[str] = ()) -> Source:
    """Find the model that `spec` names.

    Args:
        spec: a run folder, a config, a checkpoint (``RUN/checkpoints/step-N``), an adapter or model folder, or a hub id.
        step: of a run; base: of an adapter that does not name an available one; overrides: settings of a run or config.

    Raises:
        CheckpointError: no such run, checkpoint or folder. ConfigError: an option that does not apply to it.
        ModelError: no complete model.
    """
    run = find_run(spec, step, overrides)
    if run is not None:
        return source_from_config(run[0], run[1], base, spec)
    check_exists(spec)
    path = Path(spec).expanduser()
    if step != "last":
        raise ConfigError("--step", f"{spec} is not a run, so it has no steps", "leave it out, or give the run")
    if path.is_dir() and is_adapter(path):
        return _source_from_adapter(spec, path, base)
    _refuse_base(spec, base)
    return Source(spec, ModelConfig(path=spec), spec)


def _load_run_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    check_config(folder / CONFIG)
    for key in (override.partition("=")[0].strip() for override in overrides):
        section, _, name = key.partition(".")
        if section in TRAINING_ONLY or (section == "train" and name not in USED_BY_EVALUATION):
            what = f"changes nothing: {folder} is trained already"
            raise ConfigError(key, what, "leave it out, or train again with it and another output")
    config = load_config(folder / CONFIG, list(overrides))
    return config.model_copy(update={"output": str(folder.resolve())})  # it may have been moved


def check_base(run: Path, base: ModelConfig, model: Any) -> None:
    """Check that `model`, loaded from `base`, is the one that the run's adapter was trained on, if its manifest tells.

    Raises:
        ModelError: it is a different one.
    """
    if base.init == "random":  # random weights depend on the processor
        return
    manifest = read_folder(run).manifest if is_intact(run / MANIFEST) else {}
    start_model = mapping(manifest.get("model"))
    dtype = getattr(torch, text(mapping(manifest.get("hardware")).get("dtype")), None)
    if not start_model.get("sha256") or not isinstance(dtype, torch.dtype):
        return
    if source_sha256(base, model, dtype) != start_model["sha256"]:
        original_path = text(start_model.get("path"))
        suffix = "" if original_path == base.path else f" ({original_path})"
        what = f"its weights are not those that the adapter of {run} was trained on{suffix}"
        raise ModelError(base.path, what, "put them back, or name the right base")


def check_config(path: Path) -> None:
    """Check that a run's config, if it was edited, still has the settings that the run was trained with.

    Raises:
        CheckpointError: they differ or cannot be compared; metrics would silently be those of other settings.
    """
    if is_intact(path):
        return
    recorded = mapping(read_folder(path.parent).identity.get("config")) if is_intact(path.parent / IDENTITY) else {}
    try:
        current = run_identity(with_absolute_paths(load_config(path)), [], {})["config"]
        changed = differences(recorded, current, defaults=default_settings()) if recorded else []
        if recorded and not changed:
            return  # only comments, or settings that do not affect the result
    except PenchantError as error:
        changed = [f"it cannot be read: {error.what}"]
    details = f" ({'; '.join(changed[:3])}{'; ...' if changed[3:] else ''})" if changed else ""
    raise CheckpointError(
        str(path),
        f"was changed after the run wrote it{details}",
        f"undo that and give other settings on the command line, or run penchant train with the run's own config, which writes it again; "
        f"to have it taken as it is now, delete {SUMS} beside it",
    )


# ---- A config may name a run, a checkpoint or an adapter as a model ----


def resolve_model(spec: str | None) -> tuple[Path, RunConfig | None] | None:
    """The model or adapter folder inside a run, checkpoint or adapter folder, and the run's config.

    For a run it is in the best checkpoint if that is tracked and kept, else in the last, as for a pipeline's ``stage:NAME``.
    None for everything else: a model folder, a hub id, a stage.

    Raises:
        CheckpointError: a run without a checkpoint.
    """
    if spec is None or not leads_to_model(path := Path(spec).expanduser()):
        return None
    run = find_run(spec, "last")
    if run is None:
        return (path, None) if is_adapter(path) else None
    config, step = run
    checkpoint_step = step if step != "last" else None
    return model_folder(Path(config.output), checkpoint_step), with_absolute_paths(config)


def with_model_folders(
    config: RunConfig, say: Callable[[str], None] = lambda _: None, *, merge: bool = True
) -> RunConfig:
    """A copy of the config with each model replaced by a folder that transformers can load.

    Args:
        say: called with a line for each run or adapter folder that was replaced.
        merge: merge an adapter into its base, once, in ``RUN/merged/step-N`` (in the cache without a run that may be written to).
            False: use the base, which has the same shapes, unless a merged model exists already.

    Raises:
        CheckpointError: a run without a checkpoint. ModelError: an adapter that cannot be merged.
    """
    path, tokenizer, reference = config.model.path, config.model.tokenizer, config.reference.path
    in_model_folder = tokenizer is None and not merge  # the base may have another tokenizer
    tokenizer_source = resolve_model(path if in_model_folder else tokenizer)
    model = {
        "path": _model_folder("model.path", path, say, merge),
        "tokenizer": tokenizer if tokenizer_source is None else str(tokenizer_source[0]),
    }
    reference = None if reference is None else _model_folder("reference.path", reference, say, merge)
    lora = config.lora
    if str(config.model.adapter).startswith("stage:"):  # of a pipeline stage that has not run yet
        lora = lora or LoraConfig()
    elif config.model.adapter is not None:
        folder = _adapter_folder(config, say)
        lora = lora_section(folder, lora)
        model["adapter"] = str(folder)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "lora": lora,
            "reference": config.reference.model_copy(update={"path": reference}),
        }
    )


def _model_folder(key: str, spec: str, say: Callable[[str], None], merge: bool) -> str:
    resolved = resolve_model(spec)
    if resolved is None:
        return spec
    folder, run = resolved
    if not is_adapter(folder):
        if Path(spec).expanduser().resolve() != folder.resolve():
            say(f"{key}: {spec} means {folder}")
        return str(folder)
    target = cache_folder("reference") / "merged" / model_sha256(folder)[:16]
    if run is None:
        base, seed = _source_from_adapter(spec, folder, None).base, 0
    else:
        base, seed, own = run.model, run.train.seed, Path(run.output) / "merged" / folder.parent.name
        target = own if own.is_dir() or os.access(run.output, os.W_OK) else target  # the run of another user
    if not merge:
        return str(target) if target.is_dir() else base.path
    say(f"{key}: the adapter of {folder} merged into {base.path} is {target}")
    check = None if run is None else partial(check_base, Path(run.output), base)
    with writing(target):
        return str(merge_to_folder(base, folder, target, seed, check))


def _adapter_folder(config: RunConfig, say: Callable[[str], None]) -> Path:
    """The folder of the adapter that `model.adapter` names.

    Raises:
        ConfigError: the method or model.path does not fit an adapter. ModelError: there is no adapter, or several.
    """
    spec = str(config.model.adapter)
    if config.method.learns_reward:
        what = "is set, and a reward model's adapter is trained with its head"
        raise ConfigError("model.adapter", what, "leave it out, or train a language model")
    resolved, path = resolve_model(spec), Path(spec).expanduser()
    if resolved is None:
        names = sorted(p.parent.name for p in path.glob("*/adapter_config.json"))
        if len(names) > 1:
            what = f"holds several adapters ({', '.join(names)}), and one is trained"
            raise ModelError(spec, what, f"name one of them, e.g. model.adapter={path / names[0]}")
        how = f"did you mean {path / names[0]}?" if names else "name an adapter's, a run's or a checkpoint's folder"
        raise ModelError(spec, "holds no adapter" if path.is_dir() else "no such folder", how)
    folder, _ = resolved
    if not is_adapter(folder):
        raise ModelError(spec, "is a whole model, not an adapter", "name it as model.path")
    base_model = resolve_model(config.model.path)
    if base_model is not None and base_model[0].resolve() == folder.resolve():
        base = adapter_base(folder)
        raise ConfigError("model.path", "is the adapter's own folder", f"name the model under it (it says {base})")
    if path.resolve() != folder.resolve():
        say(f"model.adapter: {spec} means {folder}")
    return folder.resolve()


def check_adapters_base(adapter: Path, base: ModelConfig, model: Any) -> None:
    """`check_base` for the adapter of a run's checkpoint; a standalone adapter does not record its base's weights."""
    checkpoint = _parse_checkpoint_path(adapter)
    if checkpoint is not None:
        check_base(checkpoint[0], base, model)


def runs_in(spec: str, limit: int = 4) -> list[str]:
    """The first `limit` run folders directly inside a folder (a sweep or pipeline), then "..." if there are more."""
    folders = sorted(str(p.parent) for p in Path(spec).expanduser().glob(f"*/{CONFIG}"))
    return folders if len(folders) <= limit else [*folders[:limit], "..."]


def _parse_checkpoint_path(path: Path) -> tuple[Path, str] | None:
    """(run, step) if a folder is a run's checkpoint or the model folder in it, else None."""
    full_path = path.resolve()
    for folder in (full_path, full_path.parent if full_path.name == "model" else full_path):
        run = folder.parent.parent
        if folder.name.startswith("step-") and folder.parent.name == CHECKPOINTS and (run / CONFIG).exists():
            return run, folder.name.removeprefix("step-")
    return None


def _refuse_base(spec: str, base: str | None) -> None:
    if base is not None:
        raise ConfigError("--base", f"{spec} is not an adapter by itself", "leave it out")


def source_from_config(config: RunConfig, step: str, base: str | None = None, spec: str = "") -> Source:
    """The model of a config: a checkpoint of its run, or the starting model if there is none.

    Raises:
        CheckpointError: no such checkpoint. ConfigError: a reward model, or a base for something that is not an adapter.
    """
    config = with_model_folders(with_absolute_paths(config))
    folder, spec = Path(config.output), spec or config.output
    if config.method.learns_reward:
        raise ConfigError(
            spec,
            "is a reward model, which writes nothing and has no log-probs",
            "penchant eval on its run, without options, gives accuracy and calibration; it can be --reward of a language model",
        )
    checkpoint = find_checkpoint(folder, step)
    if checkpoint is None and step != "0" and (folder / IDENTITY).exists():
        raise CheckpointError(
            spec, "this run has no checkpoint yet", "continue training it, or give --step 0 for its start"
        )
    seed, tokenizer = config.train.seed, config.model.tokenizer or config.model.path
    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    start_source = Source(START, config.model, tokenizer, adapter, seed, config, folder, START)
    reference = _reference_source(config)
    model = None if checkpoint is None else checkpoint / "model"
    if model is None or not is_adapter(model):
        _refuse_base(spec, base)
    if model is None or checkpoint is None:
        return replace(start_source, name=spec, start=reference)
    own_tokenizer = str(model) if (model / "tokenizer_config.json").exists() else tokenizer
    source = replace(
        start_source, name=spec, checkpoint=checkpoint.name, tokenizer=own_tokenizer, start=reference or start_source
    )
    if is_adapter(model):
        return replace(source, base=config.model if base is None else ModelConfig(path=base), adapter=model)
    return replace(source, base=_model_config(model, config), adapter=None)


def _reference_source(config: RunConfig) -> Source | None:
    """The model at `reference.path`, or None."""
    path = config.reference.path
    if path is None:
        return None
    model = ModelConfig(path=path, revision=config.model.revision_of(path))
    return Source(path, model, config.model.tokenizer or path, run=config)


def _source_from_adapter(spec: str, path: Path, base: str | None) -> Source:
    base_path = base or adapter_base(path)
    if base_path is None:
        raise ModelError(spec, "the adapter does not say what its base model is", "name it with --base")
    if looks_like_folder(base_path) and not Path(base_path).expanduser().is_dir():
        raise ModelError(spec, f"its base model {base_path!r} is not there", "name the base with --base")
    model = ModelConfig(path=base_path)
    own_tokenizer = str(path) if (path / "tokenizer_config.json").exists() else base_path
    return Source(spec, model, own_tokenizer, path, start=Source(base_path, model, base_path))
