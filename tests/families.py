"""Tiny random models of every supported family, and random trees as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from parameters import one_of_each

from penchant.losses import LOSSES
from penchant.metrics.heldout import heldout_metrics, score_heldout
from penchant.types import Algorithm, TokenTree

VOCAB = 97
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def family_configs() -> dict[str, Callable[[], Any]]:
    """``{name: function that makes a transformers config}``. Sliding windows are shorter than the rows on purpose."""
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**_COMMON),
        "smollm-tied": lambda: t.LlamaConfig(**_COMMON, tie_word_embeddings=True),
        "mistral-window": lambda: t.MistralConfig(**_COMMON, sliding_window=6),
        "qwen2": lambda: t.Qwen2Config(**_COMMON),
        "qwen2-window": lambda: t.Qwen2Config(
            **_COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "qwen3": lambda: t.Qwen3Config(**_COMMON, head_dim=8),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gemma": lambda: t.GemmaConfig(**_COMMON, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(**_COMMON, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        "gemma3": lambda: t.Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    }


def tiny_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny random model. In float64 its norms are float64 too (transformers' RMSNorm computes in float32)."""
    from transformers import AutoModelForCausalLM

    from penchant.models.load import disable_dropout

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_configs()[name]()).to(dtype).eval()
    disable_dropout(model)
    if dtype == torch.float64:
        _float64_norms(model)
    return model


def _float64_norms(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm_forward(module, "Gemma" in type(module).__name__)


def _norm_forward(module: Any, one_plus: bool) -> Any:
    eps = getattr(module, "variance_epsilon", None) or module.eps

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return y * (1 + module.weight) if one_plus else module.weight * y

    return forward


def mixture_of_experts(vocab: int = VOCAB) -> Any:
    """A tiny model with two layers of four unbalanced experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocab, router_aux_loss_coef=0.7, **sizes, **experts))
    with torch.no_grad():
        for layer in model.model.layers:  # unbalanced, so that the balance loss has an effect
            layer.mlp.gate.weight.normal_(std=0.5)
    return model


def make_tree(row: int, prompt: int, completions: tuple[int, ...], *, seed: int = 0, vocab: int = VOCAB) -> TokenTree:
    """A tree of random tokens with the given lengths."""
    rng = np.random.default_rng([seed, row])
    ids = [rng.integers(3, vocab, n).astype(np.int32) for n in (prompt, *completions)]
    return TokenTree(row, ids[0], tuple(ids[1:]), (False,) * len(completions), f"made-up:{row + 1}")


def some_trees(seed: int = 0) -> list[TokenTree]:
    """Trees of unequal shape: one-token prompts, one-token completions, one to three completions."""
    shapes = [(7, (5, 9)), (1, (4,)), (20, (3, 12, 1)), (3, (18, 2))]
    return [make_tree(i, p, c, seed=seed) for i, (p, c) in enumerate(shapes)]


def some_pairs(n: int = 6, seed: int = 0) -> list[TokenTree]:
    """Pairs of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [
        make_tree(i, int(rng.integers(1, 9)), (int(rng.integers(1, 9)), int(rng.integers(1, 9))), seed=seed)
        for i in range(n)
    ]


def evaluate_heldout(algorithm: Algorithm, trees: Sequence[TokenTree], tokens_per_step: int) -> dict[str, Any]:
    """Every metric of an algorithm over `trees`, as in a run with shared prompts at the first step's scheduled values."""
    device = torch.device("cpu")
    scored, order = score_heldout(algorithm, trees, shared=True, tokens_per_step=tokens_per_step, device=device)
    return heldout_metrics(algorithm, scored, [trees[i] for i in order])


def losses_by_default() -> list[Any]:
    """Test parameters: every loss computed from a single micro-batch, one of each kind of pass by default, the others slow."""
    names = [n for n, spec in LOSSES.items() if "z0" not in spec.needs]  # z0 is one number of the whole step
    return one_of_each(names, lambda n: LOSSES[n].needs & {"shared_logps", "alignment", "batch", "divergence"})


def noted_attention(warned: list[bool]) -> Callable[..., Any]:
    """Stand-in for an attention kernel, ``q + k + v``, that records in each backward pass whether deterministic mode only warns."""

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            return q + k + v

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            warned.append(torch.is_deterministic_algorithms_warn_only_enabled())
            return grad, grad, grad

    return Noted.apply
