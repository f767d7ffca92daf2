"""Build the parts of a run in the required order: model, masters, cast, packing, reference, algorithm."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from penchant.algorithms.method import SMALL_MODEL, Parts, auto_lr
from penchant.base.files import cache_folder
from penchant.base.machine import cores, set_precision
from penchant.base.text import counted
from penchant.config import RunConfig
from penchant.data.mapped import StoredTokens
from penchant.data.packing import tree_tokens
from penchant.data.templates import set_eos_token_ids
from penchant.data.tokenize import only_padding
from penchant.distributed.shard import Sharding, gathered, rooted
from penchant.distributed.world import current
from penchant.errors import ConfigError, ModelError
from penchant.logprobs import Elsewhere, Scorer
from penchant.logprobs.packing import choose_packing, choose_pictured
from penchant.logprobs.reference import (
    CachedReference,
    LiveReference,
    MovingReference,
    Reference,
    adapter_as_it_is,
    adapter_off,
    cache_key,
    cached_reference,
    compute_logps,
    joined,
)
from penchant.models.activations import offload
from penchant.models.load import (
    backbone_of,
    base_model_of,
    cast_parameters,
    config_sha256,
    cpu_has_bf16,
    freeze_eyes,
    held_in,
    language_part,
    load_causal_model,
    load_tokenizer,
    processor_sha256,
    resolve_device,
    resolve_dtype,
    resolve_place,
    save_model,
    source_sha256,
    stays_wide,
    tokens_of,
    weights_sha256,
    write_state_dict,
)
from penchant.models.lora import adapter_base, add_lora, effective_weights, is_b_matrix, trained_on
from penchant.models.merge import merged_model, model_sha256
from penchant.models.options import ModelConfig, outside_fast_path
from penchant.models.quantize import bitsandbytes
from penchant.models.reward import whole_reward
from penchant.models.router import RouterLoss, router_loss
from penchant.rewards.reward_model import RewardScorer, make_scorer
from penchant.runs.find import check_adapters_base
from penchant.runs.record import tokenizer_sha256
from penchant.runs.rows import Rows
from penchant.runs.sharing import Key, Uncached
from penchant.training.optim import MasterAdamW, state_bytes
from penchant.training.own import check_methods
from penchant.types import Algorithm, TokenTree


@dataclass(slots=True)
class Built:
    """Everything that a run trains with.

    Args:
        parts: the model and its engine; optimizer: holds the fp32 masters; algorithm: what the loop trains.
        router: balance loss of the model's router, if `model.router_aux_loss` is set.
        reference_kind: ``frozen``, ``adapter``, ``cached``, or None.
        start: the starting policy of a run with an adapter, without a copy of the model.
        reference_seconds, reference_tokens: time and tokens spent on a cached reference, if computed now.
    """

    parts: Parts
    optimizer: MasterAdamW
    algorithm: Any = None
    router: RouterLoss | None = None
    reference_kind: str | None = None
    start: LiveReference | None = None
    reference_seconds: float = 0.0
    reference_tokens: int = 0
    _start: str | None = None

    def start_sha256(self, shared: Uncached) -> str:
        """SHA-256 of the weights before training, without an adapter; first called before they change."""
        if self._start is None:
            config = self.parts.config
            self._start = start_sha256(config, self.parts.model, config.model, shared)
        return self._start


def build(config: RunConfig, rows: Rows, shared: Uncached, console: Any, *, cache: bool = True) -> Built:
    """Build every part of a run.

    Args:
        shared: caches what other runs of this process can reuse; console: for notes on what was chosen.
        cache: False recomputes a cached reference for these rows and leaves the cache files alone.

    Raises:
        ConfigError, DataError, ModelError, RewardError: an error that the user can fix.
    """
    method, train = config.method, config.train
    device, dtype = placed(config)
    if train.optimizer.endswith("_8bit"):
        bitsandbytes("train.optimizer", train.optimizer)  # before a model is loaded
    kind = reference_kind(config) if "reference" in method.needs else None
    if "reference" not in method.needs and config.reference.moves:
        what = f"{method.name} has no reference that could move"
        raise ConfigError("reference", what, "leave out ema and sync_every")

    # the model in fp32 and the modules trained with it; a reward model already has its adapter, which is trained with its head
    if rows.reward_parts is not None:
        model = rows.reward_parts.load(torch.device("cpu") if current().many else device, train.seed)
    else:
        base_config = config.model.model_copy(update={"adapter": None})
        # an adapter's starting point is computed in fp32: DoRA's norms, or the existing adapter
        frozen = None if starts_adapted(config) else config.lora is not None
        model = fresh_model(config, base_config, device, shared, held=True, frozen=frozen)
    set_threads(config, model)
    model = prepared(model, config, rows)
    parts = Parts(
        config,
        device,
        dtype,
        rows.tokenizer,
        lambda: rows.prompts_by_source,
        rows.trees,
        rows.mismatched,
        model,
        {},
        None,
    )
    method.check(parts)
    parts.modules = method.modules(parts, lambda: fresh_model(config, config.model, device, shared), console.note)

    weights_hash, router = _shard(parts, rows, shared, console) if current().many else (None, None)

    # masters are taken before the cast; shards are their own masters
    module_parameters = [(f"{name}.{n}", p) for name, m in parts.modules.items() for n, p in m.named_parameters()]
    settings = train.model_copy(update=dict(method.optimizer))
    optimizer = MasterAdamW(
        [*model.named_parameters(), *module_parameters],
        dtype=torch.promote_types(dtype, torch.float32) if current().many else dtype,
        kind=settings.optimizer,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        lr_scale=lambda name: config.lora.lr_ratio if config.lora is not None and is_b_matrix(name) else 1.0,
        stays_wide=partial(stays_wide, model),
    )
    if not current().many:
        backbones = (m.backbone for m in parts.modules.values() if getattr(m, "backbone", None) is not None)
        for module in (model, *backbones):
            cast_parameters(module, dtype)
        parts.engine = _engine(parts, rows, shared, console)
        router = _router(parts)
        if train.gradient_checkpointing == "offload" and device.type == "cuda":
            offload(backbone_of(model))

    # the reference and the algorithm
    built = Built(parts, optimizer, reference_kind=kind, router=router, _start=weights_hash)
    if config.lora is not None and not method.learns_reward:
        built.start = (adapter_as_it_is if starts_adapted(config) else adapter_off)(parts.scorer)
    if kind is not None:
        parts.reference = _reference(built, kind, rows, shared, console, cache)
    built.algorithm = method.build(parts)
    if Algorithm not in type(built.algorithm).__mro__:
        what = f"{method.name}: build(parts) returns {type(built.algorithm).__name__}, which is not an Algorithm"
        raise ConfigError("algorithm.name", what, "derive its class from penchant.types.Algorithm")
    check_methods(built.algorithm)
    return built


def _shard(parts: Parts, rows: Rows, shared: Uncached, console: Any) -> tuple[str, RouterLoss | None]:
    """Shard the parameters over all ranks, after everything that needs the whole model.

    Returns:
        SHA-256 of the whole weights; the balance loss of the model's router.
    """
    world = current()
    set_precision(parts.device, parts.config.train.tf32)
    sha256: str = world.share(weights_sha256(parts.model, parts.dtype) if world.leads else "")
    parts.engine = _engine(parts, rows, shared, console)
    router = _router(parts)
    shard = sharding(parts)
    backbones = {name: getattr(module, "backbone", None) for name, module in parts.modules.items()}
    policy_heads = [module for name, module in parts.modules.items() if backbones[name] is None]
    models = [(parts.model, policy_heads)]
    models += [(backbone, [parts.modules[name].head]) for name, backbone in backbones.items() if backbone is not None]
    for model, heads in models:
        base_model_of(model).config.dtype = parts.dtype
        shard(model, backbone_of(model), heads)
    engine = parts.engine = rooted(parts.engine)
    if router is not None:
        router.run = partial(engine.through, router.run)
    return sha256, router


def sharding(parts: Parts) -> Sharding:
    """The sharding settings of a run's models."""
    launch = parts.config.launch
    return Sharding(current(), parts.device, parts.dtype, launch.replicas, launch.reshard, launch.offload)


# ---- the model ----


def fresh_model(
    config: RunConfig,
    source: ModelConfig,
    device: torch.device,
    shared: Uncached,
    *,
    held: bool = False,
    frozen: bool | None = None,
) -> Any:
    """Load a causal model that shares no memory with another one, with the source's adapter merged into it.

    Args:
        held: keep quantized weights quantized; frozen: whether none of its weights are trained, to hold them in the run's
            dtype if that loses nothing (`held_in`); None: in fp32.
    """
    seed = config.train.seed
    device = torch.device("cpu") if current().many else device  # each rank's shard is moved to its device later

    if held and source.quantize != "none":
        return load_causal_model(source, device, seed, held=True)

    def load(device: torch.device, within: torch.dtype = torch.float32) -> Any:
        if source.adapter is None:
            return load_causal_model(source, device, seed, within=within, mapped=current().many)
        return merged_model(source, Path(source.adapter), device, seed)

    if type(shared) is Uncached:
        dtype = placed(config)[1]
        return load(device, torch.float32 if frozen is None else held_in(source, dtype, frozen, current().many))
    key: Key = ("model", *weights_key(config, source))
    return shared.fresh(key, lambda: load(torch.device("cpu"))).to(device)


def prepared(model: Any, config: RunConfig, rows: Rows) -> Any:
    """Prepare a loaded model for training: tokenizer check, adapter, gradient checkpointing."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if (tokens := tokens_of(rows.tokenizer)) > vocabulary:
        what = f"the tokenizer has {tokens:,} tokens but the model's embedding only {vocabulary:,}"
        raise ConfigError("model.tokenizer", what, "give the tokenizer that the model was trained with")
    if rows.reward_parts is None:
        set_eos_token_ids(model, rows.tokenizer)
    if config.lora is not None and rows.reward_parts is None:
        on_meta = next(model.parameters()).device.type == "meta"
        if config.model.adapter is None or on_meta:
            within = language_part(model) if config.model.vision == "frozen" else ""
            model = add_lora(model, config.lora, config.train.seed, within=within)
        else:
            adapter = Path(config.model.adapter)
            check_adapters_base(adapter, config.model, model)
            model = trained_on(model, adapter, config.lora, config.train.seed)
    elif config.model.vision == "frozen":
        freeze_eyes(model)
    if config.train.gradient_checkpointing is True:  # an unresolved auto never trains
        # transformers 5 renamed this method and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    return model


def threads_for(config: RunConfig, parameters: int) -> int:
    """CPU threads for a model of this size, ``auto`` resolved."""
    threads = config.train.threads
    if threads == "auto":  # in a small model, a second thread costs more than it gains
        return 1 if parameters < SMALL_MODEL else max(1, cores() // current().local_size)
    return int(threads)


def placed(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """(device, dtype) of training, with ``auto`` resolved."""
    device = resolve_device(config.model.device)
    return device, resolve_dtype(config.model.dtype, device)


def reference_place(config: RunConfig) -> torch.device:
    """The device of a reference that is a separate model."""
    return resolve_place("reference.device", config.reference.device, resolve_device(config.model.device))


def check_places(config: RunConfig) -> None:
    """Refuse devices of the reference and reward that are missing, or that do not work with several processes.

    Raises:
        ConfigError: names the key and its value.
    """
    devices = {"reference.device": config.reference.device}
    devices |= {} if config.reward is None else {"reward.device": config.reward.device}
    for key, device in devices.items():
        resolve_place(key, device, config.model.device)
        if current().many and (":" in device or (key == "reference.device" and device != "auto")):
            what = f"is {device}, and each of the {current().size} processes has a device of its own"
            raise ConfigError(
                key, what, "leave it out: models beside the policy are sharded the same way as the policy"
            )
    if "reference" in config.method.needs:
        reference_kind(config)


def check_offload(config: RunConfig, device: torch.device) -> None:
    """Refuse offload settings (ConfigError) outside CUDA, where everything is in host memory anyway."""
    if config.launch.offload and current().many and device.type != "cuda":
        what = f"moves shards from CUDA GPUs to the host's memory, and this run is on {device.type}"
        raise ConfigError("launch.offload", what, "leave it out")
    if config.train.gradient_checkpointing == "offload" and device.type != "cuda":
        what = f"offload moves activations from a CUDA GPU to the host's memory, and this run is on {device.type}"
        raise ConfigError("train.gradient_checkpointing", what, "set layers, or auto")


def set_threads(config: RunConfig, model: Any) -> None:
    """Set torch's threads for this model as in `train.threads`, and a GPU's precision as in `train.tf32`."""
    torch.set_num_threads(threads_for(config, sum(p.numel() for p in model.parameters())))
    set_precision(next(model.parameters()).device, config.train.tf32)


def prepare_for_inference(model: Any, config: RunConfig, dtype: torch.dtype, processor: Any = None) -> Scorer:
    """A loaded language model for inference only: frozen, in `dtype`, with the threads and packing of its config.

    Args:
        processor: of a vision-language model.
    """
    set_threads(config, model)
    cast_parameters(model, dtype)
    model.requires_grad_(False).eval()
    if processor is not None:
        return choose_pictured(model, processor)[0]
    choice = config.model.kernels
    kernels = "auto" if choice == "compile" else choice  # compiling is not worth it, and maybe not possible here
    return choose_packing(model, config.train.packing, kernels, config.model.attention)[0]


def peak_lr(config: RunConfig, rows: Rows, parameters: int, old_manifest: Mapping[str, Any] | None = None) -> float:
    """`train.lr`, with auto resolved for the method and number of parameters; `old_manifest`: the manifest of a resumed run."""
    if config.train.lr != "auto":
        return float(config.train.lr)
    if old_manifest is not None and "peak_lr" in old_manifest:
        return float(old_manifest["peak_lr"])
    parts = rows.reward_parts
    if parts is not None and parts.encoder and config.lora is None:
        return parts.encoder_lr(parameters)
    rates = config.method.default_lr
    if old_manifest is not None and config.lora is None:  # auto before manifests recorded it
        return 1e-6 if config.algorithm is None and config.method.signal != "tokens" else rates[0]
    return auto_lr(rates, config.lora is not None, parameters)


FAR = 5  # times the usual rate, or less than a fifth of it


def remarks(config: RunConfig, rows: Rows) -> list[str]:
    """Notes on settings that the user may not have intended."""
    notes, lr, count = [], config.train.lr, len(rows.trees[0])
    if config.model.dtype == "bf16" and placed(config)[0].type == "cpu" and not cpu_has_bf16():
        notes.append(
            "model.dtype is bf16, which this processor has no products for (AVX512-BF16 or AMX): it emulates them, and they were "
            "eight times as slow as in fp32 where that was measured (21 against 179 GFLOP/s); model.dtype=auto takes fp32 here"
        )
    usual_lr = auto_lr(config.method.default_lr, True)
    if config.lora is not None and lr != "auto" and not usual_lr / FAR <= lr <= usual_lr * FAR:
        kind = "low" if lr < usual_lr else "high"
        notes.append(f"train.lr is {lr:g}, which is {kind} for an adapter: train.lr=auto would be {usual_lr:g}")
    if config.model.adapter is not None:
        trained_base = adapter_base(Path(config.model.adapter))
        if trained_base is not None and Path(trained_base).name != Path(config.model.path).name:
            notes.append(
                f"the adapter of {config.model.adapter} was trained on {trained_base}: here it is on {config.model.path}"
            )
    if config.reference.kind != "auto" and "reference" not in config.method.needs:
        notes.append(
            f"reference.kind is {config.reference.kind}, which has no effect: {config.method.name} needs no reference"
        )
    if config.train.batch_size > count:
        notes.append(
            f"train.batch_size is {config.train.batch_size:,}, and there are {counted(count, 'row')} to train on: every step "
            "takes all of them, so an epoch is a single step"
        )
    return notes


def model_writer(built: Built, rows: Rows) -> Callable[[Path], None]:
    """A function that writes the model for transformers or peft, once; several processes write the weights of this moment."""
    parts, world = built.parts, current()
    state = gathered_state(parts.model, parts.dtype) if world.many else None
    reward = rows.reward_parts
    reward_state = None if reward is None else whole_reward(parts.model, built.optimizer.masters, state, parts.dtype)
    pending = [(state, reward_state)]
    del state, reward_state

    def write(folder: Path) -> None:
        state, reward_state = pending.pop()  # free them after writing
        if not world.leads:
            return
        if reward is not None:
            reward.save(parts.model, folder, reward_state, state)
        else:
            save_model(parts.model, rows.processor if parts.config.model.sees else parts.tokenizer, folder, state)
        if parts.config.checkpoint.pt:
            write_state_dict(folder)

    return write


def gathered_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, complete on rank 0 and empty elsewhere; tied weights share memory there too."""
    parameters = list(model.state_dict(keep_vars=True).items())
    name_of = {id(p): name for name, p in reversed(parameters)}
    named = ((name, p) for name, p in parameters if name_of[id(p)] == name)
    uncast = {name for name, p in parameters if not isinstance(p, torch.nn.Parameter) or stays_wide(model, name)}
    tensors = gathered(named, current(), dtype, uncast)
    return {name: tensors[name_of[id(p)]] for name, p in parameters} if tensors else {}


def checkpoint_bytes(config: RunConfig, model: Any, dtype: torch.dtype) -> int:
    """Approximate size of a checkpoint: the model in its dtype, fp32 masters with optimizer state, the tokenizer."""
    parameters = list(model.parameters())
    total, trainable = (
        sum(p.numel() for p in parameters if p.requires_grad or not trainable_only) for trainable_only in (False, True)
    )
    element_size = torch.empty(0, dtype=dtype).element_size()
    trained_parameters = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    optimizer_bytes = trainable * 4 + state_bytes(config.train.optimizer, trained_parameters, config.train.momentum)
    state_size = optimizer_bytes + total * 12 * config.method.copies + (total * 4 if config.reference.moves else 0)
    saves_whole_model = config.lora is None or config.method.learns_reward  # a reward model is saved merged
    model_size = (total if saves_whole_model else trainable) * element_size + (
        trainable * element_size if saves_whole_model and config.lora else 0
    )
    folder = Path(config.model.tokenizer or config.model.path).expanduser()
    tokenizer_size = sum(p.stat().st_size for p in folder.glob("tok*")) if folder.is_dir() else 4 << 20
    return model_size * (2 if config.checkpoint.pt else 1) + state_size + tokenizer_size


def _engine(parts: Parts, rows: Rows, shared: Uncached, console: Any) -> Scorer | RewardScorer:
    """The engine that runs the model, with its packing chosen."""
    model_config = parts.config.model
    packing, attention = parts.config.train.packing, model_config.attention
    kernels = "off" if current().many else model_config.kernels  # a fast path holds whole parameters
    scorers: list[Scorer | RewardScorer] = []
    encoder = rows.reward_parts is not None and rows.reward_parts.encoder
    if model_config.kernels == "compile" and (reason := _uncompilable(parts.config, encoder)):
        raise ConfigError("model.kernels", f"compile does not go with {reason}", "set model.kernels=auto")
    if rows.reward_parts is not None:
        engine, note = make_scorer(parts.model, encoder, parts.tokenizer, packing, kernels, attention, _runs_as(parts))
        console.note(note)
        return engine

    if model_config.sees:
        scorer, note = choose_pictured(parts.model, rows.processor)
        console.note(note)
        return scorer

    def choose() -> tuple[Any, str]:
        scorer, note = choose_packing(parts.model, packing, kernels, attention, _runs_as(parts))
        scorers.append(scorer)
        return (scorer.packing, scorer.runs, scorer.how), note

    (packing_choice, kernels, options), note = shared.once(("packing", start_key(parts.config)), choose)
    console.note(note)
    reason = outside_fast_path(parts.config.lora)
    if reason and not current().many and (parts.device.type, parts.config.model.kernels) == ("cpu", "auto"):
        console.note(f"{reason}: this adapter runs on transformers' and peft's own layers")
    return scorers[0] if scorers else Scorer(parts.model, packing_choice, kernels, **options)


def _uncompilable(config: RunConfig, encoder: bool) -> str:
    """The first thing in a run that rules out `model.kernels=compile`, or an empty string."""
    obstacles = {
        "several processes": current().many,
        "pictures": config.model.sees,
        "an encoder": encoder,
        # torch compiles nothing within its checkpoints, and the balance loss listens to layers from outside
        "train.gradient_checkpointing": config.train.gradient_checkpointing in (True, "offload"),
        "model.router_aux_loss": config.model.router_aux_loss is not None,
    }
    return next((name for name, present in obstacles.items() if present), "")


def _runs_as(parts: Parts) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype that a model will run in, if it is on the CPU until it is sharded; else None."""
    return (parts.device, parts.dtype) if current().many else None


def _router(parts: Parts) -> RouterLoss | None:
    """The router's balance loss of the policy (or reward model), attached to its engine; None if not enabled."""
    coefficient, engine = parts.config.model.router_aux_loss, parts.engine
    scorer = engine if isinstance(engine, Scorer) else getattr(engine, "scorer", None)
    if coefficient is None:
        return None
    router = router_loss(parts.model, coefficient)
    assert isinstance(scorer, Scorer)  # encoders have no router loss
    scorer.router, router.run = router, scorer.hidden
    return router


# ---- the reference ----


def reference_kind(config: RunConfig) -> str:
    """Where the reference's log-probs come from, with ``auto`` resolved.

    Raises:
        ConfigError: it does not fit the method or the model.
    """
    kind, has_path = str(config.reference.kind), config.reference.path is not None
    has_device = config.reference.device != "auto"
    if kind == "auto" and (
        config.reference.moves or has_device or (config.method.live_reference and (config.lora is None or has_path))
    ):
        kind = "frozen"
    elif kind == "auto":
        kind = "adapter" if config.lora is not None and not has_path else "cached"
    if kind == "adapter" and (config.lora is None or has_path):
        what = "adapter means the model with its LoRA adapter off"
        raise ConfigError("reference.kind", what, "add a lora section and no reference.path")
    if has_device and (kind == "adapter" or (kind == "cached" and not has_path)):
        raise ConfigError(
            "reference.device",
            f"is {config.reference.device}, and a reference of kind {kind} is the policy itself, which is where the policy is",
            "leave one of them out; reference.kind=frozen is a model of its own",
        )
    if kind == "cached" and config.algorithm is not None and config.method.live_reference:
        what = f"a cache does not hold what {config.method.name} needs: its reference runs in each step"
        raise ConfigError("reference.kind", what, "set reference.kind=frozen (or adapter, with LoRA)")
    return kind


def _reference(built: Built, kind: str, rows: Rows, shared: Uncached, console: Any, cache: bool) -> Reference:
    parts, cfg = built.parts, built.parts.config.reference
    # a copy has the adapter merged and quantized weights dequantized
    exact = not starts_adapted(parts.config) and parts.config.model.quantize == "none"
    exact = exact and reference_place(parts.config).type == parts.device.type
    if cfg.moves:
        interval, mixup = (cfg.sync_every, cfg.sync_mixup) if cfg.ema is None else (1, 1.0 - cfg.ema)
        return MovingReference(
            frozen_scorer(parts, shared),
            exact=exact,
            policy=lambda: effective_weights(parts.model, built.optimizer.masters),
            every=int(interval or 1),
            mixup=mixup,
        )
    if kind == "adapter" and built.start is not None:
        return built.start
    if kind == "frozen":
        scorer = frozen_scorer(parts, shared)
        scorer.narrow()
        return LiveReference(scorer, exact=exact)
    # if the initial policy is the reference, it is used directly, without a copy
    live = built.start or LiveReference(parts.scorer)
    if cfg.path is not None:
        live = LiveReference(frozen_scorer(parts, shared))
    if not cache:
        return _compute_reference(built, live)
    return _cached_reference(built, live, rows, shared, console)


def starts_adapted(config: RunConfig) -> bool:
    """Whether the starting model differs from its base; with DoRA, norms are rounded separately from their weights."""
    return config.model.adapter is not None or (config.lora is not None and config.lora.dora)


def frozen_scorer(parts: Parts, shared: Uncached, *, start: bool = False) -> Scorer:
    """A frozen model in the policy's precision: the reference or, if `start`, the starting model."""
    config = parts.config
    source, place = (config.model, parts.device) if start else (reference_source(config), reference_place(config))
    model = fresh_model(config, source, place, shared, frozen=True)
    if not start and config.reference.path is not None:
        _check_reference(parts, model)
    if not current().many:  # otherwise layer by layer, when sharded
        cast_parameters(model, parts.dtype)
    model.requires_grad_(False).eval()
    same_device = place.type == parts.device.type
    if not start and (config.reference.path is not None or not same_device):  # possibly another architecture
        kernels = parts.scorer.runs if same_device or parts.scorer.fast else "off"
        attention = config.model.attention if same_device else "auto"
        scorer = choose_packing(model, parts.scorer.packing, kernels, attention, _runs_as(parts))[0]
    else:
        # same kernels as the policy: with an adapter that has no fast path, and log-probs at the start would differ
        scorer = parts.scorer.on(model)
    scorer.temperature = parts.scorer.temperature  # once an online method has set it
    if not current().many:
        return scorer if place == parts.device else cast(Scorer, Elsewhere(scorer, place))
    base_model_of(model).config.dtype = parts.dtype
    sharding(parts)(model, backbone_of(model))
    return cast(Scorer, rooted(scorer))


def reference_source(config: RunConfig) -> ModelConfig:
    """The reference model: `reference.path`, or the starting model."""
    path = config.reference.path
    if path is None:
        return config.model
    own = {"path": path, "revision": config.model.revision_of(path)}
    return config.model.model_copy(update={**own, "init": "pretrained", "adapter": None, "quantize": "none"})


def _check_reference(parts: Parts, model: Any) -> None:
    """Refuse a model at `reference.path` that stands for other tokens than the policy.

    Raises:
        ConfigError: its tokenizer gives a token another id, its embedding or (for an exact divergence) its head has another size.
    """
    config, padding = parts.config, only_padding(parts.tokenizer)
    ours = {token: i for token, i in parts.tokenizer.get_vocab().items() if i != padding}
    path, what = str(config.reference.path), ""
    with suppress(ModelError):  # it may have no tokenizer of its own
        theirs = load_tokenizer(path, config.model.revision_of(path)).get_vocab()
        differs = next((t for t, i in ours.items() if theirs.get(t, i) != i), None)
        if differs is not None:
            what = f"its tokenizer has {differs!r} as {theirs[differs]:,}, and the policy's as {ours[differs]:,}"
    sizes = [base_model_of(m).get_input_embeddings().weight.shape[0] for m in (model, parts.model)]
    if sizes[0] < (needed := 1 + max(ours.values())):
        what = f"its embedding has {sizes[0]:,} tokens, and the policy's tokenizer {needed:,}"
    elif "divergence" in config.method.needs and sizes[0] != sizes[1]:
        what = f"an exact divergence compares whole distributions; its vocabulary is {sizes[0]:,}, the policy's {sizes[1]:,}"
    if what:
        raise ConfigError(
            "reference.path", f"does not fit {config.model.path}: {what}", "take a model of the same family"
        )


def _cached_reference(built: Built, live: LiveReference, rows: Rows, shared: Uncached, console: Any) -> CachedReference:
    """A cached reference, read from disk or computed now."""
    references: list[CachedReference] = []
    parts, reference_path = built.parts, built.parts.config.reference.path
    if reference_path is None:  # the starting model itself
        sha256 = with_adapter_sha256(parts.config, built.start_sha256(shared))
    else:
        sha256 = start_sha256(parts.config, live.scorer.model, reference_source(parts.config), shared)
    train = parts.config.train
    for name, (trees, path) in cache_paths(parts.config, rows, sha256, live.scorer.model).items():
        used = round(min(train.epochs * len(trees), train.batch_size * (train.max_steps or len(trees))))
        if name == "training" and 2 * used <= len(trees) and not path.exists():
            by_step = "adapter" if parts.config.lora else "frozen"
            console.note(
                f"reference log-probs are computed for all {len(trees):,} training rows; this short run uses {used:,} "
                f"of them. reference.kind={by_step} computes them step by step instead"
            )
        cached, was_cached = cached_reference(
            live,
            trees,
            path.stem,
            path.parent,
            tokens_per_step=parts.config.train.tokens_per_step,
            tokens="shared_logps" in parts.config.method.needs,
            progress=console.counter(f"reference log-probs of {name} rows"),
            say=console.note,
        )
        verb = "read from cache" if was_cached else "computed and cached" if path.exists() else "computed"
        console.note(f"reference log-probs of {len(trees):,} {name} rows: {verb}")
        references.append(cached)
    return joined(references)


def with_adapter_sha256(config: RunConfig, weights: str) -> str:
    """Hash of the starting weights: SHA-256 of the base, plus that of a given adapter or the settings of a new DoRA one."""
    if config.reference.path is not None or not starts_adapted(config):
        return weights
    adapter, lora = config.model.adapter, config.lora
    return f"{weights} {lora.model_dump_json() if lora and adapter is None else model_sha256(Path(str(adapter)))}"


def _compute_reference(built: Built, live: LiveReference) -> CachedReference:
    """A reference computed now, with its time and tokens stored in `built`."""
    parts = built.parts
    trees = [*parts.trees[0], *parts.trees[1], *parts.mismatched.values()]
    started = time.perf_counter()
    logps = compute_logps(live, trees, tokens_per_step=parts.config.train.tokens_per_step)
    built.reference_seconds = time.perf_counter() - started
    built.reference_tokens = sum(tree_tokens(t, live.scorer.shared) for t in trees)
    sums = logps.sums.split([len(t.completion_ids) for t in trees])
    tokens = logps.tokens.split([sum(t.trained) for t in trees])
    by_row = {t.row: s for t, s in zip(trees, sums, strict=True)}
    return CachedReference(by_row, {t.row: s for t, s in zip(trees, tokens, strict=True)})


def cache_paths(config: RunConfig, rows: Rows, weights: str, model: Any) -> dict[str, tuple[Sequence[TokenTree], Path]]:
    """Map the name of each set of rows to the rows and the cache file for their reference log-probs.

    Args:
        weights: SHA-256 of the reference's weights; model: the reference, or another model with its config.
    """
    cfg = config.reference
    folder = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else cache_folder("reference")
    groups = {"training": rows.trees[0], "held-out": rows.trees[1], "mismatched": list(rows.mismatched.values())}
    dtype = str(placed(config)[1])
    if config.model.sees:
        weights += processor_sha256(rows.processor)
    key_fields = {"dtype": dtype, "tokenizer": tokenizer_sha256(rows.tokenizer), "template": config.data.template}
    return {
        name: (
            trees,
            folder
            / f"{cache_key(weights + config_sha256(model) + _pictures_sha256(trees), trees, **key_fields)}.safetensors",
        )
        for name, trees in groups.items()
        if trees
    }


def _pictures_sha256(trees: Sequence[TokenTree]) -> str:
    """SHA-256 of the pictures of some trees; empty if there are none, as in all trees on disk."""
    if isinstance(trees, StoredTokens):
        return ""
    hashes = [[i.sha256 for i in t.pictures.images] if t.pictures else [] for t in trees]
    return hashlib.sha256(repr(hashes).encode()).hexdigest() if any(hashes) else ""


# ---- keys for what runs can share ----


def weights_key(config: RunConfig, source: ModelConfig) -> Key:
    """Everything that a model's fp32 weights depend on before training."""
    seed = config.train.seed if source.init == "random" else None
    return (source.path, source.revision, source.init, seed, source.adapter, source.quantize, source.vision)


def start_key(config: RunConfig) -> Key:
    """Everything that metrics of the untrained policy depend on, apart from the rows and evaluation settings."""
    adapter = None if config.lora is None else (config.lora.model_dump_json(), config.train.seed)
    t, (device, dtype) = config.train, placed(config)
    m = config.model
    precision = str(dtype), device.type == "cuda" and t.tf32
    settings = (str(device), *precision, m.kernels, m.attention, t.packing, t.gradient_checkpointing, t.threads)
    learns_policy = not config.method.learns_reward
    return (weights_key(config, config.model), adapter, *settings, learns_policy, config.reference.model_dump_json())


def start_sha256(config: RunConfig, model: Any, source: ModelConfig, shared: Uncached) -> str:
    """SHA-256 of an untrained model loaded from `source`."""
    if config.method.learns_reward:  # its head depends on the seed
        return weights_sha256(model)
    dtype = str(placed(config)[1])
    return shared.once(("sha256", *weights_key(config, source), dtype), lambda: source_sha256(source, model))
