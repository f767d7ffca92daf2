"""Flat files that name things in the usual words (model_path, dataset_path, lora_r, max_seq_length ...) and belong to no tool we know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from penchant.importers.hf import ADAMW, NAMES, PARTS, report_to, targets
from penchant.importers.rules import (
    Given,
    Line,
    Method,
    Rule,
    Source,
    flag,
    number,
    one_of,
    same,
    to,
    unsupported,
    whole,
)

_LOSSES = {
    "sft": "sft", "dpo": "dpo", "sigmoid": "dpo", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "cpo": "cpo",
    "dpo_shift": "dpo_shift", "pmpo": "pmpo", "hinge": "hinge", "slic": "slic", "bco": "bco",
}  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32", "auto": "auto", None: "auto"}
_SHAPES = {"linear": "linear", "cosine": "cosine", "constant": "constant"}

# every way in which a thing is said: the first one is the name that comments show
_SAME_WORDS: dict[tuple[str, ...], Rule] = {
    ("model_path", "model_name_or_path", "model_name", "model_id", "base_model", "model"): to("model.path", str),
    ("tokenizer_path", "tokenizer_name", "tokenizer"): to("model.tokenizer", str),
    ("dataset_path", "train_file", "train_path", "data_path", "dataset_name", "train_data"): to("data.path", lambda v: v),
    ("eval_dataset_path", "eval_file", "eval_path", "validation_file", "val_file"): to("data.eval_path", lambda v: v),
    ("val_fraction", "validation_fraction", "validation_split", "test_size"): to("data.validation_fraction", number, "held out by prompt"),
    ("output_dir", "output_path", "save_dir", "output"): to("output", str),
    ("max_seq_length", "max_length", "max_len", "cutoff_len", "sequence_len", "max_seq_len"): to("data.max_length", whole),
    ("batch_size", "train_batch_size"): to("train.batch_size", whole),
    ("learning_rate", "lr"): to("train.lr", number),
    ("epochs", "num_epochs", "num_train_epochs", "n_epochs"): to("train.epochs", number),
    ("max_steps",): to("train.max_steps", lambda v: whole(v) if whole(v) > 0 else None),
    ("lr_scheduler", "lr_scheduler_type", "scheduler"): to("train.schedule", one_of(_SHAPES, "set train.schedule: linear, cosine or constant")),
    ("warmup_ratio", "warmup_fraction"): to("train.warmup_fraction", number),
    ("warmup_steps",): unsupported("warm-up is a share here: set train.warmup_fraction to these steps / all optimizer steps", 0),
    ("weight_decay",): to("train.weight_decay", number),
    ("max_grad_norm", "grad_clip", "gradient_clipping"): to("train.max_grad_norm", lambda v: number(v) or None),
    ("gradient_checkpointing",): to("train.gradient_checkpointing", flag),
    ("seed",): to("train.seed", whole),
    ("lora_r", "lora_rank"): to("lora.r", whole),
    ("lora_alpha",): to("lora.alpha", number),
    ("lora_dropout",): to("lora.dropout", number),
    ("lora_target_modules", "target_modules", "lora_target"): to("lora.target_modules", targets),
    ("beta", "dpo_beta"): to("loss.beta", number),
    ("label_smoothing",): to("loss.label_smoothing", number),
    ("gamma", "simpo_gamma"): to("loss.gamma", number),
    ("lambda",): to("loss.lambda", number),
    ("desirable_weight",): to("loss.desirable_weight", number),
    ("undesirable_weight",): to("loss.undesirable_weight", number),
    ("dtype", "torch_dtype", "precision"): to("model.dtype", one_of(_DTYPES, "set model.dtype: bf16 or fp32")),
    ("device",): to("model.device", one_of({"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "set model.device: auto, cpu or cuda")),
    ("bf16",): to("model.dtype", lambda v: "bf16" if flag(v) else "auto"),
    ("fp16",): unsupported("there is no fp16 with loss scaling: set model.dtype: bf16"),
    ("load_in_4bit", "load_in_8bit"): unsupported("weights are not quantized: use LoRA with model.dtype: bf16"),
    ("max_prompt_length",): unsupported("prompt and answer share data.max_length, the prompt is cut first"),
    ("optimizer", "optim"): same("AdamW", "adamw", "AdamW", *ADAMW, otherwise="only AdamW is here"),
    ("logging_steps", "log_every"): to("logging.every", whole),
    ("save_steps", "save_every"): to("checkpoint.every", whole),
    ("eval_steps", "eval_every"): to("evaluation.every", whole),
    **{(key,): rule for key, rule in NAMES.items()},
    ("num_workers",): same("changes nothing in what is trained"),
}  # fmt: skip


def method_of(given: Given) -> Iterator[Line]:
    """Which loss: loss_type, method or algorithm."""
    keys = [k for k in ("loss_type", "loss", "method", "algorithm", "training_type") if given.says(k)]
    for key in keys:
        name = str(given[key]).lower().replace("-", "_")
        if name in _LOSSES:
            yield given.line([key], "translated", {"loss.name": _LOSSES[name]})
        else:
            yield given.line(
                [key], "unsupported", note="set loss.name (`penchant losses` lists them) or algorithm.name"
            )


def batches(given: Given) -> Iterator[Line]:
    """A batch size a device with an accumulation, or one that is whole."""
    one = "per_device_train_batch_size" if given.says("per_device_train_batch_size") else "batch_size"
    more = "gradient_accumulation_steps" if given.says("gradient_accumulation_steps") else "grad_accum"
    if given.says(one, more):
        rows = whole(given[one] or 1) * whole(given[more] or 1) * given.devices
        note = f"rows of one optimizer step, on {given.devices} device(s)"
        yield given.line([k for k in (one, more) if given.says(k)], "translated", {"train.batch_size": rows}, note)


def columns(given: Given) -> Iterator[Line]:
    """prompt_column, chosen_column and the like."""
    fields = ("prompt", "chosen", "rejected", "completion", "label", "text", "score")
    named = {f: key for f in fields for key in (f"{f}_column", f"{f}_field", f"{f}_key") if given.says(key)}
    if named:
        found = {f: str(given[key]) for f, key in named.items()}
        yield given.line(list(named.values()), "translated", {"data.columns": found})


_BATCH = frozenset({"batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "grad_accum"})
_COLUMNS = frozenset(
    f"{f}_{end}"
    for f in ("prompt", "chosen", "rejected", "completion", "label", "text", "score")
    for end in ("column", "field", "key")
)
_METHOD = frozenset({"loss_type", "loss", "method", "algorithm", "training_type"})

METHODS = {
    "flat": Method(
        "flat keys",
        {},
        {},
        {},
        (batches, method_of, columns, report_to),
        _BATCH | _COLUMNS | _METHOD | PARTS,
        ("the file does not say what its tool does by default: look through `penchant config` for what it leaves out",),
    )
}


def guess(values: Mapping[str, Any], name: str) -> str | None:
    """There is one."""
    return "flat"


RULES: dict[str, Rule] = {key: rule for keys, rule in _SAME_WORDS.items() for key in keys}
SOURCE = Source("flat", "this file", METHODS, RULES, frozenset({"model_path", "dataset_path"}), guess)
