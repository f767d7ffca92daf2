"""Bytes beyond weights that a run holds while it evaluates or writes rollouts: passes over rows, what decodes answers, the start's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from penchant.models.fast_decode import _COLUMN_STEP, _ROW_STEP, _up, can_decode_fast
from penchant.models.structure import base_model_of
from penchant.planning.outline import OutlinedRun, parameter_counts
from penchant.rollout.generate import PROMPTS_HELD, rows_by_memory

PREFILL_TOKENS = 4096  # `FastDecoder.prefill` reads so many at once
BY_LENGTH_ROWS = 384  # rows that transformers' own cache holds at once


def writes_answers(run: OutlinedRun) -> bool:
    """Whether anything is decoded: at evaluations, for samples in the report, or as rollouts."""
    return any(n for n, _, _ in _askings(run))


def writing_bytes(run: OutlinedRun, size: int) -> int:
    """Bytes of the largest round of decoding: packed weights, keys and values, a prompt's pass, logits; 0 where nothing is written.

    Args:
        size: bytes of one weight in the training dtype.
    """
    return max((decoding_bytes(run.model, size, p, n, new) for n, new, p in _askings(run)), default=0)


def _askings(run: OutlinedRun) -> list[tuple[int, int, list[int]]]:
    """(completions of a prompt, new tokens, lengths of the prompts) of every round of decoding that a run does."""
    if run.reward_parts is not None:
        return []
    asked, found = run.config.evaluation, []
    train, heldout = ([len(t.prompt_ids) for t in part] for part in run.trees)
    if run.online is not None:
        batch = max((run.schedule.batch(s) for s in _steps(run)), key=lambda b: sum(train[i] for i in b))
        found.append((run.online.samples, run.online.max_new_tokens, [train[i] for i in batch]))
        if heldout:
            found.append((1, run.online.max_new_tokens, heldout))
    elif run.writes_fresh and heldout:
        prompts = list(dict.fromkeys(t.prompt_ids.tobytes() for t in run.trees[1]))[: asked.kl_prompts]
        found.append((1, asked.sample_tokens, [len(p) // 4 for p in prompts]))  # int32
    if asked.samples and not (run.signal == "tokens" and run.datasets[0].kind == "text"):
        found.append((1, asked.sample_tokens, (heldout or train)[: asked.samples]))
    return [(n, new, prompts) for n, new, prompts in found if prompts]


def _steps(run: OutlinedRun) -> range:
    """Steps that write rollouts, of the first epoch."""
    return range(0, min(run.schedule.total_steps, run.schedule.steps_per_epoch), run.schedule.repeat)


def decoding_bytes(model: Any, size: int, prompts: Sequence[int], n: int, new_tokens: int) -> int:
    """Of one call of `rollout.generate.sample`.

    Args:
        size: bytes of one weight; prompts: tokens of each; n: completions of a prompt; new_tokens: of a completion, at most.
    """
    config = base_model_of(model).config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    depth, vocabulary = config.num_hidden_layers, config.vocab_size
    a_token = 2 * depth * kv_heads * head_dim * size
    longest = max(prompts)
    if not can_decode_fast(model, longest + new_tokens):
        together = min(BY_LENGTH_ROWS, n * max(Counter(prompts).values()))
        # a step writes its layer's keys and values anew before the old ones go
        return round(together * (a_token * (longest + new_tokens) * (1 + 1 / depth) + vocabulary * (size + 8)))
    at_once = max(1, min(len(prompts), rows_by_memory(a_token, vocabulary, n, longest, new_tokens) // n))
    rows, groups = at_once * n, min(len(prompts), PROMPTS_HELD * at_once)
    caches = a_token * (_up(rows, _ROW_STEP) * _up(new_tokens) + groups * _up(longest, _COLUMN_STEP))
    read = min(at_once * longest, max(longest, PREFILL_TOKENS))
    wide = max((heads + 2 * kv_heads) * head_dim * 2, 3 * getattr(config, "intermediate_size", 4 * config.hidden_size))
    passing = max(size * read * (2 * config.hidden_size + wide), rows * vocabulary * (size + 8))
    return packed_weights(model) * size + caches + passing


def packed_weights(model: Any) -> int:
    """Numbers in the decoder's own copy of the weights: every matrix of the layers, and the head."""
    base = base_model_of(model)
    head = base.get_output_embeddings().weight
    layers = sum(p.numel() for name, p in base.model.layers.named_parameters() if p.ndim > 1 and "lora_" not in name)
    return int(layers + head.numel())


def start_weights(run: OutlinedRun) -> int:
    """Parameters of the start that an evaluation loads and lets go again: where answers are compared with it and no reference runs live."""
    if not run.trees[1] or run.reward_parts is not None or run.config.lora is not None or run.signal == "tokens":
        return 0
    held = "reference" in run.needs and run.reference_kind == "frozen" and not run.config.reference.moves
    if not run.writes_fresh or run.online is not None or held:
        return 0
    return parameter_counts(base_model_of(run.model))[0]
