"""What TRL and LLaMA-Factory share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from penchant.importers.rules import Given, Line, NotHere, Rule, flag, number, one_of, same, to, unsupported, whole
from penchant.track.tracker import TRACKERS

# ---- Where their figures are sent: `report_to` as our `logging.trackers` ----

PARTS = frozenset({"report_to", "use_wandb"})


def _one_word(value: Any) -> str:
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise NotHere(f"{value!r} is no name; set the key by hand")
    return str(value)


NAMES: dict[str, Rule] = {
    "run_name": to("logging.name", _one_word),
    "project": to("logging.project", _one_word),
    "wandb_project": to("logging.project", _one_word),
}


def report_to(given: Given) -> Iterator[Line]:
    """A name, several, `none` or `all`; those that there are none of here are reported."""
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
    """Their names, as a list or as a text with commas."""
    listed = value if isinstance(value, list) else [] if value is None or value is False else str(value).split(",")
    return [name for name in (str(v).strip().lower() for v in listed) if name]


def _installed() -> list[str]:
    """A folder of that name in the current one (W&B makes one) is not a package."""
    found = {name: importlib.util.find_spec(spec.module) for name, spec in TRACKERS.items()}
    return [name for name, spec in found.items() if spec is not None and spec.origin is not None]


# ---- The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory share, and what several of them make together ----

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
}

_LOGS = "says what is printed or logged, not what is trained; here metrics.jsonl holds every figure"
_LOADER = "how their data loader works; here rows are tokenized and packed once"
_SPEED = "speed or memory only; see docs/performance.md for what there is here"
_PROCESSES = "how several processes talk; here a run is one process (their batch counts --devices times)"
_PUSH = "training uploads nothing; when it is done: penchant export RUN --to safetensors --push OWNER/NAME"
_HUB = f"of uploading: {_PUSH}"

_ASIDE: dict[str, str] = {
    **dict.fromkeys(
        [
            "logging_strategy",
            "logging_first_step",
            "logging_dir",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "logging_nan_inf_filter",
            "disable_tqdm",
            "trackio_space_id",
            "include_num_input_tokens_seen",
            "include_tokens_per_second",
            "skip_memory_metrics",
            "include_for_metrics",
            "prediction_loss_only",
            "plot_loss",
            "debug",
            "log_completions",
            "num_completions_to_print",
            "log_unique_prompts",
            "log_multimodal",
            "generate_during_eval",
            "num_sample_generations",
        ],
        _LOGS,
    ),
    **dict.fromkeys(
        [
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_in_order",
            "remove_unused_columns",
            "label_names",
            "group_by_length",
            "length_column_name",
            "dataset_num_proc",
            "preprocessing_num_workers",
            "preprocessing_batch_size",
            "overwrite_cache",
            "dataset_kwargs",
            "pad_to_multiple_of",
            "padding_value",
            "pad_token",
            "padding_free",
            "packing_strategy",
            "eval_packing",
            "ignore_data_skip",
            "local_rollout_forward_batch_size",
        ],
        _LOADER,
    ),
    **dict.fromkeys(
        [
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "tf32",
            "use_liger_kernel",
            "liger_kernel_config",
            "enable_liger_kernel",
            "gradient_checkpointing_kwargs",
            "activation_offloading",
            "auto_find_batch_size",
            "torch_empty_cache_steps",
            "attn_implementation",
            "flash_attn",
            "use_cache",
            "bf16_full_eval",
            "fp16_full_eval",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "batch_eval_metrics",
            "low_cpu_mem_usage",
            "precompute_ref_batch_size",
            "use_unsloth",
            "use_unsloth_gc",
            "upcast_layernorm",
            "disable_gradient_checkpointing",
            "use_reentrant_gc",
            "use_fast_tokenizer",
        ],
        _SPEED,
    ),
    **dict.fromkeys(
        [
            "ddp_timeout",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "local_rank",
            "accelerator_config",
            "average_tokens_across_devices",
            "ds3_gather_for_generation",
            "ignore_bias_buffers",
            "save_on_each_node",
            "eval_use_gather_object",
        ],
        _PROCESSES,
    ),
    **dict.fromkeys(
        [
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "hf_hub_token",
            "ms_hub_token",
        ],
        _HUB,
    ),
    **dict.fromkeys(
        [
            "do_train",
            "do_eval",
            "do_predict",
            "overwrite_output_dir",
            "save_safetensors",
            "save_only_model",
            "resume_from_checkpoint",
            "full_determinism",
            "use_mca",
        ],
        "penchant train trains and evaluates; the same command continues; a run is repeatable bit for bit, and safetensors",
    ),
}

TABLE: dict[str, Rule] = {
    **{key: same(why) for key, why in _ASIDE.items()},
    **{key: NAMES[key] for key in ("run_name", "project")},
    "output_dir": to("output", str),
    "learning_rate": to("train.lr", number),
    "weight_decay": to("train.weight_decay", number),
    "adam_beta1": to("train.adam_beta1", number),
    "adam_beta2": to("train.adam_beta2", number),
    "adam_epsilon": to("train.adam_eps", number),
    "max_grad_norm": to("train.max_grad_norm", lambda v: number(v) or None),
    "seed": to("train.seed", whole, "the order of rows is another one all the same: seeds mean nothing across tools"),
    "data_seed": unsupported("the order of rows follows train.seed"),
    "gradient_checkpointing": to("train.gradient_checkpointing", flag),
    "logging_steps": to("logging.every", whole),
    "save_total_limit": to("checkpoint.keep_last", whole),
    "eval_on_start": to("evaluation.at_start", flag),
    "metric_for_best_model": to(
        "checkpoint.metric",
        one_of({"loss": "eval/loss", "eval_loss": "eval/loss"}, "docs/eval.md lists our figures' names"),
    ),
    "greater_is_better": to("checkpoint.mode", lambda v: "max" if flag(v) else "min"),
    "load_best_model_at_end": same(
        "the best checkpoint is kept and `penchant eval --step best` takes it; the last stays the last"
    ),
    "use_cpu": to("model.device", lambda v: "cpu" if flag(v) else "auto"),
    "no_cuda": to("model.device", lambda v: "cpu" if flag(v) else "auto"),
    "optim": same(
        "AdamW", *ADAMW, otherwise="only AdamW is here; its step needs another learning rate than theirs: set train.lr"
    ),
    "optim_args": unsupported("only AdamW is here"),
    "lr_scheduler_kwargs": unsupported(
        "only min_lr_rate is understood, with cosine_with_min_lr: set train.min_lr_fraction"
    ),
    "label_smoothing_factor": unsupported("there is no label smoothing of tokens; leave it out", 0, 0.0),
    "neftune_noise_alpha": unsupported("no noise is added to embeddings; leave it out", 0, 0.0),
    "dataloader_drop_last": unsupported("no row is left out: an epoch's last batch may be smaller"),
    "push_to_hub": unsupported(_PUSH),
    "deepspeed": unsupported(
        "one process trains; give the number of its GPUs as --devices so that the batch stays the same"
    ),
    "fsdp": unsupported(
        "one process trains; give the number of its GPUs as --devices so that the batch stays the same"
    ),
    "fsdp_config": unsupported("one process trains"),
    "parallelism_config": unsupported("one process trains"),
    "use_adam_mini": unsupported("only AdamW is here"),
    "trust_remote_code": same(
        "code from a model's folder is never run here; models that need it cannot be loaded",
        False,
        otherwise=(
            "code from a model's folder is never run; Llama, Qwen2, Qwen3, Mistral, Gemma, GPT-2 and GPT-NeoX need none: leave it out"
        ),
    ),
}


def batch(given: Given) -> Iterator[Line]:
    """per device x accumulation x devices: rows of one optimizer step."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = whole(given[keys[0]]) * whole(given[keys[1]]) * given.devices
    yield given.line(
        keys,
        "translated",
        {"train.batch_size": rows},
        f"{given[keys[0]]} x {given[keys[1]]} x {given.devices} device(s); memory is train.tokens_per_step here",
    )


BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


def length(given: Given) -> Iterator[Line]:
    """Epochs, or steps: theirs ignores the epochs where max_steps is set, ours takes the smaller."""
    steps = whole(given["max_steps"]) if given["max_steps"] is not None else -1
    if steps > 0:
        ours = {"train.max_steps": steps, "train.epochs": 1000.0}
        yield given.line(
            ["max_steps", "num_train_epochs"],
            "translated",
            ours,
            "max_steps decides; epochs only must not end it before",
        )
        return
    yield given.line(["num_train_epochs"], "translated", {"train.epochs": number(given["num_train_epochs"])})
    if given.says("max_steps"):
        yield given.line(["max_steps"], "same", note="no bound")


LENGTH = frozenset({"max_steps", "num_train_epochs"})


def schedule(given: Given) -> Iterator[Line]:
    """Shape, warm-up and floor of the learning rate."""
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
        yield given.line(
            ["lr_scheduler_kwargs"], "unsupported", note="set train.schedule and train.min_lr_fraction by hand"
        )
    if name == "constant":
        yield given.line(
            ["lr_scheduler_type", "warmup_steps", "warmup_ratio"],
            "translated",
            {"train.warmup_fraction": 0.0},
            "their constant schedule has no warm-up",
        )
    else:
        yield _warmup(given)


def _warmup(given: Given) -> Line:
    ratio, steps = given["warmup_ratio"], number(given["warmup_steps"] or 0)
    if steps == 0 and ratio is not None:
        return given.line(["warmup_ratio"], "translated", {"train.warmup_fraction": number(ratio)})
    if steps < 1:  # transformers 5 reads a number below one as a share
        return given.line(["warmup_steps"], "translated", {"train.warmup_fraction": steps})
    total = number(given["max_steps"] or -1)
    if total > steps:
        ours = {"train.warmup_fraction": round(steps / total, 6)}
        return given.line(["warmup_steps", "max_steps"], "translated", ours)
    how = "warm-up is a share here: set train.warmup_fraction to these steps / all optimizer steps (the run prints how many)"
    return given.line(["warmup_steps"], "unsupported", note=how)


SCHEDULE = frozenset({"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"})


def saving(given: Given) -> Iterator[Line]:
    """When checkpoints are written and held-out rows evaluated."""
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


SAVING = frozenset({"save_strategy", "save_steps", "eval_strategy", "evaluation_strategy", "eval_steps"})


def precision(given: Given) -> Iterator[Line]:
    """bf16, fp16 and the dtype that weights are loaded in."""
    keys = ("bf16", "fp16", "pure_bf16")
    if given["fp16"]:
        note = "there is no fp16 with loss scaling; bf16 has its range and needs none"
        yield given.line(keys, "unsupported", {"model.dtype": "auto"}, note)
        return
    dtype = "bf16" if given["bf16"] or given["pure_bf16"] else "fp32"
    note = "weights stay in fp32 beside a bf16 copy" if dtype == "bf16" else ""
    yield given.line(keys, "translated", {"model.dtype": dtype}, note)


PRECISION = frozenset({"bf16", "fp16", "pure_bf16"})

COMMON = (length, schedule, saving, precision, report_to)
COMMON_PARTS = LENGTH | SCHEDULE | SAVING | PRECISION | {"report_to"}


def targets(value: Any) -> str | list[str]:
    """Layers of an adapter: a list, a text with commas, or all of them."""
    names = [v.strip() for v in value.split(",")] if isinstance(value, str) else [str(v) for v in value]
    if names in (["all"], ["all-linear"]):
        return "all-linear"
    if not all(names):
        raise NotHere(f"{value!r} names no layer")
    return names
