"""Import ms-swift's arguments (`swift sft`, `swift rlhf`, `args.json`). Those that translate one to one are in ms_swift.yaml."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from penchant.importers import hf, trl
from penchant.importers.rules import OFF, Given, Line, flag, layers, number, source, table, whole

TABLE = table("ms_swift")


def sixteen(given: Given) -> Iterator[Line]:
    """Rows of one optimizer step. Without gradient accumulation, ms-swift accumulates to at least 16."""
    devices = max(given.devices, whole(given["global_world_size"] or 1))
    one = whole(given["per_device_train_batch_size"]) * devices
    more = whole(given["gradient_accumulation_steps"] or math.ceil(16 / one))
    why = "" if given["gradient_accumulation_steps"] else "; without an accumulation, at least 16"
    keys = [k for k in TABLE["derived"]["sixteen"] if given.says(k)] or ["per_device_train_batch_size"]
    note = f"{one // devices} x {more} x {devices} device(s){why}; memory is train.tokens_per_step here"
    yield given.line(keys, "translated", {"train.batch_size": one * more}, note)


def rate(given: Given) -> Iterator[Line]:
    """The learning rate, whose default depends on train_type."""
    if given.says("learning_rate"):
        yield given.line(["learning_rate"], "translated", {"train.lr": number(given["learning_rate"])})
    else:
        lr = 1e-5 if given["train_type"] == "full" else 1e-4
        yield Line((("learning_rate", lr),), "translated", (("train.lr", lr),), given=False)


def dtype(given: Given) -> Iterator[Line]:
    """torch_dtype, or else bf16 and fp16."""
    there = [k for k in TABLE["derived"]["dtype"] if given.says(k)]
    kind = str(given["torch_dtype"] or ("bfloat16" if given["bf16"] else "float16" if given["fp16"] else ""))
    kind = kind.removeprefix("torch.")
    if kind in ("float16", "fp16"):
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield given.line(there, "unsupported", {"model.dtype": "auto"}, note)
    elif kind:
        ours = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}.get(kind)
        how = "" if ours else "set model.dtype: bf16 or fp32"
        yield given.line(there, "translated" if ours else "unsupported", {"model.dtype": ours} if ours else {}, how)
    elif there:
        yield given.line(there, "same", note="bf16 where the hardware has it; the type of the model's config there")


def tuner(given: Given) -> Iterator[Line]:
    """train_type and the adapter keys."""
    kind, adapters = (
        given["train_type"],
        given["adapters"] if isinstance(given["adapters"], list) else [given["adapters"]],
    )
    adapters = [str(a) for a in adapters if a not in OFF]
    bits = {"4": "nf4", "8": "int8"}.get(str(given["quant_bits"]), "") if given["quant_bits"] else None
    bits = "" if bits and given["quant_method"] not in (None, "bnb") else bits
    yield from hf.quantized(given, "quant_bits", bits, kind == "lora")
    if given.says("quant_method"):
        yield given.line(["quant_method"], "same", note="of quant_bits")
    keys = TABLE["derived"]["tuner"][1:11]
    there = [k for k in keys if given.says(k)]
    if kind == "full":
        yield given.line(
            [k for k in ("train_type", *there) if given.says(k)], "same", note="the whole model is trained"
        )
    elif kind != "lora":
        yield given.line(
            ["train_type", *there], "unsupported", note="full and lora only: set train_type to one of them"
        )
    elif len(adapters) > 1:
        how = "one adapter is trained on: merge the others first, and set model.path"
        yield given.line(["adapters"], "unsupported", note=how)
    elif adapters:
        note = "the adapter is trained on, and the reference is its start"
        yield given.line(["train_type", *there], "translated", {"model.adapter": adapters[0]}, note)
    else:
        named = given["target_regex"] or layers(given["target_modules"])
        named = "all-linear" if named == ["all-linear"] else named
        used = ["train_type", "lora_r", "lora_alpha", "lora_dropout", "target_modules", *there]
        more: dict[str, Any] = {"lora.target_modules": named}
        if given["loraplus_lr_ratio"]:
            more["lora.lr_ratio"] = number(given["loraplus_lr_ratio"])
        rank, alpha = whole(given["lora_r"]), number(given["lora_alpha"])
        yield hf.adapter(given, list(dict.fromkeys(used)), rank, alpha, **more)
    if given.says("ref_adapters"):
        same = given["ref_adapters"] in (given["adapters"], adapters)
        how = "the reference is the adapter's start; for another one, merge it and set reference.path"
        yield given.line(["ref_adapters"], "same" if same else "unsupported", note=how)


# ---- Data sets ----


def rows(given: Given) -> Iterator[Line]:
    """`dataset` as `data.path` or `data.sources`, and `val_dataset` as `data.eval_path`. Entries are `[HF::]name[:subset][#rows]`."""
    made, notes = [], []
    for name in _listed(given["dataset"]):
        where, note, problem = _place(name, given)
        made.append(where)
        notes += [note] if note else []
        if problem:
            yield Line((("dataset", name),), "unsupported", (), problem)
    note = "; ".join(dict.fromkeys(notes))
    if len(made) > 1 and any("limit" in where for where in made):
        yield given.line(["dataset"], "translated", {"data.sources": made}, note)
    elif made:
        paths = [where["path"] for where in made]
        ours: dict[str, Any] = {"data.path": paths if len(paths) > 1 else paths[0]}
        ours |= {"data.limit": made[0]["limit"]} if "limit" in made[0] else {}
        yield given.line(["dataset"], "translated", ours, note)
    held = _listed(given["val_dataset"])
    if held:
        found = [_place(name, given) for name in held]
        paths = [where["path"] for where, _, _ in found]
        left = [name for name, (where, _, problem) in zip(held, found, strict=True) if problem or "limit" in where]
        ours = {"data.eval_path": paths if len(paths) > 1 else paths[0]}
        yield given.line(["val_dataset"], "translated", ours, f"{', '.join(left)}: all rows of the set" if left else "")
    if given["columns"]:
        names = _columns(given)
        how = "" if names else "it maps their columns to names of ms-swift"
        ours = {"data.columns": names} if names else {}
        yield given.line(["columns"], "translated" if names else "unsupported", ours, how)
    if given.says("use_hf"):
        yield given.line(["use_hf"], "same", note="hub ids are Hugging Face's here")
    if any(seen for _, seen in _looked_at(given)):
        yield from _pictures(given)


def _columns(given: Given) -> dict[str, str]:
    """``{our field: their column}``."""
    names = given["columns"] if isinstance(given["columns"], Mapping) else {}
    return {TABLE["columns"].get(str(std), str(std)): str(theirs) for theirs, std in names.items()}


def _looked_at(given: Given) -> list[tuple[str, bool]]:
    """(layout, whether it has pictures) of each data set that is a local file, and ``("", False)`` of others."""
    places = [_place(name, given)[0]["path"] for name in _listed(given["dataset"])]
    return [
        hf.rows_of(path if os.path.exists(path) else os.path.join(given.folder, path), _columns(given))
        for path in places
    ]


def _pictures(given: Given) -> Iterator[Line]:
    """Which parts of a vision model are trained."""
    yield hf.vision_parts(given, ["freeze_vit", "freeze_aligner"])
    if given.says("freeze_llm"):
        asks = flag(given["freeze_llm"])
        how = "the language model is trained, or its adapter" if asks else "as here"
        yield given.line(["freeze_llm"], "unsupported" if asks else "same", note=how)


def turns(given: Given) -> Iterator[Line]:
    """loss_scale: which answers of a conversation are trained on. Looks at the rows to see if they are conversations."""
    kind = str(given["loss_scale"] or "default").partition("+")[0]
    there = [shape in ("messages", "sharegpt") for shape, _ in _looked_at(given) if shape]
    if kind == "last_round":
        yield given.line(["loss_scale"], "same", note="of a conversation the last answer is learned")
    elif kind != "default":
        how = (
            "weights of parts of an answer are not here; every answer is learned with data.layout_options={turns: all}"
        )
        yield given.line(["loss_scale"], "unsupported", note=how)
    elif all(there) and there:
        ours = {"data.layout_options": {"turns": "all"}}
        yield given.line(
            ["loss_scale"],
            "translated",
            ours,
            "" if given.says("loss_scale") else "every answer of a conversation is learned",
        )
    elif any(there) or not there:
        how = "every answer of a conversation is learned there: set layout_options={turns: all} for the data sets that hold some"
        yield Line((("loss_scale", "default"),), "unsupported", (), how, given.says("loss_scale"))
    elif given.says("loss_scale"):
        yield given.line(["loss_scale"], "same", note="the rows are no conversations")


def _listed(value: Any) -> list[str]:
    if value in OFF:
        return []
    return [str(v) for v in value] if isinstance(value, list) else str(value).split()


def _place(name: str, given: Given) -> tuple[dict[str, Any], str, str]:
    """(our path and limit, what differs, what is not supported) of one data set."""
    hub, _, rest = name.rpartition("::")
    rest, _, rows = rest.partition("#")
    limit = {"limit": int(rows)} if re.fullmatch(r"\d+", rows) else {}
    note = f"the first {rows} rows; {rows} rows drawn at random there" if limit else ""
    if hf.is_local(rest.partition(":")[0], given.folder):
        return {"path": rest.partition(":")[0], **limit}, note, ""
    rest, _, subset = rest.partition(":")
    if not (hub == "HF" or str(given["use_hf"]).lower() in ("true", "1")):
        moved = "hub ids are ModelScope's there and Hugging Face's here: see that they are the same"
        note = "; ".join(filter(None, (note, moved)))
    how = f"the subset {subset} is not read, but the default one: save it as a file and set data.path"
    return {"path": f"{rest}:train", **limit}, note, how if subset not in ("", "default") else ""


def longest(given: Given) -> Iterator[Line]:
    """max_length, and how longer rows are handled."""
    if given.says("max_length"):
        yield given.line(["max_length"], "translated", {"data.max_length": whole(given["max_length"])})
    else:
        how = "the model's whole context there, at most 1024 here: set data.max_length"
        yield Line((("max_length", "the model's"),), "unsupported", (), how, given=False)
    kind = str(given["truncation_strategy"])
    if kind == "delete":
        ours = {"data.truncation": "bad_row", "data.on_bad_row": "skip"}
        note = "longer rows are set aside and counted, as all rows that cannot be read"
        yield given.line(["truncation_strategy"], "translated", ours, note)
    elif kind in ("left", "right"):
        note = "" if kind == "left" else "a longer row loses the beginning of its prompt first, then the answer's end"
        ours = {"data.truncation": "prompt_then_completion"}
        yield given.line(["truncation_strategy"], "translated", ours, note)
    else:
        how = "set data.truncation: bad_row or prompt_then_completion"
        yield given.line(["truncation_strategy"], "unsupported", note=how)


def estimator(given: Given) -> Iterator[Line]:
    """advantage_estimator, which selects an algorithm here, and dynamic_sample."""
    names = {"grpo": None, "rloo": "rloo", "reinforce_plus_plus": "reinforce_pp"}
    if given.says("advantage_estimator"):
        kind = str(given["advantage_estimator"])
        name, how = names.get(kind), "set algorithm.name: grpo, rloo or reinforce_pp"
        status: Any = "unsupported" if kind not in names else "translated" if name else "same"
        yield given.line(
            ["advantage_estimator"], status, {"algorithm.name": name} if name else {}, "" if kind in names else how
        )
    keys = [k for k in ("dynamic_sample", "max_resample_times") if given.says(k)]
    if given["dynamic_sample"]:
        ours = {"algorithm.dynamic_sampling": whole(given["max_resample_times"] or 3)}
        yield given.line(keys, "translated", ours)
    elif keys:
        yield given.line(keys, "same", note="off, as here")


def guess(values: Mapping[str, Any], name: str) -> str:
    """The method that a file is for: rlhf_type, or else sft."""
    return str(values.get("rlhf_type") or "sft")


OWN = (sixteen, rate, dtype, tuner, rows, turns, longest, estimator)
SOURCE = source("ms-swift", (*hf.DERIVATIONS, *trl.DERIVATIONS, *OWN), guess)
