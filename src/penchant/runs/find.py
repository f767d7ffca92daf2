"""From what a person calls a model to the model: a run, a config, a checkpoint, an adapter, a model folder or a hub id."""

from __future__ import annotations

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
from penchant.models.merge import adapter_base, is_adapter, lora_section, merge_to_folder, merged_model, model_sha256
from penchant.models.options import LoraConfig, ModelConfig, check_there, looks_like_folder
from penchant.runfolder import (
    CHECKPOINTS,
    CONFIG,
    IDENTITY,
    MANIFEST,
    SUMS,
    differences,
    is_whole,
    stands_for_model,
)
from penchant.runfolder.read import read
from penchant.runfolder.values import mapping, text
from penchant.runs.identity import run_identity
from penchant.runs.state import model_folder
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
            check = None
            if self.folder is not None and self.run is not None and self.base == self.run.model:
                check = partial(check_base, self.folder, self.base)
            return merged_model(self.base, self.adapter, device, self.seed, check)
        return load_causal_model(self.base, device, self.seed)


def trained_source(name: str, model: Path, config: RunConfig) -> Source:
    """A checkpoint's model by its folder, of the run with this config."""
    if is_adapter(model):
        return Source(name, config.model, adapter=model, seed=config.train.seed)
    return Source(name, _of_folder(model, config))


def _of_folder(model: Path, config: RunConfig) -> ModelConfig:
    """A checkpoint's whole model, which reads pictures where its run does."""
    own_eyes = config.model.model_dump(include={"vision", "image_options"}, exclude_defaults=True)
    return ModelConfig(path=str(model), **own_eyes)


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
            what = f"is {step}, but {given} is step {own} already"
            raise ConfigError("--step", what, "leave it out, or give the run")
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
    check_config(folder / CONFIG)
    config = load_config(folder / CONFIG, list(overrides))
    return config.model_copy(update={"output": str(folder.resolve())})  # it may have been moved


def check_base(run: Path, base: ModelConfig, model: Any) -> None:
    """Check that `model`, loaded from `base`, is the one that the run's adapter was trained on, as far as its manifest says.

    Raises:
        ModelError: it is another one.
    """
    if base.init == "random":  # another processor draws other weights
        return
    known = read(run).manifest if is_whole(run / MANIFEST) else {}
    start = mapping(known.get("model"))
    dtype = getattr(torch, text(mapping(known.get("hardware")).get("dtype")), None)
    if not start.get("sha256") or not isinstance(dtype, torch.dtype):
        return
    if source_sha256(base, model, dtype) != start["sha256"]:
        there = text(start.get("path"))
        of = "" if there == base.path else f" ({there})"
        what = f"its weights are not those that the adapter of {run} was trained on{of}"
        raise ModelError(base.path, what, "put them back, or name the right base")


def check_config(path: Path) -> None:
    """A run's config says what the run was trained with, wherever its text was changed.

    Raises:
        CheckpointError: it says something else, or nothing. Figures would be of other settings, and nobody would see it.
    """
    if is_whole(path):
        return
    known = mapping(read(path.parent).identity.get("config")) if is_whole(path.parent / IDENTITY) else {}
    try:
        now = run_identity(with_absolute_paths(load_config(path)), [], {})["config"]
        found = differences(known, now, defaults=default_settings()) if known else []
        if known and not found:
            return  # only comments, or settings that change no figure
    except PenchantError as error:
        found = [f"it cannot be read: {error.what}"]
    said = f" ({'; '.join(found[:3])}{'; ...' if found[3:] else ''})" if found else ""
    raise CheckpointError(
        str(path),
        f"was changed after the run wrote it{said}",
        f"undo that and give other settings on the command line, or run penchant train with the run's own config, which writes it again; "
        f"to have it taken as it is now, delete {SUMS} beside it",
    )


# ---- A config may name a run, a checkpoint or an adapter where a model is asked for ----


def model_of(given: str | None) -> tuple[Path, RunConfig | None] | None:
    """The folder of the model or adapter in a run's, a checkpoint's or an adapter's folder, and the run's config.

    Of a run it is the best checkpoint where that is tracked and kept, else the last, as for a pipeline's ``stage:NAME``. None for
    everything else: a model's folder, a hub id, a stage.

    Raises:
        CheckpointError: a run without a checkpoint.
    """
    if given is None or not stands_for_model(path := Path(given).expanduser()):
        return None
    run = find_run(given, "last")
    if run is None:
        return (path, None) if is_adapter(path) else None
    config, step = run
    inside = step if step != "last" else None
    return model_folder(Path(config.output), inside), with_absolute_paths(config)


def with_model_folders(
    config: RunConfig, say: Callable[[str], None] = lambda _: None, *, merge: bool = True
) -> RunConfig:
    """The same config with each model that it names replaced by a folder that transformers loads.

    Args:
        say: gets a line for each run's or adapter's folder that was replaced.
        merge: merge an adapter into its base, once, in ``RUN/merged/step-N`` (in the cache for an adapter without a run); False
            takes the base alone, which has the same shapes.

    Raises:
        CheckpointError: a run without a checkpoint. ModelError: an adapter that cannot be merged.
    """
    path, tokenizer, reference = config.model.path, config.model.tokenizer, config.reference.path
    adapter_too = tokenizer is None and not merge  # the base's folder may have another tokenizer
    own = model_of(path if adapter_too else tokenizer)
    model = {
        "path": _model_folder("model.path", path, say, merge),
        "tokenizer": tokenizer if own is None else str(own[0]),
    }
    reference = None if reference is None else _model_folder("reference.path", reference, say, merge)
    lora = config.lora
    if str(config.model.adapter).startswith("stage:"):  # of a pipeline that has not come there yet
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


def _model_folder(key: str, given: str, say: Callable[[str], None], merge: bool) -> str:
    found = model_of(given)
    if found is None:
        return given
    folder, run = found
    if not is_adapter(folder):
        if Path(given).expanduser().resolve() != folder.resolve():
            say(f"{key}: {given} means {folder}")
        return str(folder)
    if run is not None:
        base, seed, target = run.model, run.train.seed, Path(run.output) / "merged" / folder.parent.name
    else:
        base, seed = _of_adapter(given, folder, None).base, 0
        target = cache_folder("reference") / "merged" / model_sha256(folder)[:16]
    if not merge:
        return str(target) if target.is_dir() else base.path
    say(f"{key}: the adapter of {folder} merged into {base.path} is {target}")
    check = None if run is None else partial(check_base, Path(run.output), base)
    with writing(target):
        return str(merge_to_folder(base, folder, target, seed, check))


def _adapter_folder(config: RunConfig, say: Callable[[str], None]) -> Path:
    """Where the adapter is that `model.adapter` means.

    Raises:
        ConfigError: nothing that such an adapter goes on. ModelError: there is none, or there are several.
    """
    given = str(config.model.adapter)
    if config.method.learns_reward:
        what = "is set, and a reward model's adapter is trained with its head"
        raise ConfigError("model.adapter", what, "leave it out, or train a language model")
    found, path = model_of(given), Path(given).expanduser()
    if found is None:
        inside = sorted(p.parent.name for p in path.glob("*/adapter_config.json"))
        if len(inside) > 1:
            what = f"holds several adapters ({', '.join(inside)}), and one is trained"
            raise ModelError(given, what, f"name one of them, e.g. model.adapter={path / inside[0]}")
        how = f"did you mean {path / inside[0]}?" if inside else "name an adapter's, a run's or a checkpoint's folder"
        raise ModelError(given, "holds no adapter" if path.is_dir() else "no such folder", how)
    folder, _ = found
    if not is_adapter(folder):
        raise ModelError(given, "is a whole model, not an adapter", "name it as model.path")
    under = model_of(config.model.path)
    if under is not None and under[0].resolve() == folder.resolve():
        base = adapter_base(folder)
        raise ConfigError("model.path", "is the adapter's own folder", f"name the model under it (it says {base})")
    if path.resolve() != folder.resolve():
        say(f"model.adapter: {given} means {folder}")
    return folder.resolve()


def check_adapters_base(adapter: Path, base: ModelConfig, model: Any) -> None:
    """`check_base` for the adapter of a run's checkpoint; one that stands alone does not know its base's weights."""
    inside = _checkpoint_of(adapter)
    if inside is not None:
        check_base(inside[0], base, model)


def runs_in(given: str, limit: int = 4) -> list[str]:
    """The run folders right inside a folder (a sweep's, a pipeline's), the first `limit` of them."""
    found = sorted(str(p.parent) for p in Path(given).expanduser().glob(f"*/{CONFIG}"))
    return found if len(found) <= limit else [*found[:limit], "..."]


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
        raise ConfigError("--base", f"{given} is not an adapter by itself", "leave it out")


def of_config(config: RunConfig, step: str, base: str | None = None, given: str = "") -> Source:
    """The model of a config: a checkpoint of its run, or what it starts from where there is none.

    Raises:
        CheckpointError: no such checkpoint. ConfigError: a reward model, or a base for something that is not an adapter.
    """
    config = with_model_folders(with_absolute_paths(config))
    folder, given = Path(config.output), given or config.output
    if config.method.learns_reward:
        raise ConfigError(
            given,
            "is a reward model, which writes nothing and has no log-probs",
            "penchant eval on its run, without options, gives accuracy and calibration; it can be --reward of a language model",
        )
    checkpoint = find_checkpoint(folder, step)
    if checkpoint is None and step != "0" and (folder / IDENTITY).exists():
        raise CheckpointError(
            given, "this run has no checkpoint yet", "continue training it, or give --step 0 for its start"
        )
    seed, tokenizer = config.train.seed, config.model.tokenizer or config.model.path
    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    first = Source(START, config.model, tokenizer, adapter, seed, config, folder, START)
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
    return replace(made, base=_of_folder(model, config), adapter=None)


def _named_start(config: RunConfig) -> Source | None:
    """The reference that a run names itself."""
    path = config.reference.path
    if path is None:
        return None
    return Source(path, ModelConfig(path=path), config.model.tokenizer or path, run=config)


def _of_adapter(given: str, path: Path, base: str | None) -> Source:
    named = base or adapter_base(path)
    if named is None:
        raise ModelError(given, "the adapter does not say what its base model is", "name it with --base")
    if looks_like_folder(named) and not Path(named).expanduser().is_dir():
        raise ModelError(given, f"its base model {named!r} is not there", "name the base with --base")
    model = ModelConfig(path=named)
    own = str(path) if (path / "tokenizer_config.json").exists() else named
    return Source(given, model, own, path, start=Source(named, model, named))
