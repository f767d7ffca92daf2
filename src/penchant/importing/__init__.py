"""Other tools' config files in our terms: TRL's, LLaMA-Factory's, and flat ones with the usual words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.config import apply_overrides, build, read_mapping
from penchant.errors import ConfigError
from penchant.importing import flat, llama_factory, trl
from penchant.importing.rules import Source, Translation, choose, translate
from penchant.importing.write import as_text, as_yaml, nested, settings

SOURCES: dict[str, Source] = {s.name: s for s in (trl.SOURCE, llama_factory.SOURCE, flat.SOURCE)}


@dataclass(frozen=True)
class Imported:
    """A file translated: our YAML, what became of every key, and how many were not supported."""

    yaml: str
    text: str
    translation: Translation

    @property
    def unsupported(self) -> int:
        """Keys of their file that have no counterpart."""
        return self.translation.count("unsupported")


def import_config(
    path: str | Path, source: str = "auto", method: str = "auto", devices: int = 1, overrides: Sequence[str] = ()
) -> Imported:
    """Translate another tool's YAML (or JSON) file into a config of ours; every key of it is accounted for.

    Args:
        source: trl, llama-factory, flat, or auto.
        method: of TRL, whose files do not say it: sft, dpo, kto ...; or auto.
        devices: GPUs that the other tool's run used; its optimiser step holds so many batches.
        overrides: our settings as ``key.path=value``, for what the file leaves to a command line; they win.

    Raises:
        ConfigError: the file cannot be read, is of no known tool or of several of TRL's trainers, lacks model, data or reward,
            or translates into something that is no valid config.
    """
    values, _ = read_mapping(path, "another tool's config is a mapping of its keys")
    if devices < 1:
        raise ConfigError("--devices", f"is {devices}", "give the number of GPUs, 1 or more")
    tool = choose(source, SOURCES, "--from", "tool that can be read") if source != "auto" else SOURCES[_tool(values)]
    name = method if method != "auto" else tool.guess(values, Path(path).stem)
    if name is None:
        how = f"say which with --method: {', '.join(tool.methods)}"
        raise ConfigError(str(path), f"does not say which of {tool.title}'s trainers it is for", how)
    chosen = choose(name, tool.methods, str(path), f"method of {tool.title}")
    try:
        translation = translate(values, tool, chosen, devices, str(Path(path).parent))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            str(path), f"a value cannot be understood ({error})", "mend it, or leave the key out"
        ) from error
    found = settings(translation, _given(overrides))
    if "output" not in found:
        found["output"] = (f"runs/{Path(path).stem}", "the file names no folder")
    _complete(found, translation, str(path))
    config = nested(found)
    try:
        build(config, {}, str(path))
    except ConfigError as error:
        raise ConfigError(str(path), f"translates into no valid config: {error.what}", error.how) from error
    return Imported(as_yaml(translation, found, Path(path).name), as_text(translation, found), translation)


def _tool(values: Mapping[str, Any]) -> str:
    """Whose file it is: the tool that has most keys of its own in it; TRL where only the shared ones are there."""
    counts = {name: len(source.marks & values.keys()) for name, source in SOURCES.items()}
    best = max(counts, key=lambda name: counts[name])
    shared = {"model_name_or_path", "per_device_train_batch_size", "num_train_epochs"} & values.keys()
    return best if counts[best] else "trl" if shared else "flat"


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """``{"model.path": value}`` of the command line."""
    made: dict[str, Any] = {}
    apply_overrides(made, {}, overrides)
    flat_keys: dict[str, Any] = {}
    for section, value in made.items():
        if isinstance(value, dict) and section != "reward":
            flat_keys |= {f"{section}.{k}": v for k, v in value.items()}
        else:
            flat_keys[section] = value
    return flat_keys


def _complete(found: Mapping[str, Any], translation: Translation, path: str) -> None:
    """Model, data and an online method's reward often stand on their command line or in a script."""
    online = found.get("algorithm.name", ("reward_model", ""))[0] != "reward_model"
    wanted = {
        "model.path": "MODEL",
        "data.path": "train.jsonl",
        **({"reward": "rewards.py:FUNCTION"} if online else {}),
    }
    missing = {k: v for k, v in wanted.items() if k not in found}
    if missing:
        how = "add it behind the file: " + " ".join(f"{k}={v}" for k, v in missing.items())
        raise ConfigError(path, f"says nothing of {' and '.join(missing)} that could be used", how)
