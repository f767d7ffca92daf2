"""Estimate a run's peak memory by running its forward and backward passes on the meta device."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penchant.base.lanes import Turns
from penchant.base.machine import machine_memory, meta_as
from penchant.data.packing import max_concurrent_passes, pack, tree_tokens
from penchant.data.tokenize import pair_format
from penchant.errors import PenchantError
from penchant.logprobs import Scorer
from penchant.models.cpu.decode import cached_tokens, can_decode_fast
from penchant.models.cpu.head import KEEP_BYTES
from penchant.models.cpu.layers import fast_forward
from penchant.models.load import base_model_of, cast_parameters, held_in, size_of
from penchant.plan.outline import META, OutlinedRun, outline, parameter_counts, weight_file_bytes
from penchant.plan.work import Work, passes_over
from penchant.rewards.reward_model import CausalRewards, EncoderRewards, find_reward_model
from penchant.rollout.generate import (
    CACHE_BYTES,
    PROMPTS_HELD,
    key_value_bytes,
    passing_bytes,
    row_bytes,
    rows_by_memory,
    rows_that_fit,
)
from penchant.runs.evaluating import writes_completions
from penchant.runs.parts import reference_kind, reference_place, reference_source, starts_adapted, threads_for
from penchant.runs.record import has_samples
from penchant.training.optim import state_bytes
from penchant.types import PackedBatch, TokenTree

# ---- Bytes of live tensors, counted at every operation, on real tensors or on the meta device ----


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of storages created inside it, until each is freed.

    Args:
        tensors: existing ones that are counted elsewhere, such as weights.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._tensors = list(tensors)
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in self._tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # a check for padding reads a value that meta tensors lack: count the general, padded case
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def on_free(_: Any) -> None:
            self.live -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, on_free)


# ---- Bytes of one forward and backward pass beyond the weights, counted on the meta device ----
# The code of a real training step (transformers' layers or the CPU kernels) runs on the meta device, where tensors have shapes but no
# data, and `LiveBytes` counts what it would have allocated. Tests compare both with a real pass.


@dataclass(frozen=True, slots=True)
class Activations:
    """Peak bytes of a pass beyond the weights.

    Args:
        layers: saved by the layers for the backward pass; head: additional bytes at the peak.
        layouts: attention plans of all micro-batches of a step; forward: peak of a pass without gradients.
        counted_by: the implementation that was counted, ``kernels`` or ``transformers``, or ``rule of thumb``.
    """

    layers: int
    head: int
    layouts: int
    forward: int
    counted_by: str

    @property
    def total(self) -> int:
        return self.layers + self.head + self.layouts

    def times(self, share: float) -> Activations:
        """Scale to several concurrent passes, which together have `share` times the tokens of this one."""
        layers, head, forward = (round(share * n) for n in (self.layers, self.head, self.forward))
        return replace(self, layers=layers, head=head, forward=forward)


def activations_of(run: OutlinedRun, model: Any, batches: Sequence[Sequence[TokenTree]], fast: bool) -> Activations:
    """Activations of a training step.

    Args:
        batches: the step's micro-batches, largest first.
    """
    with _on_meta_device(run, model, batches if fast else batches[:1], fast) as (engine, packed):
        model.train()
        if fast and run.dtype != torch.bfloat16 and len(packed) > 1:  # gradients of the earlier micro-batches
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
        model_tensors, layers = _model_tensors(model), 0
        if fast:
            with LiveBytes(model_tensors) as live:
                hidden = getattr(engine, "scorer", engine).hidden(packed[0])
                layers = live.live
                del hidden
        with LiveBytes(model_tensors) as live, Turns().of(0) if fast else nullcontext():
            _output_sum(engine, packed[0]).backward()
        # lasting gradients are reported separately; the rest of the peak is activations and temporary gradients
        known_ids = {id(t) for t in model_tensors}
        gradients = (p.grad for p in model.parameters() if p.grad is not None and id(p.grad) not in known_ids)
        peak = max(layers, live.peak - sum(g.nbytes for g in gradients))
        layouts = sum(_tensor_bytes(b.cache.values()) for b in packed)
    forward = forward_bytes(run, model, batches[0], fast)
    layers = layers or peak
    activations = Activations(layers, peak - layers, layouts, forward, "kernels" if fast else "transformers")
    return activations.times(
        _concurrency_factor(run, [sum(tree_tokens(t, run.shared_prompts) for t in b) for b in batches])
    )


def _concurrency_factor(run: OutlinedRun, sizes: Sequence[int]) -> float:
    """Tokens of the largest concurrent passes, as a multiple of the tokens of the largest pass."""
    train, models = run.config.train, 1 + run.method.copies  # one pass for each model
    limit = max_concurrent_passes(sizes, train.tokens_per_step, train.batch_size * models) if run.side_by_side else 1
    threads = threads_for(run.config, parameter_counts(run.model)[0])
    return sum(sorted([*sizes] * models, reverse=True)[: min(threads, limit)]) / max(sizes)


def forward_bytes(run: OutlinedRun, model: Any, batch: Sequence[TokenTree], fast: bool) -> int:
    """Peak bytes of a pass without gradients, beyond the weights."""
    with _on_meta_device(run, model, [batch], fast) as (engine, packed):
        model.eval()
        with LiveBytes(_model_tensors(model)) as live, torch.no_grad():
            _output_sum(engine, packed[0])
        return live.peak + _tensor_bytes(packed[0].cache.values())


@contextmanager
def _on_meta_device(
    run: OutlinedRun, model: Any, batches: Sequence[Sequence[TokenTree]], fast: bool
) -> Iterator[tuple[Any, list[PackedBatch]]]:
    """Yield a run's engine and packed batches, ready for passes on the meta device. Clears the model's gradients on exit."""
    hooks = _cast_for_training(model, run.dtype, fast)
    packed = [replace(pack([replace(t, pictures=None) for t in b], shared=run.shared_prompts), seed=0) for b in batches]
    kernels = fast_forward(model) if fast else None
    engine = _engine(run, model, "auto" if fast else "off")
    try:
        with _flash_attention(), meta_as(run.device.type):
            yield engine, [b.to(META) if kernels is None else kernels.outlined(b) for b in packed]
    finally:
        for hook in hooks:
            hook.remove()
        for p in model.parameters():
            p.grad = None
            vars(p).pop("main_grad", None)


def _model_tensors(model: Any) -> list[Tensor]:
    gradients = [g for p in model.parameters() for g in (p.grad, getattr(p, "main_grad", None)) if g is not None]
    return [*model.parameters(), *model.buffers(), *gradients]


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a batch's cached layouts, however nested."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else value
    return sum(map(_tensor_bytes, parts)) if isinstance(parts, Iterable) else 0


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Use the CPU's flash SDPA, which saves no attention scores. On the meta device torch would pick the math kernel, which does."""
    original = F.scaled_dot_product_attention

    def flash(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        mask = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
        return out

    F.scaled_dot_product_attention = flash  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _output_sum(engine: Any, batch: PackedBatch) -> Tensor:
    outputs: Tensor = engine.logps(batch).sums if isinstance(engine, Scorer) else engine.rewards(batch)
    return outputs.sum()


def _engine(run: OutlinedRun, model: Any, kernels: str) -> Any:
    packing = run.layout[0]
    if run.encoder:
        return EncoderRewards(model, pair_format(run.rows.tokenizer))
    own_attention = run.config.model.sees  # a vision model computes its own positions
    scorer = Scorer(model, packing, kernels, attention=run.attention[0], own_attention=own_attention)  # type: ignore[arg-type]
    return scorer if not run.method.learns_reward else CausalRewards(scorer)


def _cast_for_training(model: Any, dtype: torch.dtype, fast: bool) -> list[Any]:
    """Cast the model to its training dtype and return hooks that free each bf16 gradient at once, as a run adds it to an fp32 buffer."""
    hooks = []
    cast_parameters(model, dtype)
    for p in model.parameters():
        if p.requires_grad and p.dtype == torch.bfloat16:
            if fast:
                p.main_grad = torch.empty_like(p, dtype=torch.float32)
            hooks.append(p.register_post_accumulate_grad_hook(_free_grad))
    return hooks


def _free_grad(p: Tensor) -> None:
    p.grad = None


# ---- Bytes beyond the weights during evaluations and rollouts: passes over rows, decoding, the initial model's weights ----

PREFILL_TOKENS = 4096  # tokens that `FastDecoder.prefill` processes at once


def _decoding_rounds(run: OutlinedRun) -> list[tuple[int, int, list[int]]]:
    """(completions per prompt, new tokens, prompt lengths) of each kind of decoding that a run does."""
    if run.method.learns_reward:
        return []
    evaluation, rounds = run.config.evaluation, []
    train, heldout = ([len(t.prompt_ids) for t in part] for part in run.rows.trees)
    rollouts = run.method.rollouts
    if rollouts is not None:
        batch = max((run.schedule.batch(s) for s in _rollout_steps(run)), key=lambda b: sum(train[i] for i in b))
        rounds.append((rollouts.samples, rollouts.max_new_tokens, [train[i] for i in batch]))
        if heldout:
            rounds.append((1, rollouts.max_new_tokens, heldout))
    elif writes_completions(run.config, run.rows) and heldout:
        prompts = list(dict.fromkeys(t.prompt_ids.tobytes() for t in run.rows.trees[1]))[: evaluation.kl_prompts]
        rounds.append((1, evaluation.sample_tokens, [len(p) // 4 for p in prompts]))  # int32
    if has_samples(run.config, run.rows):
        rounds.append((1, evaluation.sample_tokens, (heldout or train)[: evaluation.samples]))
    return [(n, new, prompts) for n, new, prompts in rounds if prompts]


def _rollout_steps(run: OutlinedRun) -> range:
    """Steps of the first epoch that generate rollouts."""
    return range(0, min(run.schedule.total_steps, run.schedule.steps_per_epoch), run.schedule.repeat)


def decoding_bytes(model: Any, size: int, prompts: Sequence[int], n: int, new_tokens: int) -> int:
    """Peak bytes of one call of `rollout.generate.sample`.

    Args:
        size: bytes per weight; prompts: length of each in tokens; n: completions per prompt; new_tokens: most tokens of a completion.
    """
    longest = max(prompts)
    if not can_decode_fast(model, longest + new_tokens):
        per_row = row_bytes(model, size, longest, n, new_tokens)
        return round(min(n * len(prompts), rows_that_fit(per_row, CACHE_BYTES)) * per_row)
    token_bytes, vocabulary = key_value_bytes(model, size), size_of(model, "vocab_size")
    at_once = max(1, min(len(prompts), rows_by_memory(token_bytes, vocabulary, n, longest, new_tokens) // n))
    rows, groups = at_once * n, min(len(prompts), PROMPTS_HELD * at_once)
    caches = token_bytes * cached_tokens(rows, groups, longest, new_tokens)
    prefill_tokens = min(at_once * longest, max(longest, PREFILL_TOKENS))
    scratch = max(prefill_tokens * passing_bytes(model, size), rows * vocabulary * (size + 8))
    return packed_weights(model) * size + caches + scratch


def packed_weights(model: Any) -> int:
    """Number of weights in the decoder's own packed copy: every matrix of the layers, and the head."""
    base = base_model_of(model)
    head = base.get_output_embeddings().weight
    layers = sum(p.numel() for name, p in base.model.layers.named_parameters() if p.ndim > 1 and "lora_" not in name)
    return int(layers + head.numel())


def initial_model_parameters(run: OutlinedRun) -> int:
    """Parameters of the initial model that an evaluation loads temporarily, or 0.

    It is loaded if completions are compared with the initial model's and no frozen reference is in memory.
    """
    if (
        not run.rows.trees[1]
        or run.method.learns_reward
        or run.config.lora is not None
        or run.method.signal == "tokens"
    ):
        return 0
    has_frozen_reference = (
        "reference" in run.method.needs and reference_kind(run.config) == "frozen" and not run.config.reference.moves
    )
    if not writes_completions(run.config, run.rows) or has_frozen_reference:
        return 0
    return parameter_counts(base_model_of(run.model))[0]


# ---- A run's memory, part by part, from the shapes of its model and of its largest step ----
# A CPU process stays at its high-water mark: the command line sets the allocator to keep freed pages, which would only be faulted in
# again at the next step. So the peak is the largest of the moments below, and each of them is a sum.

MIB = 1 << 20
# These constants were measured on one machine (benchmarks/plan_memory.py); everything else is counted.
# Loaded only when training starts: peft, the optimizer, kernels and their scratch space.
TRAINING_LIBRARIES = 110 * MIB
# Heap fragmentation between tensors of different sizes, as a share. The fast path allocates the same few sizes layer by layer; autograd
# keeps hundreds of tensors of many sizes and frees them in a different order.
HEAP_LOSS = {"kernels": 0.02, "transformers": 0.20, "rule of thumb": 0.20}
# oneDNN creates a primitive for every bf16 matmul of a new size. The kernel that it generates is never freed, whatever the settings; the
# primitive around it stays in an LRU cache (of 128 entries under the command line, of 1,024 by oneDNN's default).
CAPACITY, CAPACITY_WITHOUT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024
KERNEL, PRODUCT = 262 << 10, 275 << 10  # bytes of each
WITH_GRADIENT, WITHOUT = (17, 31), (7, 12)  # (kernels, primitives) that a pass of a new size adds


MOMENTS = "optimizer (two moments)"  # AdamW has two, other optimizers fewer


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated memory of a run, in bytes.

    Args:
        parts: of a training step, by name; moments: peak of each phase of the run, by name; machine: total memory; free: free now.
        coarse: why this is a rough estimate, or an empty string; advice: (setting to change, bytes it would save).
        elsewhere: bytes on other devices, by device.
    """

    parts: dict[str, int]
    moments: dict[str, int]
    machine: int
    free: int
    coarse: str
    advice: tuple[tuple[str, int], ...] = ()
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine


def quantized_bytes(model: nn.Module, bits: str) -> tuple[int, int, int]:
    """The effect of quantizing a plain model: (number of quantized weights, their bytes afterwards, weights in the largest layer).

    nf4: half a byte per weight, a byte per block of 64 and 4 bytes per 256 blocks; int8: a byte per weight and 4 bytes per row.
    """
    head, count, stored_bytes, largest = base_model_of(model).get_output_embeddings(), 0, 0, 0
    for name, layer in base_model_of(model).named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and "lora_" not in name and bits != "none":
            n = layer.weight.numel()
            blocks = -(-n // 64)
            count, largest = count + n, max(largest, n)
            stored_bytes += n + 4 * layer.out_features if bits == "int8" else n // 2 + blocks + 4 * -(-blocks // 256)
    return count, stored_bytes, largest


def memory_of(run: OutlinedRun, work: Work, baseline: int, rows: int, *, counted: bool = True) -> Memory:
    """Estimate a run's memory.

    Args:
        baseline: bytes of this process with its libraries and tokenizer; rows: bytes that the rows and their tokens added to it.
        counted: count activations on the meta device; otherwise use a rule of thumb, which takes no time.
    """
    model, on_cpu = run.model, run.device.type == "cpu"
    parameters, trainable = parameter_counts(model)
    copies = run.method.copies * parameters  # models trained beside the policy
    trainable += copies
    size = torch.empty(0, dtype=run.dtype).element_size()
    shadow = size < 4  # bf16 weights are shadows of fp32 masters
    frozen_parameters, ref_elsewhere = _frozen_models(run), reference_place(run.config) != run.device
    reference = (frozen_parameters[0] + frozen_parameters[1] * (not ref_elsewhere)) * size - (
        0 if ref_elsewhere else _narrowed(run)
    )
    activations, coarse = _activations(run, work) if counted else (_rule_of_thumb(run, work), "a rule of thumb")
    if run.config.train.gradient_checkpointing == "offload":  # the GPU holds no more than a pass that saves nothing
        activations = replace(activations, layers=min(activations.layers, activations.forward))
    train, bits = run.config.train, run.config.model.quantize
    quantized, quantized_size, largest = quantized_bytes(model, bits)
    elsewhere = _other_device_bytes(
        run, (frozen_parameters[1] * size + activations.forward) * bool(ref_elsewhere and frozen_parameters[1])
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    base_parameters = list(base_model_of(model).named_parameters()) if run.method.copies else []
    optimizer_bytes = [state_bytes(train.optimizer, named, train.momentum) for named in (trained, base_parameters)]
    lasting = {
        "Python, torch, transformers": baseline + (TRAINING_LIBRARIES if on_cpu else 0),
        "rows and tokens": rows,
        "weights": (parameters - quantized + copies) * size + quantized_size,
        "fp32 master weights": trainable * 4 if shadow else 0,
        "gradients": trainable * 4,  # in fp32, summed over micro-batches
        MOMENTS: optimizer_bytes[0] + optimizer_bytes[1] * run.method.copies,
        # frozen weights are cast from fp32 to bf16 one at a time, and the gaps they leave are too small for an activation
        "left by fp32 weights": (parameters - quantized - trainable) * 2 if shadow and on_cpu else 0,
        "prepared products, by size of pass": _onednn_bytes(run, work) if shadow else 0,
        "reference": reference,
    }
    step_parts = {
        "activations of the largest micro-batch"
        + (" and those beside it" if run.side_by_side else ""): activations.layers + activations.layouts,
        "head (or the backward pass of a layer)": activations.head,
    }
    if largest:
        step_parts["a layer's dequantized weight"] = largest * (size + 4)
    step_bytes = sum(step_parts.values())
    if run.device.type == "cuda":
        del lasting["Python, torch, transformers"]
        free, total = torch.cuda.mem_get_info()
        moments = {"a training step": sum(lasting.values()) + step_bytes}
        coarse = "the GPU's own context and cached blocks are not counted"
        parts = lasting | step_parts
        advice = _advice(run, parts, activations, trainable, parameters) if sum(parts.values()) > total else ()
        return Memory(parts, moments, total, free, coarse, advice, elsewhere)
    process = lasting["Python, torch, transformers"] + rows
    overhead = 1.0 + HEAP_LOSS[activations.counted_by]

    def with_losses(more: int) -> int:
        """Total bytes of the process with `more` bytes of tensors, including heap fragmentation."""
        return process + round((sum(lasting.values()) - process + more) * overhead)

    before = process + (parameters - quantized) * size + quantized_size + trainable * (8 if shadow else 0)
    step = with_losses(step_bytes)
    moments = {
        "loading the model": process
        + (parameters - quantized) * 4
        + quantized_size
        + weight_file_bytes(run.config.model.path, model),
        "before the first step": before + round(activations.forward * overhead) + reference,
        "a training step": step,
    }
    # the largest round of decoding: packed weights, KV cache, prefill, logits; 0 if nothing is generated
    decoding = max((decoding_bytes(run.model, size, p, n, new) for n, new, p in _decoding_rounds(run)), default=0)
    evaluating = with_losses(max(activations.forward, _scoring_bytes(run, activations), decoding))
    initial_parameters = initial_model_parameters(run)
    if initial_parameters:
        # its fp32 weights reuse the pages of freed activations; the file that it is read from comes on top
        evaluating = max(step, evaluating, with_losses(initial_parameters * 4))
        evaluating += weight_file_bytes(run.config.reference.path or run.config.model.path, model)
    if run.rows.trees[1]:
        moments["an evaluation" + (", which loads the start again" if initial_parameters else "")] = evaluating
    elif decoding:
        moments["writing answers"] = evaluating
    parts = lasting | step_parts
    parts["lost between tensors"] = step - sum(parts.values())
    total, free = machine_memory()
    fits = max(moments.values()) <= total
    advice = () if fits else _advice(run, parts, activations, trainable, parameters)
    return Memory(parts, moments, total, free, coarse, advice, elsewhere)


def _onednn_bytes(run: OutlinedRun, work: Work) -> int:
    """Bytes that oneDNN keeps for bf16 matmuls, from the number of distinct pass sizes and this process's cache capacity."""
    if run.device.type != "cpu":
        return 0
    cached_trees = (
        run.rows.trees[0] if "reference" in run.method.needs and reference_kind(run.config) == "cached" else []
    )
    forward = len(passes_over(run, cached_trees)) + len(passes_over(run, run.rows.trees[1]))
    setting = os.environ.get(CAPACITY, "")
    capacity = int(setting) if setting.isdigit() else CAPACITY_WITHOUT
    kernels, products = (work.sizes * a + forward * b for a, b in zip(WITH_GRADIENT, WITHOUT, strict=True))
    return kernels * KERNEL + min(capacity, products) * PRODUCT


def _activations(run: OutlinedRun, work: Work) -> tuple[Activations, str]:
    fast = run.layout[1]
    try:
        activations = activations_of(run, run.model, work.batch, fast)
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, PenchantError):
            raise
        activations = _rule_of_thumb(run, work)
        return activations, "this model's operations cannot be counted on shapes alone; activations are a rule of thumb"
    if run.method.rollouts is not None:
        return activations, "assumes rollouts of maximum length; reward models are not counted"
    return activations, "counts picture tokens, but not the vision tower" if run.config.model.sees else ""


def _rule_of_thumb(run: OutlinedRun, work: Work) -> Activations:
    """Activations by the usual rule of 34 d bytes per token and layer in bf16 (17 values of width d).

    The head adds the logits of the completion tokens, or one chunk of them if they are too large to keep.
    """
    size = torch.empty(0, dtype=run.dtype).element_size()
    hidden_bytes = work.largest * size_of(run.model, "hidden_size") * size
    layer_bytes, depth = hidden_bytes * 17, size_of(run.model, "num_hidden_layers") or 12
    checkpointing = run.config.train.gradient_checkpointing is not False  # only the inputs of the layers are kept
    layers = hidden_bytes * depth + layer_bytes if checkpointing else layer_bytes * depth
    completions = sum(t.shared_tokens - len(t.prompt_ids) for t in work.batch[0])
    head = min(completions * size_of(run.model, "vocab_size") * size, KEEP_BYTES)
    activations = Activations(layers, head, 0, layer_bytes, "rule of thumb")
    return activations.times(
        _concurrency_factor(run, [sum(tree_tokens(t, run.shared_prompts) for t in b) for b in work.batch])
    )


def _frozen_models(run: OutlinedRun) -> tuple[int, int]:
    """(initial adapter, reference): parameters held frozen beside the trained model for the whole run."""
    adapted = starts_adapted(run.config) and not run.method.learns_reward
    adapter = parameter_counts(run.model)[1] if adapted else 0
    if "reference" not in run.method.needs or reference_kind(run.config) != "frozen":
        return adapter, 0
    return adapter, parameter_counts(base_model_of(outline(run.config.model)))[0]


def _narrowed(run: OutlinedRun) -> int:
    """Bytes that an fp32 reference saves if its layers' values came from a bf16 file (`FastForward.narrow`)."""
    frozen = _frozen_models(run)[1] and run.layout[1] and not run.config.reference.moves
    source = reference_source(run.config)
    if not frozen or source.adapter is not None or run.dtype != torch.float32:
        return 0
    if held_in(source, torch.bfloat16, frozen=False) == torch.float32:
        return 0
    layers = base_model_of(outline(source)).model.layers
    return 2 * sum(p.numel() for p in layers.parameters() if p.ndim > 1)


def _other_device_bytes(run: OutlinedRun, reference: int) -> dict[str, int]:
    """Bytes on devices other than the policy's, by device: `reference` (its weights and a pass), and reward models' weights."""
    bytes_by_device = Counter({str(reference_place(run.config)): reference})
    if run.config.reward is not None and run.config.reward.device not in ("auto", str(run.device)):
        folders = filter(None, map(find_reward_model, run.config.reward.terms))
        bytes_by_device[run.config.reward.device] += sum(
            weight_file_bytes(str(folder), run.model) for folder in folders
        )
    return {device: n for device, n in bytes_by_device.items() if n}


def _scoring_bytes(run: OutlinedRun, activations: Activations) -> int:
    """Bytes of scoring the largest micro-batch of held-out rows, or 0 if there is none or `activations` is a rule of thumb."""
    trees = run.rows.trees[1]
    passes = passes_over(run, trees) if trees and run.method.rollouts is None else []
    if not passes or activations.counted_by == "rule of thumb":
        return 0
    tokens = [sum(tree_tokens(trees[i], run.shared_prompts) for i in members) for members in passes]
    largest = passes[tokens.index(max(tokens))]
    return round(
        forward_bytes(run, run.model, [trees[i] for i in largest], run.layout[1]) * _concurrency_factor(run, tokens)
    )


def _advice(
    run: OutlinedRun, parts: dict[str, int], activations: Activations, trainable: int, parameter_count: int
) -> tuple[tuple[str, int], ...]:
    """(setting to change, approximate bytes saved) for a run that does not fit, largest saving first."""
    train, reference = run.config.train, run.config.reference
    training_bytes = parts["fp32 master weights"] + parts["gradients"] + parts[MOMENTS]
    longest = max((t.shared_tokens for t in run.rows.trees[0]), default=0)
    two_fit = train.tokens_per_step >= 2 * longest
    savings = {
        "lora={r: 16} (an adapter in place of the whole model)": round(training_bytes * 0.96)
        * (run.config.lora is None),
        "half of train.tokens_per_step": activations.total // 2 * two_fit,
        "half of data.max_length, with half of train.tokens_per_step": activations.total // 2 * (not two_fit),
        "train.gradient_checkpointing=layers (a third slower)": activations.layers
        * 3
        // 4
        * (train.gradient_checkpointing is False),
        "model.quantize=nf4 (QLoRA)": parts["weights"]
        * 3
        // 5
        * (run.config.lora is not None and run.config.model.quantize == "none" and not run.method.learns_reward),
        "train.optimizer=adamw_8bit": trainable * 6 * (train.optimizer == "adamw" and run.config.lora is None),
        "model.dtype=bf16": (activations.layers // 2 + parameter_count * 2 - trainable * 4)
        * (run.dtype != torch.bfloat16),
        "reference.kind=cached": parts["reference"] * (not run.method.live_reference and not reference.moves),
    }
    return tuple(sorted(((text, n) for text, n in savings.items() if n > 0), key=lambda pair: -pair[1]))
