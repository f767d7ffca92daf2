"""TRL's files (`trl dpo --config FILE` and the others): keys and defaults of its trainers, read at version 1.16 and, for PPO and BCO, 1.12."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penchant.importers import hf
from penchant.importers.rules import (
    Derive,
    Given,
    Line,
    Method,
    NotHere,
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

DEFAULTS: dict[str, Any] = {
    **hf.DEFAULTS,
    "bf16": True,
    "max_length": 1024,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
# what PEFT adapts where nobody names layers
PEFT_TARGETS = {
    **{kind: ["q_proj", "v_proj"] for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")},
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
}

_DTYPES = {"auto", "float32", "bfloat16", "fp32", "bf16", None}
_OLD_LENGTHS = "prompt and answer share data.max_length here, the prompt is cut first; the sum stays bounded"

RULES: dict[str, Rule] = {
    **hf.TABLE,
    "model_name_or_path": to("model.path", str),
    "model_revision": to("model.revision", lambda v: None if v == "main" else str(v)),
    "torch_dtype": same(
        "weights are kept in fp32, and computed with in bf16 where bf16 is on",
        *_DTYPES,
        otherwise="set model.dtype: bf16 or fp32",
    ),
    "dtype": same(
        "weights are kept in fp32, and computed with in bf16 where bf16 is on",
        *_DTYPES,
        otherwise="set model.dtype: bf16 or fp32",
    ),
    "model_init_kwargs": unsupported("set model.dtype and model.revision; nothing else is passed to the model"),
    "load_in_8bit": unsupported("weights are not quantized: use LoRA (lora: {r: 16}) with model.dtype: bf16"),
    "load_in_4bit": unsupported("weights are not quantized: use LoRA (lora: {r: 16}) with model.dtype: bf16"),
    "bnb_4bit_quant_type": same("of load_in_4bit"),
    "use_bnb_nested_quant": same("of load_in_4bit"),
    "bnb_4bit_quant_storage": same("of load_in_4bit"),
    "disable_dropout": same("dropout of the model is always off", True, otherwise="dropout of the model is always off"),
    "max_length": to("data.max_length", whole),
    "max_seq_length": to("data.max_length", whole),
    "max_prompt_length": unsupported(_OLD_LENGTHS),
    "truncation_mode": same(
        "longer rows lose the beginning of the prompt first, then the answer's end (data.truncation)"
    ),
    "router_aux_loss_coef": unsupported("a mixture-of-experts model's balance loss is not added", 0, 0.0),
    "chat_template_path": unsupported(
        "the tokenizer's own template is used: save the tokenizer with the other one and set model.tokenizer"
    ),
    "eos_token": unsupported(
        "the tokenizer's own is used: save the tokenizer with the other one and set model.tokenizer"
    ),
    "is_encoder_decoder": unsupported("causal models only"),
    "dataset_streaming": same("a file is read row by row; a run's rows are held in memory"),
    "precompute_ref_log_probs": same("the reference is always computed once, and cached on disk"),
    "importance_sampling_level": same(
        "token", "token", otherwise="only token-wise ratios are here (rloo: the whole completion's)"
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# what several keys make together


def lora(given: Given) -> Iterator[Line]:
    """An adapter, where use_peft is on; their lora_* keys alone do nothing."""
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
    if not given["use_peft"]:
        if given.says("use_peft", *keys):
            yield given.line(
                ["use_peft", *(k for k in keys if given.says(k))],
                "same",
                note="use_peft is off there: the whole model is trained",
            )
        return
    rank, alpha = whole(given["lora_r"]), number(given["lora_alpha"])
    ours: dict[str, Any] = {"lora.r": rank, "lora.alpha": alpha, "lora.dropout": number(given["lora_dropout"])}
    if given["use_rslora"]:
        ours["lora.alpha"] = round(alpha * math.sqrt(rank), 6)
    yield given.line(
        ["use_peft", "lora_r", "lora_alpha", "lora_dropout", *(["use_rslora"] if given.says("use_rslora") else [])],
        "translated",
        ours,
        "rsLoRA divides by the root of the rank: alpha is that much larger here" if given["use_rslora"] else "",
    )
    yield _targets(given)


def _targets(given: Given) -> Line:
    if given["lora_target_modules"]:
        return given.line(
            ["lora_target_modules"], "translated", {"lora.target_modules": hf.targets(given["lora_target_modules"])}
        )
    kind = model_type(str(given["model_name_or_path"]))
    layers = PEFT_TARGETS.get(kind or "llama", ["q_proj", "v_proj"])
    note = (
        f"PEFT's default for {kind}"
        if kind in PEFT_TARGETS
        else "PEFT's default for Llama, Mistral, Qwen and Gemma; GPT-2: c_attn, GPT-NeoX: query_key_value"
    )
    return Line((), "translated", (("lora.target_modules", layers),), note, given=False)


def model_type(path: str) -> str | None:
    """What a local model folder's config.json calls its architecture; None for a hub id."""
    try:
        found = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found.get("model_type")) if isinstance(found, dict) else None


LORA = frozenset({"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora"})
RULES |= {
    "use_dora": unsupported("plain LoRA only"),
    "lora_modules_to_save": unsupported("an adapter's layers only (a reward model's head is trained with it)"),
    "lora_target_parameters": unsupported("name layers in lora.target_modules"),
    "lora_task_type": same("follows the method"),
}

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".ndjson")


def data(given: Given) -> Iterator[Line]:
    """Where rows come from: a hub id with its splits, a file, or their mixture of several."""
    evaluated = str(given["eval_strategy"] or given["evaluation_strategy"] or "no") not in ("no", "False")
    if given["datasets"]:
        yield from _mixture(given)
    elif given["dataset_name"]:
        name = str(given["dataset_name"])
        local = name.endswith(FILES) or Path(given.folder, name).exists()
        split = given["dataset_train_split"]
        keys = ["dataset_name"] if local else ["dataset_name", "dataset_train_split"]
        yield given.line(keys, "translated", {"data.path": name if local else f"{name}:{split}"}, _about(name, local))
        if evaluated and not local:
            yield given.line(
                ["dataset_test_split"], "translated", {"data.eval_path": f"{name}:{given['dataset_test_split']}"}
            )
        elif evaluated and not given["test_split_size"]:
            note = "a file has no test split: hold rows out with data.validation_fraction, or set data.eval_path"
            yield given.line(["dataset_test_split"], "unsupported", note=note)
    if given.says("dataset_config"):
        how = "a hub data set's default configuration is read; save the other one as a file and set data.path"
        yield given.line(["dataset_config"], "unsupported" if given["dataset_config"] else "same", note=how)
    if given.says("test_split_size"):
        yield given.line(
            ["test_split_size"],
            "translated",
            {"data.validation_fraction": number(given["test_split_size"])},
            "held out by prompt",
        )


def _about(name: str, local: bool) -> str:
    if local:
        return ""
    return "" if name.count("/") == 1 else "a hub id is written owner/name here: add the owner, or give a file"


def _mixture(given: Given) -> Iterator[Line]:
    paths, left = [], []
    for part in given["datasets"] if isinstance(given["datasets"], list) else []:
        files = part.get("data_files") if isinstance(part, Mapping) else None
        if isinstance(files, (str, list)) and str(part.get("path")) in ("json", "csv", "parquet", "text"):
            paths += [files] if isinstance(files, str) else [str(f) for f in files]
        elif isinstance(part, Mapping) and part.get("path") and not part.get("name") and not files:
            paths.append(f"{part['path']}:{part.get('split', 'train')}")
        else:
            left.append(part)
    if paths:
        yield given.line(["datasets"], "translated", {"data.path": paths if len(paths) > 1 else paths[0]})
    if left or not paths:
        note = f"{len(left)} of them has a configuration or files of its own kind: save it as a file and add it to data.path"
        yield Line((("datasets", left),), "unsupported", (), note)


DATA = frozenset(
    {"dataset_name", "dataset_train_split", "dataset_test_split", "dataset_config", "datasets", "test_split_size"}
)


def reference(given: Given) -> Iterator[Line]:
    """A reference that follows the policy (TR-DPO)."""
    keys = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    if given["sync_ref_model"]:
        ours = {
            "reference.sync_every": whole(given["ref_model_sync_steps"] or 512),
            "reference.sync_mixup": number(given["ref_model_mixup_alpha"] or 0.6),
        }
        yield given.line(keys, "translated", ours)
    elif given.says(*keys):
        yield given.line([k for k in keys if given.says(k)], "same", note="off: the reference stays the start")


REFERENCE = frozenset({"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"})

# their name of a DPO loss: ours, and which of their keys it reads
DPO_LOSSES: dict[str, tuple[str, dict[str, str]]] = {
    "sigmoid": ("dpo", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "sigmoid_norm": ("dpo", {"beta": "beta"}),
    "hinge": ("hinge", {"beta": "beta"}),
    "ipo": ("ipo", {"beta": "beta"}),
    "exo_pair": ("exo", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "nca_pair": ("nca", {"beta": "beta"}),
    "robust": ("rdpo", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "sppo_hard": ("sppo", {"beta": "beta"}),
    "aot": ("aot", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "aot_pair": ("aot", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "aot_unpaired": ("aot_unpaired", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "apo_zero": ("apo_zero", {"beta": "beta"}),
    "apo_down": ("apo_down", {"beta": "beta"}),
    "discopop": ("discopop", {"beta": "beta", "discopop_tau": "tau"}),
    "sft": ("sft", {}),
}
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
_LOSS_KEYS = (
    "loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau", "f_divergence_type",
    "f_alpha_divergence_coef", "use_weighting", "ld_alpha", "rpo_alpha", "reference_free",
)  # fmt: skip


def dpo_loss(given: Given) -> Iterator[Line]:
    """loss_type (one or several) and everything that changes it."""
    names = given["loss_type"] if isinstance(given["loss_type"], list) else [given["loss_type"]]
    weights = given["loss_weights"] or [1.0] * len(names)
    unknown = [n for n in names if n not in DPO_LOSSES]
    if unknown or len(weights) != len(names):
        how = "`penchant losses` lists ours" if unknown else "give a weight for each"
        note = (
            "kto_pair and bco_pair: set loss.name: kto or bco, which learn from the two answers one by one"
            if set(unknown) & {"bco_pair", "kto_pair"}
            else how
        )
        yield given.line(["loss_type", "loss_weights"], "unsupported", {"loss.name": "dpo"}, note)
        return
    parts = [_component(given, str(n)) for n in names]
    used = ["loss_type", *dict.fromkeys(k for n in names for k in DPO_LOSSES[str(n)][1])]
    changed, note = _changed(given, parts)
    used += changed
    if len(parts) == 1:
        ours = {f"loss.{k}": v for k, v in parts[0].items()}
    else:
        ours = {"loss.mix": [{**p, "weight": number(w)} for p, w in zip(parts, weights, strict=True)]}
        used.append("loss_weights")
    if names == ["sigmoid_norm"]:
        ours["loss.average_log_prob"] = True
    if given["rpo_alpha"]:
        ours["loss.nll_weight"] = number(given["rpo_alpha"])
        used.append("rpo_alpha")
    yield given.line(used, "translated", ours, note)
    rest = [k for k in _LOSS_KEYS if given.says(k) and k not in used]
    yield from (_of_other_losses(k, given, names) for k in rest)


def _component(given: Given, name: str) -> dict[str, Any]:
    ours, keys = DPO_LOSSES[name]
    values = {mine: number(given[theirs]) for theirs, mine in keys.items() if given[theirs] is not None}
    if ours == "exo" and values.get("label_smoothing") == 0:
        values["label_smoothing"] = 1e-3  # theirs puts it up, as a target of 0 would be infinite
    return {"name": ours, **values}


def _changed(given: Given, parts: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Keys that make another of our losses of plain DPO, in place; the keys that were used, and what to say."""
    alone = len(parts) == 1 and parts[0]["name"] == "dpo" and not parts[0].get("label_smoothing")
    if not alone:
        return [], ""
    plain, beta = parts[0], parts[0]["beta"]
    if given["f_divergence_type"] in DIVERGENCES:
        kind = DIVERGENCES[given["f_divergence_type"]]
        alpha = {"alpha": 1 - number(given["f_alpha_divergence_coef"])} if kind == "alpha" else {}
        plain.clear()
        plain.update(name="f_dpo", beta=beta, divergence=kind, **alpha)
        used = ["f_divergence_type", *(["f_alpha_divergence_coef"] if alpha else [])]
        return used, "our alpha is one minus theirs" if alpha else ""
    if given["use_weighting"]:
        plain.clear()
        plain.update(name="wpo", beta=beta)
        return ["use_weighting"], ""
    if given["ld_alpha"] is not None:
        plain.clear()
        plain.update(name="ld_dpo", beta=beta, alpha=number(given["ld_alpha"]))
        return ["ld_alpha"], ""
    return [], ""


def _of_other_losses(key: str, given: Given, names: list[Any]) -> Line:
    idle = {
        "f_divergence_type": ("reverse_kl",),
        "use_weighting": (False,),
        "ld_alpha": (None, 1.0),
        "reference_free": (False,),
    }
    read = {"label_smoothing", "discopop_tau", "f_alpha_divergence_coef", "loss_weights", "beta", "rpo_alpha"}
    if given[key] in idle.get(key, ()) or key in read:
        return given.line([key], "same", note=f"without effect on {', '.join(map(str, names))}")
    how = (
        "no reference at all: loss.name: cpo with alpha: 0"
        if key == "reference_free"
        else "choose one loss that has it: `penchant losses`"
    )
    return given.line([key], "unsupported", note=how)


def cpo_loss(given: Given) -> Iterator[Line]:
    """CPO, SimPO and AlphaPO, which share a trainer there."""
    keys = ["loss_type", "beta", "cpo_alpha"]
    beta, nll = number(given["beta"]), number(given["cpo_alpha"])
    if given["loss_type"] == "simpo":
        shape = number(given["alpha"] or 0)
        ours: dict[str, Any] = {
            "loss.name": "alpha_po" if shape else "simpo",
            "loss.beta": beta,
            "loss.gamma": number(given["simpo_gamma"]),
        }
        ours |= {"loss.alpha": shape} if shape else {}
        ours |= {"loss.nll_weight": nll} if nll else {}
        note = (
            "their cpo_alpha adds the chosen answers' likelihood to SimPO; set it to 0 for the paper's"
            if nll and not given.says("cpo_alpha")
            else ""
        )
        yield given.line([*keys, "simpo_gamma", *(["alpha"] if shape else [])], "translated", ours, note)
    elif given["loss_type"] == "sigmoid":
        ours = {
            "loss.name": "cpo",
            "loss.beta": beta,
            "loss.alpha": nll,
            "loss.label_smoothing": number(given["label_smoothing"]),
        }
        yield given.line(
            [*keys, "label_smoothing"],
            "translated",
            ours,
            "the likelihood term is a mean over each answer's tokens here",
        )
    else:
        how = "CPO with hinge or IPO is not here: slic (a hinge, no reference) or ipo (with one) are nearest"
        yield given.line(["loss_type"], "unsupported", {"loss.name": "cpo"}, how)


def _prompts(given: Given) -> tuple[int, int, int]:
    """(completions of a prompt, prompts of a batch of rollouts, optimizer steps on it) of GRPO and RLOO, which count completions."""
    group, devices = whole(given["num_generations"]), given.devices
    one, accumulation = whole(given["per_device_train_batch_size"]), whole(given["gradient_accumulation_steps"])
    rounds = whole(given["steps_per_generation"] or accumulation)
    completions = whole(given["generation_batch_size"] or one * devices * rounds)
    if completions % group:
        raise NotHere(
            f"{completions} completions cannot be shared among groups of {group}: fix per_device_train_batch_size"
        )
    return group, completions // group, max(1, completions // (one * devices * accumulation))


def groups(given: Given) -> Iterator[Line]:
    """Prompts of a step: their batch counts completions."""
    keys = [*hf.BATCH, "num_generations", "steps_per_generation", "generation_batch_size"]
    try:
        group, prompts, steps = _prompts(given)
    except NotHere as problem:
        yield given.line(keys, "unsupported", note=str(problem))
        return
    ours = {"algorithm.samples": group, "train.batch_size": prompts, "algorithm.minibatches": steps}
    note = f"their batch counts completions: {prompts} prompt(s) of {group} each; {given.devices} device(s)"
    yield given.line([*given_or_default(given, keys)], "translated", ours, note)


def given_or_default(given: Given, keys: list[str] | tuple[str, ...]) -> list[str]:
    """Those keys that have a value."""
    return [k for k in sorted(keys) if given[k] is not None]


GROUPS = hf.BATCH | {"num_generations", "steps_per_generation", "generation_batch_size"}
THEIR_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def rewards(given: Given) -> Iterator[Line]:
    """Reward models and functions, with their weights."""
    model = given["reward_model_name_or_path"] or given["reward_model_path"]
    key = "reward_model_path" if given.says("reward_model_path") else "reward_model_name_or_path"
    named = (
        given["reward_funcs"]
        if isinstance(given["reward_funcs"], list)
        else [given["reward_funcs"]]
        if given["reward_funcs"]
        else []
    )
    left = [n for n in named if n in THEIR_REWARDS or "." not in str(n)]
    functions = [_as_file(str(n)) for n in named if n not in left]
    terms = [str(model), *functions] if model else functions
    weights = given["reward_weights"] or [1.0] * len(terms)
    if left:
        note = "not built in here: write it as a Python function and set reward: FILE.py:FUNCTION"
        yield Line((("reward_funcs", left),), "unsupported", (), note)
    if terms and len(weights) == len(terms):
        keys = [k for k in (key, "reward_funcs", "reward_weights") if given[k] is not None]
        note = (
            "called as f(prompts, completions) with lists of text, and answers a list of numbers" if functions else ""
        )
        yield given.line(keys, "translated", {"reward": dict(zip(terms, map(number, weights), strict=True))}, note)
    elif terms:
        yield given.line(
            ["reward_weights"], "unsupported", {"reward": dict.fromkeys(terms, 1.0)}, "give each reward its weight"
        )


def _as_file(dotted: str) -> str:
    module, _, function = dotted.rpartition(".")
    return f"{module.replace('.', '/')}.py:{function}"


REWARDS = frozenset({"reward_model_name_or_path", "reward_model_path", "reward_funcs", "reward_weights"})


def ppo_batch(given: Given) -> Iterator[Line]:
    """PPO's batch: one batch of rollouts is all its minibatches."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    parts = whole(given["num_mini_batches"])
    rows = whole(given[keys[0]]) * whole(given[keys[1]]) * parts * given.devices
    ours = {"train.batch_size": rows, "algorithm.minibatches": parts}
    yield given.line(keys, "translated", ours, f"prompts of one batch of rollouts, on {given.devices} device(s)")


def ppo_length(given: Given) -> Iterator[Line]:
    """Episodes are prompts answered."""
    if given["total_episodes"] is None:
        yield from hf.length(given)
        return
    parts = whole(given["num_mini_batches"])
    rows = (
        whole(given["per_device_train_batch_size"])
        * whole(given["gradient_accumulation_steps"])
        * parts
        * given.devices
    )
    steps = math.ceil(whole(given["total_episodes"]) / rows) * whole(given["num_ppo_epochs"]) * parts
    note = "episodes / batch x passes x minibatches; epochs only must not end it before"
    yield given.line(
        ["total_episodes", "num_train_epochs"], "translated", {"train.max_steps": steps, "train.epochs": 1000.0}, note
    )


# ---------------------------------------------------------------------------------------------------------------------
# the trainers

_COMMON: tuple[Derive, ...] = (*hf.COMMON, lora, data)
_PARTS = hf.COMMON_PARTS | LORA | DATA
_CUT = "rows longer than data.max_length: theirs keeps the beginning (keep_start); ours cuts the beginning of the prompt, then the answer's end"
_SAMPLING: dict[str, Rule] = {
    "temperature": to("algorithm.temperature", number),
    "top_p": to("algorithm.top_p", number),
    "top_k": to("algorithm.top_k", lambda v: whole(v or 0)),
    "min_p": unsupported("use algorithm.top_p or top_k", 0, 0.0),
    "repetition_penalty": unsupported("log-probs are the model's own: leave it out", 1, 1.0),
    "generation_kwargs": unsupported("set algorithm.temperature, top_p, top_k"),
    "chat_template_kwargs": unsupported("the tokenizer's own template is used as it is"),
    "cache_implementation": same("speed only"),
    "use_vllm": same("speed only: completions are sampled by this engine"),
    "num_generations_eval": same("held-out prompts get algorithm.samples completions"),
    "shuffle_dataset": to("train.shuffle", flag),
    "mask_truncated_completions": unsupported(
        "completions that were cut are learned from; missing_eos_penalty makes them dear"
    ),
    "cast_lm_head_to_fp32": same("log-probs are always computed in fp32"),
    "use_transformers_paged": same("speed only"),
    "missing_eos_penalty": to("algorithm.missing_eos_penalty", number),
}
_SAMPLING |= {
    key: same("speed only: completions are sampled by this engine")
    for key in [
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
    ]
}
_GROUP_RULES: dict[str, Rule] = {
    **_SAMPLING,
    "max_completion_length": to("algorithm.max_new_tokens", whole),
    "beta": to("algorithm.beta", number),
    "num_iterations": to("algorithm.epochs", whole),
    "epsilon": to("algorithm.clip", number),
    "epsilon_high": to("algorithm.clip_high", number),
    "delta": unsupported("the ratio has no other upper bound than algorithm.clip_high"),
    "reward_clip_range": unsupported("clip in the reward function itself"),
    "normalize_advantages": unsupported("advantages are used as they are; grpo divides by the group's deviation"),
    "top_entropy_quantile": unsupported("every token is learned from", 1, 1.0),
    "entropy_coef": unsupported("there is no entropy term", 0, 0.0),
    "off_policy_mask_threshold": unsupported("leave it out"),
    "multi_objective_aggregation": same(
        "rewards are summed by weight, then normalized",
        "sum_then_normalize",
        otherwise="rewards are summed by weight first",
    ),
    "use_bias_correction_kl": unsupported("the k3 estimate is used as it is"),
}
_SCALES = {"group": "group", "batch": "batch", "none": "none", True: "group", False: "none"}
_MEANS = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
_GROUP_DEFAULTS = {
    **DEFAULTS, "learning_rate": 1e-6, "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    "num_iterations": 1, "epsilon": 0.2,
}  # fmt: skip
_GROUP_DEFAULTS.pop("max_length")
_PREFERENCE = {**DEFAULTS, "learning_rate": 1e-6}

METHODS: dict[str, Method] = {
    "sft": Method(
        "SFT",
        {"loss.name": "sft"},
        {**DEFAULTS, "learning_rate": 2e-5},
        {
            "dataset_text_field": to("data.columns", lambda v: {} if v == "text" else {"text": str(v)}),
            "packing": unsupported("rows are always packed, but a step is train.batch_size rows, not blocks of max_length: multiply it by the rows of a block"),
            "completion_only_loss": same("prompts are never targets", True, None, otherwise="prompts are never targets: give plain text (`text`) to train on all of it"),
            "assistant_only_loss": same("of a conversation the last answer is learned", True, otherwise="of a conversation the last answer is learned"),
            "loss_type": same("the negative log-likelihood", "nll", "chunked_nll", otherwise="plain likelihood only"),
            "shuffle_dataset": to("train.shuffle", flag),
        },
        (hf.batch, *_COMMON),
        hf.BATCH | _PARTS,
        ("of a conversation (`messages`) only the last answer is learned here, all of it there unless assistant_only_loss is on", _CUT),
    ),
    "dpo": Method(
        "DPO",
        {},
        {**_PREFERENCE, "beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "discopop_tau": 0.05, "f_alpha_divergence_coef": 0.5},
        {"max_completion_length": unsupported(_OLD_LENGTHS), "max_target_length": unsupported(_OLD_LENGTHS)},
        (hf.batch, *_COMMON, reference, dpo_loss),
        hf.BATCH | _PARTS | REFERENCE | set(_LOSS_KEYS),
        (_CUT,),
    ),
    "kto": Method(
        "KTO",
        {"loss.name": "kto"},
        {**_PREFERENCE, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        {
            "beta": to("loss.beta", number),
            "desirable_weight": to("loss.desirable_weight", number),
            "undesirable_weight": to("loss.undesirable_weight", number),
            "loss_type": same("KTO", "kto", otherwise="loss.name: apo_zero is for pairs; there is none for single answers"),
            "train_sampling_strategy": same("which prompt's answer another prompt is compared with is drawn anew, not taken from the batch"),
            "max_completion_length": unsupported(_OLD_LENGTHS),
        },
        (hf.batch, *_COMMON, reference),
        hf.BATCH | _PARTS | REFERENCE,
        (_CUT,),
    ),
    "bco": Method(
        "BCO",
        {"loss.name": "bco"},
        {**_PREFERENCE, "learning_rate": 5e-7, "beta": 0.1},
        {
            "beta": to("loss.beta", number),
            "prompt_sample_size": unsupported("underlying distribution matching is not here"),
            "min_density_ratio": same("of distribution matching"),
            "max_density_ratio": same("of distribution matching"),
            "max_completion_length": unsupported(_OLD_LENGTHS),
        },
        (hf.batch, *_COMMON),
        hf.BATCH | _PARTS,
        (_CUT,),
    ),
    "orpo": Method(
        "ORPO",
        {"loss.name": "orpo"},
        {**_PREFERENCE, "beta": 0.1},
        {"beta": to("loss.beta", number), "max_completion_length": unsupported(_OLD_LENGTHS)},
        (hf.batch, *_COMMON),
        hf.BATCH | _PARTS,
        (_CUT,),
    ),
    "cpo": Method(
        "CPO, SimPO",
        {},
        {**_PREFERENCE, "beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "loss_type": "sigmoid", "alpha": 0.0},
        {"max_completion_length": unsupported(_OLD_LENGTHS)},
        (hf.batch, *_COMMON, cpo_loss),
        hf.BATCH | _PARTS | {"loss_type", "beta", "cpo_alpha", "simpo_gamma", "label_smoothing", "alpha"},
        (_CUT,),
    ),
    "reward": Method(
        "reward model",
        {"algorithm.name": "reward_model"},
        {**DEFAULTS, "learning_rate": 1e-4},
        {"center_rewards_coefficient": to("algorithm.centring", number)},
        (hf.batch, *_COMMON),
        hf.BATCH | _PARTS,
        ("a `margin` column is not read: rows with chosen_score and rejected_score and algorithm.margin: scores are", _CUT),
    ),
    "grpo": Method(
        "GRPO",
        {"algorithm.name": "grpo"},
        {**_GROUP_DEFAULTS, "num_generations": 8, "beta": 0.0, "loss_type": "dapo", "scale_rewards": "group"},
        {
            **_GROUP_RULES,
            "loss_type": to("algorithm.loss_mean", one_of(_MEANS, "set algorithm.loss_mean: sequence, token or constant")),
            "scale_rewards": to("algorithm.scale_rewards", one_of(_SCALES, "set group, batch or none")),
        },
        (groups, *_COMMON, reference, rewards),
        GROUPS | _PARTS | REFERENCE | REWARDS,
    ),
    "rloo": Method(
        "RLOO",
        {"algorithm.name": "rloo"},
        {**_GROUP_DEFAULTS, "num_generations": 2, "beta": 0.05},
        _GROUP_RULES,
        (groups, *_COMMON, reference, rewards),
        GROUPS | _PARTS | REFERENCE | REWARDS,
    ),
    "online_dpo": Method(
        "online DPO",
        {"algorithm.name": "online_dpo", "algorithm.samples": 2},
        {**_GROUP_DEFAULTS, "learning_rate": 5e-7, "max_new_tokens": 64, "temperature": 0.9, "beta": 0.1},
        {
            **_SAMPLING,
            "max_new_tokens": to("algorithm.max_new_tokens", whole),
            "beta": to("algorithm.beta", lambda v: number(v[0] if isinstance(v, list) and len(v) == 1 else v)),
            "loss_type": same("DPO's", "sigmoid", otherwise="online_dpo has DPO's loss only"),
            "judge": unsupported("a reward decides: write the judge as a Python function and set reward: FILE.py:FUNCTION"),
        },
        (hf.batch, *_COMMON, rewards),
        hf.BATCH | _PARTS | REWARDS,
    ),
    "ppo": Method(
        "PPO",
        {"algorithm.name": "ppo", "algorithm.value": "separate"},
        {
            **DEFAULTS, "learning_rate": 3e-6, "num_mini_batches": 1, "num_ppo_epochs": 4, "response_length": 53, "temperature": 0.7,
            "kl_coef": 0.05, "kl_estimator": "k1", "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0,
            "lam": 0.95, "whiten_rewards": False,
        },
        {
            **_SAMPLING,
            "sft_model_path": to("model.path", str),
            "response_length": to("algorithm.max_new_tokens", whole),
            "num_ppo_epochs": to("algorithm.epochs", whole),
            "kl_coef": to("algorithm.beta", number),
            "kl_estimator": to("algorithm.kl_estimator", str),
            "cliprange": to("algorithm.clip", number),
            "vf_coef": to("algorithm.value_coef", number),
            "cliprange_value": to("algorithm.value_clip", number),
            "gamma": to("algorithm.gamma", number),
            "lam": to("algorithm.lambda", number),
            "whiten_rewards": to("algorithm.whiten_rewards", flag),
            "stop_token": same("EOS", "eos", otherwise="EOS ends a completion"),
            "stop_token_id": unsupported("the tokenizer's EOS ends a completion"),
            "exp_name": same("name the run by `output`"),
            "adam_epsilon": to("algorithm.adam_eps", number),
        },
        (ppo_batch, ppo_length, hf.schedule, hf.saving, hf.precision, lora, data, rewards),
        hf.BATCH | {"num_mini_batches", "total_episodes"} | _PARTS | REWARDS,
    ),
}  # fmt: skip

# keys that only one trainer has, and words in a file's name
_MARKS = {
    "ppo": ("num_ppo_epochs", "kl_coef", "cliprange", "response_length", "total_episodes", "vf_coef"),
    "grpo": ("scale_rewards", "epsilon_high", "num_iterations"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "reward": ("center_rewards_coefficient",),
    "bco": ("prompt_sample_size", "min_density_ratio", "max_density_ratio"),
    "dpo": (
        "sync_ref_model",
        "rpo_alpha",
        "ld_alpha",
        "f_divergence_type",
        "precompute_ref_log_probs",
        "use_weighting",
        "discopop_tau",
    ),
    "sft": ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "packing", "max_seq_length"),
}
_BY_LOSS = {
    "kto": "kto",
    "simpo": "cpo",
    "nll": "sft",
    "dapo": "grpo",
    "dr_grpo": "grpo",
    "bnpo": "grpo",
    "grpo": "grpo",
}
_BY_LOSS |= {name: "dpo" for name in DPO_LOSSES if name not in ("sigmoid", "hinge", "ipo", "sft")}
_WORDS = ("online_dpo", "grpo", "rloo", "simpo", "orpo", "cpo", "kto", "bco", "dpo", "ppo", "reward", "sft")


def guess(values: Mapping[str, Any], name: str) -> str | None:
    """Which trainer a file is for: by a key that only one has, by its loss, by the file's name; None where nothing tells."""
    by_name = next((w for w in _WORDS if w in name.lower().replace("-", "_")), None)
    by_name = "cpo" if by_name == "simpo" else by_name
    if "num_generations" in values and by_name in ("grpo", "rloo"):
        return by_name
    for method, marks in _MARKS.items():
        if any(m in values for m in marks):
            return method
    loss = values.get("loss_type")
    kinds = loss if isinstance(loss, list) else [loss]
    return next((_BY_LOSS[k] for k in kinds if isinstance(k, str) and k in _BY_LOSS), by_name)


SOURCE = Source(
    "trl",
    "TRL",
    METHODS,
    RULES,
    frozenset(
        {
            "dataset_train_split",
            "dataset_test_split",
            "use_peft",
            "lora_target_modules",
            "num_generations",
            "loss_type",
            "max_prompt_length",
        }
    ),
    guess,
)
