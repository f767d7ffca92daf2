"""A translation as our YAML, with a comment at every line that has one, and as a table that says what became of each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from penchant.algorithms.options import OnlineConfig
from penchant.config import ALGORITHMS, RunConfig, default_settings
from penchant.importing.rules import Line, Status, Translation
from penchant.printable import shown
from penchant.redact import HIDDEN, redact

STATUS: dict[Status, str] = {"translated": "translated", "same": "nothing to write", "unsupported": "NOT SUPPORTED"}


def settings(translation: Translation, extra: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Our key -> (value, comment): what the file says, and their defaults wherever ours would be another.

    Args:
        extra: our keys from the command line; they win.
    """
    found = dict(translation.settings)
    defaults = _our_defaults(found)
    spoken = {k for line in translation.lines if line.given for k, _ in line.ours} | set(translation.method.base)
    kept = {k: v for k, v in found.items() if k in spoken or k not in defaults or defaults[k] != v[0]}
    if "lora.r" in found:
        kept |= {k: v for k, v in found.items() if k.startswith("lora.")}
    kept = {k: (v, c) for k, (v, c) in kept.items() if v != {} and not (v is None and defaults.get(k, ...) is None)}
    return kept | {k: (v, "command line") for k, v in extra.items()}


def _our_defaults(found: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Our default of every key, of this loss and of this algorithm."""
    from penchant.losses import LOSSES

    flat = {
        f"{s}.{k}": v for s, part in default_settings().items() if isinstance(part, Mapping) for k, v in part.items()
    }
    loss = found.get("loss.name", (None, ""))[0]
    if loss in LOSSES:
        fields = LOSSES[loss].params.model_fields.items()
        flat |= {f"loss.{i.alias or n}": i.default for n, i in fields}
    name = found.get("algorithm.name", (None, ""))[0]
    if name is not None:
        fields = ALGORITHMS.get(name, OnlineConfig).model_fields.items()
        flat |= {f"algorithm.{i.alias or n}": i.default for n, i in fields if not i.is_required()}
    return flat


def nested(found: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """The settings as a config's mapping."""
    made: dict[str, Any] = {}
    for key, (value, _) in found.items():
        section, _, rest = key.partition(".")
        if rest:
            made.setdefault(section, {})[rest] = value
        else:
            made[section] = value
    return made


def as_yaml(translation: Translation, found: Mapping[str, tuple[Any, str]], name: str) -> str:
    """The config file: sections in our order, one key a line, each with where it comes from."""
    lines = [f"# {shown(name)} ({translation.source.title}, {translation.method.title}), written by `penchant import`"]
    left = _left(translation)
    if left:
        lines.append("# NOT SUPPORTED, and not in this file:")
        lines += [f"#   {_pairs(line.theirs)}: {shown(line.note)}" for line in left]
    lines += [f"# differs: {remark}" for remark in _remarks(translation)]
    for section in RunConfig.model_fields:
        keys = [k for k in found if k.split(".")[0] == section]
        if keys == [section]:
            lines.append(_entry(section, *found[section]))
        elif keys:
            lines.append(f"{section}:")
            lines += ["  " + _entry(k.partition(".")[2], *found[k]) for k in keys if k != section]
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, comment: str) -> str:
    text = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=False, width=10**9).strip()
    line = text[1:-1]  # without the braces
    return f"{line}  # {shown(comment)}" if comment else line


SECRETS = frozenset({"hub_token", "hf_hub_token", "ms_hub_token", "swanlab_api_key", "push_to_hub_token"})


def _pairs(theirs: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(shown(f"{k}: {HIDDEN if k in SECRETS and v else redact(str(v))}")[:120] for k, v in theirs)


def _left(translation: Translation) -> list[Line]:
    """What their file asks for and is not here: the same lines in our file and on the screen."""
    return [line for line in translation.lines if line.given and line.status == "unsupported"]


def _remarks(translation: Translation) -> list[str]:
    """What differs though the file does not say it: by nature, and by a default of theirs that has no counterpart."""
    tool = translation.source.title
    silent = [line for line in translation.lines if not line.given and line.status == "unsupported"]
    defaults = [f"{tool}'s default {_pairs(line.theirs)}: {shown(line.note)}" for line in silent]
    return [*map(shown, translation.remarks), *defaults]


def as_text(translation: Translation, found: Mapping[str, tuple[Any, str]]) -> str:
    """What became of every key, one line each, and how many of each kind."""
    asked = [line for line in translation.lines if line.given]
    lines = [f"{translation.source.title}, {translation.method.title}"]
    for status, title in STATUS.items():
        those = [line for line in asked if line.status == status]
        if those:
            lines += ["", f"{title}:", *(f"  {_line(line)}" for line in those)]
    defaults = [k for k in found if found[k][1].startswith(translation.source.title)]
    if defaults:
        lines += ["", f"{translation.source.title}'s defaults that differ from ours, written out:"]
        lines += [f"  {k} = {shown(str(found[k][0]))}" for k in defaults]
    remarks = _remarks(translation)
    lines += ["", *(f"differs: {remark}" for remark in remarks)] if remarks else []
    lines += ["", ", ".join(f"{translation.count(s)} key(s): {title.lower()}" for s, title in STATUS.items())]
    return "\n".join(lines)


def _line(line: Line) -> str:
    ours = ", ".join(shown(f"{k} = {v}") for k, v in line.ours)
    return _pairs(line.theirs) + (f" -> {ours}" if ours else "") + (f" ({shown(line.note)})" if line.note else "")
