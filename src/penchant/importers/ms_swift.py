"""Import ms-swift's arguments (`swift sft`, `swift rlhf`, `args.json`). Those that translate one to one are in ms_swift.yaml."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from penchant.importers import hf, trl
from penchant.importers.rules import OFF, Line, ToolConfig, flag, integer, layers, number, source, table

TABLE = table("ms_swift")


def _accumulation(config: ToolConfig) -> int:
    """Passes of one optimizer step: if they are not set, as many as 16 rows need."""
    rows = integer(config["per_device_train_batch_size"]) * config.devices
    return integer(config["gradient_accumulation_steps"] or math.ceil(16 / rows))


def train_batch(config: ToolConfig) -> Iterator[Line]:
    """Rows of one optimizer step."""
    rows, accumulation = integer(config["per_device_train_batch_size"]), _accumulation(config)
    reason = "" if config["gradient_accumulation_steps"] else "; without an accumulation, at least 16"
    keys = [k for k in TABLE["derived"]["train_batch"] if config.sets(k)] or ["per_device_train_batch_size"]
    note = f"{rows} x {accumulation} x {config.devices} device(s){reason}; memory is train.tokens_per_step here"
    yield config.line(keys, "translated", {"train.batch_size": rows * accumulation * config.devices}, note)


def shuffle(config: ToolConfig) -> Iterator[Line]:
    """Whether rows are shuffled: once when they are read, and again in each epoch."""
    keys = ("dataset_shuffle", "train_dataloader_shuffle")
    once, again = (config[k] is None or flag(config[k]) for k in keys)
    if config.sets(*keys):
        note = "one order for all epochs there, a new one in each epoch here" if once and not again else ""
        yield config.line(keys, "translated", {"train.shuffle": once or again}, note)


def ppo_batch(config: ToolConfig) -> Iterator[Line]:
    """PPO's batch, with the accumulation of `train_batch`."""
    defaults = {**config.defaults, "gradient_accumulation_steps": _accumulation(config)}
    yield from hf.ppo_batch(replace(config, defaults=defaults))


def learning_rate(config: ToolConfig) -> Iterator[Line]:
    """The learning rate, whose default depends on train_type."""
    if config.sets("learning_rate"):
        yield config.line(["learning_rate"], "translated", {"train.lr": number(config["learning_rate"])})
    else:
        lr = 1e-5 if config["train_type"] == "full" else 1e-4
        yield Line((("learning_rate", lr),), "translated", (("train.lr", lr),), is_set=False)


def dtype(config: ToolConfig) -> Iterator[Line]:
    """torch_dtype, or else bf16 and fp16."""
    set_keys = [k for k in TABLE["derived"]["dtype"] if config.sets(k)]
    kind = str(config["torch_dtype"] or ("bfloat16" if config["bf16"] else "float16" if config["fp16"] else ""))
    kind = kind.removeprefix("torch.")
    if kind in ("float16", "fp16"):
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield config.line(set_keys, "unsupported", {"model.dtype": "auto"}, note)
    elif kind:
        ours = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}.get(kind)
        how = "" if ours else "set model.dtype: bf16 or fp32"
        yield config.line(set_keys, "translated" if ours else "unsupported", {"model.dtype": ours} if ours else {}, how)
    elif set_keys:
        yield config.line(set_keys, "same", note="bf16 where the hardware has it; the type of the model's config there")


def tuner(config: ToolConfig) -> Iterator[Line]:
    """train_type and the adapter keys."""
    kind, adapters = (
        config["train_type"],
        config["adapters"] if isinstance(config["adapters"], list) else [config["adapters"]],
    )
    adapters = [str(a) for a in adapters if a not in OFF]
    bits = {"4": "nf4", "8": "int8"}.get(str(config["quant_bits"]), "") if config["quant_bits"] else None
    bits = "" if bits and config["quant_method"] not in (None, "bnb") else bits
    yield from hf.quantized(config, "quant_bits", bits, kind == "lora")
    if config.sets("quant_method"):
        yield config.line(["quant_method"], "same", note="of quant_bits")
    keys = TABLE["derived"]["tuner"][1:11]
    set_keys = [k for k in keys if config.sets(k)]
    if kind == "full":
        yield config.line(
            [k for k in ("train_type", *set_keys) if config.sets(k)], "same", note="the whole model is trained"
        )
    elif kind != "lora":
        yield config.line(
            ["train_type", *set_keys], "unsupported", note="full and lora only: set train_type to one of them"
        )
    elif len(adapters) > 1:
        how = "one adapter is trained on: merge the others first, and set model.path"
        yield config.line(["adapters"], "unsupported", note=how)
    elif adapters:
        note = "the adapter is trained on, and the reference is its start"
        yield config.line(["train_type", *set_keys], "translated", {"model.adapter": adapters[0]}, note)
    else:
        targets = config["target_regex"] or layers(config["target_modules"])
        targets = "all-linear" if targets == ["all-linear"] else targets
        used_keys = ["train_type", "lora_r", "lora_alpha", "lora_dropout", "target_modules", *set_keys]
        options: dict[str, Any] = {"lora.target_modules": targets}
        if config["loraplus_lr_ratio"]:
            options["lora.lr_ratio"] = number(config["loraplus_lr_ratio"])
        rank, alpha = integer(config["lora_r"]), number(config["lora_alpha"])
        yield hf.adapter_line(config, list(dict.fromkeys(used_keys)), rank, alpha, **options)
    if config.sets("ref_adapters"):
        same = config["ref_adapters"] in (config["adapters"], adapters)
        how = "the reference is the adapter's start; for another one, merge it and set reference.path"
        yield config.line(["ref_adapters"], "same" if same else "unsupported", note=how)


# ---- Data sets ----


def datasets(config: ToolConfig) -> Iterator[Line]:
    """`dataset` as `data.path` or `data.sources`, and `val_dataset` as `data.eval_path`. Entries are `[HF::]name[:subset][#rows]`."""
    locations, notes = [], []
    for name in _as_list(config["dataset"]):
        location, note, problem = _locate(name, config)
        locations.append(location)
        notes += [note] if note else []
        if problem:
            yield Line((("dataset", name),), "unsupported", (), problem)
    note = "; ".join(dict.fromkeys(notes))
    if len(locations) > 1 and any("limit" in location for location in locations):
        yield config.line(["dataset"], "translated", {"data.sources": locations}, note)
    elif locations:
        paths = [location["path"] for location in locations]
        ours: dict[str, Any] = {"data.path": paths if len(paths) > 1 else paths[0]}
        ours |= {"data.limit": locations[0]["limit"]} if "limit" in locations[0] else {}
        yield config.line(["dataset"], "translated", ours, note)
    held_out = _as_list(config["val_dataset"])
    if held_out:
        held_out_locations = [_locate(name, config) for name in held_out]
        paths = [location["path"] for location, _, _ in held_out_locations]
        incomplete = [
            name
            for name, (location, _, problem) in zip(held_out, held_out_locations, strict=True)
            if problem or "limit" in location
        ]
        ours = {"data.eval_path": paths if len(paths) > 1 else paths[0]}
        yield config.line(
            ["val_dataset"], "translated", ours, f"{', '.join(incomplete)}: all rows of the set" if incomplete else ""
        )
    if config["columns"]:
        columns = _columns(config)
        how = "" if columns else "it maps their columns to names of ms-swift"
        ours = {"data.columns": columns} if columns else {}
        yield config.line(["columns"], "translated" if columns else "unsupported", ours, how)
    if config.sets("use_hf"):
        yield config.line(["use_hf"], "same", note="hub ids are Hugging Face's here")
    if any(has_pictures for _, has_pictures in _local_layouts(config)):
        yield from _pictures(config)


def _columns(config: ToolConfig) -> dict[str, str]:
    """``{our field: their column}``."""
    names = config["columns"] if isinstance(config["columns"], Mapping) else {}
    return {TABLE["columns"].get(str(std), str(std)): str(theirs) for theirs, std in names.items()}


def _local_layouts(config: ToolConfig) -> list[tuple[str, bool]]:
    """(layout, whether it has pictures) of each data set that is a local file, and ``("", False)`` of others."""
    places = [_locate(name, config)[0]["path"] for name in _as_list(config["dataset"])]
    return [
        hf.detect_local_layout(path if os.path.exists(path) else os.path.join(config.folder, path), _columns(config))
        for path in places
    ]


def _pictures(config: ToolConfig) -> Iterator[Line]:
    """Which parts of a vision model are trained."""
    yield hf.vision_parts(config, ["freeze_vit", "freeze_aligner"])
    if config.sets("freeze_llm"):
        frozen = flag(config["freeze_llm"])
        note = "the language model is trained, or its adapter" if frozen else "as here"
        yield config.line(["freeze_llm"], "unsupported" if frozen else "same", note=note)


def loss_scale(config: ToolConfig) -> Iterator[Line]:
    """loss_scale: which answers of a conversation are trained on. Looks at the rows to see if they are conversations."""
    kind = str(config["loss_scale"] or "default").partition("+")[0]
    are_conversations = [shape in ("messages", "sharegpt") for shape, _ in _local_layouts(config) if shape]
    if kind == "last_round":
        yield config.line(["loss_scale"], "same", note="of a conversation the last answer is learned")
    elif kind != "default":
        how = (
            "weights of parts of an answer are not here; every answer is learned with data.layout_options={turns: all}"
        )
        yield config.line(["loss_scale"], "unsupported", note=how)
    elif all(are_conversations) and are_conversations:
        ours = {"data.layout_options": {"turns": "all"}}
        yield config.line(
            ["loss_scale"],
            "translated",
            ours,
            "" if config.sets("loss_scale") else "every answer of a conversation is learned",
        )
    elif any(are_conversations) or not are_conversations:
        how = "every answer of a conversation is learned there: set layout_options={turns: all} for the data sets that hold some"
        yield Line((("loss_scale", "default"),), "unsupported", (), how, config.sets("loss_scale"))
    elif config.sets("loss_scale"):
        yield config.line(["loss_scale"], "same", note="the rows are no conversations")


def _as_list(value: Any) -> list[str]:
    if value in OFF:
        return []
    return [str(v) for v in value] if isinstance(value, list) else str(value).split()


def _locate(name: str, config: ToolConfig) -> tuple[dict[str, Any], str, str]:
    """(our path and limit, what differs, what is not supported) of one data set."""
    hub, _, rest = name.rpartition("::")
    rest, _, count = rest.partition("#")
    limit = {"limit": int(count)} if re.fullmatch(r"\d+", count) else {}
    note = f"the first {count} rows; {count} rows drawn at random there" if limit else ""
    if hf.is_local(rest.partition(":")[0], config.folder):
        return {"path": rest.partition(":")[0], **limit}, note, ""
    rest, _, subset = rest.partition(":")
    if not (hub == "HF" or str(config["use_hf"]).lower() in ("true", "1")):
        hub_note = "hub ids are ModelScope's there and Hugging Face's here: see that they are the same"
        note = "; ".join(filter(None, (note, hub_note)))
    how = f"the subset {subset} is not read, but the default one: save it as a file and set data.path"
    return {"path": f"{rest}:train", **limit}, note, how if subset not in ("", "default") else ""


def truncation(config: ToolConfig) -> Iterator[Line]:
    """max_length, and how longer rows are handled."""
    if config.sets("max_length"):
        yield config.line(["max_length"], "translated", {"data.max_length": integer(config["max_length"])})
    else:
        how = "the model's whole context there, at most 1024 here: set data.max_length"
        yield Line((("max_length", "the model's"),), "unsupported", (), how, is_set=False)
    kind = str(config["truncation_strategy"])
    if kind == "delete":
        ours = {"data.truncation": "bad_row", "data.on_bad_row": "skip"}
        note = "longer rows are set aside and counted, as all rows that cannot be read"
        yield config.line(["truncation_strategy"], "translated", ours, note)
    elif kind in ("left", "right"):
        note = "" if kind == "left" else "a longer row loses the beginning of its prompt first, then the answer's end"
        ours = {"data.truncation": "prompt_then_completion"}
        yield config.line(["truncation_strategy"], "translated", ours, note)
    else:
        how = "set data.truncation: bad_row or prompt_then_completion"
        yield config.line(["truncation_strategy"], "unsupported", note=how)


def advantage_estimator(config: ToolConfig) -> Iterator[Line]:
    """advantage_estimator, which selects an algorithm here, and dynamic_sample."""
    names = {"grpo": None, "rloo": "rloo", "reinforce_plus_plus": "reinforce_pp"}
    if config.sets("advantage_estimator"):
        kind = str(config["advantage_estimator"])
        name, how = names.get(kind), "set algorithm.name: grpo, rloo or reinforce_pp"
        status: Any = "unsupported" if kind not in names else "translated" if name else "same"
        yield config.line(
            ["advantage_estimator"], status, {"algorithm.name": name} if name else {}, "" if kind in names else how
        )
    keys = [k for k in ("dynamic_sample", "max_resample_times") if config.sets(k)]
    if config["dynamic_sample"]:
        ours = {"algorithm.dynamic_sampling": integer(config["max_resample_times"] or 3)}
        yield config.line(keys, "translated", ours)
    elif keys:
        yield config.line(keys, "same", note="off, as here")


def guess(values: Mapping[str, Any], name: str) -> str:
    """The method that a file is for: rlhf_type, or else sft."""
    return str(values.get("rlhf_type") or "sft")


OWN = (
    train_batch,
    shuffle,
    ppo_batch,
    learning_rate,
    dtype,
    tuner,
    datasets,
    loss_scale,
    truncation,
    advantage_estimator,
)
SOURCE = source("ms-swift", (*hf.DERIVATIONS, *trl.DERIVATIONS, *OWN), guess)
