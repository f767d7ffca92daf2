"""`penchant import`: translate configs of TRL, LLaMA-Factory, Axolotl and ms-swift, and flat files with common key names."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.algorithms import ALGORITHMS
from penchant.base.text import HIDDEN, redact, shown
from penchant.config import RunConfig, apply_overrides, build, default_settings, read_mapping
from penchant.config.yaml import dump_yaml
from penchant.errors import ConfigError
from penchant.importers import axolotl, flat, llama_factory, ms_swift, trl
from penchant.importers.command import ENDINGS, read_command
from penchant.importers.rules import Line, Source, Status, Translation, Untranslatable, choose, translate

SOURCES: dict[str, Source] = {
    s.name: s for s in (trl.SOURCE, llama_factory.SOURCE, axolotl.SOURCE, ms_swift.SOURCE, flat.SOURCE)
}
STATUS: dict[Status, str] = {"translated": "translated", "same": "no key needed here", "unsupported": "NOT SUPPORTED"}
COUNTED: dict[Status, str] = {
    "translated": "translated",
    "same": "not needed here",
    "unsupported": "not supported",
}
# sections of tools that cannot be imported; a file with two of a tool's sections is rejected as that tool's
UNSUPPORTED_TOOLS = {
    "torchtune": ("tokenizer", "checkpointer", "model", "dataset", "loss", "optimizer", "recipe_checkpoint"),
    "verl": ("actor_rollout_ref", "critic", "trainer", "algorithm", "reward_model"),
}  # fmt: skip


def settings(translation: Translation, extra: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """``{our key: (value, comment)}`` of what the file sets, and of the other tool's defaults that differ from ours.

    Args:
        extra: our keys from the command line, which take precedence.
    """
    all_settings = dict(translation.settings)
    defaults = _our_defaults(all_settings)
    explicit = {k for line in translation.lines if line.is_set for k, _ in line.ours} | set(translation.method.base)
    needed = {k: v for k, v in all_settings.items() if k in explicit or k not in defaults or defaults[k] != v[0]}
    if "lora.r" in all_settings:
        needed |= {k: v for k, v in all_settings.items() if k.startswith("lora.")}
    needed = {k: (v, c) for k, (v, c) in needed.items() if v != {} and not (v is None and defaults.get(k, ...) is None)}
    return needed | {k: (v, "command line") for k, v in extra.items()}


def _our_defaults(our_settings: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Our defaults of every key, including those of the chosen loss and algorithm."""
    from penchant.losses import LOSSES

    defaults = {
        f"{s}.{k}": v for s, part in default_settings().items() if isinstance(part, Mapping) for k, v in part.items()
    }
    loss = our_settings.get("loss.name", (None, ""))[0]
    if loss in LOSSES:
        fields = LOSSES[loss].params.model_fields.items()
        defaults |= {f"loss.{i.alias or n}": i.default for n, i in fields}
    name = our_settings.get("algorithm.name", (None, ""))[0]
    if name is not None:
        fields = ALGORITHMS[name].model_fields.items()
        defaults |= {f"algorithm.{i.alias or n}": i.default for n, i in fields if not i.is_required()}
    return defaults


def nested(our_settings: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Nest dotted settings into a config mapping."""
    config: dict[str, Any] = {}
    for key, (value, _) in our_settings.items():
        section, _, rest = key.partition(".")
        if rest:
            config.setdefault(section, {})[rest] = value
        else:
            config[section] = value
    return config


def as_yaml(translation: Translation, our_settings: Mapping[str, tuple[Any, str]], name: str) -> str:
    """Format the config file: sections in our order, one key per line, each with its origin as a comment."""
    lines = [f"# {shown(name)} ({translation.source.title}, {translation.method.title}), written by `penchant import`"]
    unsupported = _unsupported_lines(translation)
    if unsupported:
        lines.append("# NOT SUPPORTED, and not in this file:")
        lines += [f"#   {_pairs(line.theirs)}: {shown(line.note)}" for line in unsupported]
    lines += [f"# differs: {remark}" for remark in _remarks(translation, our_settings)]
    for section in RunConfig.model_fields:
        keys = [k for k in our_settings if k.split(".")[0] == section]
        if keys == [section]:
            lines.append(_entry(section, *our_settings[section]))
        elif keys:
            lines.append(f"{section}:")
            last_comment = ""
            for k in (k for k in keys if k != section):
                value, comment = our_settings[k]
                if isinstance(value, list) and value and isinstance(value[0], Mapping):
                    lines.append(f"  {k.partition('.')[2]}:" + (f"  # {shown(comment)}" if comment else ""))
                    lines += [f"    - {_flow(item)}" for item in value]
                    continue
                lines.append("  " + _entry(k.partition(".")[2], value, comment if comment != last_comment else ""))
                last_comment = comment
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, comment: str) -> str:
    line = _flow({key: value})[1:-1]  # without the braces
    return f"{line}  # {shown(comment)}" if comment else line


def _flow(value: Any) -> str:
    return dump_yaml(value, default_flow_style=True, allow_unicode=False, width=10**9, sort_keys=False).strip()


SECRETS = frozenset({"hub_token", "hf_hub_token", "ms_hub_token", "swanlab_api_key", "push_to_hub_token"})


def _pairs(items: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(shown(f"{k}: {HIDDEN if k in SECRETS and v else redact(str(v))}")[:120] for k, v in items)


def _unsupported_lines(translation: Translation) -> list[Line]:
    """Unsupported settings that the file sets. They are listed both in our file and on the terminal."""
    return [line for line in translation.lines if line.is_set and line.status == "unsupported"]


def _remarks(translation: Translation, our_settings: Mapping[str, Any]) -> list[str]:
    """Differences that no key of the file states: the method's own, unsupported defaults of the other tool, and missing held-out rows."""
    tool = translation.source.title
    unset_lines = [line for line in translation.lines if not line.is_set and line.status == "unsupported"]
    defaults = [f"{tool}'s default {_pairs(line.theirs)}: {shown(line.note)}" for line in unset_lines]
    held_out = {"data.eval_path", "data.validation_rows", "data.validation_fraction"} & {
        k for k, (value, _) in our_settings.items() if value
    }
    no_held_out = (
        [] if held_out else ["no rows are held out, so there will be no held-out figures: set data.validation_rows"]
    )
    return [*map(shown, translation.remarks), *defaults, *no_held_out]


def as_text(translation: Translation, our_settings: Mapping[str, tuple[Any, str]]) -> str:
    """Format a report with one line per key, and the number of keys of each status."""
    set_lines = [line for line in translation.lines if line.is_set]
    lines = [f"{translation.source.title}, {translation.method.title}"]
    for status, title in STATUS.items():
        matching = [line for line in set_lines if line.status == status]
        if matching:
            lines += ["", f"{title}:", *(f"  {_line(line)}" for line in matching)]
    defaults = [k for k in our_settings if our_settings[k][1].startswith(translation.source.title)]
    if defaults:
        lines += ["", f"{translation.source.title}'s defaults that differ from ours, written out:"]
        lines += [f"  {k} = {shown(str(our_settings[k][0]))}" for k in defaults]
    remarks = _remarks(translation, our_settings)
    lines += ["", *(f"differs: {remark}" for remark in remarks)] if remarks else []
    counts = {s: translation.count(s) for s in STATUS}
    lines += ["", f"{sum(counts.values())} keys: " + ", ".join(f"{n} {COUNTED[s]}" for s, n in counts.items())]
    return "\n".join(lines)


def _line(line: Line) -> str:
    ours = ", ".join(shown(f"{k} = {v}") for k, v in line.ours)
    return _pairs(line.theirs) + (f" -> {ours}" if ours else "") + (f" ({shown(line.note)})" if line.note else "")


@dataclass(frozen=True)
class Imported:
    """Result of `import_config`: our YAML, the report on every key, and the translation itself."""

    yaml: str
    text: str
    translation: Translation

    @property
    def unsupported(self) -> int:
        """Number of keys in the file that have no counterpart."""
        return self.translation.count("unsupported")


def import_config(
    path: str | Path, source: str = "auto", method: str = "auto", devices: int = 1, overrides: Sequence[str] = ()
) -> Imported:
    """Translate another tool's YAML or JSON file, or a shell script with its command, into our config. Reports on every key.

    Args:
        source: trl, llama-factory, axolotl, ms-swift, flat, or auto.
        method: for TRL, whose files do not state it: sft, dpo, kto, ...; or auto.
        devices: number of GPUs of the other tool's run, which multiplies its batch size.
        overrides: our settings as ``key.path=value``, which take precedence, for what the file leaves to the command line.

    Raises:
        ConfigError: the file cannot be read, is of no known tool or could be of several of TRL's trainers, lacks a model, data or
            reward, or does not translate into a valid config.
    """
    if Path(path).suffix in ENDINGS:
        command = read_command(path)
        values, devices = command.values, command.devices if devices == 1 else devices
        source, method = (
            (command.tool if source == "auto" else source),
            (command.method if method == "auto" else method) or "auto",
        )
    else:
        values, _ = read_mapping(path, "foreign")
    bad_key = next((k for k in values if not isinstance(k, str)), "")
    if bad_key != "":
        raise ConfigError(str(path), f"has the key {bad_key!r}, which is not a text", "quote it, or leave it out")
    if devices < 1:
        raise ConfigError("--devices", f"is {devices}", "give the number of GPUs, 1 or more")
    if isinstance(values.get("model"), Mapping) and values.keys() <= RunConfig.model_fields.keys():
        raise ConfigError(
            str(path), "is Penchant's own config already", f"use `penchant train {shlex.quote(str(path))}`"
        )
    if source == "auto":
        _reject_unsupported_tools(values, str(path))
    tool = (
        choose(source, SOURCES, "--from", "tool that can be read")
        if source != "auto"
        else SOURCES[_detect_tool(values)]
    )
    name = method if method != "auto" else tool.guess(values, Path(path).stem)
    if name is None:
        how = f"say which with --method: {', '.join(tool.methods)}"
        raise ConfigError(str(path), f"does not say which of {tool.title}'s trainers it is for", how)
    trainer = choose(name, tool.methods, str(path), f"method of {tool.title}")
    try:
        translation = translate(values, tool, trainer, devices, str(Path(path).parent))
    except Untranslatable as error:
        what, _, how = str(error).partition("; ")
        raise ConfigError(
            str(path), what, f"{how}, or leave the key out" if how else "fix it, or leave the key out"
        ) from error
    our_settings = settings(translation, _parse_overrides(overrides))
    if "output" not in our_settings:
        our_settings["output"] = (f"runs/{Path(path).stem}", "the file names no folder")
    _check_complete(our_settings, str(path))
    config = nested(our_settings)
    try:
        build(config, {}, str(path))
    except ConfigError as error:
        raise ConfigError(str(path), f"does not translate into a valid config: {error.what}", error.how) from error
    return Imported(
        as_yaml(translation, our_settings, Path(path).name), as_text(translation, our_settings), translation
    )


def _reject_unsupported_tools(values: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError for a file of a tool that cannot be imported, which read as a flat file would lose most of its settings."""
    sections = {k for k, v in values.items() if isinstance(v, Mapping)}
    counts = {name: len(sections & set(keys)) for name, keys in UNSUPPORTED_TOOLS.items()}
    tool = max(counts, key=lambda name: counts[name])
    is_known = any(source.marks & (values.keys() - sections) for source in SOURCES.values())
    if counts[tool] >= 2 and not is_known:
        raise ConfigError(
            path,
            f"looks like a file of {tool}, which cannot be translated yet",
            "write a config with `penchant init`, or take the keys whose names are known with --from flat",
        )


def _detect_tool(values: Mapping[str, Any]) -> str:
    """Detect the tool by the number of keys that only its files have. TRL if there are only shared keys, else flat.

    Keys that a flat file may also have (`model`) are not enough by themselves.
    """
    marks = {name: source.marks & values.keys() for name, source in SOURCES.items()}
    best = max(marks, key=lambda name: len(marks[name]))
    shared = {"model_name_or_path", "per_device_train_batch_size", "num_train_epochs"} & values.keys()
    return best if marks[best] - (flat.SOURCE.rules.keys() - flat.SOURCE.marks) else "trl" if shared else "flat"


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Command-line overrides as ``{"model.path": value}``."""
    values: dict[str, Any] = {}
    apply_overrides(values, {}, overrides)
    sections = {k: v if isinstance(v, dict) and k != "reward" else {"": v} for k, v in values.items()}
    return {f"{k}.{name}".rstrip("."): v for k, section in sections.items() for name, v in section.items()}


def _check_complete(our_settings: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError if model, data or an online method's reward is missing. Other tools often take them from the command line."""
    method = ALGORITHMS.get(our_settings.get("algorithm.name", ("", ""))[0])
    required = {"model.path": "MODEL", "data.path": "train.jsonl"}
    if method is not None and method.takes_reward:
        required["reward"] = "rewards.py:FUNCTION"
    missing = {
        k: v
        for k, v in required.items()
        if k not in our_settings and (k != "data.path" or "data.sources" not in our_settings)
    }
    if missing:
        how = "add it behind the file: " + " ".join(f"{k}={v}" for k, v in missing.items())
        raise ConfigError(path, f"has no usable {' and '.join(missing)}", how)
