"""Memory of each rank of a multi-GPU run, computed from shapes. It has not been checked against measurements on several GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from penchant.distributed.shard import layers_of
from penchant.models.load import backbone_of
from penchant.plan.memory import Memory
from penchant.plan.outline import OutlinedRun
from penchant.runs.parts import reference_kind
from penchant.training.optim import state_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameter counts of a model.

    Args:
        every, trained: all parameters, and the trained ones; layer: of the largest layer; root: outside the layers.
        moments: bytes of the optimizer's state for the trained ones.
    """

    every: int
    trained: int
    layer: int
    root: int
    moments: int

    @classmethod
    def of(cls, model: Any, optimizer: str = "adamw") -> Sizes:
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(backbone_of(model))]
        every = sum(p.numel() for p in model.parameters())
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        trained = sum(p.numel() for _, p in named)
        return cls(every, trained, max(layers, default=0), every - sum(layers), state_bytes(optimizer, named))


def rank_bytes(
    sizes: Sizes,
    ranks: int,
    *,
    width: int,
    activations: int,
    copies: int = 0,
    frozen: int = 0,
    whole: int = 0,
    moved: int = 0,
    replicas: int = 1,
    reshard: bool = True,
    offload: bool = False,
) -> dict[str, int]:
    """Bytes by part of each of `ranks` processes, one per GPU.

    Trained parameters are fp32 shards with fp32 gradients and the optimizer's moments; frozen ones are shards in the compute dtype. A rank
    also holds the root and two layers unsharded (the next layer is gathered while one computes), and the gradients of the root and of
    two layers until they are reduced.

    Args:
        width: bytes per number of the compute dtype; activations: bytes of one pass.
        copies: models of this size that are also trained; frozen: sharded frozen models of this size (references); whole: unsharded frozen
            models on every rank (reward models); moved: references that are updated, which also keep fp32 weights.
        replicas: groups that each hold the whole model (HSDP); reshard: whether a layer frees its gathered weights after use.
        offload: whether the shards are in host memory, which is not counted.
    """
    if ranks == 1:  # nothing is sharded; bf16 weights have fp32 masters
        full = sizes.trained + copies * sizes.every
        single = {
            "weights": width * (sizes.every + copies * sizes.every),
            "fp32 master weights": 4 * full if width < 4 else 0,
            "gradients": 4 * full,
            "the optimizer's moments": sizes.moments + copies * sizes.moments * sizes.every // max(1, sizes.trained),
            "reference": (width * (frozen + moved) + 4 * moved) * sizes.every,
            "reward models": whole * width * sizes.every,
            "activations of a pass": activations,
        }
        return {name: n for name, n in single.items() if n}
    share = ranks // replicas
    gathered = sizes.root + (2 * sizes.layer if reshard else sizes.every - sizes.root)
    trains = sizes.trained > sizes.every // 2  # otherwise an adapter, whose gradients are small
    full = sizes.trained + copies * sizes.every
    unreduced = 4 * (sizes.root + 2 * sizes.layer) if trains else 4 * sizes.trained
    parts = {
        "fp32 master weights": 4 * full,
        "weights": width * (sizes.every - sizes.trained),
        "gradients": 4 * full,
        "the optimizer's moments": sizes.moments + copies * sizes.moments * sizes.every // max(1, sizes.trained),
        "reference": (width * (frozen + moved) + 4 * moved) * sizes.every,
    }
    sharded = {name: -(-n // share) for name, n in parts.items() if n and not offload}
    unsharded = {
        "reward models": whole * width * sizes.every,
        "gathered weights": width * gathered * (2 if copies or frozen or moved else 1),
        "gradients on their way to the others": unreduced,
        "activations of a pass": activations,
    }
    return sharded | {name: n for name, n in unsharded.items() if n}


def activations_of(config: Any, tokens: int, width: int = 2) -> int:
    """Bytes of a pass over `tokens` tokens with gradient checkpointing: the input of each of a Llama's layers, and one layer's activations.

    Args:
        config: the model's transformers config; width: bytes per number.
    """
    d, heads = config.hidden_size, config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", heads) * (getattr(config, "head_dim", None) or d // heads)
    # inputs, norms, q, attention, residual; k, v; gate, up, their product
    layer = 6 * d + 2 * kv + 3 * config.intermediate_size
    return tokens * width * (d * config.num_hidden_layers + layer) + 4 * tokens * heads


def ranks_of(run: OutlinedRun, memory: Memory, counts: Sequence[int]) -> dict[int, dict[str, int]]:
    """``{number of processes: {part: bytes per process}}`` for a run. The activations in `memory` are split over `launch.context` ranks."""
    launch = run.config.launch
    activations = sum(n for name, n in memory.parts.items() if name.startswith("head"))
    activations += sum(n for name, n in memory.parts.items() if name.startswith("activations")) // launch.context
    sizes, needed = Sizes.of(run.model, run.config.train.optimizer), "reference" in run.method.needs
    frozen = needed and reference_kind(run.config) == "frozen"
    options: dict[str, Any] = {
        "width": run.dtype.itemsize,
        "activations": activations,
        "copies": run.method.copies,
        "frozen": int(frozen and not run.config.reference.moves),
        "moved": int(frozen and run.config.reference.moves),
    }
    sharding: dict[str, Any] = {"replicas": launch.replicas, "reshard": launch.reshard, "offload": launch.offload}
    return {n: rank_bytes(sizes, n, **options, **({} if n == 1 else sharding)) for n in counts}


# ---- The table of docs/many_gpus.md: common model sizes on 1 to 64 GPUs ----

SHAPES: dict[str, dict[str, int]] = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40, vocab_size=32000),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "DPO, cached reference": {},
    "DPO, live reference": {"frozen": 1},
    "DPO with LoRA (r=16), adapter off": {"lora": True},
    "PPO, value head, live reference": {"frozen": 1},
    "PPO, value model of its own, live reference": {"frozen": 1, "copies": 1},
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = 8192


def sizes_of(shape: Mapping[str, int], lora: bool = False) -> Sizes:
    """Sizes of a Llama of this shape, with or without an adapter, extrapolated from models of one and two layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from penchant.models.load import on_meta
    from penchant.models.lora import add_lora
    from penchant.models.options import LoraConfig

    models = [on_meta(AutoModelForCausalLM, LlamaConfig(**{**shape, "num_hidden_layers": n})) for n in (1, 2)]  # type: ignore[arg-type]
    one, two = (astuple(Sizes.of(add_lora(model, LoraConfig(), 0) if lora else model)) for model in models)
    return Sizes(*(a + (shape["num_hidden_layers"] - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def table() -> list[str]:
    """Lines of a Markdown table of GB (10^9 bytes) per process."""
    from transformers import LlamaConfig

    lines = [f"| | {' | '.join(map(str, GPUS))} |", "|---" * (len(GPUS) + 1) + "|"]
    for name, shape in SHAPES.items():
        config: Any = LlamaConfig(**shape)  # type: ignore[arg-type]
        for kind, options in KINDS.items():
            sizes = sizes_of(shape, "lora" in options)
            kwargs = {key: value for key, value in options.items() if key != "lora"}
            activations = activations_of(config, TOKENS)
            cells = [
                f"{sum(rank_bytes(sizes, n, width=2, activations=activations, **kwargs).values()) / 1e9:,.0f}"
                for n in GPUS
            ]
            lines.append(f"| {name}: {kind} | {' | '.join(cells)} |")
    return lines
