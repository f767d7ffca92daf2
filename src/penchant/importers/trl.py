"""Import TRL's files (`trl dpo --config FILE` and the others). Keys that translate one to one are in trl.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from penchant.importers import hf
from penchant.importers.rules import Line, ToolConfig, Untranslatable, integer, layers, number, source, table

TABLE = table("trl")


def lora(config: ToolConfig) -> Iterator[Line]:
    """use_peft and the adapter keys. Without use_peft, lora_* keys have no effect."""
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
    for key, ours in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        yield from hf.quantized(config, key, ours if config[key] else None, bool(config["use_peft"]))
    if not config["use_peft"]:
        if config.sets("use_peft", *keys):
            set_keys = ["use_peft", *(k for k in keys if config.sets(k))]
            yield config.line(set_keys, "same", note="use_peft is off there: the whole model is trained")
        return
    used_keys = ["use_peft", *keys[:3], *(key for key in keys[4:] if config.sets(key))]
    yield hf.adapter_line(config, used_keys, integer(config["lora_r"]), number(config["lora_alpha"]))
    yield _targets(config)


def _targets(config: ToolConfig) -> Line:
    targets = config["lora_target_modules"]
    if targets:
        return config.line(["lora_target_modules"], "translated", {"lora.target_modules": layers(targets)})
    return peft_targets(config)


def peft_targets(config: ToolConfig) -> Line:
    """The layers that PEFT adapts by default."""
    targets, kind = TABLE["peft_targets"], hf.model_type(str(config["model_name_or_path"]))
    note = f"PEFT's default for {kind}"
    if kind not in targets:
        kind = "llama"
        note = "PEFT's default for Llama, Mistral, Qwen and Gemma; GPT-2: c_attn, GPT-NeoX: query_key_value"
    return Line((), "translated", (("lora.target_modules", targets[kind]),), note, is_set=False)


def data(config: ToolConfig) -> Iterator[Line]:
    """The data: a hub id with its splits, a file, or a mixture of several."""
    evaluates = str(config["eval_strategy"] or config["evaluation_strategy"] or "no") not in ("no", "False")
    if config["datasets"]:
        yield from _mixture(config)
    elif config["dataset_name"]:
        name = str(config["dataset_name"])
        is_local = hf.is_local(name, config.folder)
        keys = ["dataset_name"] if is_local else ["dataset_name", "dataset_train_split"]
        path = name if is_local else f"{name}:{config['dataset_train_split']}"
        is_clear = is_local or name.count("/") == 1
        note = "" if is_clear else "a hub id is written owner/name here: add the owner, or give a file"
        yield config.line(keys, "translated", {"data.path": path}, note)
        if evaluates and not is_local:
            ours = {"data.eval_path": f"{name}:{config['dataset_test_split']}"}
            yield config.line(["dataset_test_split"], "translated", ours)
        elif evaluates and not config["test_split_size"]:
            note = "a file has no test split: hold rows out with data.validation_fraction, or set data.eval_path"
            yield config.line(["dataset_test_split"], "unsupported", note=note)
    if config.sets("dataset_config"):
        how = "a hub data set's default configuration is read; save the other one as a file and set data.path"
        yield config.line(["dataset_config"], "unsupported" if config["dataset_config"] else "same", note=how)
    if config.sets("test_split_size"):
        held_out = {"data.validation_fraction": number(config["test_split_size"])}
        yield config.line(["test_split_size"], "translated", held_out, "held out by prompt")


def _mixture(config: ToolConfig) -> Iterator[Line]:
    paths, unsupported = [], []
    for part in config["datasets"] if isinstance(config["datasets"], list) else []:
        files = part.get("data_files") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and (part.get("fraction") is not None or part.get("data_dir")):
            unsupported.append(part)
        elif isinstance(files, (str, list)) and str(part.get("path")) in ("json", "csv", "parquet", "text"):
            paths += [files] if isinstance(files, str) else [str(f) for f in files]
        elif isinstance(part, Mapping) and part.get("path") and not part.get("name") and not files:
            paths.append(f"{part['path']}:{part.get('split', 'train')}")
        else:
            unsupported.append(part)
    if paths:
        yield config.line(["datasets"], "translated", {"data.path": paths if len(paths) > 1 else paths[0]})
    if unsupported or not paths:
        note = f"{len(unsupported)} of them has a configuration, a fraction or files of its own kind: save it as a file and add it to data.path"
        yield Line((("datasets", unsupported),), "unsupported", (), note)


def reference(config: ToolConfig) -> Iterator[Line]:
    """A reference that is synced with the policy (TR-DPO)."""
    keys = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    if config["sync_ref_model"]:
        steps, mixup = integer(config["ref_model_sync_steps"] or 512), number(config["ref_model_mixup_alpha"] or 0.6)
        yield config.line(keys, "translated", {"reference.sync_every": steps, "reference.sync_mixup": mixup})
    elif config.sets(*keys):
        yield config.line([k for k in keys if config.sets(k)], "same", note="off: the reference stays the start")


DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def dpo_loss(config: ToolConfig) -> Iterator[Line]:
    """loss_type (one or several) and every key that modifies it."""
    losses = TABLE["dpo_losses"]
    names = config["loss_type"] if isinstance(config["loss_type"], list) else [config["loss_type"]]
    weights = config["loss_weights"] or [1.0] * len(names)
    unknown = [n for n in names if n not in losses]
    if unknown or len(weights) != len(names):
        note = "`penchant losses` lists ours" if unknown else "give a weight for each"
        if set(unknown) & {"bco_pair", "kto_pair"}:
            note = "kto_pair and bco_pair: set loss.name: kto or bco, which learn from the two answers one by one"
        yield config.line(["loss_type", "loss_weights"], "unsupported", {"loss.name": "dpo"}, note)
        return
    components = [_component(config, losses[n]) for n in names]
    used_keys = ["loss_type", *dict.fromkeys(key for n in names for field, key in losses[n].items() if field != "name")]
    note = ""
    if len(components) == 1 and components[0]["name"] == "dpo" and not components[0].get("label_smoothing"):
        components[0], variant_keys, note = _dpo_variant(config, components[0])
        used_keys += variant_keys
    if len(components) == 1:
        ours = {f"loss.{k}": v for k, v in components[0].items()}
    else:
        ours = {"loss.mix": [{**p, "weight": number(w)} for p, w in zip(components, weights, strict=True)]}
        used_keys.append("loss_weights")
    if names == ["sigmoid_norm"]:
        ours["loss.average_log_prob"] = True
    if config["rpo_alpha"]:
        ours["loss.nll_weight"] = number(config["rpo_alpha"])
        used_keys.append("rpo_alpha")
    yield config.line(used_keys, "translated", ours, note)
    for key in TABLE["derived"]["dpo_loss"]:
        if config.sets(key) and key not in used_keys:
            yield _unused_loss_key(key, config, names)


def _component(config: ToolConfig, loss: Mapping[str, str]) -> dict[str, Any]:
    keys = {ours: key for ours, key in loss.items() if ours != "name" and config[key] is not None}
    component = {"name": loss["name"], **{ours: number(config[key]) for ours, key in keys.items()}}
    if component["name"] == "exo" and component.get("label_smoothing") == 0:
        component["label_smoothing"] = 1e-3  # TRL does the same, since a target of 0 would be infinite
    return component


def _dpo_variant(config: ToolConfig, base_loss: dict[str, Any]) -> tuple[dict[str, Any], list[str], str]:
    """(loss, keys used, note) for the keys that turn plain DPO into another of our losses."""
    beta = {"beta": base_loss["beta"]} if "beta" in base_loss else {}
    divergence = DIVERGENCES.get(config["f_divergence_type"])
    if divergence == "alpha":
        alpha = 1 - number(config["f_alpha_divergence_coef"])
        loss = {"name": "f_dpo", **beta, "divergence": divergence, "alpha": alpha}
        return loss, ["f_divergence_type", "f_alpha_divergence_coef"], "our alpha is one minus theirs"
    if divergence:
        return {"name": "f_dpo", **beta, "divergence": divergence}, ["f_divergence_type"], ""
    if config["use_weighting"]:
        return {"name": "wpo", **beta}, ["use_weighting"], ""
    if config["ld_alpha"] is not None:
        return {"name": "ld_dpo", **beta, "alpha": number(config["ld_alpha"])}, ["ld_alpha"], ""
    return base_loss, [], ""


# values without effect; keys not listed here have no effect with any value on a loss that does not read them
_IDLE = {
    "f_divergence_type": ("reverse_kl",),
    "use_weighting": (False,),
    "ld_alpha": (None, 1.0),
    "reference_free": (False,),
}


def _unused_loss_key(key: str, config: ToolConfig, names: list[Any]) -> Line:
    if key not in _IDLE or config[key] in _IDLE[key]:
        return config.line([key], "same", note=f"without effect on {', '.join(map(str, names))}")
    how = "choose one loss that has it: `penchant losses`"
    if key == "reference_free":
        how = "no reference at all: loss.name: cpo with alpha: 0"
    return config.line([key], "unsupported", note=how)


def grpo_loss(config: ToolConfig) -> Iterator[Line]:
    """GRPO's loss_type, which selects the token averaging or another method, and importance_sampling_level, which may select GSPO."""
    kind, level, epsilon_high = (
        str(config["loss_type"]),
        config["importance_sampling_level"] or "token",
        config["epsilon_high"],
    )
    keys = ["loss_type", *(["importance_sampling_level"] if config.sets("importance_sampling_level") else [])]
    loss_mean = TABLE["grpo_losses"].get(kind)
    if loss_mean is None or level not in ("token", "sequence") or (kind == "cispo" and level == "sequence"):
        how = f"there is no {kind} with ratios of each {level}: take algorithm.name dapo, dr_grpo, gspo or cispo"
        yield config.line(keys, "unsupported", {}, how)
    elif kind == "cispo":
        # TRL caps the ratio at epsilon_high, we cap it at 1 + clip_high
        bound = number(epsilon_high if epsilon_high is not None else config["epsilon"]) - 1
        ours = {"algorithm.name": "cispo", "algorithm.loss_mean": loss_mean}
        note = (
            ""
            if bound > 0
            else "ratios are held at 1 + algorithm.clip_high here, and at epsilon_high there: set it above 1"
        )
        if bound > 0:
            ours["algorithm.clip_high"] = bound
        yield config.line([*keys, "epsilon_high"], "unsupported" if note else "translated", ours, note)
        return
    else:
        algorithm = {"algorithm.name": "gspo"} if level == "sequence" else {}
        yield config.line(keys, "translated", {**algorithm, "algorithm.loss_mean": loss_mean})
    if epsilon_high is not None:
        yield config.line(["epsilon_high"], "translated", {"algorithm.clip_high": number(epsilon_high)})
    elif config.sets("epsilon_high"):
        yield config.line(["epsilon_high"], "same", note="not set")
    elif level == "sequence":  # GSPO's own default differs
        yield Line((), "translated", (("algorithm.clip_high", number(config["epsilon"])),), "epsilon", is_set=False)


def gkd_loss(config: ToolConfig) -> Iterator[Line]:
    """GKD's beta: 0 is the forward KL, 1 the reverse KL."""
    beta = number(config["beta"])
    if beta in (0.0, 1.0):
        ours: dict[str, Any] = {"algorithm.divergence": "reverse_kl" if beta else "forward_kl"}
    else:
        ours = {"algorithm.divergence": "jsd", "algorithm.beta": beta}
    yield config.line(["beta"], "translated", ours)


def cpo_loss(config: ToolConfig) -> Iterator[Line]:
    """CPO, SimPO and AlphaPO, which share a trainer in TRL."""
    keys = ["loss_type", "beta", "cpo_alpha"]
    beta, nll = number(config["beta"]), number(config["cpo_alpha"])
    if config["loss_type"] == "simpo":
        alpha = number(config["alpha"] or 0)
        name = "alpha_po" if alpha else "simpo"
        ours = {"loss.name": name, "loss.beta": beta, "loss.gamma": number(config["simpo_gamma"])}
        ours |= {"loss.alpha": alpha} if alpha else {}
        ours |= {"loss.nll_weight": nll} if nll else {}
        note = "their cpo_alpha adds the chosen answers' likelihood to SimPO; set it to 0 for the paper's"
        note = note if nll and not config.sets("cpo_alpha") else ""
        yield config.line([*keys, "simpo_gamma", *(["alpha"] if alpha else [])], "translated", ours, note)
    elif config["loss_type"] == "sigmoid":
        ours = {"loss.name": "cpo", "loss.beta": beta, "loss.alpha": nll}
        ours["loss.label_smoothing"] = number(config["label_smoothing"])
        note = "the likelihood term is a mean over each answer's tokens here"
        yield config.line([*keys, "label_smoothing"], "translated", ours, note)
    else:
        how = "CPO with hinge or IPO is not here: slic (a hinge, no reference) or ipo (with one) are nearest"
        yield config.line(["loss_type"], "unsupported", {"loss.name": "cpo"}, how)


def groups(config: ToolConfig) -> Iterator[Line]:
    """Prompts per step of GRPO and RLOO, whose batch sizes in TRL count completions."""
    keys = TABLE["derived"]["groups"]
    try:
        group_size, micro_batch_size = (
            integer(config["num_generations"]),
            integer(config["per_device_train_batch_size"]) * config.devices,
        )
        accumulation = integer(config["gradient_accumulation_steps"])
        rounds = integer(config["steps_per_generation"] or accumulation)
        of_step = micro_batch_size * accumulation
        generated = integer(config["generation_batch_size"] or micro_batch_size * rounds)
        completions = max(generated, of_step)  # a step may take several generations, all of the same policy
        if completions % group_size:
            problem = f"{completions} completions cannot be shared among groups of {group_size}"
            raise Untranslatable(f"{problem}: fix per_device_train_batch_size")
        if completions % generated or completions % of_step:
            problem = f"steps of {of_step} completions do not fit generations of {generated}"
            raise Untranslatable(f"{problem}: fix steps_per_generation")
    except Untranslatable as error:
        yield config.line(keys, "unsupported", note=str(error))
        return
    prompts, steps = completions // group_size, completions // of_step
    ours = {"algorithm.samples": group_size, "train.batch_size": prompts, "algorithm.minibatches": steps}
    note = f"their batch counts completions: {prompts} prompt(s) of {group_size} each; {config.devices} device(s)"
    yield config.line(sorted(k for k in keys if config[k] is not None), "translated", ours, note)


THEIR_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
OUR_REWARDS = {"accuracy_reward": "accuracy", "think_format_reward": "think_format"}


def rewards(config: ToolConfig) -> Iterator[Line]:
    """Reward models and functions, with their weights."""
    model = config["reward_model_name_or_path"] or config["reward_model_path"]
    key = "reward_model_path" if config.sets("reward_model_path") else "reward_model_name_or_path"
    names = config["reward_funcs"] or []
    names = names if isinstance(names, list) else [names]
    names = [OUR_REWARDS.get(str(n), n) for n in names]
    unsupported = [n for n in names if n in THEIR_REWARDS or ("." not in str(n) and n not in OUR_REWARDS.values())]
    functions = [str(n) if n in OUR_REWARDS.values() else _function_path(str(n)) for n in names if n not in unsupported]
    terms = [str(model), *functions] if model else functions
    weights = config["reward_weights"] or [1.0] * len(terms)
    if unsupported:
        note = "not built in here: write it as a Python function and set reward: FILE.py:FUNCTION"
        yield Line((("reward_funcs", unsupported),), "unsupported", (), note)
    if terms and len(weights) == len(terms):
        keys = [k for k in (key, "reward_funcs", "reward_weights") if config[k] is not None]
        note = "called as f(prompts, completions) with lists of text, and returns a list of numbers"
        ours = {"reward": dict(zip(terms, map(number, weights), strict=True))}
        yield config.line(keys, "translated", ours, note if any(":" in f for f in functions) else "")
    elif terms:
        ours = {"reward": dict.fromkeys(terms, 1.0)}
        yield config.line(["reward_weights"], "unsupported", ours, "give each reward its weight")


def _function_path(import_path: str) -> str:
    module, _, function = import_path.rpartition(".")
    return f"{module.replace('.', '/')}.py:{function}"


def ppo_length(config: ToolConfig) -> Iterator[Line]:
    """PPO's length: total_episodes counts prompts with one completion each; max_steps has no effect."""
    if config.sets("max_steps"):
        yield config.line(["max_steps"], "same", note="without effect there: episodes or epochs decide")
    if config["total_episodes"] is None:
        yield config.line(["num_train_epochs"], "translated", {"train.epochs": number(config["num_train_epochs"])})
        return
    minibatches, device_rows = integer(config["num_mini_batches"]), integer(config["per_device_train_batch_size"])
    rows = device_rows * integer(config["gradient_accumulation_steps"]) * minibatches * config.devices
    steps = math.ceil(integer(config["total_episodes"]) / rows) * integer(config["num_ppo_epochs"]) * minibatches
    note = "episodes / batch x passes x minibatches; epochs only must not end it before"
    ours = {"train.max_steps": steps, "train.epochs": 1000.0}
    yield config.line(["total_episodes", "num_train_epochs"], "translated", ours, note)


def guess(values: Mapping[str, Any], name: str) -> str | None:
    """The trainer that a file is for, by keys that only one trainer has, by its loss or by the file's name; None if unclear."""
    hints = TABLE["guess"]
    words = name.lower().replace("-", "_")
    by_name = next((method for word, method in hints["names"].items() if word in words), None)
    if "num_generations" in values and by_name in ("grpo", "rloo"):
        return by_name
    for method, keys in hints["keys"].items():
        if any(key in values for key in keys):
            return method
    loss = values.get("loss_type")
    kinds = loss if isinstance(loss, list) else [loss]
    return next((hints["losses"][k] for k in kinds if isinstance(k, str) and k in hints["losses"]), by_name)


DERIVATIONS = (lora, data, reference, dpo_loss, cpo_loss, grpo_loss, gkd_loss, groups, rewards, ppo_length)
SOURCE = source("trl", (*hf.DERIVATIONS, *DERIVATIONS), guess)
