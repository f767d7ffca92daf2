"""LoRA adapters: add one to a model, check that it can be merged, read one from a folder, and its merged weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from penchant.errors import ConfigError, ModelError
from penchant.models.folder import (
    check_finite,
    check_folder,
    first_line,
    headers,
    loading,
    read_object,
)
from penchant.models.load import base_model_of, plain_name, quiet, widened, without_cache
from penchant.models.options import LoraConfig
from penchant.models.quantize import is_quantized, whole_weight


def add_lora(
    model: Any, cfg: LoraConfig, seed: int, *, task: str = "CAUSAL_LM", whole: Sequence[str] = (), within: str = ""
) -> Any:
    """Wrap a model with a trainable LoRA adapter (peft); everything else is frozen.

    Args:
        task: peft's task type; whole: modules that are trained and saved in full, without an adapter (a new head).
        within: name of the only module whose layers get adapters; "" for the whole model.

    Papers: arXiv 2106.09685; rsLoRA 2312.03732; DoRA 2402.09353.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    torch.manual_seed(seed)
    targets = cfg.target_modules
    peft_config = PeftLoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]
        lora_dropout=cfg.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task,
        modules_to_save=list(whole) or None,
        exclude_modules=_below(whole) if whole else rf"(?!{re.escape(within)}\.).*" if within else None,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            warnings.simplefilter("ignore", UserWarning)  # about tied weights, which check_adapter refuses
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # of experts
            with _adapters_in_fp32():
                adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    except ValueError as error:
        what, how = first_line(error), "name" if targets == "all-linear" else 'use "all-linear" or names of'
        if "not found in the base model" in what:
            what = f"{targets if isinstance(targets, str) else ', '.join(targets)}: this model has no such layers"
        if isinstance(targets, str) and "," in targets:
            how = f"a list is written [{', '.join(t.strip() for t in targets.split(','))}]; {how}"
        raise ConfigError("lora.target_modules", what, f"{how} linear layers of this model") from error
    check_adapter(adapted)
    return adapted


@contextmanager
def _adapters_in_fp32() -> Iterator[None]:
    """Create adapters in fp32 even on bf16 weights; peft would cast them to bf16."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer._get_base_layer_device_and_dtype

    def wide(self: Any, layer: Any) -> tuple[Any, Any]:
        device, dtype = original(self, layer)
        return device, torch.float32 if dtype == torch.bfloat16 else dtype

    BaseTunerLayer._get_base_layer_device_and_dtype = wide  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = original  # type: ignore[method-assign]


def _below(modules: Sequence[str]) -> str:
    """A regular expression for the names of these modules and of everything in them."""
    return r"(.*\.)?(" + "|".join(re.escape(m) for m in modules) + r")(\..*)?"


def check_adapter(model: Any) -> None:
    """Check on the start model that adapters can be merged, with a nonzero update on one layer of each kind.

    Raises:
        ConfigError: an adapted weight is shared with another layer, a layer's product is not one that peft supports, or the merged
            weights give different logits from the adapter.
    """
    base = base_model_of(model)
    holders: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(p), []).append(plain_name(f"{name}.{own}"))
    kinds: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, module in adapters_of(base):
        tied = [n for n in holders[id(_adapted(module))] if n != name]
        if tied:
            raise ConfigError(
                "lora.target_modules",
                f"{name} is the same weight as {tied[0]} in this model: an adapter on one of them could not be merged",
                f"leave {name.split('.')[-2]} out of it",
            )
        kinds.setdefault((type(module).__name__, ".".join(re.sub(r"\d+", "", name).split(".")[-3:])), (name, module))
    if next(base.parameters()).device.type == "meta" or base.get_output_embeddings() is None:
        return
    if any(map(is_quantized, base.modules())):  # all are linear layers; merging dequantizes, and checks the logits then
        return
    updates = [p for _, m in kinds.values() for n, p in m.named_parameters() if _starts_at_zero(n)]
    initial = [p.detach().clone() for p in updates]
    others = [m for _, m in adapters_of(base) if all(m is not chosen for _, chosen in kinds.values())]
    ids = torch.arange(12, device=next(base.parameters()).device)[None] + 1

    def logits(disabled: Sequence[Any]) -> Tensor:
        for module in disabled:
            module._disable_adapters = True
        try:
            return cast(Tensor, base(input_ids=ids, **without_cache(base)).logits)
        finally:
            for module in disabled:
                module._disable_adapters = False

    # in bf16 a merged weight would be rounded, and the layers above amplify the error
    with widened(model), quiet(model):
        adapters = [m for _, m in adapters_of(base)]
        try:
            for p in updates:
                p.data.add_(torch.randn_like(p), alpha=0.1)
            with _names_where_it_fails(kinds.values()):
                adapter_logits = logits(others)
            merged_weights = {name: (_adapted(module), merged_weight(module)) for name, module in kinds.values()}
        finally:
            for p, own in zip(updates, initial, strict=True):
                p.data.copy_(own)
        base_logits = logits(adapters)
        originals = [(p, p.data) for p, _ in merged_weights.values()]
        try:
            for p, merged in merged_weights.values():
                p.data = merged.to(p.dtype)
            difference = float((logits(adapters) - adapter_logits).abs().max())
        finally:
            for p, data in originals:
                p.data = data
    if not difference <= 1e-3 * max(
        float((adapter_logits - base_logits).abs().max()), 1e-3 * float(base_logits.abs().max())
    ):
        raise ConfigError(
            "lora.target_modules",
            f"merging an adapter of this model changes its logits by {difference:.2g}",
            "name the attention's projections only, e.g. [q_proj, v_proj]",
        )


@contextmanager
def _names_where_it_fails(layers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Turn a RuntimeError into a ConfigError naming the layer, e.g. a grouped linear layer with inputs wider than its weight."""
    entered: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: entered.append(name)) for name, m in layers]
    try:
        yield
    except RuntimeError as error:
        if not entered:
            raise
        kind = entered[-1].split(".")[-2]
        what = f"peft's adapter does not fit {entered[-1]} ({first_line(error)})"
        raise ConfigError(
            "lora.target_modules", what, f"name this model's other linear layers, without {kind}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _starts_at_zero(name: str) -> bool:
    """Whether a parameter is the half of an adapter that starts at zero: B, or A for an embedding."""
    return "lora_B" in name or "lora_embedding_A" in name


def is_b_matrix(name: str) -> bool:
    """Whether a parameter is an adapter's B matrix, whose learning rate LoRA+ raises."""
    return "lora_B" in name or "lora_embedding_B" in name


def adapters_of(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name of the weight in the plain model, LoRA layer) for every adapter; adapters on several weights of a module are nested."""
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}", module


def _adapted(module: Any) -> Tensor:
    """The weight that a LoRA layer adapts: a linear layer's, or one of several in an expert layer."""
    inner = module.get_base_layer()
    return getattr(inner, getattr(module, "parameter_name", "weight"))  # type: ignore[no-any-return]


def merged_weight(module: Any) -> Tensor:
    """``W' = W + scale B A`` in fp32 (fp64); for DoRA ``m W' / |W'|`` with the norm of each output's weights."""
    weight = whole_weight(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
    wide = torch.promote_types(weight.dtype, torch.float32)
    (name,) = module.active_adapters
    merged = weight.to(wide) + module.get_delta_weight(name).detach().to(wide)
    magnitude = getattr(module, "lora_magnitude_vector", {})
    if name in magnitude:
        dim, shape = (0, (1, -1)) if getattr(module, "fan_in_fan_out", False) else (1, (-1, 1))
        m = magnitude[name].weight.detach().to(wide).view(shape)
        merged *= m / torch.linalg.vector_norm(merged, dim=dim, keepdim=True)
    return merged


def effective_weights(model: Any, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights in fp32 (fp64) under the base model's names, adapters merged in: ``W + scale B A``.

    Args:
        model: a causal model, or a peft model around one; masters: the optimizer's fp32 copies by parameter name.
    """
    base = base_model_of(model)
    if base is model:
        return {name: master.detach() for name, master in masters.items()}
    return {name: merged_weight(module) for name, module in adapters_of(base)}


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds a LoRA adapter rather than a model."""
    return (folder / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str | None:
    """The base model named in an adapter folder; None if it names none.

    Raises:
        ModelError: its adapter_config.json cannot be read.
    """
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def lora_section(adapter: Path, section: LoraConfig | None = None) -> LoraConfig:
    """The `lora` section of a run that continues to train an adapter: the adapter's own settings, updated from `section`.

    Args:
        section: the config's `lora` section; it may change dropout and lr_ratio, and must agree with the adapter otherwise.

    Raises:
        ConfigError: `section` contradicts the adapter. ModelError: the adapter cannot be trained further.
    """
    check_folder(adapter)
    file = adapter / "adapter_config.json"
    values = read_object(file)
    _check_trainable(file, values)
    targets = values.get("target_modules")
    with loading(str(file), "is not a config of a LoRA adapter", "get it again"):
        settings = LoraConfig(
            r=values["r"],
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else sorted(targets or ()),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
        )
    if section is None:
        return settings
    set_fields, given_values, own_values = section.model_fields_set, section.model_dump(), settings.model_dump()
    for name in sorted(set_fields & {"r", "alpha", "rslora", "dora"}):
        if given_values[name] != own_values[name]:
            _contradicted(name, given_values[name], own_values[name], adapter)
    # target_modules may be a pattern: `trained_on` compares it once the model is loaded
    updates = {name: given_values[name] for name in set_fields & {"dropout", "lr_ratio", "target_modules"}}
    if isinstance(updates.get("target_modules"), list):
        updates["target_modules"] = sorted(updates["target_modules"])
    return settings.model_copy(update=updates)


def _check_trainable(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than low-rank updates of frozen weights."""
    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        what = f"is an adapter of type {values.get('peft_type')}, {values.get('task_type')}"
        raise ModelError(str(file), what, "name a LoRA adapter of a causal language model")
    init = values.get("init_lora_weights", True)
    extras = [key for key in ("modules_to_save", "trainable_token_indices", "layer_replication") if values.get(key)]
    extras += ["bias"] if values.get("bias", "none") != "none" or values.get("lora_bias") else []
    extras += [f"init_lora_weights: {init}"] if str(init).startswith(("pissa", "olora", "corda", "loftq")) else []
    if extras:
        what = f"holds more than low-rank updates ({', '.join(extras)}), and only those can be trained further here"
        raise ModelError(str(file), what, "merge it (name it as model.path) and train a new adapter")


def _contradicted(name: str, theirs: Any, ours: Any, adapter: Path) -> None:
    what = f"is {theirs}, but the adapter in {adapter} has {ours}"
    raise ConfigError(f"lora.{name}", what, "leave it out: the value comes from model.adapter")


def trained_on(base: Any, adapter: Path, lora: LoraConfig, seed: int) -> Any:
    """Add a trainable copy of an existing adapter to a model in fp32; everything else is frozen.

    Args:
        lora: from `lora_section`; seed: for torch's random numbers, as for a new adapter.

    Raises:
        ConfigError: `lora` names other layers than the adapter has, or it cannot be merged. ModelError: not an adapter of this model.
    """
    from peft import PeftConfig

    torch.manual_seed(seed)
    with loading(str(adapter), "its adapter_config.json could not be read", "give a LoRA adapter"), quiet_peft():
        config: Any = PeftConfig.from_pretrained(str(adapter))
    config.lora_dropout, config.inference_mode = lora.dropout, False
    targets = lora.target_modules
    own_targets = config.target_modules
    expected = (
        None
        if targets == (own_targets if isinstance(own_targets, str) else sorted(own_targets or ()))
        else _matching(base, config, targets)
    )
    model = _beside(base, adapter, config)
    adapted = {plain_name(name).rpartition(".")[0] for name, _ in adapters_of(base_model_of(model))}
    if expected is not None and expected != adapted:
        kinds = sorted({name.rpartition(".")[2] for name in adapted})
        _contradicted("target_modules", targets, f"{len(adapted)} layers, {', '.join(kinds)}", adapter)
    check_adapter(model)
    return model


def _matching(base: Any, config: Any, targets: str | list[str]) -> set[str]:
    """Names of the layers that peft would adapt for these targets."""
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    peft_config = PeftLoraConfig(task_type=config.task_type, target_modules=targets)
    expanded = _maybe_include_all_linear_layers(peft_config, base)
    return {name for name, _ in base.named_modules() if name and check_target_module_exists(expanded, name)}


def with_adapter(base: Any, adapter: Path) -> Any:
    """Load a LoRA adapter onto a model, unmerged, in fp32 and eval mode, as users of peft do.

    Raises:
        ModelError: the folder holds no complete adapter of this model.
    """
    check_folder(adapter)
    return _beside(base, adapter).float().eval()


def _beside(base: Any, adapter: Path, config: Any = None) -> Any:
    """Load an adapter onto a model and check that it is complete; `config`: peft config to train it with, not the folder's."""
    from peft import PeftModel, get_peft_model_state_dict

    with loading(str(adapter), "the adapter could not be loaded", "give an adapter of this model"), quiet_peft():
        trainable = config is not None
        model = PeftModel.from_pretrained(
            base, str(adapter), config=config, is_trainable=trainable, autocast_adapter_dtype=False
        )
        expected, stored = set(get_peft_model_state_dict(model)), set(headers(adapter))
    differences = sorted(expected ^ stored)
    if stored and differences:
        what = "lacks" if differences[0] in expected else "has, beyond what its config says,"
        raise ModelError(str(adapter), f"the adapter {what} {differences[0]}", "give a whole adapter of this model")
    check_finite(str(adapter), ((n, p) for n, p in model.named_parameters() if "lora_" in n))
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's deprecation warnings, and its warning about missing weights, which are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses a deprecated name of transformers
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield
