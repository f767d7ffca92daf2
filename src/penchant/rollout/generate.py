"""Sampling with a KV cache: prompts of one length together, their prefill shared by their samples, finished rows dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Sample:
    """One completion: its token ids (EOS included when it ended), and the log-prob of each under the sampling distribution."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    rows_at_once: int = 384,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Sample]]:
    """Sample `n` completions of each prompt.

    Args:
        prompts: token ids, each with at least one token.
        temperature: 0 is greedy; log-probs are of ``softmax(logits / temperature)`` (before top-p).
        top_p: sample from the smallest set of tokens whose probabilities sum to it.
        seed: of the draws; the same call gives the same completions.
        rows_at_once: completions decoded together.

    Returns:
        For each prompt, in order, its `n` samples.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    results: list[list[Sample]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    done = 0
    with torch.inference_mode():
        for _, members in sorted(by_length.items()):
            for start in range(0, len(members), max(1, rows_at_once // n)):
                part = members[start : start + max(1, rows_at_once // n)]
                ids = torch.tensor([list(prompts[i]) for i in part])
                rows = _decode(model, ids, n, max_new_tokens, temperature, top_p, generator, eos_token_id)
                for at, i in enumerate(part):
                    results[i] = rows[at * n : (at + 1) * n]
                done += len(part)
                if progress is not None:
                    progress(done, len(prompts))
    model.train(training)
    return results


def _decode(
    model: Any,
    ids: Tensor,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    eos: int | None,
) -> list[Sample]:
    device = next(model.parameters()).device
    out = model(input_ids=ids.to(device), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    logits = out.logits[:, -1].repeat_interleave(n, dim=0)
    if n > 1:
        cache.batch_repeat_interleave(n)
    samples = [Sample() for _ in range(len(logits))]
    alive = torch.arange(len(samples))
    for step in range(max_new_tokens):
        tokens, logps = _draw(logits.float(), temperature, top_p, generator)
        for row, token, logp in zip(alive.tolist(), tokens.tolist(), logps.tolist(), strict=True):
            samples[row].ids.append(token)
            samples[row].logps.append(logp)
        if eos is not None:
            going = tokens != eos
            for row in alive[~going].tolist():
                samples[row].finished = True
            if not bool(going.all()):
                keep = going.nonzero().squeeze(1)
                if not len(keep):
                    break
                alive, tokens = alive[keep], tokens[keep]
                cache.batch_select_indices(keep.to(device))
        if step + 1 == max_new_tokens:
            break
        position = torch.full((len(tokens), 1), ids.shape[1] + step, device=device)
        out = model(input_ids=tokens[:, None].to(device), past_key_values=cache, use_cache=True, position_ids=position)
        logits = out.logits[:, -1]
    return samples


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probs (B,), on the CPU so that the draws are the same on every device."""
    logits = logits.cpu()
    logps = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        weights = logps
        if top_p < 1:
            ordered, index = logps.sort(dim=-1, descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()
            weights = logps.scatter(1, index, ordered.masked_fill(before >= top_p, float("-inf")))
        # Gumbel-max: argmax(log p + g) is a draw from p, without the normalisation that multinomial asks for
        uniform = torch.rand(weights.shape, generator=generator).clamp_min_(1e-20)
        tokens = (weights - torch.log(-torch.log(uniform))).argmax(-1)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1)


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """The most likely completion of each prompt, as text."""
    rows = sample(model, prompts, max_new_tokens=max_new_tokens, temperature=0, eos_token_id=tokenizer.eos_token_id)
    return [tokenizer.decode(r[0].ids, skip_special_tokens=True) for r in rows]
