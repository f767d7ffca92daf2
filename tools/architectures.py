"""Check the engine against every causal architecture of the installed transformers: how each is run, or why it is refused.

    python tools/architectures.py --page    # print docs/models.md
    python tools/architectures.py           # print one line per architecture
    python tools/architectures.py mamba opt # these only

Each model is built tiny and random from its own config class, with nonzero attention sinks, saved, and loaded as a run loads it.
The engine's log-probs are compared with those of the model's own `forward`, which is independent of the engine.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 131
PROMPT, COMPLETIONS = 13, (9, 6, 1)
LARGEST = 4e7  # parameters
CLOSE = 1e-4  # largest error of a completion's log-prob x, relative to 1 + |x|

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "hidden_size": 32,
    "hidden_size_global": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 8,
    # other names for the same sizes
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "embedding_size": 32,
    "word_embed_proj_dim": 16,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # state space and linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "use_mamba_kernels": False,
    # factors and caps that an engine may overlook
    "logits_scaling": 2.0,
    "logit_scale": 0.5,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "attn_logit_softcapping": 5.0,
}

_OWN: dict[str, dict[str, Any]] = {  # extra settings for single families
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"], "adapter_in_dim": 16, "adapter_out_dim": 32},
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "adapter_out_dim": 32,
        },
    },
    "gemma3": {"final_logit_softcapping": None},  # transformers' multimodal model ignores the cap
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_n_groups": 1, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}

NOT_BUILT = {  # architectures without a tiny model -> why
    "emu3": "transformers' `AutoModelForCausalLM` does not accept its config",
    "gemma3n": "its vision tower needs the package timm (its text model, gemma3n_text, is listed above)",
    "gemma4_assistant": "a draft model that reads another model's keys and values",
    "gemma4_unified_assistant": "a draft model that reads another model's keys and values",
    "mllama": "transformers' `AutoModelForCausalLM` does not accept its config",
    "musicgen": "generates audio; transformers' `AutoModelForCausalLM` does not accept its config",
    "musicgen_melody": "generates audio; transformers' `AutoModelForCausalLM` does not accept its config",
}

_IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
_VISION: dict[str, Any] = {"vision_config": _IMAGES, "audio_config": None}


def causal_types() -> list[str]:
    """Model types supported by `AutoModelForCausalLM`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    """A tiny config of a model type: the defaults of its class with every size made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = CONFIG_MAPPING[kind]
    own = _OWN.get(kind, {})
    try:
        config = _by_names(family, own)
        with torch.device("meta"):
            size = sum(p.numel() for p in _auto().from_config(config).parameters())
        if size <= LARGEST:
            return config
    except Exception as error:  # an incomplete config or model may raise anything
        config = error
    try:
        return family(**_shrunk(family()) | own)
    except Exception:
        if isinstance(config, Exception):
            raise config from None
        return config


def _by_names(family: Any, own: dict[str, Any]) -> Any:
    """A config of a family with a small value for every size that its class accepts."""
    if "text_config" in family.sub_configs:
        parts = {k: v for k, v in _VISION.items() if k in family.sub_configs}
        parts |= {k: (parts[k] or {}) | own[k] for k in parts if k in own}
        text = {k: v for k, v in own.items() if k not in parts}
        return family(text_config=_sizes(family.sub_configs["text_config"]) | text, **parts)
    return family(**_sizes(family) | own)


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments that shrink a default config and its nested configs, with at least one layer of each kind."""
    small = _sizes(type(config))
    if "vision" in config.model_type or "audio" in config.model_type:
        small |= {k: v for k, v in _IMAGES.items() if hasattr(config, k)}
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            small[name] = _shrunk(value) | {"model_type": value.model_type}
        elif name in ("layer_types", "layers_block_type") and value:
            small[name] = list(dict.fromkeys(value)) * (2 if len(set(value)) == 1 else 1)
            small["num_hidden_layers"] = len(small[name])
        elif name == "per_layer_config":
            small[name] = {}
    return small


def _sizes(family: Any) -> dict[str, Any]:
    known = set(inspect.signature(family.__init__).parameters) | set(getattr(family, "__dataclass_fields__", ()))
    sizes = _SIZES | ({"head_dim": 4, "num_key_value_heads": 4} if "qk_rope_head_dim" in known else {})
    other = getattr(family, "attribute_map", {})
    return {name: sizes[k] for k in sizes for name in (k, other.get(k, k)) if name in known}


def tiny_model(kind: str) -> Any:
    """A tiny random model with weights large enough to expose a missing part, and with nonzero sinks and router biases."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "sink" in name:
                p.normal_()
            elif p.ndim >= 2 and p.is_floating_point():
                p.mul_(3.0)
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "correction_bias" in name or "expert_bias" in name:  # chooses experts in DeepSeek V3 and similar
                value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
    return model


@dataclass(frozen=True)
class Verdict:
    """Result of an architecture: `way` is shared, separate, padded, refused, unbuilt (no tiny model) or wrong; `note` has details."""

    kind: str
    way: str
    note: str


def judge(kind: str) -> Verdict:
    """Build, save, load and run one architecture, and compare the engine with the model's own `forward`."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in _auto().from_config(tiny_config(kind)).parameters())
        if size > LARGEST:
            return Verdict(kind, "unbuilt", f"its smallest config has {size:,} parameters")
        model = tiny_model(kind)
    except Exception as error:
        return Verdict(kind, "unbuilt", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            own = _auto().from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:
            return Verdict(kind, "unbuilt", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
        try:
            return _compare(kind, folder, own)
        except Exception as error:  # a user would see a traceback
            return Verdict(kind, "wrong", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")


def _auto() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _compare(kind: str, folder: str, own: Any) -> Verdict:
    from penchant.data.packing import pack
    from penchant.errors import PenchantError
    from penchant.logprobs.packing import choose_packing
    from penchant.models.load import load_causal_model
    from penchant.models.options import ModelConfig
    from penchant.types import TokenTree

    rng = np.random.default_rng(1)
    trees = [
        TokenTree(row, *_ids(rng, prompt, completions), (False,) * len(completions))
        for row, (prompt, completions) in enumerate([(PROMPT, COMPLETIONS), (1, (3, 20)), (30, (4, 4))])
    ]
    try:
        model = load_causal_model(ModelConfig(path=folder), torch.device("cpu"))
        scorer, note = choose_packing(model, "auto", "auto")
    except PenchantError as error:
        return Verdict(kind, "refused", str(error).replace(folder, "MODEL"))
    model.train()
    with torch.no_grad():
        logps = torch.cat([scorer.logps(pack([t], shared=scorer.shared)).sums for t in trees])
        packed_logps = scorer.logps(pack(trees, shared=scorer.shared)).sums
        expected = torch.stack([_own_logp(own, t.prompt_ids, c) for t in trees for c in t.completion_ids])
    deviation = float(
        ((logps - expected).abs() / (1 + expected.abs()))
        .max()
        .maximum(((packed_logps - expected).abs() / (1 + expected.abs())).max())
    )
    if not deviation <= CLOSE:
        return Verdict(kind, "wrong", f"{note}; off by {deviation:.2g}")
    return Verdict(kind, scorer.packing, note.removeprefix("packing: "))


def _ids(
    rng: np.random.Generator, prompt: int, completions: tuple[int, ...]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    first, *rest = (rng.integers(10, VOCAB, n).astype(np.int32) for n in (prompt, *completions))
    return first, tuple(rest)


def _own_logp(model: Any, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """A completion's log-prob from the model's own `forward` on this row alone."""
    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    except TypeError:
        logits = model(input_ids=ids).logits
    logps = torch.log_softmax(logits[0, :-1].float(), -1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence transformers' logs and warnings about made-up models."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)


_HEADS = {
    "shared": "Trained with shared prompts: a prompt is computed once for all its completions.",
    "separate": "Trained packed, each completion with its own copy of the prompt: the attention accepts a mask for rows side by side, but not for trees.",
    "padded": "Trained as padded rows, one per completion, which is slower: layers carry state along a row, or the attention cannot be replaced.",
    "refused": "Refused with a message: encoders, models with randomness in training, models that need more than text.",
    "unbuilt": "Not tried: no tiny model could be made.",
    "wrong": "WRONG",
}


def page(verdicts: list[Verdict]) -> str:
    """The text of docs/models.md: its handwritten part, followed by regenerated results."""
    import transformers

    handwritten = (
        (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text().split("\nBelow are the results")[0]
    )
    lines = [
        handwritten,
        f"Below are the results for every causal architecture of transformers {transformers.__version__}, with tiny random models.",
        "`python tools/architectures.py --page` tries them and prints this page.",
        "",
    ]
    for way, intro in _HEADS.items():
        members = [v for v in verdicts if v.way == way]
        if members:
            lines += [f"## {way.capitalize()} ({len(members)})", "", intro, ""]
        if way == "refused" and members:
            lines += ["| architecture | why |", "|---|---|"]
            lines += [f"| {v.kind} | {v.note.removeprefix('MODEL: ').split('; ')[0]} |" for v in members] + [""]
        elif way == "unbuilt" and members:
            lines += ["| architecture | why |", "|---|---|"]
            lines += [f"| {v.kind} | {NOT_BUILT.get(v.kind, v.note)} |" for v in members] + [""]
        elif members:
            lines += [", ".join(v.kind for v in members), ""]
    return "\n".join(lines)


def main() -> None:
    kinds = [a for a in sys.argv[1:] if not a.startswith("--")] or causal_types()
    verdicts = []
    for kind in kinds:
        with silent():
            verdicts.append(judge(kind))
        if "--page" not in sys.argv:
            print(f"{kind:26} {verdicts[-1].way:10} {verdicts[-1].note}", flush=True)
    if "--page" in sys.argv:
        print(page(verdicts), end="")


if __name__ == "__main__":
    main()
