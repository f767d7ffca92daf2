"""Import Axolotl's files (`axolotl train FILE`). Keys that translate one to one are in axolotl.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from penchant.data.layouts.fields import ROLES
from penchant.importers import hf, trl
from penchant.importers.rules import OFF, Line, ToolConfig, integer, layers, number, rules_of, source, table

TABLE = table("axolotl")
LONGEST_WARMUP = 100  # steps, if the file sets none


def total_batch(config: ToolConfig) -> Iterator[Line]:
    """micro_batch_size with gradient accumulation, or batch_size, which includes both."""
    if not config.sets("batch_size"):
        yield from hf.batch(config)
        return
    ours = {"train.batch_size": integer(config["batch_size"]) * config.devices}
    keys = ["batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"]
    note = f"{config['batch_size']} x {config.devices} device(s); memory is train.tokens_per_step here"
    yield config.line([k for k in keys if config.sets(k)], "translated", ours, note)


def lr_schedule(config: ToolConfig) -> Iterator[Line]:
    """The learning rate schedule, whose default warm-up has at most 100 steps, and cosine_min_lr_ratio."""
    yield from hf.schedule(config)
    if not config.sets("warmup_steps", "warmup_ratio") and config["lr_scheduler_type"] != "constant":
        total = number(config["max_steps"] or 0)
        if total * number(config["warmup_ratio"]) > LONGEST_WARMUP:
            yield config.line(["max_steps"], "translated", {"train.warmup_fraction": LONGEST_WARMUP / total})
        elif not total:
            how = f"at most {LONGEST_WARMUP} steps there: if that is less, set train.warmup_fraction to {LONGEST_WARMUP} / all steps"
            yield config.line(["warmup_ratio"], "unsupported", note=how)
    if config.sets("cosine_min_lr_ratio"):
        ours = {"train.min_lr_fraction": number(config["cosine_min_lr_ratio"])}
        cosine = config["lr_scheduler_type"] == "cosine"
        note = "" if cosine else "without effect: the schedule is not cosine"
        yield config.line(["cosine_min_lr_ratio"], "translated" if cosine else "same", ours if cosine else {}, note)


def intervals(config: ToolConfig) -> Iterator[Line]:
    """When to checkpoint and evaluate: every N steps, every epoch, or N times per epoch."""
    yield from hf.saving(config)
    for key, ours in (("saves_per_epoch", "checkpoint.every"), ("evals_per_epoch", "evaluation.every")):
        if config.sets(key):
            times = number(config[key])
            how = f"set {ours} to the steps of an epoch / {config[key]} (`penchant plan` prints how many there are)"
            values = {0.0: None, 1.0: "epoch"}
            known = times in values
            yield config.line(
                [key],
                "translated" if known else "unsupported",
                {ours: values[times]} if known else {},
                "" if known else how,
            )


def dtype(config: ToolConfig) -> Iterator[Line]:
    """bf16 (auto, true, full) and fp16, and bfloat16, float16 and float32, which are without mixed precision."""
    keys = ["bf16", "fp16", "bfloat16", "float16", "float32"]
    set_keys = [k for k in keys if config.sets(k)] or ["bf16"]
    bf16 = config["bf16"] if config.sets("bf16") else None if config["fp16"] or config["float16"] else config["bf16"]
    if config["bfloat16"] or bf16 in (True, "full"):
        yield config.line(set_keys, "translated", {"model.dtype": "bf16"}, "weights stay in fp32 beside a bf16 copy")
    elif bf16 == "auto":
        yield config.line(set_keys, "translated", {"model.dtype": "auto"}, "bf16 where the hardware has it")
    elif config["fp16"] or config["float16"]:
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield config.line(set_keys, "unsupported", {"model.dtype": "auto"}, note)
    else:
        yield config.line(set_keys, "translated", {"model.dtype": "fp32"})


def tracking(config: ToolConfig) -> Iterator[Line]:
    """W&B, MLflow and TensorBoard, with project and run name."""
    enabled = {
        "wandb": bool(config["wandb_project"]) if config["use_wandb"] is None else bool(config["use_wandb"]),
        "mlflow": bool(config["use_mlflow"]),
        "tensorboard": bool(config["use_tensorboard"]),
    }
    set_keys = [k for k in TABLE["derived"]["tracking"] if config.sets(k)]
    trackers = [name for name, is_enabled in enabled.items() if is_enabled]
    if not trackers:
        if set_keys:
            yield config.line(set_keys, "same", note="no tracker, as here")
        return
    ours: dict[str, Any] = {"logging.trackers": trackers}
    project, name = (
        config["wandb_project"] or config["mlflow_experiment_name"],
        config["wandb_name"] or config["mlflow_run_name"],
    )
    ours |= ({"logging.project": str(project)} if project else {}) | ({"logging.name": str(name)} if name else {})
    yield config.line(set_keys, "translated", ours)


def adapters(config: ToolConfig) -> Iterator[Line]:
    """adapter (lora or qlora) and its related keys."""
    kind, keys = config["adapter"], TABLE["derived"]["adapters"]
    lora = kind in ("lora", "qlora")
    for key, ours in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        yield from hf.quantized(config, key, ours if config[key] else None, lora)
    set_keys = ["adapter", *(k for k in keys[3:] if config.sets(k))]
    if kind in OFF:
        if config.sets(*set_keys):
            yield config.line(
                [k for k in set_keys if config.sets(k)], "same", note="no adapter: the whole model is trained"
            )
        return
    if not lora:
        yield config.line(set_keys, "unsupported", note="lora and qlora only")
        return
    if config["lora_model_dir"]:
        note = "the reference is the adapter's start here, the model under it there"
        yield config.line(set_keys, "translated", {"model.adapter": str(config["lora_model_dir"])}, note)
        return
    options: dict[str, Any] = (
        {"lora.lr_ratio": number(config["loraplus_lr_ratio"])} if config["loraplus_lr_ratio"] else {}
    )
    target_keys = [k for k in ("lora_target_linear", "lora_target_modules") if config[k]]
    if target_keys:
        options["lora.target_modules"] = (
            "all-linear" if "lora_target_linear" in target_keys else layers(config["lora_target_modules"])
        )
    used_keys = [*set_keys, *(k for k in ("lora_r", "lora_alpha", "lora_dropout") if k not in set_keys)]
    yield hf.adapter_line(config, used_keys, integer(config["lora_r"]), number(config["lora_alpha"]), **options)
    if not target_keys:
        yield trl.peft_targets(config)


def pictures(config: ToolConfig) -> Iterator[Line]:
    """processor_type, which is set for models that read pictures."""
    if not config["processor_type"]:
        if config.sets("processor_type"):
            yield config.line(["processor_type"], "same", note="text alone, as here")
        return
    whole_model = config["adapter"] in OFF
    note = "" if whole_model else "adapters of the vision tower too: model.vision: trained"
    ours = {"model.vision": "trained" if whole_model else "frozen"}
    yield config.line(["processor_type"], "translated", ours, note)


def excess_length(config: ToolConfig) -> Iterator[Line]:
    """excess_length_strategy: what to do with rows longer than sequence_len tokens."""
    strategies = {
        "drop": {"data.truncation": "bad_row", "data.on_bad_row": "skip"},
        "raise": {"data.truncation": "bad_row"},
        "truncate": {"data.truncation": "prompt_then_completion"},
    }
    ours = strategies.get(str(config["excess_length_strategy"]))
    note = (
        "longer rows are set aside and counted, as all rows that cannot be read" if ours == strategies["drop"] else ""
    )
    how = "set data.truncation: bad_row or prompt_then_completion"
    yield config.line(["excess_length_strategy"], "translated" if ours else "unsupported", ours, note if ours else how)


# ---- Data sets ----


def data_sets(config: ToolConfig) -> Iterator[Line]:
    """Training sets as `data.path`, or as `data.sources` if there are several, and test sets as `data.eval_path`."""
    method = str(config["rl"]) if config["rl"] else "reward" if config["reward_model"] else "sft"
    sources: list[dict[str, Any]] = []
    keys = [k for k in ("datasets", "pretraining_dataset") if config[k]]
    single = len(keys) == 1 and (not isinstance(config[keys[0]], list) or len(config[keys[0]]) == 1)
    for key in keys:
        kind = "pretrain" if key == "pretraining_dataset" else method
        for i, entry in enumerate(config[key] if isinstance(config[key], list) else [config[key]]):
            entry = {"path": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping):
                yield Line(((f"{key}[{i}]", entry),), "unsupported", (), "it is not a mapping of a data set's keys")
                continue
            where = f"{key}[{i}]"
            settings, used_keys, lines = _data_set(entry, where, kind, config.folder)
            yield from lines
            if "path" in settings:
                sources.append(settings)
            theirs = tuple((f"{where}.{k}", entry[k]) for k in used_keys)
            if theirs and single:
                yield Line(theirs, "translated", tuple((f"data.{k}", v) for k, v in settings.items()))
            elif theirs:
                yield Line(theirs, "translated", (), ", ".join(f"{k}: {v}" for k, v in settings.items()))
    if len(sources) > 1:
        note = f"{len(sources)} data sets, each gone through once in an epoch"
        yield Line(
            tuple((k, f"{len(config[k])} data sets") for k in keys), "translated", (("data.sources", sources),), note
        )
    elif sources:  # a single set has its own line above
        ours = () if single else tuple((f"data.{k}", v) for k, v in sources[0].items())
        yield Line(tuple((k, "1 data set") for k in keys), "translated", ours)
    if config["test_datasets"]:
        yield from _held_out(config, method)


def _held_out(config: ToolConfig, method: str) -> Iterator[Line]:
    paths = []
    for i, entry in enumerate(config["test_datasets"]):
        where = f"test_datasets[{i}]"
        settings, _, lines = _data_set(entry, where, method, config.folder)
        yield from (line for line in lines if line.status == "unsupported")
        theirs = tuple((f"{where}.{k}", v) for k, v in entry.items())
        yield Line(theirs, "same", note="read like the training rows")
        paths += [settings["path"]] if "path" in settings else []
    files = [p for path in paths for p in (path if isinstance(path, list) else [path])]
    if files:
        yield config.line(["test_datasets"], "translated", {"data.eval_path": files if len(files) > 1 else files[0]})


def _data_set(
    entry: Mapping[str, Any], where: str, method: str, folder: str
) -> tuple[dict[str, Any], list[str], list[Line]]:
    """(our settings, the keys that they come from, lines about the other keys) of one data set."""
    lines = [
        Line(((f"{where}.{k}", None),), "same", note="not set")
        for k, v in entry.items()
        if v is None and k != "roles_to_train"
    ]
    dataset = ToolConfig({k: v for k, v in entry.items() if v is not None}, {})
    path, used_keys, location_notes = _locate(dataset, folder)
    settings: dict[str, Any] = path
    shape, columns, layout_keys, layout_notes = _layout(dataset, method)
    used_keys += layout_keys
    options: dict[str, Any] = {}
    if shape in ("messages", "sharegpt"):
        turns, turn_keys, turn_notes = _trained_turns(entry)
        options, used_keys = ({"turns": turns} if turns != "last" else {}), used_keys + turn_keys
        layout_notes += turn_notes
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    for key, value in (("shape", shape), ("columns", columns), ("layout_options", options)):
        settings |= {key: value} if value else {}
    noted = {k for k, _, _ in (*location_notes, *layout_notes)}
    lines += [
        Line(((f"{where}.{k}", _entry_value(entry, k)),), status, (), note)
        for k, status, note in (*location_notes, *layout_notes)
    ]
    rules = rules_of(TABLE["data_set"])
    for k in dataset.values:
        if k in used_keys or k in noted or (k == "type" and isinstance(dataset[k], Mapping)):
            continue
        line = (
            rules[k](k, dataset)
            if k in rules
            else dataset.line([k], "unsupported", note="not a key of a data set that the importer knows")
        )
        lines.append(Line(((f"{where}.{k}", dataset[k]),), line.status, (), line.note))
    return settings, used_keys, lines


Notes = list[tuple[str, Any, str]]  # key of a data set, status, note


def _entry_value(entry: Mapping[str, Any], key: str) -> Any:
    first, _, rest = key.partition(".")
    return entry[first][rest] if rest else entry[first]


def _locate(dataset: ToolConfig, folder: str) -> tuple[dict[str, Any], list[str], Notes]:
    """(our path and limit, keys used, notes): local files, a hub id with its split, or nothing if the location is unsupported."""
    name, files, split = str(dataset["path"] or ""), dataset["data_files"], dataset["split"]
    file_names = [str(f) for f in (files if isinstance(files, list) else [files] if files else [])]
    if name in ("json", "csv", "parquet", "text", "arrow") and file_names:
        path = file_names if len(file_names) > 1 else file_names[0]
        used_keys = ["path", "data_files"]
        return {"path": path}, used_keys, [("split", "same", "files are read whole")] if split else []
    if re.match(r"(s3|gs|gcs|az|abfs|oci|https?)://", name) or (file_names and not hf.is_local(name, folder)):
        how = "download the files and set data.path to them"
        return {}, [], [(k, "unsupported", how) for k in ("path", "data_files", "split") if dataset.sets(k)]
    if hf.is_local(name, folder):
        path = [f"{name}/{f}" for f in file_names] if file_names else name
        path = path[0] if isinstance(path, list) and len(path) == 1 else path
        used_keys = [k for k in ("path", "data_files") if dataset.sets(k)]
        return {"path": path}, used_keys, [("split", "same", "files are read whole")] if split else []
    match = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", str(split or "train"))
    if match is None:
        how = "a part of a split is not read: set the split alone, and data.limit for its first rows"
        return {"path": f"{name}:train"}, ["path"], [("split", "unsupported", how)]
    location: dict[str, Any] = {"path": f"{name}:{match[1]}"} | ({"limit": int(match[2])} if match[2] else {})
    return location, ["path", *(["split"] if split else [])], []


def _layout(dataset: ToolConfig, method: str) -> tuple[str, dict[str, str], list[str], Notes]:
    """(our layout, columns by field, keys used, notes) of a data set's rows."""
    kind = TABLE["kinds"].get(method, "pairs" if method == "reward" else "sft")
    row_type = dataset["type"]
    if method == "pretrain":
        row_type = row_type or "pretrain"
    if isinstance(row_type, Mapping):
        return _type_mapping(row_type, kind)
    if row_type is None:
        return "", {}, [], []
    layouts = {**TABLE["types"][kind], **TABLE["types"].get(method, {})}
    type_name = str(row_type).partition(":")[0]
    entry = layouts.get(type_name) or layouts.get(type_name.rpartition(".")[2])
    if not entry:
        how = "the layout is found by what the rows hold: look at it with `penchant data show`, or set data.shape"
        if kind == "prompts":
            how = "rows are read as they are: give them a `prompt` column, or name a layout of your own (docs/data_formats.md)"
        return "", {}, [], [("type", "unsupported", how)]
    shape, columns = str(entry["shape"]), dict(entry.get("columns", {}))
    used_keys, notes = (["type"] if dataset.sets("type") else []), []
    if "note" in entry and used_keys:
        used_keys, notes = [], [("type", "translated", f"{shape}; {entry['note']}")]
    fields = TABLE["fields"].get(shape, {})
    for key in (k for k in fields if dataset.sets(k)):
        columns[fields[key]] = str(dataset[key])
        used_keys.append(key)
    notes += _message_notes(dataset)
    return shape, columns, used_keys, notes


def _message_notes(dataset: ToolConfig) -> Notes:
    """Notes on the keys that name the role and content fields of a conversation's turns."""
    notes: Notes = []
    mapping = {"role": dataset["message_field_role"], "content": dataset["message_field_content"]}
    mapping |= dataset["message_property_mappings"] or {}
    fits = mapping.get("role") in (None, "role", "from") and mapping.get("content") in (None, "content", "value")
    how = "turns are of role and content, or of from and value: rename them in the rows"
    for key in ("message_property_mappings", "message_field_role", "message_field_content"):
        if dataset.sets(key):
            notes.append((key, "same" if fits else "unsupported", "found by what the turns hold" if fits else how))
    if dataset.sets("roles"):
        roles = dataset["roles"] if isinstance(dataset["roles"], Mapping) else {}
        fits = bool(roles) and all(
            ROLES.get(str(n)) == ROLES.get(str(ours)) for ours, names in roles.items() for n in names
        )
        how = f"roles are read by these names: {', '.join(ROLES)}"
        notes.append(("roles", "same" if fits else "unsupported", "these names are known" if fits else how))
    return notes


def _trained_turns(entry: Mapping[str, Any]) -> tuple[str, list[str], Notes]:
    """(turns, keys used, notes): which answers of a conversation are trained on."""
    if "roles_to_train" not in entry:
        return "all", [], []
    roles = entry["roles_to_train"]
    if roles is None:
        return "last", [], [("roles_to_train", "same", "the last answer is learned")]
    if set(roles) <= {"assistant", "gpt"}:
        return "all", ["roles_to_train"], []
    return "all", [], [("roles_to_train", "unsupported", "answers of the assistant alone are learned")]


def _type_mapping(row_type: Mapping[str, Any], kind: str) -> tuple[str, dict[str, str], list[str], Notes]:
    """(our layout, columns, keys used, notes) of a `type` mapping, which names columns and the prompt format."""
    spec, columns, notes = TABLE["written"][kind], {}, []
    for key, value in row_type.items():
        name = f"type.{key}"
        if value in OFF:
            notes.append((name, "same", "not set"))
        elif key in spec["fields"]:
            columns[spec["fields"][key]] = str(value)
            notes.append((name, "translated", f"columns: {{{spec['fields'][key]}: {value}}}"))
        elif key.endswith("format") and value in TABLE["formats"]:
            notes.append((name, "same", "as here"))
        else:
            how = "the wording of a prompt stands in the rows, or in a layout of your own (docs/data_formats.md)"
            notes.append((name, "unsupported", how))
    return str(spec["shape"]), columns, [], notes


def guess(values: Mapping[str, Any], name: str) -> str:
    """The method that a file is for: `rl`, or else reward for a reward model, or sft."""
    rl = values.get("rl")
    return str(rl) if rl else "reward" if values.get("reward_model") else "sft"


SOURCE = source(
    "axolotl",
    (
        *hf.DERIVATIONS,
        *trl.DERIVATIONS,
        total_batch,
        lr_schedule,
        intervals,
        dtype,
        tracking,
        adapters,
        pictures,
        excess_length,
        data_sets,
    ),
    guess,
)
