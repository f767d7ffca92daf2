"""Import TRL's files (`trl dpo --config FILE` and the others). Keys that translate one to one are in trl.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from penchant.importers import hf
from penchant.importers.rules import Given, Line, NotHere, layers, number, source, table, whole

TABLE = table("trl")


def lora(given: Given) -> Iterator[Line]:
    """use_peft and the adapter keys. Without use_peft, lora_* keys have no effect."""
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
    for key, ours in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        yield from hf.quantized(given, key, ours if given[key] else None, bool(given["use_peft"]))
    if not given["use_peft"]:
        if given.says("use_peft", *keys):
            there = ["use_peft", *(k for k in keys if given.says(k))]
            yield given.line(there, "same", note="use_peft is off there: the whole model is trained")
        return
    used = ["use_peft", *keys[:3], *(key for key in keys[4:] if given.says(key))]
    yield hf.adapter(given, used, whole(given["lora_r"]), number(given["lora_alpha"]))
    yield _targets(given)


def _targets(given: Given) -> Line:
    named = given["lora_target_modules"]
    if named:
        return given.line(["lora_target_modules"], "translated", {"lora.target_modules": layers(named)})
    return peft_targets(given)


def peft_targets(given: Given) -> Line:
    """The layers that PEFT adapts by default."""
    known, kind = TABLE["peft_targets"], hf.model_type(str(given["model_name_or_path"]))
    note = f"PEFT's default for {kind}"
    if kind not in known:
        kind = "llama"
        note = "PEFT's default for Llama, Mistral, Qwen and Gemma; GPT-2: c_attn, GPT-NeoX: query_key_value"
    return Line((), "translated", (("lora.target_modules", known[kind]),), note, given=False)


def data(given: Given) -> Iterator[Line]:
    """The data: a hub id with its splits, a file, or a mixture of several."""
    evaluated = str(given["eval_strategy"] or given["evaluation_strategy"] or "no") not in ("no", "False")
    if given["datasets"]:
        yield from _mixture(given)
    elif given["dataset_name"]:
        name = str(given["dataset_name"])
        local = hf.is_local(name, given.folder)
        keys = ["dataset_name"] if local else ["dataset_name", "dataset_train_split"]
        path = name if local else f"{name}:{given['dataset_train_split']}"
        clear = local or name.count("/") == 1
        note = "" if clear else "a hub id is written owner/name here: add the owner, or give a file"
        yield given.line(keys, "translated", {"data.path": path}, note)
        if evaluated and not local:
            ours = {"data.eval_path": f"{name}:{given['dataset_test_split']}"}
            yield given.line(["dataset_test_split"], "translated", ours)
        elif evaluated and not given["test_split_size"]:
            note = "a file has no test split: hold rows out with data.validation_fraction, or set data.eval_path"
            yield given.line(["dataset_test_split"], "unsupported", note=note)
    if given.says("dataset_config"):
        how = "a hub data set's default configuration is read; save the other one as a file and set data.path"
        yield given.line(["dataset_config"], "unsupported" if given["dataset_config"] else "same", note=how)
    if given.says("test_split_size"):
        held_out = {"data.validation_fraction": number(given["test_split_size"])}
        yield given.line(["test_split_size"], "translated", held_out, "held out by prompt")


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


def reference(given: Given) -> Iterator[Line]:
    """A reference that is synced with the policy (TR-DPO)."""
    keys = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    if given["sync_ref_model"]:
        steps, share = whole(given["ref_model_sync_steps"] or 512), number(given["ref_model_mixup_alpha"] or 0.6)
        yield given.line(keys, "translated", {"reference.sync_every": steps, "reference.sync_mixup": share})
    elif given.says(*keys):
        yield given.line([k for k in keys if given.says(k)], "same", note="off: the reference stays the start")


DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def dpo_loss(given: Given) -> Iterator[Line]:
    """loss_type (one or several) and every key that modifies it."""
    losses = TABLE["dpo_losses"]
    names = given["loss_type"] if isinstance(given["loss_type"], list) else [given["loss_type"]]
    weights = given["loss_weights"] or [1.0] * len(names)
    unknown = [n for n in names if n not in losses]
    if unknown or len(weights) != len(names):
        note = "`penchant losses` lists ours" if unknown else "give a weight for each"
        if set(unknown) & {"bco_pair", "kto_pair"}:
            note = "kto_pair and bco_pair: set loss.name: kto or bco, which learn from the two answers one by one"
        yield given.line(["loss_type", "loss_weights"], "unsupported", {"loss.name": "dpo"}, note)
        return
    parts = [_component(given, losses[n]) for n in names]
    used = ["loss_type", *dict.fromkeys(key for n in names for part, key in losses[n].items() if part != "name")]
    note = ""
    if len(parts) == 1 and parts[0]["name"] == "dpo" and not parts[0].get("label_smoothing"):
        parts[0], changed, note = _changed(given, parts[0])
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
    for key in TABLE["derived"]["dpo_loss"]:
        if given.says(key) and key not in used:
            yield _of_other_losses(key, given, names)


def _component(given: Given, loss: Mapping[str, str]) -> dict[str, Any]:
    read = {ours: key for ours, key in loss.items() if ours != "name" and given[key] is not None}
    made = {"name": loss["name"], **{ours: number(given[key]) for ours, key in read.items()}}
    if made["name"] == "exo" and made.get("label_smoothing") == 0:
        made["label_smoothing"] = 1e-3  # TRL does the same, since a target of 0 would be infinite
    return made


def _changed(given: Given, plain: dict[str, Any]) -> tuple[dict[str, Any], list[str], str]:
    """(loss, keys used, note) for the keys that turn plain DPO into another of our losses."""
    beta = {"beta": plain["beta"]} if "beta" in plain else {}
    kind = DIVERGENCES.get(given["f_divergence_type"])
    if kind == "alpha":
        alpha = 1 - number(given["f_alpha_divergence_coef"])
        made = {"name": "f_dpo", **beta, "divergence": kind, "alpha": alpha}
        return made, ["f_divergence_type", "f_alpha_divergence_coef"], "our alpha is one minus theirs"
    if kind:
        return {"name": "f_dpo", **beta, "divergence": kind}, ["f_divergence_type"], ""
    if given["use_weighting"]:
        return {"name": "wpo", **beta}, ["use_weighting"], ""
    if given["ld_alpha"] is not None:
        return {"name": "ld_dpo", **beta, "alpha": number(given["ld_alpha"])}, ["ld_alpha"], ""
    return plain, [], ""


# values without effect; keys not listed here have no effect with any value on a loss that does not read them
_IDLE = {
    "f_divergence_type": ("reverse_kl",),
    "use_weighting": (False,),
    "ld_alpha": (None, 1.0),
    "reference_free": (False,),
}


def _of_other_losses(key: str, given: Given, names: list[Any]) -> Line:
    if key not in _IDLE or given[key] in _IDLE[key]:
        return given.line([key], "same", note=f"without effect on {', '.join(map(str, names))}")
    how = "choose one loss that has it: `penchant losses`"
    if key == "reference_free":
        how = "no reference at all: loss.name: cpo with alpha: 0"
    return given.line([key], "unsupported", note=how)


def grpo_loss(given: Given) -> Iterator[Line]:
    """GRPO's loss_type, which selects the token averaging or another method, and importance_sampling_level, which may select GSPO."""
    kind, level, high = str(given["loss_type"]), given["importance_sampling_level"] or "token", given["epsilon_high"]
    keys = ["loss_type", *(["importance_sampling_level"] if given.says("importance_sampling_level") else [])]
    found = TABLE["grpo_losses"].get(kind)
    if found is None or level not in ("token", "sequence") or (kind == "cispo" and level == "sequence"):
        how = f"there is no {kind} with ratios of each {level}: take algorithm.name dapo, dr_grpo, gspo or cispo"
        yield given.line(keys, "unsupported", {}, how)
    elif kind == "cispo":
        # TRL caps the ratio at epsilon_high, we cap it at 1 + clip_high
        bound = number(high if high is not None else given["epsilon"]) - 1
        ours = {"algorithm.name": "cispo", "algorithm.loss_mean": found}
        note = (
            ""
            if bound > 0
            else "ratios are held at 1 + algorithm.clip_high here, and at epsilon_high there: set it above 1"
        )
        if bound > 0:
            ours["algorithm.clip_high"] = bound
        yield given.line([*keys, "epsilon_high"], "unsupported" if note else "translated", ours, note)
        return
    else:
        name = {"algorithm.name": "gspo"} if level == "sequence" else {}
        yield given.line(keys, "translated", {**name, "algorithm.loss_mean": found})
    if high is not None:
        yield given.line(["epsilon_high"], "translated", {"algorithm.clip_high": number(high)})
    elif given.says("epsilon_high"):
        yield given.line(["epsilon_high"], "same", note="not set")
    elif level == "sequence":  # GSPO's own default differs
        yield Line((), "translated", (("algorithm.clip_high", number(given["epsilon"])),), "epsilon", given=False)


def gkd_loss(given: Given) -> Iterator[Line]:
    """GKD's beta: 0 is the forward KL, 1 the reverse KL."""
    beta = number(given["beta"])
    if beta in (0.0, 1.0):
        ours: dict[str, Any] = {"algorithm.divergence": "reverse_kl" if beta else "forward_kl"}
    else:
        ours = {"algorithm.divergence": "jsd", "algorithm.beta": beta}
    yield given.line(["beta"], "translated", ours)


def cpo_loss(given: Given) -> Iterator[Line]:
    """CPO, SimPO and AlphaPO, which share a trainer in TRL."""
    keys = ["loss_type", "beta", "cpo_alpha"]
    beta, nll = number(given["beta"]), number(given["cpo_alpha"])
    if given["loss_type"] == "simpo":
        shape = number(given["alpha"] or 0)
        name = "alpha_po" if shape else "simpo"
        ours = {"loss.name": name, "loss.beta": beta, "loss.gamma": number(given["simpo_gamma"])}
        ours |= {"loss.alpha": shape} if shape else {}
        ours |= {"loss.nll_weight": nll} if nll else {}
        note = "their cpo_alpha adds the chosen answers' likelihood to SimPO; set it to 0 for the paper's"
        note = note if nll and not given.says("cpo_alpha") else ""
        yield given.line([*keys, "simpo_gamma", *(["alpha"] if shape else [])], "translated", ours, note)
    elif given["loss_type"] == "sigmoid":
        ours = {"loss.name": "cpo", "loss.beta": beta, "loss.alpha": nll}
        ours["loss.label_smoothing"] = number(given["label_smoothing"])
        note = "the likelihood term is a mean over each answer's tokens here"
        yield given.line([*keys, "label_smoothing"], "translated", ours, note)
    else:
        how = "CPO with hinge or IPO is not here: slic (a hinge, no reference) or ipo (with one) are nearest"
        yield given.line(["loss_type"], "unsupported", {"loss.name": "cpo"}, how)


def groups(given: Given) -> Iterator[Line]:
    """Prompts per step of GRPO and RLOO, whose batch sizes in TRL count completions."""
    keys = TABLE["derived"]["groups"]
    try:
        group, one = whole(given["num_generations"]), whole(given["per_device_train_batch_size"]) * given.devices
        accumulation = whole(given["gradient_accumulation_steps"])
        rounds = whole(given["steps_per_generation"] or accumulation)
        completions = whole(given["generation_batch_size"] or one * rounds)
        if completions % group:
            problem = f"{completions} completions cannot be shared among groups of {group}"
            raise NotHere(f"{problem}: fix per_device_train_batch_size")
    except NotHere as error:
        yield given.line(keys, "unsupported", note=str(error))
        return
    prompts, steps = completions // group, max(1, completions // (one * accumulation))
    ours = {"algorithm.samples": group, "train.batch_size": prompts, "algorithm.minibatches": steps}
    note = f"their batch counts completions: {prompts} prompt(s) of {group} each; {given.devices} device(s)"
    yield given.line(sorted(k for k in keys if given[k] is not None), "translated", ours, note)


THEIR_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
OUR_REWARDS = {"accuracy_reward": "accuracy", "think_format_reward": "think_format"}


def rewards(given: Given) -> Iterator[Line]:
    """Reward models and functions, with their weights."""
    model = given["reward_model_name_or_path"] or given["reward_model_path"]
    key = "reward_model_path" if given.says("reward_model_path") else "reward_model_name_or_path"
    named = given["reward_funcs"] or []
    named = named if isinstance(named, list) else [named]
    named = [OUR_REWARDS.get(str(n), n) for n in named]
    left = [n for n in named if n in THEIR_REWARDS or ("." not in str(n) and n not in OUR_REWARDS.values())]
    functions = [str(n) if n in OUR_REWARDS.values() else _as_file(str(n)) for n in named if n not in left]
    terms = [str(model), *functions] if model else functions
    weights = given["reward_weights"] or [1.0] * len(terms)
    if left:
        note = "not built in here: write it as a Python function and set reward: FILE.py:FUNCTION"
        yield Line((("reward_funcs", left),), "unsupported", (), note)
    if terms and len(weights) == len(terms):
        keys = [k for k in (key, "reward_funcs", "reward_weights") if given[k] is not None]
        note = "called as f(prompts, completions) with lists of text, and answers a list of numbers"
        ours = {"reward": dict(zip(terms, map(number, weights), strict=True))}
        yield given.line(keys, "translated", ours, note if any(":" in f for f in functions) else "")
    elif terms:
        ours = {"reward": dict.fromkeys(terms, 1.0)}
        yield given.line(["reward_weights"], "unsupported", ours, "give each reward its weight")


def _as_file(dotted: str) -> str:
    module, _, function = dotted.rpartition(".")
    return f"{module.replace('.', '/')}.py:{function}"


def ppo_length(given: Given) -> Iterator[Line]:
    """PPO's length: total_episodes counts prompts with one completion each."""
    if given["total_episodes"] is None:
        yield from hf.length(given)
        return
    parts, one = whole(given["num_mini_batches"]), whole(given["per_device_train_batch_size"])
    rows = one * whole(given["gradient_accumulation_steps"]) * parts * given.devices
    steps = math.ceil(whole(given["total_episodes"]) / rows) * whole(given["num_ppo_epochs"]) * parts
    note = "episodes / batch x passes x minibatches; epochs only must not end it before"
    ours = {"train.max_steps": steps, "train.epochs": 1000.0}
    yield given.line(["total_episodes", "num_train_epochs"], "translated", ours, note)


def guess(values: Mapping[str, Any], name: str) -> str | None:
    """The trainer that a file is for, by keys that only one trainer has, by its loss or by the file's name; None if unclear."""
    told = TABLE["guess"]
    words = name.lower().replace("-", "_")
    by_name = next((method for word, method in told["names"].items() if word in words), None)
    if "num_generations" in values and by_name in ("grpo", "rloo"):
        return by_name
    for method, keys in told["keys"].items():
        if any(key in values for key in keys):
            return method
    loss = values.get("loss_type")
    kinds = loss if isinstance(loss, list) else [loss]
    return next((told["losses"][k] for k in kinds if isinstance(k, str) and k in told["losses"]), by_name)


DERIVATIONS = (lora, data, reference, dpo_loss, cpo_loss, grpo_loss, gkd_loss, groups, rewards, ppo_length)
SOURCE = source("trl", (*hf.DERIVATIONS, *DERIVATIONS), guess)
