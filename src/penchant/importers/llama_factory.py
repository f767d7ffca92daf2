"""Import LLaMA-Factory's files (`llamafactory-cli train FILE`). Keys that translate one to one are in llama_factory.yaml."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.importers import hf
from penchant.importers.rules import Line, ToolConfig, integer, layers, number, source, table

TABLE = table("llama_factory")


def lora(config: ToolConfig) -> Iterator[Line]:
    """finetuning_type and the adapter keys."""
    kind_key, *keys, bits_key = TABLE["derived"]["lora"]
    kind, bits = config[kind_key], config[bits_key]
    yield from hf.quantized(config, bits_key, {4: "nf4", 8: "int8"}.get(bits, "") if bits else None, kind == "lora")
    if kind == "full":
        set_keys = [kind_key, *(k for k in keys if config.sets(k))]
        yield config.line(set_keys, "same", note="without `lora` the whole model is trained")
        return
    if kind != "lora":
        yield config.line([kind_key], "unsupported", note="full and lora only: set finetuning_type to one of them")
        return
    rank = integer(config["lora_rank"])
    used_keys = [kind_key, *(k for k in keys if config[k] is not None)]
    options: dict[str, Any] = {}
    if config["loraplus_lr_ratio"]:
        options["lora.lr_ratio"] = number(config["loraplus_lr_ratio"])
    if adapter := config["adapter_name_or_path"]:
        if "," in str(adapter):
            how = "one adapter is trained on: merge the others first, and set model.path"
            yield config.line(["adapter_name_or_path"], "unsupported", note=how)
            return
        options["model.adapter"] = str(adapter)
        yield config.line(
            used_keys, "translated", options, "the reference is the adapter's start here, the model under it there"
        )
        return
    options["lora.target_modules"] = layers(config["lora_target"])
    yield hf.adapter_line(config, used_keys, rank, number(config["lora_alpha"] or 2 * rank), **options)


# ---- Data sets by name ----


def data(config: ToolConfig) -> Iterator[Line]:
    """Look up `dataset` and `eval_dataset` in dataset_info.json, as LLaMA-Factory does, and translate picture keys if a set has images."""
    entries: list[Mapping[str, Any]] | None = []
    for key, ours in (("dataset", "data.path"), ("eval_dataset", "data.eval_path")):
        if config[key]:
            descriptions = yield from _resolve_datasets(config, key, ours)
            entries = None if descriptions is None or entries is None else entries + descriptions
    keys = [k for k in TABLE["derived"]["data"][3:] if config.sets(k)]
    if entries is None:
        if keys:
            how = "whether rows have pictures or turns stands in dataset_info.json: lay it beside the file"
            yield config.line(keys, "unsupported", note=how)
    elif any("images" in _column_names(entry) for entry in entries):
        yield from _pictures(config, entries)


def _resolve_datasets(
    config: ToolConfig, key: str, our_key: str
) -> Generator[Line, None, list[Mapping[str, Any]] | None]:
    """Translate the data sets of a key. Returns their descriptions, or None without dataset_info.json."""
    value = config[key]
    names = [str(n) for n in value] if isinstance(value, list) else [n.strip() for n in str(value).split(",")]
    folder = Path(str(config["dataset_dir"]))
    info, where = _dataset_info(folder, Path(config.folder))
    if info is None:
        path = [str(folder / f"{n}.json") for n in names]
        note = f"{where} is not here: the file's place is guessed; with it beside the file, its columns, turns and pictures are read too"
        yield config.line([key, "dataset_dir"], "translated", {our_key: path if len(path) > 1 else path[0]}, note)
        return None
    entries: list[Mapping[str, Any]] = []
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            raise ConfigError(where, f"there is no {name!r}", f"there are {', '.join(sorted(map(str, info)))[:200]}")
        entries.append(entry)
        yield from _unread_fields(name, entry)
        history = _column_names(entry).get("history")
        if history and str(config["stage"] or "sft") == "sft" and not config["mask_history"]:
            how = "its answers are learned there and only read here: write the rows as conversations"
            yield Line(((f"{name}.columns.history", history),), "unsupported", (), how)
    paths = [_locate(entry, folder) for entry in entries]
    settings: dict[str, Any] = {our_key: paths if len(paths) > 1 else paths[0]}
    row_options = [_row_options(entry, config) for entry in entries]
    if our_key == "data.path" and any(r != row_options[0] for r in row_options):
        settings = {
            "data.sources": [{"path": path, **options} for path, options in zip(paths, row_options, strict=True)]
        }
    elif our_key == "data.path":
        settings |= {f"data.{k}": v for k, v in row_options[0].items()}
    used_keys = [key, "dataset_dir", *(["mask_history"] if config.sets("mask_history") else [])]
    yield config.line(used_keys, "translated", settings)
    return entries


def _row_options(entry: Mapping[str, Any], config: ToolConfig) -> dict[str, Any]:
    """How to read the rows of one set, from its description alone."""
    is_conversation = entry.get("formatting", "alpaca") == "sharegpt"
    options: dict[str, Any] = {"columns": _columns(entry)}
    if is_conversation and entry.get("ranking"):
        options["shape"] = "sharegpt_pairs"
    elif is_conversation and str(config["stage"] or "sft") == "sft":
        options |= {"shape": "sharegpt", "layout_options": {} if config["mask_history"] else {"turns": "all"}}
    return {k: v for k, v in options.items() if v}


def _pictures(config: ToolConfig, entries: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """Which parts of a vision model are trained, and where the pictures are."""
    yield hf.vision_parts(config, ["freeze_vision_tower", "freeze_multi_modal_projector"])
    if config["freeze_language_model"]:
        yield config.line(
            ["freeze_language_model"], "unsupported", note="the language model is trained, or its adapter"
        )
    folder = Path(str(config["dataset_dir"]))
    if config["media_dir"] or any(len(Path(str(e.get("file_name", ""))).parts) > 1 for e in entries):
        image_dir = str(config["media_dir"] or folder)
        yield config.line(
            ["media_dir"] if config["media_dir"] else ["dataset_dir"], "translated", {"data.image_dir": image_dir}
        )
    pixels = integer(config["image_max_pixels"] or 768 * 768)
    how = "LLaMA-Factory first shrinks larger pictures; set the processor's own limit in model.image_options"
    yield Line((("image_max_pixels", pixels),), "unsupported", (), how, config.sets("image_max_pixels"))
    if config.sets("image_min_pixels"):
        yield config.line(
            ["image_min_pixels"], "unsupported", note="set it in model.image_options, as the processor has it"
        )


def _dataset_info(folder: Path, config_folder: Path) -> tuple[Mapping[str, Any] | None, str]:
    """(dataset_info.json or None, its path), looked for in the working directory and beside the imported file."""
    for root in (Path(), config_folder):
        path = root / folder / "dataset_info.json"
        if path.is_file():
            try:
                info = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(str(path), f"cannot be read ({error})", "fix the file") from error
            if not isinstance(info, dict):
                raise ConfigError(str(path), "is not a JSON object", "it maps names to descriptions")
            return info, str(path)
    return None, str(folder / "dataset_info.json")


def _locate(entry: Mapping[str, Any], folder: Path) -> str:
    if entry.get("hf_hub_url"):
        return f"{entry['hf_hub_url']}:{entry.get('split', 'train')}"
    return str(folder / str(entry.get("file_name", "?")))


def _column_names(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description's column names, or an empty mapping."""
    columns = entry.get("columns")
    return columns if isinstance(columns, Mapping) else {}


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """``{our field: their column}`` for names that differ."""
    columns = _column_names(entry)
    if entry.get("formatting", "alpaca") == "sharegpt":
        columns, fields = {"messages": "conversations", **columns}, TABLE["sharegpt"]
    else:
        fields = TABLE["alpaca"]
    renames = {fields[k]: str(v) for k, v in columns.items() if k in fields}
    return {ours: theirs for ours, theirs in renames.items() if ours != theirs}


def _unread_fields(name: str, entry: Mapping[str, Any]) -> Iterator[Line]:
    columns = _column_names(entry)
    for column in (c for c in columns if c in TABLE["not_read"]):
        note = f"{TABLE['not_read'][column]} not read: leave such rows out"
        yield Line(((f"{name}.columns.{column}", columns[column]),), "unsupported", (), note)
    for key in ("subset", "folder", "num_samples", "script_url", "ms_hub_url"):
        if entry.get(key):
            yield Line(((f"{name}.{key}", entry[key]),), "unsupported", (), "save the rows as a file and set data.path")
    tags = entry.get("tags")
    for tag, words in TABLE["tags"].items():
        if isinstance(tags, Mapping) and tags.get(tag, words[0]) not in words:
            yield Line(((f"{name}.tags.{tag}", tags[tag]),), "unsupported", (), f"write {words[1]!r} in the rows")


# ---- Losses ----


def preference(config: ToolConfig) -> Iterator[Line]:
    """pref_loss, pref_beta and related keys."""
    name, beta = str(config["pref_loss"]), number(config["pref_beta"])
    used_keys = ["pref_loss", "pref_beta"]
    if name not in TABLE["pref_losses"]:
        note = "kto_pair: set loss.name: kto, which takes pairs apart; `penchant losses` lists the others"
        yield config.line(used_keys, "unsupported", {"loss.name": "dpo", "loss.beta": beta}, note)
        return
    ours: dict[str, Any] = {"loss.name": TABLE["pref_losses"][name], "loss.beta": beta}
    smoothing, note = number(config["dpo_label_smoothing"] or 0) if name == "sigmoid" else 0, ""
    if name == "simpo":
        ours["loss.gamma"] = number(config["simpo_gamma"])
        used_keys.append("simpo_gamma")
    if smoothing:
        ours["loss.label_smoothing"] = smoothing
        used_keys.append("dpo_label_smoothing")
    elif name == "sigmoid" and config["ld_alpha"] is not None:
        ours |= {"loss.name": "ld_dpo", "loss.alpha": number(config["ld_alpha"])}
        used_keys.append("ld_alpha")
    if number(config["pref_ftx"] or 0):
        ours["loss.nll_weight"] = number(config["pref_ftx"])
        used_keys.append("pref_ftx")
        note = "the likelihood term is a mean over all tokens here, over answers there"
    yield config.line(used_keys, "translated", ours, note)
    for key in TABLE["derived"]["preference"]:
        if config.sets(key) and key not in used_keys:
            if key in ("simpo_gamma", "pref_ftx") or not config[key]:
                yield config.line([key], "same", note=f"without effect on {name}")
            else:
                yield config.line([key], "unsupported", note="choose one loss that has it: `penchant losses`")


def ppo_length(config: ToolConfig) -> Iterator[Line]:
    """PPO's length: max_steps counts batches of rollouts, each with several optimizer steps."""
    updates = integer(config["ppo_epochs"]) * integer(config["ppo_buffer_size"])
    for line in hf.length(config):
        ours = {k: v * updates if k == "train.max_steps" else v for k, v in line.ours}
        yield replace(line, ours=tuple(ours.items()))


# a file without a stage is for sft
SOURCE = source(
    "llama-factory",
    (*hf.DERIVATIONS, lora, data, preference, ppo_length),
    lambda values, name: str(values.get("stage", "sft")),
)
