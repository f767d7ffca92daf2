"""How much memory a run needs, part by part, from the shapes of its model and of its largest step.

A process on the CPU keeps its high-water mark: the command line starts with allocator settings under which freed pages stay (they
would only be faulted in again at the next step). So the peak is the largest of the moments below, and each of them is a sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penchant.algorithms.options import PPOConfig
from penchant.data.packing import tree_tokens
from penchant.errors import PenchantError
from penchant.machine import machine_memory
from penchant.models.structure import base_model_of
from penchant.planning.activations import Activations, activations_of, forward_bytes
from penchant.planning.evaluating import start_weights, writing_bytes
from penchant.planning.outline import OutlinedRun, parameter_counts, weight_file_bytes
from penchant.planning.work import Work, passes_over

MIB = 1 << 20
# Measured on one machine (benchmarks/plan_memory.py); everything else is counted.
TRAINING_LIBRARIES = (
    110 * MIB
)  # what is loaded only when training begins: peft, the optimiser, kernels and their scratch space
# What the heap loses between tensors of different sizes. The fast path makes the same few tensors layer by layer; autograd keeps
# hundreds of many sizes, and frees them in another order than they came in.
HEAP_LOSS = {"formula": 0.05, "shapes": 0.20, "rule of thumb": 0.20}
# oneDNN prepares every bf16 product of a new size. The kernel that it generates stays for good, whatever is set; the product around it
# stays while it is among the last ones (the command line keeps 128, oneDNN itself 1,024).
CAPACITY, CAPACITY_WITHOUT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024
KERNEL, PRODUCT = 262 << 10, 275 << 10  # bytes of one


@dataclass(frozen=True, slots=True)
class NewSize:
    """What a pass of a size that was not met before makes oneDNN prepare."""

    kernels: int
    products: int


WITH_GRADIENT, WITHOUT = NewSize(17, 31), NewSize(7, 12)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes.

    Args:
        parts: of the training step, by name; moments: high-water marks of the phases of a run; machine: what there is in all, free: now.
        coarse: why this is a rough estimate, or an empty string; advice: key, what to set, bytes that it would save.
    """

    parts: dict[str, int]
    moments: dict[str, int]
    machine: int
    free: int
    coarse: str
    advice: tuple[tuple[str, int], ...] = ()

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine


def memory_of(run: OutlinedRun, work: Work, baseline: int, rows: int) -> Memory:
    """The estimate.

    Args:
        baseline: bytes of this process with its libraries and tokenizer; rows: what the rows and their tokens added to it.
    """
    model = run.model
    every, trainable = parameter_counts(model)
    size = torch.empty(0, dtype=run.dtype).element_size()
    shadow = size < 4  # bf16 weights are shadows of fp32 masters
    held = _frozen_models(run)
    more, more_trainable = _value(run)
    trainable += more_trainable
    activations, coarse = _activations(run, work)
    passing = (
        0 if shadow else trainable * 4
    )  # fp32 gradients are the parameters' own, and stay from micro-batch to micro-batch
    parts = {
        "Python, torch, transformers": baseline + (TRAINING_LIBRARIES if run.device.type == "cpu" else 0),
        "rows and tokens": rows,
        "weights": (every + more) * size,
        "fp32 master weights": trainable * 4 if shadow else 0,
        "gradients": trainable * 4 if shadow else passing,
        "optimiser (two moments)": trainable * 8,
        # frozen weights turn from fp32 to bf16 one by one, and what each leaves is too small for an activation
        "left by fp32 weights": (every - trainable) * 2 if shadow and run.device.type == "cpu" else 0,
        "prepared products, by size of pass": _prepared(run, work) if shadow else 0,
        "reference": held * size,
        "activations of the largest micro-batch": activations.layers + activations.layouts,
        "head (or the backward pass of a layer)": activations.head,
    }
    lasting = sum(list(parts.values())[:-2])
    if run.device.type == "cuda":
        parts.pop("Python, torch, transformers")
        lasting = sum(list(parts.values())[:-2])
        return _on_gpu(parts, lasting, activations)
    process = parts["Python, torch, transformers"] + rows
    loading = every * 4 + weight_file_bytes(run.config.model.path, model)
    before = process + every * size + trainable * (8 if shadow else 0)
    heap = 1.0 + HEAP_LOSS[activations.by]
    step = process + _heap(lasting - process + activations.total, heap)
    moments = {
        "loading the model": process + loading,
        "before the first step": before + _heap(activations.forward, heap) + held * size,
        "a training step": step,
    }
    asked = [activations.forward, _scoring(run, activations), writing_bytes(run, size)]
    evaluating = process + _heap(lasting - process + max(asked), heap)
    again = start_weights(run)
    if again:
        # its fp32 weights take the place of activations, whose pages stay; the file that it is read from comes on top
        evaluating = max(step, evaluating, process + _heap(lasting - process + again * 4, heap))
        evaluating += weight_file_bytes(run.config.reference.path or run.config.model.path, model)
    if run.trees[1]:
        moments["an evaluation" + (", which loads the start again" if again else "")] = evaluating
    elif asked[-1]:
        moments["writing answers"] = evaluating
    parts["lost between tensors"] = moments["a training step"] - sum(parts.values())
    total, free = machine_memory()
    return Memory(
        parts,
        moments,
        total,
        free,
        coarse,
        () if max(moments.values()) <= total else _advice(run, parts, activations, trainable, every),
    )


def _prepared(run: OutlinedRun, work: Work) -> int:
    """What oneDNN keeps of bf16 products: by the sizes of passes that the run meets, and the cache's capacity in this process."""
    if run.device.type != "cpu":
        return 0
    once = run.trees[0] if "reference" in run.needs and run.reference_kind == "cached" else []
    forward = len(passes_over(run, once)) + len(passes_over(run, run.trees[1]))
    said = os.environ.get(CAPACITY, "")
    capacity = int(said) if said.isdigit() else CAPACITY_WITHOUT
    kernels, products = (
        work.sizes * getattr(WITH_GRADIENT, kind) + forward * getattr(WITHOUT, kind) for kind in ("kernels", "products")
    )
    return kernels * KERNEL + min(capacity, products) * PRODUCT


def _heap(held: int, factor: float) -> int:
    return round(held * factor)


def _on_gpu(parts: dict[str, int], lasting: int, activations: Activations) -> Memory:
    free, total = torch.cuda.mem_get_info()
    moments = {"a training step": lasting + activations.total}
    return Memory(parts, moments, total, free, "the GPU's own context and cached blocks are not counted")


def _activations(run: OutlinedRun, work: Work) -> tuple[Activations, str]:
    fast = run.layout[1]
    try:
        found = activations_of(run, run.model, work.batch, fast)
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, PenchantError):
            raise
        found = _rule_of_thumb(run, work)
        return found, "this model's operations cannot be counted on shapes alone; activations are a rule of thumb"
    if run.online is not None:
        return found, "rollouts count as long as they may be; reward models are not counted"
    return found, ""


def _rule_of_thumb(run: OutlinedRun, work: Work) -> Activations:
    """34 numbers of width d a token and layer, as the literature counts a transformer layer's activations."""
    config = base_model_of(run.model).config
    size = torch.empty(0, dtype=run.dtype).element_size()
    a_layer = work.largest * config.hidden_size * 34 * size // 2
    layers = a_layer * int(getattr(config, "num_hidden_layers", 12))
    return Activations(layers, work.largest * 4 * config.vocab_size // 4, 0, a_layer, "rule of thumb")


def _frozen_models(run: OutlinedRun) -> int:
    """Parameters of models that are held beside the trained one for the whole run."""
    if "reference" not in run.needs or run.reference_kind != "frozen":
        return 0
    return parameter_counts(base_model_of(run._fresh_model(run.config.model)))[0]


def _scoring(run: OutlinedRun, known: Activations) -> int:
    """A pass over the largest micro-batch of held-out rows; `known` stands for it where training has a larger one."""
    trees = run.trees[1]
    passes = passes_over(run, trees) if trees and run.online is None else []
    if not passes or known.by == "rule of thumb":
        return 0
    tokens = [sum(tree_tokens(trees[i], run.shared_prompts) for i in members) for members in passes]
    largest = passes[tokens.index(max(tokens))]
    return forward_bytes(run, run.model, [trees[i] for i in largest], run.layout[1])


def _value(run: OutlinedRun) -> tuple[int, int]:
    """(all, trainable) parameters of PPO's own value model."""
    if not isinstance(run.online, PPOConfig) or run.online.value != "separate":
        return 0, 0
    return parameter_counts(run.model)[0], parameter_counts(run.model)[0]


# ---------------------------------------------------------------------------------------------------------------------
# what could be changed where it does not fit


def _advice(
    run: OutlinedRun, parts: dict[str, int], activations: Activations, trainable: int, every: int
) -> tuple[tuple[str, int], ...]:
    """What to set, and what it would save, the largest saving first."""
    found = [(text, saved(run, parts, activations, trainable, every)) for text, saved in CHANGES.items()]
    return tuple(sorted(((t, s) for t, s in found if s > 0), key=lambda pair: -pair[1]))


Saved = Callable[[OutlinedRun, dict[str, int], Activations, int, int], int]


def _by_adapter(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    of_training = parts["fp32 master weights"] + parts["gradients"] + parts["optimiser (two moments)"]
    return round(of_training * 0.96) if run.config.lora is None else 0


def _by_half_the_tokens(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    longest = max((t.shared_tokens for t in run.trees[0]), default=0)
    return a.total // 2 if run.config.train.tokens_per_step >= 2 * longest else 0


def _by_length(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    longest = max((t.shared_tokens for t in run.trees[0]), default=0)
    return a.total // 2 if run.config.train.tokens_per_step < 2 * longest else 0


def _by_recomputing(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    return a.layers * 3 // 4 if not run.config.train.gradient_checkpointing else 0


def _by_bf16(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    if run.dtype == torch.bfloat16:
        return 0
    return a.layers // 2 + every * 2 - trainable * 4


def _by_cache(run: OutlinedRun, parts: dict[str, int], a: Activations, trainable: int, every: int) -> int:
    could = run.online is None and "divergence" not in run.needs and not run.config.reference.moves
    return parts["reference"] if could else 0


CHANGES: dict[str, Saved] = {
    "lora={r: 16} (an adapter in place of the whole model)": _by_adapter,
    "half of train.tokens_per_step": _by_half_the_tokens,
    "half of data.max_length, with half of train.tokens_per_step": _by_length,
    "train.gradient_checkpointing=true (a third slower)": _by_recomputing,
    "model.dtype=bf16": _by_bf16,
    "reference.kind=cached": _by_cache,
}
