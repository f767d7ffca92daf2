"""LLaMA-Factory's files (`llamafactory-cli train FILE`): its keys and defaults, read at version 0.9."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.importers import hf
from penchant.importers.rules import Given, Line, Method, Rule, Source, flag, number, same, to, unsupported, whole

DEFAULTS: dict[str, Any] = {
    **hf.DEFAULTS,
    "cutoff_len": 2048,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "dataset_dir": "data",
    "bf16": False,
}

_OTHER_WAYS = "full and lora only: set finetuning_type to one of them"
RULES: dict[str, Rule] = {
    **hf.TABLE,
    "model_name_or_path": to("model.path", str),
    "model_revision": to("model.revision", lambda v: None if v == "main" else str(v)),
    "adapter_name_or_path": unsupported("a run starts from a whole model: merge the adapter first (their `export`), and set model.path"),
    "cache_dir": same("models are kept where HF_HOME says"),
    "quantization_bit": unsupported("weights are not quantized: use LoRA with model.dtype: bf16"),
    "rope_scaling": unsupported("set it in the model's own config.json"),
    "resize_vocab": unsupported("the model's own vocabulary is used"),
    "add_tokens": unsupported("the model's own vocabulary is used"),
    "add_special_tokens": unsupported("the model's own vocabulary is used"),
    "train_from_scratch": to("model.init", lambda v: "random" if flag(v) else "pretrained"),
    "moe_aux_loss_coef": unsupported("a mixture-of-experts model's balance loss is not added", 0, 0.0),
    "cutoff_len": to("data.max_length", whole),
    "template": same("the tokenizer's own chat template is used (data.template: auto), or plain text where it has none or data.template is plain; `penchant data show FILE` shows the turns that it is given"),
    "max_samples": to("data.limit", whole, "of all files together here"),
    "train_on_prompt": unsupported("prompts are never targets: give plain text (`text`) to train on all of it"),
    "mask_history": same("of a conversation the last answer is learned", True, otherwise="of a conversation the last answer is learned"),
    "packing": unsupported("rows are always packed, but a step is train.batch_size rows, not blocks of cutoff_len: multiply it by the rows of a block"),
    "neat_packing": unsupported("rows are always packed, none sees another; a step is train.batch_size rows, not blocks of cutoff_len"),
    "mix_strategy": same("files are read one after the other", "concat", otherwise="files are read one after the other"),
    "interleave_probs": unsupported("files are read one after the other; repeat a file in data.path to weigh it"),
    "streaming": unsupported("a run's rows are held in memory"),
    "buffer_size": same("of streaming"),
    "tokenized_path": same("rows are tokenized when the run starts"),
    "ignore_pad_token_for_loss": same("nothing is padded"),
    "disable_shuffling": to("train.shuffle", lambda v: not flag(v)),
    "early_stopping_steps": unsupported("`penchant sweep` with halving stops early; a run's best checkpoint is kept"),
    "compute_accuracy": same("see docs/eval.md for what is measured"),
    "additional_target": unsupported("an adapter's layers only (a reward model's head is trained with it)"),
    "loraplus_lr_ratio": unsupported("one learning rate for both halves of an adapter"),
    "use_dora": unsupported("plain LoRA only"),
    "pissa_init": unsupported("an adapter starts at zero"),
    "create_new_adapter": same("a run always makes a new adapter"),
    "use_galore": unsupported("only AdamW is here"),
    "use_apollo": unsupported("only AdamW is here"),
    "use_badam": unsupported("only AdamW is here"),
    "use_muon": unsupported("only AdamW is here"),
    "use_llama_pro": unsupported(_OTHER_WAYS),
    "use_dft_loss": unsupported("plain likelihood only"),
    "use_swanlab": unsupported("metrics.jsonl holds every figure"),
    "ref_model": to("reference.path", str),
    "ref_model_adapters": unsupported("merge the adapter first, and set reference.path"),
    "ref_model_quantization_bit": unsupported("the reference is not quantized"),
    "media_dir": unsupported("text only"),
    "eval_on_each_dataset": unsupported("held-out rows are evaluated together"),
}  # fmt: skip


def val_size(given: Given) -> Iterator[Line]:
    """A share of the rows, or so many of them."""
    if not given.says("val_size"):
        return
    size = number(given["val_size"])
    if size == 0:
        yield given.line(["val_size"], "same", note="nothing is held out")
    else:
        ours: dict[str, Any] = {"data.validation_fraction": size} if size < 1 else {"data.validation_rows": whole(size)}
        yield given.line(["val_size"], "translated", ours, "held out by prompt: no prompt on both sides")


def lora(given: Given) -> Iterator[Line]:
    """finetuning_type and the adapter's keys."""
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora")
    kind = given["finetuning_type"]
    if kind == "full":
        yield given.line(
            ["finetuning_type", *(k for k in keys if given.says(k))],
            "same",
            note="without `lora` the whole model is trained",
        )
        return
    if kind != "lora":
        yield given.line(["finetuning_type"], "unsupported", note=_OTHER_WAYS)
        return
    rank = whole(given["lora_rank"])
    alpha = number(given["lora_alpha"] or 2 * rank)
    ours = {
        "lora.r": rank,
        "lora.alpha": round(alpha * math.sqrt(rank), 6) if given["use_rslora"] else alpha,
        "lora.dropout": number(given["lora_dropout"]),
        "lora.target_modules": hf.targets(given["lora_target"]),
    }
    note = "rsLoRA divides by the root of the rank: alpha is that much larger here" if given["use_rslora"] else ""
    yield given.line(["finetuning_type", *(k for k in keys if given[k] is not None)], "translated", ours, note)


# ---------------------------------------------------------------------------------------------------------------------
# data sets by name

_ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
    "system": "system",
    "history": "history",
}
_SHAREGPT = {
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
    "system": "system",
}
_NOT_READ = {
    "tools": "tools",
    "images": "pictures",
    "videos": "videos",
    "audios": "sound",
}


def data(given: Given) -> Iterator[Line]:
    """`dataset` names looked up in dataset_info.json beside the files, as they do."""
    for key, ours in (("dataset", "data.path"), ("eval_dataset", "data.eval_path")):
        if given[key]:
            yield from _named(given, key, ours)


def _named(given: Given, key: str, ours: str) -> Iterator[Line]:
    names = (
        [n.strip() for n in str(given[key]).split(",")]
        if not isinstance(given[key], list)
        else [str(n) for n in given[key]]
    )
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
        made["data.shape"] = (
            "sharegpt_pairs"  # the description says so; its rows may have a "prompt" of their own besides
        )
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
                raise ConfigError(str(path), "is no JSON object", "it maps names to descriptions")
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
        found = {_SHAREGPT[k]: str(v) for k, v in {"messages": "conversations", **given}.items() if k in _SHAREGPT}
    else:
        found = {_ALPACA[k]: str(v) for k, v in given.items() if k in _ALPACA}
    return {ours: theirs for ours, theirs in found.items() if ours != theirs}


def _left(name: str, entry: Mapping[str, Any]) -> Iterator[Line]:
    given = _described(entry)
    for column in (c for c in given if c in _NOT_READ):
        note = f"{_NOT_READ[column]} in a column of its own is not read: put it into the prompt (messages with a system turn)"
        yield Line(((f"{name}.columns.{column}", given[column]),), "unsupported", (), note)
    for key in ("subset", "folder", "num_samples", "script_url", "ms_hub_url"):
        if entry.get(key):
            yield Line(((f"{name}.{key}", entry[key]),), "unsupported", (), "save the rows as a file and set data.path")
    tags = entry.get("tags")
    wanted = {
        "role_tag": ("from", "role"),
        "content_tag": ("value", "content"),
        "user_tag": ("human", "user"),
        "assistant_tag": ("gpt", "assistant"),
    }
    for tag, words in wanted.items():
        if isinstance(tags, Mapping) and tags.get(tag, words[0]) not in words:
            yield Line(((f"{name}.tags.{tag}", tags[tag]),), "unsupported", (), f"write {words[1]!r} in the rows")


# ---------------------------------------------------------------------------------------------------------------------
# losses

PREFERENCE: dict[str, dict[str, Any]] = {
    "sigmoid": {"name": "dpo"},
    "hinge": {"name": "hinge"},
    "ipo": {"name": "ipo"},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo"},
}


def preference(given: Given) -> Iterator[Line]:
    """pref_loss, pref_beta and what goes with them."""
    name, beta = str(given["pref_loss"]), number(given["pref_beta"])
    used = ["pref_loss", "pref_beta"]
    if name not in PREFERENCE:
        note = "kto_pair: set loss.name: kto, which takes pairs apart; `penchant losses` lists the others"
        yield given.line(used, "unsupported", {"loss.name": "dpo", "loss.beta": beta}, note)
        return
    ours: dict[str, Any] = {"loss.name": PREFERENCE[name]["name"], "loss.beta": beta}
    if name == "simpo":
        ours["loss.gamma"] = number(given["simpo_gamma"])
        used.append("simpo_gamma")
    if name == "sigmoid" and number(given["dpo_label_smoothing"] or 0):
        ours["loss.label_smoothing"] = number(given["dpo_label_smoothing"])
        used.append("dpo_label_smoothing")
    elif name == "sigmoid" and given["ld_alpha"] is not None:
        ours |= {"loss.name": "ld_dpo", "loss.alpha": number(given["ld_alpha"])}
        used.append("ld_alpha")
    if number(given["pref_ftx"] or 0):
        ours["loss.nll_weight"] = number(given["pref_ftx"])
        used.append("pref_ftx")
    note = "the likelihood term is a mean over all tokens here, over answers there" if "pref_ftx" in used else ""
    yield given.line(used, "translated", ours, note)
    for key in ("simpo_gamma", "dpo_label_smoothing", "ld_alpha", "pref_ftx"):
        if given.says(key) and key not in used:
            idle = key in ("simpo_gamma", "pref_ftx") or not given[key]
            how = "choose one loss that has it: `penchant losses`"
            yield given.line(
                [key], "same" if idle else "unsupported", note=f"without effect on {name}" if idle else how
            )


PREFERENCE_PARTS = frozenset({"pref_loss", "pref_beta", "simpo_gamma", "dpo_label_smoothing", "ld_alpha", "pref_ftx"})


def ppo_batch(given: Given) -> Iterator[Line]:
    """Their buffer is what is sampled between two updates, in minibatches of one device's batch times accumulation."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size")
    parts = whole(given["ppo_buffer_size"])
    rows = whole(given[keys[0]]) * whole(given[keys[1]]) * parts * given.devices
    ours = {"train.batch_size": rows, "algorithm.minibatches": parts}
    yield given.line(keys, "translated", ours, f"prompts of one batch of rollouts, on {given.devices} device(s)")


_COMMON = (*hf.COMMON, lora, val_size, data)
_PARTS = hf.COMMON_PARTS | {
    "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "val_size", "dataset", "eval_dataset", "dataset_dir",
}  # fmt: skip
_STAGE: dict[str, Rule] = {"stage": same("the method")}
_TEXT = "an instruction and its input are joined by an empty line here, by a line break there"

METHODS: dict[str, Method] = {
    "sft": Method("SFT", {"loss.name": "sft"}, DEFAULTS, _STAGE, (hf.batch, *_COMMON), hf.BATCH | _PARTS,
                  (_TEXT, "of a conversation only the last answer is learned here, every answer there unless mask_history is on")),
    "pt": Method("continued pre-training", {"loss.name": "sft", "data.shape": "text"}, DEFAULTS, _STAGE, (hf.batch, *_COMMON), hf.BATCH | _PARTS,
                 ("their pre-training packs documents into blocks and counts those; a step is train.batch_size documents here",)),
    "dpo": Method(
        "DPO, ORPO, SimPO",
        {},
        {**DEFAULTS, "pref_loss": "sigmoid", "pref_beta": 0.1, "simpo_gamma": 0.5},
        {**_STAGE, "pref_bco_weight": unsupported("list both losses in loss.mix, each with its weight", 0, 0.0)},
        (hf.batch, *_COMMON, preference),
        hf.BATCH | _PARTS | PREFERENCE_PARTS,
        (_TEXT,),
    ),
    "kto": Method(
        "KTO",
        {"loss.name": "kto"},
        {**DEFAULTS, "pref_beta": 0.1, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0},
        {
            **_STAGE,
            "pref_beta": to("loss.beta", number),
            "kto_chosen_weight": to("loss.desirable_weight", number),
            "kto_rejected_weight": to("loss.undesirable_weight", number),
            "pref_ftx": to("loss.nll_weight", number, "a mean over all tokens of good answers"),
        },
        (hf.batch, *_COMMON),
        hf.BATCH | _PARTS,
        (_TEXT,),
    ),
    "rm": Method("reward model", {"algorithm.name": "reward_model"}, DEFAULTS, _STAGE, (hf.batch, *_COMMON), hf.BATCH | _PARTS, (_TEXT,)),
    "ppo": Method(
        "PPO",
        {"algorithm.name": "ppo", "algorithm.value": "head", "algorithm.kl_control": "adaptive", "algorithm.beta": 0.2},
        {
            **DEFAULTS, "ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_target": 6.0, "max_new_tokens": 1024, "temperature": 0.95, "top_p": 0.7,
            "top_k": 50,
        },
        {
            **_STAGE,
            "reward_model": to("reward", str, "a folder with a one-label classifier or our own run; their value-head checkpoints are neither: train it here"),
            "reward_model_type": same("a whole model", "full", otherwise="merge the adapter first; an endpoint goes into a Python function (reward: FILE.py:FUNCTION)"),
            "reward_model_adapters": unsupported("merge the adapter first"),
            "reward_model_quantization_bit": unsupported("the reward model is not quantized"),
            "ppo_epochs": to("algorithm.epochs", whole),
            "ppo_target": to("algorithm.kl_target", number),
            "ppo_score_norm": to("algorithm.normalise_scores", flag),
            "ppo_whiten_rewards": to("algorithm.whiten_rewards", flag),
            "max_new_tokens": to("algorithm.max_new_tokens", whole),
            "temperature": to("algorithm.temperature", number),
            "top_p": to("algorithm.top_p", number),
            "top_k": to("algorithm.top_k", whole),
            "adam_epsilon": to("algorithm.adam_eps", number),
            "do_sample": same("completions are sampled", True, otherwise="completions are sampled"),
            "num_beams": same("none", 1, otherwise="completions are sampled"),
            "repetition_penalty": unsupported("log-probs are the model's own: leave it out", 1, 1.0),
        },
        (ppo_batch, *_COMMON),
        hf.BATCH | {"ppo_buffer_size"} | _PARTS,
        ("beta starts at 0.2 and follows ppo_target, as their PPO does", _TEXT),
    ),
}  # fmt: skip


def guess(values: Mapping[str, Any], name: str) -> str | None:
    """The stage; they take sft where none is given."""
    return str(values.get("stage", "sft"))


SOURCE = Source(
    "llama-factory",
    "LLaMA-Factory",
    METHODS,
    RULES,
    frozenset(
        {
            "stage",
            "finetuning_type",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "pref_beta",
            "pref_loss",
            "dataset_dir",
            "template",
            "val_size",
        }
    ),
    guess,
)
