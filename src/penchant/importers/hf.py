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
from penchant.importers.rules import Line, ToolConfig, Untranslatable, flag, integer, number
from penchant.track.tracker import TRACKERS

# ---- Trackers: `report_to` as our `logging.trackers` ----


def report_to(config: ToolConfig) -> Iterator[Line]:
    """report_to (one or several names, `none` or `all`) and use_wandb. Unknown trackers are reported as unsupported."""
    names: list[str] = []
    if config.sets("report_to"):
        requested = _names(config["report_to"])
        names = list(
            dict.fromkeys(n for a in requested for n in (_installed() if a == "all" else [a]) if n in TRACKERS)
        )
        unknown = [a for a in requested if a not in TRACKERS and a not in ("all", "none")]
        if unknown:
            how = f"there is no tracker {', '.join(unknown)}: logging.trackers takes {', '.join(TRACKERS)}"
            yield Line((("report_to", ", ".join(unknown)),), "unsupported", (), how)
        if names:
            note = "those that are installed here" if "all" in requested else ""
            yield config.line(["report_to"], "translated", {"logging.trackers": names}, note)
        elif not unknown:
            reason = f"none of {', '.join(TRACKERS)} is installed here" if "all" in requested else "no tracker, as here"
            yield config.line(["report_to"], "same", note=reason)
    if config.sets("use_wandb"):
        yield _wandb(config, names)


def _wandb(config: ToolConfig, names: list[str]) -> Line:
    try:
        enabled = config["use_wandb"] is not None and flag(config["use_wandb"])
    except Untranslatable as error:
        return config.line(["use_wandb"], "unsupported", note=str(error))
    if not enabled:
        return config.line(["use_wandb"], "same", note="off, as here")
    return config.line(["use_wandb"], "translated", {"logging.trackers": list(dict.fromkeys([*names, "wandb"]))})


def _names(value: Any) -> list[str]:
    """Tracker names from a list or a comma-separated string, in lower case."""
    values = value if isinstance(value, list) else [] if value is None or value is False else str(value).split(",")
    return [name for name in (str(v).strip().lower() for v in values) if name]


def _installed() -> list[str]:
    """Installed trackers. A folder of the same name in the working directory (W&B creates one) does not count."""
    specs = {name: importlib.util.find_spec(spec.module) for name, spec in TRACKERS.items()}
    return [name for name, spec in specs.items() if spec is not None and spec.origin is not None]


# ---- Settings that combine several keys ----

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


def batch(config: ToolConfig) -> Iterator[Line]:
    """Rows of one optimizer step: per-device batch size x accumulation x devices."""
    size_key, accumulation_key = keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    ours = {"train.batch_size": integer(config[size_key]) * integer(config[accumulation_key]) * config.devices}
    note = f"{config[size_key]} x {config[accumulation_key]} x {config.devices} device(s); memory is train.tokens_per_step here"
    yield config.line(keys, "translated", ours, note)


def length(config: ToolConfig) -> Iterator[Line]:
    """Epochs or steps. If max_steps is set, transformers ignores the epochs, but we stop at whichever comes first."""
    steps = integer(config["max_steps"]) if config["max_steps"] is not None else -1
    if steps > 0:
        ours = {"train.max_steps": steps, "train.epochs": 1000.0}
        note = "max_steps decides; epochs only must not end it before"
        yield config.line(["max_steps", "num_train_epochs"], "translated", ours, note)
        return
    yield config.line(["num_train_epochs"], "translated", {"train.epochs": number(config["num_train_epochs"])})
    if config.sets("max_steps"):
        yield config.line(["max_steps"], "same", note="no bound")


def schedule(config: ToolConfig) -> Iterator[Line]:
    """Shape, warm-up and floor of the learning rate schedule."""
    name = str(config["lr_scheduler_type"])
    keys = ["lr_scheduler_type"]
    if name in MIN_LR and isinstance(config["lr_scheduler_kwargs"], Mapping):
        kwargs = config["lr_scheduler_kwargs"]
        floor = kwargs.get("min_lr_rate", None)
        if floor is None and "min_lr" in kwargs:
            floor = number(kwargs["min_lr"]) / number(config["learning_rate"])
        if floor is not None:
            ours = {"train.schedule": "cosine", "train.min_lr_fraction": number(floor)}
            yield config.line([*keys, "lr_scheduler_kwargs"], "translated", ours)
    elif name in SCHEDULES:
        yield config.line(keys, "translated", {"train.schedule": SCHEDULES[name]})
    else:
        yield config.line(keys, "unsupported", note="set train.schedule: linear, cosine or constant")
    if config.sets("lr_scheduler_kwargs") and name not in MIN_LR:
        how = "set train.schedule and train.min_lr_fraction by hand"
        yield config.line(["lr_scheduler_kwargs"], "unsupported", note=how)
    if name == "constant":
        warmup_keys = ["lr_scheduler_type", "warmup_steps", "warmup_ratio"]
        note = "their constant schedule has no warm-up"
        yield config.line(warmup_keys, "translated", {"train.warmup_fraction": 0.0}, note)
    else:
        yield _warmup(config)


def _warmup(config: ToolConfig) -> Line:
    ratio, steps = config["warmup_ratio"], number(config["warmup_steps"] or 0)
    if steps == 0 and ratio is not None and (config.sets("warmup_ratio") or not config.sets("warmup_steps")):
        return config.line(["warmup_ratio"], "translated", {"train.warmup_fraction": number(ratio)})
    if steps < 1:  # transformers 5 reads a value below 1 as a fraction
        return config.line(["warmup_steps"], "translated", {"train.warmup_fraction": steps})
    total = number(config["max_steps"] or -1)
    if total > steps:
        ours = {"train.warmup_fraction": round(steps / total, 6)}
        return config.line(["warmup_steps", "max_steps"], "translated", ours)
    how = "warm-up is a share here: set train.warmup_fraction to these steps / all optimizer steps (the run prints how many)"
    return config.line(["warmup_steps"], "unsupported", note=how)


def saving(config: ToolConfig) -> Iterator[Line]:
    """When to write checkpoints and when to evaluate."""
    yield from _interval(config, "save_strategy", "save_steps", "checkpoint.every")
    name = "evaluation_strategy" if config.sets("evaluation_strategy") else "eval_strategy"
    yield from _interval(config, name, "eval_steps", "evaluation.every")


def _interval(config: ToolConfig, strategy_key: str, steps_key: str, our_key: str) -> Iterator[Line]:
    if not config.sets(strategy_key, steps_key):
        return
    kind = str(config[strategy_key] if config.sets(strategy_key) else "steps")
    interval: Any = {"epoch": "epoch", "no": None, "False": None}.get(kind, "")
    if interval == "" and kind == "steps" and config[steps_key] is not None and number(config[steps_key]) >= 1:
        interval = integer(config[steps_key])
    if interval == "":
        yield config.line(
            [strategy_key, steps_key], "unsupported", note=f"set {our_key} to a number of optimizer steps, or epoch"
        )
    else:
        note = "the end is always saved" if strategy_key == "save_strategy" and interval is None else ""
        yield config.line([strategy_key, steps_key], "translated", {our_key: interval}, note)


def precision(config: ToolConfig) -> Iterator[Line]:
    """bf16, fp16 and pure_bf16, which set the training dtype."""
    keys = ("bf16", "fp16", "pure_bf16")
    if config["fp16"]:
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield config.line(keys, "unsupported", {"model.dtype": "auto"}, note)
        return
    dtype = "bf16" if config["bf16"] or config["pure_bf16"] else "fp32"
    note = "weights stay in fp32 beside a bf16 copy" if dtype == "bf16" else ""
    yield config.line(keys, "translated", {"model.dtype": dtype}, note)


def val_size(config: ToolConfig) -> Iterator[Line]:
    """val_size: a fraction of the rows if below 1, else a number of rows."""
    if not config.sets("val_size"):
        return
    size = number(config["val_size"])
    if size == 0:
        yield config.line(["val_size"], "same", note="nothing is held out")
    else:
        ours: dict[str, Any] = (
            {"data.validation_fraction": size} if size < 1 else {"data.validation_rows": integer(size)}
        )
        yield config.line(["val_size"], "translated", ours, "held out by prompt: no prompt on both sides")


def ppo_batch(config: ToolConfig) -> Iterator[Line]:
    """PPO's batch: one batch of rollouts holds all its minibatches (LLaMA-Factory: a buffer of that many batches)."""
    split = "ppo_buffer_size" if "ppo_buffer_size" in config.defaults else "num_mini_batches"
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", split)
    parts = integer(config[split])
    rows = integer(config[keys[0]]) * integer(config[keys[1]]) * parts * config.devices
    ours = {"train.batch_size": rows, "algorithm.minibatches": parts}
    yield config.line(keys, "translated", ours, f"prompts of one batch of rollouts, on {config.devices} device(s)")


def adapter_line(config: ToolConfig, keys: list[str], rank: int, alpha: float, **targets: Any) -> Line:
    """A line about the LoRA keys."""
    flags = {ours: True for key, ours in (("use_rslora", "lora.rslora"), ("use_dora", "lora.dora")) if config[key]}
    ours = {"lora.r": rank, "lora.alpha": alpha, "lora.dropout": number(config["lora_dropout"]), **flags, **targets}
    return config.line(keys, "translated", ours)


def quantized(config: ToolConfig, key: str, quantization: str | None, has_adapter: bool) -> Iterator[Line]:
    """4- or 8-bit weights, which need an adapter here. `quantization`: our setting, None if not requested, "" if unsupported."""
    if quantization is None:
        if config.sets(key):
            yield config.line([key], "same", note="off, as here")
    elif quantization and has_adapter:
        yield config.line([key], "translated", {"model.quantize": quantization})
    else:
        how = "model.quantize: nf4 (or int8) stands beside a lora section (docs/memory.md)"
        yield config.line([key], "unsupported", note=how)


# ---- Local models and rows ----

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".ndjson")


def is_local(name: str, folder: str) -> bool:
    """Whether a data set is a file or folder rather than a hub id."""
    return name.endswith(FILES) or name.startswith(("/", ".", "~")) or os.path.exists(os.path.join(folder, name))


def detect_local_layout(path: str, columns: Mapping[str, str]) -> tuple[str, bool]:
    """(layout, whether there are pictures) of a local file's first rows. ``("", False)`` if it is missing or has no known layout."""
    if not Path(path).expanduser().exists():
        return "", False
    try:
        rows = list(islice(read_rows(path), FIRST_ROWS))
        has_pictures = any(
            is_nonempty(rename_columns(r.values, columns).get(n)) for r in rows if isinstance(r, Row) for n in COLUMNS
        )
        return detect_layout(rows, path, columns, {})[0], has_pictures
    except DataError:
        return "", False


def model_type(path: str) -> str | None:
    """`model_type` in a local model folder's config.json, or None for a hub id."""
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(config.get("model_type")) if isinstance(config, dict) else None


DERIVATIONS = (batch, length, schedule, saving, precision, val_size, report_to, ppo_batch)


def vision_parts(config: ToolConfig, parts: list[str]) -> Line:
    """model.vision, from the keys `parts` that freeze the vision tower and the projector (both frozen by default)."""
    frozen = [config[k] is None or flag(config[k]) for k in parts]
    same = frozen[0] == frozen[1]
    how = "" if same else "the vision tower and its projector are trained both (model.vision: trained) or neither"
    ours = {"model.vision": "frozen" if any(frozen) else "trained"}
    return config.line(
        parts if config.sets(*parts) else ["dataset"], "translated" if same else "unsupported", ours, how
    )
