"""Batched sampling: many completions of many prompts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.base.lanes import side_by_side
from penchant.base.machine import in_fp64, place_of
from penchant.data.templates import end_ids
from penchant.errors import ModelError
from penchant.models.cpu.decode import FastDecoder, can_decode_fast
from penchant.models.load import base_model_of, size_of, without_cache

# ---- One token of every row: temperature, top-k, top-p, and a draw that does not depend on the other rows ----

_BLOCK = 256  # probabilities are summed in blocks: an exact cumulative sum over blocks, another in the block hit
_LIKELY = 512  # top-p first tries this many of the most likely tokens


def row_uniforms(seed: int, prompt_seed: int, sample: int, count: int) -> np.ndarray:
    """Uniform numbers (count,) in [0, 1) for one completion; they depend only on the first three arguments."""
    keys = np.random.SeedSequence([seed, prompt_seed, sample])
    return np.random.Generator(np.random.Philox(keys)).random(count)


def draw(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    penalized: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the next token of each row by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits: (B, V); uniforms: (B,) float64 in [0, 1).
        temperature: 0 takes the most likely token; top_p: keep the smallest set of tokens with at least this probability;
        top_k: keep this many most likely tokens, 0 for all (applied before top_p, which then counts only their probability).
        min_p: keep tokens with at least this share of the most likely one's probability (applied first; arXiv 2407.01082).
        penalized: (B, V) logits to draw from instead of `logits`, which still give the log-probs.

    Returns:
        tokens (B,) int64, and their log-probs (B,) under ``softmax(logits / temperature)``, before penalties, min-p, top-k
        and top-p; NaN if logits are NaN or infinite (`check_logps`).
    """
    if logits.ndim != 2 or uniforms.shape != logits.shape[:1]:
        raise ValueError(f"logits (B, V) and uniforms (B,) are wanted, not {logits.shape} and {uniforms.shape}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if penalized is not None:
        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        tokens, _ = draw(penalized, uniforms, **options)  # type: ignore[arg-type]
        scaled = logits if temperature == 0 else logits / min(max(temperature, 1e-8), 1e8)
        return tokens, torch.log_softmax(scaled, -1).gather(1, tokens[:, None]).squeeze(1)
    if temperature == 0:
        logps = torch.log_softmax(logits, dim=-1)
        tokens = logits.argmax(-1)
        return tokens, logps.gather(1, tokens[:, None]).squeeze(1)
    if temperature != 1.0:  # fp32 limits: beyond them, the distribution is one-hot or uniform
        logits = logits / min(max(temperature, 1e-8), 1e8)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()  # unnormalized probabilities; the largest is 1
    total = weights.sum(-1)
    likely, likely_total = weights, total
    if min_p > 0.0:
        likely = weights.masked_fill(weights < min_p, 0.0)  # the largest weight is 1
        likely_total = likely.sum(-1)
    if top_k or top_p < 1.0:
        tokens = _draw_among_likely(likely, likely_total, uniforms, top_p, top_k)
    else:
        tokens = _inverse(likely, uniforms)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - top.squeeze(1) - total.log()


def check_logps(logps: Tensor) -> None:
    """Raise ModelError if log-probs of drawn tokens are NaN or infinite; this waits for the device, so it is not done per token."""
    if not bool(logps.isfinite().all()):
        raise ModelError("model", "its logits are NaN or infinite", "its weights are damaged, or training diverged")


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds ``u * total``, never one of zero weight; the last index for NaN."""
    padding = -weights.shape[1] % _BLOCK
    blocks = (F.pad(weights, (0, padding)) if padding else weights).view(len(weights), -1, _BLOCK)
    ends = in_fp64(blocks.sum(-1)).cumsum(-1)
    goal = _below(uniforms * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, goal[:, None], right=True).clamp(max=ends.shape[1] - 1)
    starts = F.pad(ends, (1, 0))
    goal = goal - starts.gather(1, block).squeeze(1)
    inside = in_fp64(blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1)).cumsum(-1)
    goal = _below(goal.clamp(min=0.0), inside[:, -1])
    offset = torch.searchsorted(inside, goal[:, None], right=True)
    return (block * _BLOCK + offset).squeeze(1).clamp(max=weights.shape[1] - 1)


def _below(threshold: Tensor, total: Tensor) -> Tensor:
    """Clamp `threshold` to strictly below the total, which rounding may have reached."""
    return torch.minimum(threshold, total * (1.0 - max(1e-12, torch.finfo(total.dtype).eps)))


def _draw_among_likely(weights: Tensor, total: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """Like `_inverse`, over a row's most likely tokens in descending order."""
    vocabulary = weights.shape[1]
    count = min(top_k or _LIKELY, vocabulary)
    ordered, index = weights.topk(count, dim=-1)
    if top_k:
        total = ordered.sum(-1)
    elif count < vocabulary and bool((in_fp64(ordered).sum(-1) < top_p * total).any()):
        ordered, index = weights.sort(dim=-1, descending=True)  # a flat distribution needs more tokens
    mass_before = in_fp64(ordered).cumsum(-1) - ordered
    ordered = ordered.masked_fill(mass_before >= top_p * total[:, None], 0.0)
    ordered[:, 0] = ordered[:, 0].clamp(min=torch.finfo(ordered.dtype).tiny)  # always keep the most likely token
    return index.gather(1, _inverse(ordered, uniforms)[:, None]).squeeze(1)


# ---- Sampling: many completions of each prompt, each determined by its own seed, whatever else is decoded with it ----
# Known families decode in a pool of rows (models/cpu/decode.py): a prompt is computed once for all its samples, and a finished row
# makes room for new prompts. Other models, and GPUs, use transformers' own cache with shorter prompts padded on the left.

CACHE_BYTES = 1 << 30  # limit on keys and values held at once
MOST_ROWS = 384
PROMPTS_HELD = 2  # times the prompts that run together: those with a last row or two stay while new ones come in
POOL_ROWS = 16  # the fewest rows for which a pool of its own pays off for a thread
POOL_BYTES = 64 << 20  # of weights: what fits a processor's shared cache
LOGITS_AT_ONCE = 1 << 23  # logits of a step: 2^23 are 170 rows with a vocabulary of 49,152


@dataclass(slots=True)
class Sample:
    """One completion: its token ids (including EOS if it ended), and the log-prob of each under the sampling distribution.

    With an environment, `own` marks the tokens that the policy wrote (empty: all), and `prompt` is the prompt with the
    environment's additions (empty: the row's own).
    """

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False
    own: list[bool] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)

    @property
    def own_logps(self) -> list[float]:
        """Log-probs of the policy's own tokens."""
        return [p for p, own in zip(self.logps, self.own, strict=True) if own] if self.own else self.logps


@dataclass(frozen=True, slots=True)
class Settings:
    """Sampling settings as for `sample`; `rooms`: token limit for each prompt's completions (empty: max_new_tokens for all)."""

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    ends: frozenset[int]
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    rooms: tuple[int, ...] = ()

    def draw(self, logits: Tensor, uniforms: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self
        return draw(
            logits,
            uniforms,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            penalized=None if seen is None else penalized(logits, seen, s.repetition_penalty),
        )


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalize logits (B, V) of tokens already in the row: divided by `penalty` if positive, multiplied by it if negative.

    Args:
        seen: (B, n) token ids of prompt and completion; repeated tokens count once.

    Paper: arXiv 1909.05858.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen_logits = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(seen_logits < 0, seen_logits * penalty, seen_logits / penalty))


class Written:
    """The completions so far, on the model's device: one line per completion, with its own uniform numbers."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        seed: int,
        prompt_seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        lines, columns = len(prompts) * settings.n, settings.max_new_tokens
        self.settings, self.device = settings, device
        self.ids = torch.zeros(lines, columns, dtype=torch.int64, device=device)
        self.logps = torch.zeros(lines, columns, device=device)
        self.lengths = torch.zeros(lines, dtype=torch.int64, device=device)
        self.finished = torch.zeros(lines, dtype=torch.bool, device=device)
        self._seed, self._prompt_seeds = seed, prompt_seeds
        rooms = torch.tensor(settings.rooms or [columns] * len(prompts), device=device)
        self._rooms = rooms.repeat_interleave(settings.n)
        self._uniforms = in_fp64(torch.zeros(lines, columns, device=device))
        self._end_ids = torch.tensor(sorted(settings.ends), dtype=torch.int64, device=device)
        self._prompt_ids: Tensor | None = None  # (prompts, longest) ids, padded with each prompt's first id
        if settings.repetition_penalty != 1.0:
            longest = max(map(len, prompts))
            padded = [[*p, *[p[0]] * (longest - len(p))] for p in prompts]
            self._prompt_ids = torch.tensor(padded, dtype=torch.int64, device=device)

    def _seen_ids(self, lines: Tensor, positions: Tensor) -> Tensor | None:
        """(B, n) ids in each line's prompt and completion so far."""
        if self._prompt_ids is None:
            return None
        prompt_ids = self._prompt_ids[lines // self.settings.n]
        written = torch.arange(self.ids.shape[1], device=self.device) < positions[:, None]
        return torch.cat((prompt_ids, torch.where(written, self.ids[lines], prompt_ids[:, :1])), 1)

    def lines_of(self, prompts: Sequence[int]) -> Tensor:
        """The lines of the completions of these prompts."""
        n = self.settings.n
        return torch.cat([torch.arange(i * n, (i + 1) * n, device=self.device) for i in prompts])

    def begin(self, prompt: int) -> None:
        """Draw a prompt's uniform numbers."""
        n, columns = self.settings.n, self.settings.max_new_tokens
        if self.settings.temperature > 0:
            rows = [row_uniforms(self._seed, self._prompt_seeds[prompt], i, columns) for i in range(n)]
            self._uniforms[prompt * n : (prompt + 1) * n] = torch.from_numpy(np.stack(rows)).to(self._uniforms.dtype)

    def add(self, lines: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next token of each line from its logits; return the tokens, and which lines continue."""
        positions = self.lengths[lines]
        tokens, logps = self.settings.draw(logits, self._uniforms[lines, positions], self._seen_ids(lines, positions))
        self.ids[lines, positions] = tokens
        self.logps[lines, positions] = logps.float()
        self.lengths[lines] = positions + 1
        ended = torch.isin(tokens, self._end_ids)
        self.finished[lines] = ended
        return tokens, ~ended & (positions + 1 < self._rooms[lines])

    def samples(self) -> list[list[Sample]]:
        check_logps(self.logps)
        rows = [
            Sample(ids[:length], logps[:length], finished)
            for ids, logps, length, finished in zip(
                self.ids.tolist(), self.logps.tolist(), self.lengths.tolist(), self.finished.tolist(), strict=True
            )
        ]
        n = self.settings.n
        return [rows[i : i + n] for i in range(0, len(rows), n)]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    prompt_seeds: Sequence[int] | None = None,
    eos_token_id: int | Collection[int] | None = None,
    rooms: Sequence[int] = (),
    rows_at_once: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Sample]]:
    """Sample `n` completions of each prompt.

    Args:
        prompts: token ids, each with at least one token.
        temperature: 0 is greedy; log-probs are of ``softmax(logits / temperature)`` (before top-k and top-p).
        top_p, top_k: sample from the smallest set of tokens with total probability top_p, of the top_k (0: all) most likely.
        min_p: sample from tokens with at least this share of the most likely one's probability.
        repetition_penalty: divides logits of tokens already in prompt or completion (multiplies negative ones).
        seed: of the draws; prompt_seeds: one per prompt (default: its index). Up to rounding, a completion depends only on the
            weights, its prompt, both seeds and its index among the n, not on the other prompts or the number of rows.
        eos_token_id: the id or ids that end a completion: `penchant.data.templates.end_ids` of model and tokenizer.
        rooms: token limit for each prompt's completions, if some are below max_new_tokens.
        rows_at_once: completions decoded together; default: as many as memory allows.

    Returns:
        For each prompt, in order, its `n` samples.
    """
    ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ()
    settings = Settings(
        n, max_new_tokens, temperature, top_p, top_k, frozenset(ends), min_p, repetition_penalty, tuple(rooms)
    )
    if not prompts:
        return []
    seeds = prompt_seeds if prompt_seeds is not None else range(len(prompts))
    written = Written(prompts, settings, seed, seeds, place_of(model))
    training = model.training
    model.eval()
    with torch.inference_mode():
        if can_decode_fast(model, max(map(sum, zip(map(len, prompts), rooms or repeat(max_new_tokens))))):
            _decode_pooled(model, prompts, written, rows_at_once, progress)
        else:
            _decode_in_waves(model, prompts, written, rows_at_once, progress)
    model.train(training)
    return written.samples()


# ---------------------------------------------------------------------------------------------------------------------
# pools of rows


def _decode_pooled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    written: Written,
    rows_at_once: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    n, new_tokens = written.settings.n, written.settings.max_new_tokens
    longest = max(map(len, prompts))
    if rows_at_once is None:
        embeddings = model.get_input_embeddings().weight
        token_bytes = key_value_bytes(model, embeddings.element_size())
        rows_at_once = rows_by_memory(token_bytes, embeddings.shape[0], n, longest, new_tokens)
    at_once = max(1, min(len(prompts), rows_at_once // n))  # prompts that run together
    pools = pools_of(at_once * n, sum(p.nbytes for p in base_model_of(model).parameters()))
    pools = min(pools, at_once)
    at_once = -(-at_once // pools)  # per pool
    rows, groups = at_once * n, min(len(prompts), PROMPTS_HELD * at_once)
    decoder = FastDecoder(model, rows=rows, groups=groups, prompt_tokens=longest, new_tokens=new_tokens)
    # by length, so that prompts computed together have similar lengths, and pools have similar amounts of work
    in_order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    finished, lock = 0, threading.Lock()

    def report(more: int) -> None:
        nonlocal finished
        with lock:
            finished += more
            if progress is not None and more:
                progress(finished, len(prompts))

    def decode(number: int) -> None:
        pool_decoder = decoder if number == 0 else decoder.with_room(rows=rows, groups=groups, prompt_tokens=longest, new_tokens=new_tokens)  # fmt: skip
        waiting = deque(in_order[number::pools])
        with torch.inference_mode():
            pool, total, reported = Pool(pool_decoder, prompts, written), len(waiting), 0
            while waiting or pool.rows:
                free = min(groups - len(pool.prompts), (rows - pool.rows) // n)
                # several prompts at once, as computing a single one wastes most of the machine
                if waiting and (free >= max(1, at_once // 4) or not pool.rows):
                    pool.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                if pool.rows:
                    pool.step()
                done = total - len(waiting) - len(pool.prompts)
                report(done - reported)
                reported = done

    list(side_by_side(decode, range(pools), most=pools))


def pools_of(rows: int, weight_bytes: int) -> int:
    """Number of pools to decode rows in, each on its own thread: small products do not benefit from several threads.

    Large weights use a single pool, so that all threads read them only once per step. The number is even otherwise, and does not
    depend on the threads, so neither do the bits of the completions.
    """
    if rows < 2 * POOL_ROWS or weight_bytes > POOL_BYTES:
        return 1
    return min(8, max(2, rows // (4 * POOL_ROWS) * 2))


def rows_by_memory(token_bytes: int, vocabulary: int, n: int, longest: int, new_tokens: int) -> int:
    """Number of rows to decode together: as many as caches and logits have room for, at most `MOST_ROWS`.

    Args:
        token_bytes: of one token's keys and values in all layers; n: completions per prompt; longest, new_tokens: token
            limits of prompts and completions.
    """
    per_row = token_bytes * (new_tokens + PROMPTS_HELD * longest / n)
    return int(min(MOST_ROWS, CACHE_BYTES / per_row, LOGITS_AT_ONCE / vocabulary))


class Pool:
    """Rows being decoded: row r of the decoder writes line `lines[r]` and belongs to group `group_of[r]`."""

    def __init__(self, decoder: FastDecoder, prompts: Sequence[Sequence[int]], written: Written) -> None:
        self.decoder, self.all_prompts, self.written = decoder, prompts, written
        self.prompts: list[int] = []  # of each group
        self.lines = torch.zeros(0, dtype=torch.int64)
        self.group_of = torch.zeros(0, dtype=torch.int64)
        self.tokens = torch.zeros(0, dtype=torch.int64)

    @property
    def rows(self) -> int:
        return len(self.lines)

    def admit(self, prompts: Sequence[int]) -> None:
        """Compute new prompts and draw the first token of each of their completions."""
        n, first = self.written.settings.n, len(self.prompts)
        logits = self.decoder.prefill([self.all_prompts[i] for i in prompts], first)
        for i in prompts:
            self.written.begin(i)
        self.prompts.extend(prompts)
        lines = self.written.lines_of(prompts)
        tokens, active = self.written.add(lines, logits.repeat_interleave(n, dim=0))
        groups = torch.arange(first, first + len(prompts)).repeat_interleave(n)
        # rows that ended at once are not added; the others have no tokens of their own in the caches yet
        self.lines = torch.cat((self.lines, lines[active]))
        self.group_of = torch.cat((self.group_of, groups[active]))
        self.tokens = torch.cat((self.tokens, tokens[active]))
        self._drop_groups()

    def step(self) -> None:
        """Decode one token of every row, and remove rows that end."""
        lengths = torch.tensor([len(self.all_prompts[i]) for i in self.prompts])
        ages = self.written.lengths[self.lines] - 1
        logits = self.decoder.step(self.tokens, self.group_of, ages, lengths)
        self.tokens, active = self.written.add(self.lines, logits)
        if not bool(active.all()):
            self._drop_rows(active)

    def _drop_rows(self, active: Tensor) -> None:
        """Move the last rows into the places of ended rows."""
        remaining = int(active.sum())
        holes = (~active[:remaining]).nonzero().squeeze(1)
        movers = active[remaining:].nonzero().squeeze(1) + remaining
        oldest = int(self.written.lengths[self.lines].max())
        self.decoder.move_rows(movers.tolist(), holes.tolist(), oldest)
        for name in ("lines", "group_of", "tokens"):
            values = getattr(self, name)
            values[holes] = values[movers]
            setattr(self, name, values[:remaining].clone())
        self._drop_groups()

    def _drop_groups(self) -> None:
        """Likewise remove prompts without rows."""
        used = torch.bincount(self.group_of, minlength=len(self.prompts)) > 0
        if bool(used.all()):
            return
        remaining = int(used.sum())
        holes = (~used[:remaining]).nonzero().squeeze(1).tolist()
        movers = (used[remaining:].nonzero().squeeze(1) + remaining).tolist()
        if movers:
            self.decoder.move_groups(movers, holes, max(len(self.all_prompts[self.prompts[i]]) for i in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self.prompts[hole] = self.prompts[mover]
            self.group_of[self.group_of == mover] = hole
        del self.prompts[remaining:]


# ---------------------------------------------------------------------------------------------------------------------
# any transformers model


def _decode_in_waves(
    model: Any,
    prompts: Sequence[Sequence[int]],
    written: Written,
    rows_at_once: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode prompts of similar length together, or of equal length if the model does not support padding."""
    way, n, room = decoder_class(model), written.settings.n, cache_room(written.device)
    size = model.get_input_embeddings().weight.element_size()

    def fits(count: int, longest: int) -> bool:
        limit = rows_at_once or rows_that_fit(row_bytes(model, size, longest, n, written.settings.max_new_tokens), room)
        return count * n <= limit

    waiting, done = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i]))), 0
    while waiting:
        wave = [waiting.popleft()]
        while waiting and fits(len(wave) + 1, longest := len(prompts[waiting[0]])):
            if not way.pads and longest > len(prompts[wave[0]]):
                break
            wave.append(waiting.popleft())
        for i in wave:
            written.begin(i)
        _decode_together(way(model), prompts, wave, written)
        done += len(wave)
        if progress is not None:
            progress(done, len(prompts))


def row_bytes(model: Any, size: int, longest: int, n: int, new_tokens: int) -> float:
    """Bytes per row decoded with transformers' cache: keys and values, logits, and its share of the prompt's pass.

    Args:
        size: bytes per weight; longest: tokens of a prompt; n: completions per prompt; new_tokens: limit per completion.
    """
    depth = size_of(model, "num_hidden_layers")
    # a step allocates a layer's new keys and values before freeing the old ones
    cache = key_value_bytes(model, size) * (longest + new_tokens) * (1 + 1 / max(1, depth))
    return cache + size_of(model, "vocab_size") * (size + 8) + longest / n * passing_bytes(model, size)


def key_value_bytes(model: Any, size: int) -> int:
    """Bytes of one token's keys and values in all layers, from the model's config."""
    _, kv_heads, head_dim = _heads(model)
    return 2 * size_of(model, "num_hidden_layers") * kv_heads * head_dim * size


def passing_bytes(model: Any, size: int) -> int:
    """Bytes that one token takes within a layer in a pass without gradient, from the model's config."""
    width, (heads, kv_heads, head_dim) = size_of(model, "hidden_size"), _heads(model)
    widest = max((heads + 2 * kv_heads) * head_dim * 2, 3 * (size_of(model, "intermediate_size") or 4 * width))
    return size * (2 * width + widest)


def _heads(model: Any) -> tuple[int, int, int]:
    """Number of query heads, of key-value heads, and head size, from the model's config; no heads if layers carry a state."""
    heads = size_of(model, "num_attention_heads")
    head_dim = size_of(model, "head_dim") or size_of(model, "hidden_size") // max(1, heads)
    return heads, size_of(model, "num_key_value_heads") or heads, head_dim


def cache_room(device: torch.device) -> int:
    """Bytes available for rows: half of a GPU's free memory, otherwise `CACHE_BYTES`, so that bits do not depend on RAM size."""
    if device.type != "cuda":
        return CACHE_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 2


def rows_that_fit(per_row: float, room: int) -> int:
    """Number of rows to decode together: a power of two, so that it is stable under small changes in memory, or `MOST_ROWS`."""
    return min(MOST_ROWS, 1 << max(1, int(room / per_row)).bit_length() - 1)


def _decode_together(
    row: _Cached | _Recomputed, prompts: Sequence[Sequence[int]], part: Sequence[int], written: Written
) -> None:
    """Decode prompts together, removing finished rows; each token waits for the device only once."""
    longest = max(len(prompts[i]) for i in part)
    pads = [longest - len(prompts[i]) for i in part]
    ids = torch.tensor([[0] * pad + list(prompts[i]) for i, pad in zip(part, pads, strict=True)], device=written.device)
    logits = row.first(ids, written.settings.n, pads)
    lines = written.lines_of(part)
    while True:
        tokens, active = written.add(lines, logits)
        remaining = int(active.sum())
        if not remaining:
            return
        if remaining < len(lines):
            lines, tokens = lines[active], tokens[active]
            row.keep(active.nonzero().squeeze(1))
        logits = row.step(tokens)


class _Cached:
    """Decodes rows of equal length with transformers' cache."""

    pads = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.mask: Tensor | None = None  # (B, tokens so far), 0 for padding; None: no padding

    def first(self, ids: Tensor, n: int, pads: Sequence[int]) -> Tensor:
        """The next-token logits (B * n, V) of prompts (B, L), each repeated for n rows.

        Args:
            pads: number of padding ids on the left of each prompt.
        """
        padding = torch.tensor(pads, device=ids.device)[:, None]
        options: dict[str, Any] = {}
        if any(pads):
            positions = torch.arange(ids.shape[1], device=ids.device) - padding
            self.mask = (positions >= 0).long()
            options = {"attention_mask": self.mask, "position_ids": positions.clamp(min=0)}
            self.mask = self.mask.repeat_interleave(n, dim=0)
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
        self.cache, self.at = out.past_key_values, (ids.shape[1] - padding).repeat_interleave(n, dim=0)
        if n > 1:
            self.cache.batch_repeat_interleave(n)
        return cast(Tensor, out.logits[:, -1].repeat_interleave(n, dim=0))

    def keep(self, rows: Tensor) -> None:
        """Continue with only these rows."""
        self.cache.batch_select_indices(rows)
        self.at = self.at[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """The next-token logits (B, V) after adding one token to each row."""
        options: dict[str, Any] = {"position_ids": self.at}
        if self.mask is not None:
            self.mask = options["attention_mask"] = F.pad(self.mask, (0, 1), value=1)
        out = self.model(input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True, **options)
        self.at = self.at + 1
        return cast(Tensor, out.logits[:, -1])


class _Padded(_Cached):
    """Decodes rows of any lengths, with shorter prompts padded on the left."""

    pads = True


class _Recomputed:
    """Decodes with the model's own `forward` on whole rows, for models without a cache that allows removing rows; slow."""

    pads = False

    def __init__(self, model: Any) -> None:
        self.model, self.ids = model, torch.zeros(0)

    def first(self, ids: Tensor, n: int, pads: Sequence[int]) -> Tensor:
        self.ids = ids.repeat_interleave(n, dim=0)
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
        return self._logits()

    def _logits(self) -> Tensor:
        return cast(Tensor, self.model(input_ids=self.ids, **without_cache(self.model)).logits[:, -1])


def decoder_class(model: Any) -> type[_Cached | _Recomputed]:
    """The first decoding method that matches a pass over whole rows; tested once per model on a few tokens."""
    base = base_model_of(model)
    chosen: type[_Cached | _Recomputed] | None = getattr(base, "_penchant_way", None)
    if chosen is None:
        vocab = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(0)).to(place_of(model))
        chosen = next(
            (candidate for candidate in (_Padded, _Cached) if _matches_full_pass(candidate(model), ids)), _Recomputed
        )
        base._penchant_way = chosen
    return chosen


def _matches_full_pass(row: _Cached, ids: Tensor) -> bool:
    """Test with two rows for each of two prompts, one of which is removed on the way."""
    lengths = (5, 3) if row.pads else (5, 5)
    try:
        prompts = torch.stack(
            [F.pad(line[:length], (5 - length, 0)) for line, length in zip(ids, lengths, strict=True)]
        )
        row.first(prompts, 2, [5 - length for length in lengths])
        row.keep(torch.tensor([0, 2, 3], device=ids.device))
        expected = row.model(input_ids=ids, **without_cache(row.model)).logits.float()
        lines = torch.tensor([0, 1, 1], device=ids.device)
        positions = torch.tensor([lengths[0], lengths[1], lengths[1]], device=ids.device)
        steps = range(ids.shape[1] - 5)
        differences = [
            (row.step(ids[lines, positions + i]).float() - expected[lines, positions + i]).abs().max() for i in steps
        ]
        return bool(max(differences) <= 2e-2 * expected.abs().max())
    except Exception:  # an unknown model without such a cache may raise anything
        return False


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """The most likely completion of each prompt, as text."""
    ends = end_ids(tokenizer, model)
    rows = sample(model, prompts, max_new_tokens=max_new_tokens, temperature=0, eos_token_id=ends)
    return [tokenizer.decode(r[0].ids, skip_special_tokens=True) for r in rows]
