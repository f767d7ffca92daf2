"""Translations of keys shared by the tools built on transformers' Trainer."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from penchant.data.layouts.fields import is_nonempty
from penchant.data.load import FIRST_ROWS, detect_layout, rename_columns
from penchant.data.pictures import COLUMNS
from penchant.data.read import Row, read_rows
from penchant.errors import DataError
from penchant.importers.rules import Given, Line, NotHere, flag, number, whole
from penchant.track.tracker import TRACKERS

# ---- Trackers: `report_to` as our `logging.trackers` ----


def report_to(given: Given) -> Iterator[Line]:
    """report_to (one or several names, `none` or `all`) and use_wandb. Unknown trackers are reported as unsupported."""
    names: list[str] = []
    if given.says("report_to"):
        asked = _names(given["report_to"])
        names = list(dict.fromkeys(n for a in asked for n in (_installed() if a == "all" else [a]) if n in TRACKERS))
        strangers = [a for a in asked if a not in TRACKERS and a not in ("all", "none")]
        if strangers:
            how = f"there is no tracker {', '.join(strangers)}: logging.trackers takes {', '.join(TRACKERS)}"
            yield Line((("report_to", ", ".join(strangers)),), "unsupported", (), how)
        if names:
            note = "those that are installed here" if "all" in asked else ""
            yield given.line(["report_to"], "translated", {"logging.trackers": names}, note)
        elif not strangers:
            none = f"none of {', '.join(TRACKERS)} is installed here" if "all" in asked else "no tracker, as here"
            yield given.line(["report_to"], "same", note=none)
    if given.says("use_wandb"):
        yield _wandb(given, names)


def _wandb(given: Given, names: list[str]) -> Line:
    try:
        wanted = given["use_wandb"] is not None and flag(given["use_wandb"])
    except NotHere as problem:
        return given.line(["use_wandb"], "unsupported", note=str(problem))
    if not wanted:
        return given.line(["use_wandb"], "same", note="off, as here")
    return given.line(["use_wandb"], "translated", {"logging.trackers": list(dict.fromkeys([*names, "wandb"]))})


def _names(value: Any) -> list[str]:
    """Tracker names from a list or a comma-separated string, in lower case."""
    listed = value if isinstance(value, list) else [] if value is None or value is False else str(value).split(",")
    return [name for name in (str(v).strip().lower() for v in listed) if name]


def _installed() -> list[str]:
    """Installed trackers. A folder of the same name in the working directory (W&B creates one) does not count."""
    found = {name: importlib.util.find_spec(spec.module) for name, spec in TRACKERS.items()}
    return [name for name, spec in found.items() if spec is not None and spec.origin is not None]


# ---- Settings that combine several keys ----

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


def batch(given: Given) -> Iterator[Line]:
    """Rows of one optimizer step: per-device batch size x accumulation x devices."""
    one, more = keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    ours = {"train.batch_size": whole(given[one]) * whole(given[more]) * given.devices}
    note = f"{given[one]} x {given[more]} x {given.devices} device(s); memory is train.tokens_per_step here"
    yield given.line(keys, "translated", ours, note)


def length(given: Given) -> Iterator[Line]:
    """Epochs or steps. If max_steps is set, transformers ignores the epochs, but we stop at whichever comes first."""
    steps = whole(given["max_steps"]) if given["max_steps"] is not None else -1
    if steps > 0:
        ours = {"train.max_steps": steps, "train.epochs": 1000.0}
        note = "max_steps decides; epochs only must not end it before"
        yield given.line(["max_steps", "num_train_epochs"], "translated", ours, note)
        return
    yield given.line(["num_train_epochs"], "translated", {"train.epochs": number(given["num_train_epochs"])})
    if given.says("max_steps"):
        yield given.line(["max_steps"], "same", note="no bound")


def schedule(given: Given) -> Iterator[Line]:
    """Shape, warm-up and floor of the learning rate schedule."""
    name = str(given["lr_scheduler_type"])
    keys = ["lr_scheduler_type"]
    if name in MIN_LR and isinstance(given["lr_scheduler_kwargs"], Mapping):
        extra = given["lr_scheduler_kwargs"]
        floor = extra.get("min_lr_rate", None)
        if floor is None and "min_lr" in extra:
            floor = number(extra["min_lr"]) / number(given["learning_rate"])
        if floor is not None:
            ours = {"train.schedule": "cosine", "train.min_lr_fraction": number(floor)}
            yield given.line([*keys, "lr_scheduler_kwargs"], "translated", ours)
    elif name in SCHEDULES:
        yield given.line(keys, "translated", {"train.schedule": SCHEDULES[name]})
    else:
        yield given.line(keys, "unsupported", note="set train.schedule: linear, cosine or constant")
    if given.says("lr_scheduler_kwargs") and name not in MIN_LR:
        how = "set train.schedule and train.min_lr_fraction by hand"
        yield given.line(["lr_scheduler_kwargs"], "unsupported", note=how)
    if name == "constant":
        warmup = ["lr_scheduler_type", "warmup_steps", "warmup_ratio"]
        note = "their constant schedule has no warm-up"
        yield given.line(warmup, "translated", {"train.warmup_fraction": 0.0}, note)
    else:
        yield _warmup(given)


def _warmup(given: Given) -> Line:
    ratio, steps = given["warmup_ratio"], number(given["warmup_steps"] or 0)
    if steps == 0 and ratio is not None and (given.says("warmup_ratio") or not given.says("warmup_steps")):
        return given.line(["warmup_ratio"], "translated", {"train.warmup_fraction": number(ratio)})
    if steps < 1:  # transformers 5 reads a value below 1 as a fraction
        return given.line(["warmup_steps"], "translated", {"train.warmup_fraction": steps})
    total = number(given["max_steps"] or -1)
    if total > steps:
        ours = {"train.warmup_fraction": round(steps / total, 6)}
        return given.line(["warmup_steps", "max_steps"], "translated", ours)
    how = "warm-up is a share here: set train.warmup_fraction to these steps / all optimizer steps (the run prints how many)"
    return given.line(["warmup_steps"], "unsupported", note=how)


def saving(given: Given) -> Iterator[Line]:
    """When to write checkpoints and when to evaluate."""
    yield from _every(given, "save_strategy", "save_steps", "checkpoint.every")
    name = "evaluation_strategy" if given.says("evaluation_strategy") else "eval_strategy"
    yield from _every(given, name, "eval_steps", "evaluation.every")


def _every(given: Given, strategy: str, steps: str, ours: str) -> Iterator[Line]:
    if not given.says(strategy, steps):
        return
    kind = str(given[strategy] if given.says(strategy) else "steps")
    how_often: Any = {"epoch": "epoch", "no": None, "False": None}.get(kind, "")
    if how_often == "" and kind == "steps" and given[steps] is not None and number(given[steps]) >= 1:
        how_often = whole(given[steps])
    if how_often == "":
        yield given.line([strategy, steps], "unsupported", note=f"set {ours} to a number of optimizer steps, or epoch")
    else:
        note = "the end is always saved" if strategy == "save_strategy" and how_often is None else ""
        yield given.line([strategy, steps], "translated", {ours: how_often}, note)


def precision(given: Given) -> Iterator[Line]:
    """bf16, fp16 and pure_bf16, which set the training dtype."""
    keys = ("bf16", "fp16", "pure_bf16")
    if given["fp16"]:
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield given.line(keys, "unsupported", {"model.dtype": "auto"}, note)
        return
    dtype = "bf16" if given["bf16"] or given["pure_bf16"] else "fp32"
    note = "weights stay in fp32 beside a bf16 copy" if dtype == "bf16" else ""
    yield given.line(keys, "translated", {"model.dtype": dtype}, note)


def val_size(given: Given) -> Iterator[Line]:
    """val_size: a fraction of the rows if below 1, else a number of rows."""
    if not given.says("val_size"):
        return
    size = number(given["val_size"])
    if size == 0:
        yield given.line(["val_size"], "same", note="nothing is held out")
    else:
        ours: dict[str, Any] = {"data.validation_fraction": size} if size < 1 else {"data.validation_rows": whole(size)}
        yield given.line(["val_size"], "translated", ours, "held out by prompt: no prompt on both sides")


def ppo_batch(given: Given) -> Iterator[Line]:
    """PPO's batch: one batch of rollouts holds all its minibatches (LLaMA-Factory: a buffer of that many batches)."""
    split = "ppo_buffer_size" if "ppo_buffer_size" in given.defaults else "num_mini_batches"
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", split)
    parts = whole(given[split])
    rows = whole(given[keys[0]]) * whole(given[keys[1]]) * parts * given.devices
    ours = {"train.batch_size": rows, "algorithm.minibatches": parts}
    yield given.line(keys, "translated", ours, f"prompts of one batch of rollouts, on {given.devices} device(s)")


def adapter(given: Given, keys: list[str], rank: int, alpha: float, **targets: Any) -> Line:
    """A line about the LoRA keys."""
    more = {ours: True for key, ours in (("use_rslora", "lora.rslora"), ("use_dora", "lora.dora")) if given[key]}
    ours = {"lora.r": rank, "lora.alpha": alpha, "lora.dropout": number(given["lora_dropout"]), **more, **targets}
    return given.line(keys, "translated", ours)


def quantized(given: Given, key: str, ours: str | None, adapted: bool) -> Iterator[Line]:
    """4- or 8-bit weights, which need an adapter here. `ours`: our setting, None if not requested, "" if unsupported."""
    if ours is None:
        if given.says(key):
            yield given.line([key], "same", note="off, as here")
    elif ours and adapted:
        yield given.line([key], "translated", {"model.quantize": ours})
    else:
        how = "model.quantize: nf4 (or int8) stands beside a lora section (docs/memory.md)"
        yield given.line([key], "unsupported", note=how)


# ---- Local models and rows ----

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".ndjson")


def is_local(name: str, folder: str) -> bool:
    """Whether a data set is a file or folder rather than a hub id."""
    return name.endswith(FILES) or name.startswith(("/", ".", "~")) or os.path.exists(os.path.join(folder, name))


def rows_of(path: str, columns: Mapping[str, str]) -> tuple[str, bool]:
    """(layout, whether there are pictures) of a local file's first rows. ``("", False)`` if it is missing or has no known layout."""
    if not Path(path).expanduser().exists():
        return "", False
    try:
        first = list(islice(read_rows(path), FIRST_ROWS))
        seen = any(
            is_nonempty(rename_columns(r.values, columns).get(n)) for r in first if isinstance(r, Row) for n in COLUMNS
        )
        return detect_layout(first, path, columns, {})[0], seen
    except DataError:
        return "", False


def model_type(path: str) -> str | None:
    """`model_type` in a local model folder's config.json, or None for a hub id."""
    try:
        found = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found.get("model_type")) if isinstance(found, dict) else None


DERIVATIONS = (batch, length, schedule, saving, precision, val_size, report_to, ppo_batch)


def vision_parts(given: Given, parts: list[str]) -> Line:
    """model.vision, from the keys `parts` that freeze the vision tower and the projector (both frozen by default)."""
    frozen = [given[k] is None or flag(given[k]) for k in parts]
    same = frozen[0] == frozen[1]
    how = "" if same else "the vision tower and its projector are trained both (model.vision: trained) or neither"
    ours = {"model.vision": "frozen" if any(frozen) else "trained"}
    return given.line(parts if given.says(*parts) else ["dataset"], "translated" if same else "unsupported", ours, how)
