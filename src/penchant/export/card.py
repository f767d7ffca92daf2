"""The model card: what the model is, how it was made, its results with their uncertainty, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import penchant
from penchant.base.files import file_sha256
from penchant.base.text import counted
from penchant.config import RunConfig
from penchant.data.read import ending
from penchant.export.formats import Check, Format
from penchant.export.subject import Subject
from penchant.metrics.names import metric
from penchant.models.options import looks_like_folder
from penchant.runfolder.read import Folder, read_folder
from penchant.runfolder.values import ci_of, format_decimals, mapping, num

CARD = "README.md"
OMITTED_SETTINGS = ("output", "logging", "trust", "checkpoint")  # settings that do not affect the weights
PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def model_card(
    subject: Subject, form: Format, dtype: str, check: Check, files: Mapping[str, str], notes: Sequence[str]
) -> str:
    """Return the whole text of README.md.

    Args:
        files: SHA-256 by file name; notes: the export's notes.
    """
    run = read_folder(subject.run)
    manifest = run.manifest
    name = f"{subject.run.name} (step {subject.step})"
    parts = [
        _front_matter(subject, form),
        f"# {escape_markdown(name)}",
        _summary(subject, form, dtype, manifest),
        "> **No license is chosen.** Whoever publishes this decides on one: add `license:` to the first lines of this file, and see "
        "what the licenses of the base model and of the data require.",
        f"## Load it\n\n```python\n{_loading_code(subject, form, files)}```",
        f"## Method\n\n{subject.config.method.about}\n\n<details><summary>Every setting</summary>\n\n```yaml\n{_settings(subject.config)}"
        "```\n\n</details>",
        f"## Data\n\n{_data(subject, run)}",
        f"## Results\n\n{_results(run.metrics, subject.step)}",
        f"## What to know before trusting it\n\n{_flags(run)}",
        f"## This export\n\n{_export(form, dtype, check, notes)}",
        f"## Hashes\n\n{_hashes(files, manifest)}",
        f"## Versions\n\n{_versions(manifest)}",
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: object) -> str:
    """Escape all markup in a text and put it on one line."""
    return PUNCTUATION.sub(r"\\\1", _one_line(text))


def inline_code(text: object) -> str:
    """Format a text as inline code, on one line."""
    return "`" + _one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def _one_line(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))


def strip_paths(value: Any) -> Any:
    """Strip this machine's paths from settings: only the last part of a path is kept."""
    if isinstance(value, Mapping):
        return {strip_paths(k): strip_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strip_paths(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


def base_name(subject: Subject) -> str:
    """Return the base model's public name: a hub id, or a folder's name."""
    path = subject.base.path
    return Path(path).name if looks_like_folder(path) else path


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _front_matter(subject: Subject, form: Format) -> str:
    config = subject.config
    values: dict[str, Any] = {
        "library_name": form.library,
        "pipeline_tag": "text-classification" if subject.reward else "text-generation",
        "tags": [
            "penchant",
            *(n.replace("_", "-") for n in config.method.name.split("+")),
            *(["lora"] if subject.adapter else []),
        ],
    }
    if not looks_like_folder(subject.base.path):
        values["base_model"] = subject.base.path
        values["base_model_relation"] = "adapter" if form.name == "adapter" else "finetune"
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    hub_ids = [p.split(":")[0] for p in paths if not looks_like_folder(p) and not ending(p)]
    if hub_ids:
        values["datasets"] = hub_ids
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _summary(subject: Subject, form: Format, dtype: str, manifest: Mapping[str, Any]) -> str:
    kind = "A reward model" if subject.reward else "A language model"
    trained_part = "a LoRA adapter" if subject.adapter is not None else "all weights"
    steps = manifest.get("total_steps")
    total = f" of {steps}" if steps else ""
    return (
        f"{kind}, made from {inline_code(base_name(subject))} by {subject.config.method.name.replace('+', ' and ')}: {trained_part} trained for "
        f"{subject.step}{total} optimizer steps with Penchant {penchant.__version__}. This is {form.what}, in {dtype}."
    )


def _loading_code(subject: Subject, form: Format, files: Mapping[str, str]) -> str:
    auto_class = "AutoModelForSequenceClassification" if subject.reward else "AutoModelForCausalLM"
    file = next((f for f in files if f.endswith(".gguf")), "")
    labels = ", num_labels=1" if subject.reward else ""
    return form.load.format(auto=auto_class, folder="FOLDER", base=base_name(subject), file=file, labels=labels)


def _settings(config: RunConfig) -> str:
    settings = config.model_dump(mode="json", exclude=set(OMITTED_SETTINGS))
    settings["reference"].pop("cache_dir", None)
    text = yaml.safe_dump(strip_paths(settings), sort_keys=False, allow_unicode=True)
    return text.replace("```", "'''")


def _data(subject: Subject, run: Folder) -> str:
    names = strip_paths(subject.config.data.path)
    sources = ", ".join(inline_code(n) for n in ([names] if isinstance(names, str) else names))
    rows = ["| | rows | kept aside | fingerprint |", "|---|---|---|---|"]
    for name, part in mapping(run.manifest.get("data")).items():
        split = mapping(part)
        count = split.get("accepted", split.get("rows", ""))
        rows.append(
            f"| {escape_markdown(name)} | {count} | {split.get('quarantined', '')} | `{split.get('fingerprint', '')}` |"
        )
    items = map(mapping, mapping(run.audit.get("findings")).values())
    audit = [f"- {escape_markdown(f.get('title'))}: {f.get('count')} of {f.get('of')}" for f in items if f.get("count")]
    findings = "\n".join(audit) if audit else "- nothing was found"
    return f"From {sources}.\n\n" + "\n".join(rows) + f"\n\nWhat the audit of the data found:\n\n{findings}"


def _results(metrics: Sequence[Mapping[str, Any]], step: int) -> str:
    lines = [row for row in metrics if row.get("kind") == "eval"]
    after = next((row for row in lines if row.get("step") == step), None)
    if after is None:
        return "Nothing was evaluated at this step."
    before = next((row for row in lines if row.get("step") == 0), {})
    rows = ["| figure | start | this model | 95% interval | meaning |", "|---|---|---|---|---|"]
    for name, value in after.items():
        if not name.startswith("eval/") or name == "eval/rows" or not isinstance(value, (int, float)):
            continue
        if name.rsplit("/", 1)[-1] in ("n", "ci"):
            continue
        start, interval = num(before, name), ci_of(after, name)
        cells = [
            escape_markdown(name.removeprefix("eval/")),
            "" if start is None else format_decimals(start, ".4f"),
            format_decimals(value, ".4f"),
            "" if interval is None else " to ".join(format_decimals(end, ".4f") for end in interval),
            escape_markdown(metric(name).meaning),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    held_out = after.get("eval/rows")
    return (
        f"On {counted(int(held_out or 0), 'row')} held out from training (intervals over rows or prompts):\n\n"
        + "\n".join(rows)
    )


def _flags(run: Folder) -> str:
    flags = ((escape_markdown(f.get(key)) for key in ("title", "level", "sentence")) for f in run.flags or ())
    return "\n".join(f"- **{title}** ({level}): {text}" for title, level, text in flags) or "No flag was raised."


def _export(form: Format, dtype: str, check: Check, notes: Sequence[str]) -> str:
    lines = [f"{form.what[0].upper()}{form.what[1:]}, weights in {dtype}. It was {check.to_text()}."]
    return "\n\n".join([*lines, *(f"Note: {escape_markdown(n)}." for n in notes)])


def _hashes(files: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    rows = ["| file | SHA-256 |", "|---|---|", *(f"| {inline_code(n)} | `{h}` |" for n, h in files.items())]
    base = mapping(manifest.get("model")).get("sha256")
    rows += [f"| the base model's weights, as loaded | `{base}` |"] if base else []
    return "\n".join(rows)


def _versions(manifest: Mapping[str, Any]) -> str:
    names = ("penchant", "python", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    hardware = mapping(manifest.get("hardware"))
    machine = ", ".join(
        f"{k} {escape_markdown(v)}" for k, v in hardware.items() if k in ("cpu", "gpu", "device", "dtype") and v
    )
    return (
        ", ".join(f"{n} {escape_markdown(manifest[n])}" for n in names if manifest.get(n))
        + (f"; {machine}" if machine else "")
        + "."
    )
