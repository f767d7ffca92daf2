"""LLaMA-Factory's files (`llamafactory-cli train FILE`): what several keys make together; the plain ones are in llama_factory.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.importers import hf
from penchant.importers.rules import Given, Line, layers, number, source, table, whole

TABLE = table("llama_factory")


def lora(given: Given) -> Iterator[Line]:
    """finetuning_type and the adapter's keys."""
    kind_key, *keys, bits_key = TABLE["derived"]["lora"]
    kind, bits = given[kind_key], given[bits_key]
    yield from hf.quantized(given, bits_key, {4: "nf4", 8: "int8"}.get(bits, "") if bits else None, kind == "lora")
    if kind == "full":
        there = [kind_key, *(k for k in keys if given.says(k))]
        yield given.line(there, "same", note="without `lora` the whole model is trained")
        return
    if kind != "lora":
        yield given.line([kind_key], "unsupported", note="full and lora only: set finetuning_type to one of them")
        return
    rank = whole(given["lora_rank"])
    used = [kind_key, *(k for k in keys if given[k] is not None)]
    more: dict[str, Any] = {}
    if given["loraplus_lr_ratio"]:
        more["lora.lr_ratio"] = number(given["loraplus_lr_ratio"])
    if adapter := given["adapter_name_or_path"]:
        if "," in str(adapter):
            how = "one adapter is trained on: merge the others first, and set model.path"
            yield given.line(["adapter_name_or_path"], "unsupported", note=how)
            return
        more["model.adapter"] = str(adapter)
        yield given.line(
            used, "translated", more, "the reference is the adapter's start here, the model under it there"
        )
        return
    more["lora.target_modules"] = layers(given["lora_target"])
    yield hf.adapter(given, used, rank, number(given["lora_alpha"] or 2 * rank), **more)


# ---- Data sets by name ----


def data(given: Given) -> Iterator[Line]:
    """`dataset` names looked up in dataset_info.json beside the files, as they do."""
    for key, ours in (("dataset", "data.path"), ("eval_dataset", "data.eval_path")):
        if given[key]:
            yield from _named(given, key, ours)


def _named(given: Given, key: str, ours: str) -> Iterator[Line]:
    listed = given[key]
    names = [str(n) for n in listed] if isinstance(listed, list) else [n.strip() for n in str(listed).split(",")]
    folder = Path(str(given["dataset_dir"]))
    known, where = _dataset_info(folder, Path(given.folder))
    if known is None:
        path = [str(folder / f"{n}.json") for n in names]
        note = f"{where} is not here: the file's place is guessed; with it beside the file, its columns are read too"
        yield given.line([key, "dataset_dir"], "translated", {ours: path if len(path) > 1 else path[0]}, note)
        return
    paths: list[str] = []
    columns: dict[str, str] = {}
    ranked: list[bool] = []
    for name in names:
        entry = known.get(name)
        if not isinstance(entry, Mapping):
            raise ConfigError(where, f"there is no {name!r}", f"there are {', '.join(sorted(map(str, known)))[:200]}")
        paths.append(_place(entry, folder))
        columns |= _columns(entry)
        ranked.append(bool(entry.get("ranking")) and entry.get("formatting", "alpaca") == "sharegpt")
        yield from _left(name, entry)
    made: dict[str, Any] = {ours: paths if len(paths) > 1 else paths[0]}
    if columns and ours == "data.path":
        made["data.columns"] = columns
    if all(ranked) and ours == "data.path":
        # the description says so; its rows may have a "prompt" of their own besides
        made["data.shape"] = "sharegpt_pairs"
    yield given.line([key, "dataset_dir"], "translated", made)


def _dataset_info(folder: Path, beside: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The list of data sets, looked for from here and from their file; None where there is none."""
    for root in (Path(), beside):
        path = root / folder / "dataset_info.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(str(path), f"cannot be read ({error})", "fix the file") from error
            if not isinstance(found, dict):
                raise ConfigError(str(path), "is not a JSON object", "it maps names to descriptions")
            return found, str(path)
    return None, str(folder / "dataset_info.json")


def _place(entry: Mapping[str, Any], folder: Path) -> str:
    if entry.get("hf_hub_url"):
        return f"{entry['hf_hub_url']}:{entry.get('split', 'train')}"
    return str(folder / str(entry.get("file_name", "?")))


def _described(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Their column names, where the description has some."""
    found = entry.get("columns")
    return found if isinstance(found, Mapping) else {}


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """Our field: their column, where the two differ."""
    given = _described(entry)
    if entry.get("formatting", "alpaca") == "sharegpt":
        given, fields = {"messages": "conversations", **given}, TABLE["sharegpt"]
    else:
        fields = TABLE["alpaca"]
    found = {fields[k]: str(v) for k, v in given.items() if k in fields}
    return {ours: theirs for ours, theirs in found.items() if ours != theirs}


def _left(name: str, entry: Mapping[str, Any]) -> Iterator[Line]:
    given = _described(entry)
    for column in (c for c in given if c in TABLE["not_read"]):
        note = f"{TABLE['not_read'][column]} in a column of its own is not read: put it into the prompt (messages with a system turn)"
        yield Line(((f"{name}.columns.{column}", given[column]),), "unsupported", (), note)
    for key in ("subset", "folder", "num_samples", "script_url", "ms_hub_url"):
        if entry.get(key):
            yield Line(((f"{name}.{key}", entry[key]),), "unsupported", (), "save the rows as a file and set data.path")
    tags = entry.get("tags")
    for tag, words in TABLE["tags"].items():
        if isinstance(tags, Mapping) and tags.get(tag, words[0]) not in words:
            yield Line(((f"{name}.tags.{tag}", tags[tag]),), "unsupported", (), f"write {words[1]!r} in the rows")


# ---- Losses ----


def preference(given: Given) -> Iterator[Line]:
    """pref_loss, pref_beta and what goes with them."""
    name, beta = str(given["pref_loss"]), number(given["pref_beta"])
    used = ["pref_loss", "pref_beta"]
    if name not in TABLE["pref_losses"]:
        note = "kto_pair: set loss.name: kto, which takes pairs apart; `penchant losses` lists the others"
        yield given.line(used, "unsupported", {"loss.name": "dpo", "loss.beta": beta}, note)
        return
    ours: dict[str, Any] = {"loss.name": TABLE["pref_losses"][name], "loss.beta": beta}
    smoothing, note = number(given["dpo_label_smoothing"] or 0) if name == "sigmoid" else 0, ""
    if name == "simpo":
        ours["loss.gamma"] = number(given["simpo_gamma"])
        used.append("simpo_gamma")
    if smoothing:
        ours["loss.label_smoothing"] = smoothing
        used.append("dpo_label_smoothing")
    elif name == "sigmoid" and given["ld_alpha"] is not None:
        ours |= {"loss.name": "ld_dpo", "loss.alpha": number(given["ld_alpha"])}
        used.append("ld_alpha")
    if number(given["pref_ftx"] or 0):
        ours["loss.nll_weight"] = number(given["pref_ftx"])
        used.append("pref_ftx")
        note = "the likelihood term is a mean over all tokens here, over answers there"
    yield given.line(used, "translated", ours, note)
    for key in TABLE["derived"]["preference"]:
        if given.says(key) and key not in used:
            if key in ("simpo_gamma", "pref_ftx") or not given[key]:
                yield given.line([key], "same", note=f"without effect on {name}")
            else:
                yield given.line([key], "unsupported", note="choose one loss that has it: `penchant losses`")


# a file that names no stage is for sft
SOURCE = source(
    "llama-factory",
    (*hf.DERIVATIONS, lora, data, preference),
    lambda values, name: str(values.get("stage", "sft")),
)
