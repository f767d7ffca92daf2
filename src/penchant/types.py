"""Types shared by all layers: prompt trees, their tokenized form, packed batches, and the inputs and outputs of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from penchant.base.machine import moved

if TYPE_CHECKING:  # torch and numpy take half a second to import, too long for `penchant --help`
    import numpy as np
    import torch
    from torch import Tensor

# ---- text ----


class Picture(NamedTuple):
    """A picture's file, and the SHA-256 of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `role` is ``system``, ``developer``, ``user``, ``assistant`` or ``tool``.

    `trained` is only used in `Completion.more`; `reasoning` is an assistant's thinking, if the row has it separately.
    `tool_calls` of an assistant are a JSON list of ``{"type": "function", "function": {"name", "arguments"}}``, or empty; a
    tool's turn may name the call that it answers (`tool_call_id`) and its function (`name`).
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""
    name: str = ""

    @property
    def said(self) -> str:
        """The content and the calls, for comparison and display."""
        return "\n".join(filter(None, (self.content, self.tool_calls)))


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt: its text, and what is known about it.

    `more` are the following turns, if several answers of a conversation are trained: assistant turns marked `trained` count in
    the loss as `text` does, all others are context. The last one is trained. `reasoning` and `tool_calls` are as in `Message`.
    """

    text: str
    label: bool | None = None
    score: float | None = None
    more: tuple[Message, ...] = ()
    reasoning: str = ""
    tool_calls: str = ""

    @property
    def whole(self) -> str:
        """The answer with its reasoning, its calls and the following turns, for comparison and display."""
        if not (self.reasoning or self.tool_calls or self.more):
            return self.text
        reasoning = [self.reasoning] if self.reasoning else []
        calls = [self.tool_calls] if self.tool_calls else []
        return "\n".join([*reasoning, self.text, *calls, *(f"{m.role}: {m.said}" for m in self.more)])


@dataclass(frozen=True, slots=True)
class PromptTree:
    """One prompt with k completions: k=1 is SFT or a labeled answer, k=2 a preference pair (chosen first), k=n a ranking.

    `source` is where the row came from (``"train.jsonl:118"``), for messages; `columns` are the row's extra columns, if a reward
    reads them; `origin` is the number of its source, if several are mixed. `tools` (a JSON list) and `template_options` (a JSON
    object) are passed to the chat template with the turns; empty if the row has none. `weight` is the row's weight in a loss
    (`data.weight`). `images` are the prompt's pictures, in the order of their marks in its text (`data.pictures`).
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    origin: int = 0
    tools: str = ""
    template_options: str = ""
    weight: float = 1.0
    images: tuple[Picture, ...] = ()


# ---- tokens ----


class PicturedPrompt(NamedTuple):
    """A prompt with pictures: the text for the model's processor, and the pictures in the order of their marks in it."""

    text: str
    images: tuple[Picture, ...]


# added to a row's number for each further time that one batch of rollouts has it; a lower one's high word could be a sample's index,
# and numpy's SeedSequence would take row + FURTHER, sample 0 for row, sample n
FURTHER = 1 << 45


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tokenized prompt tree.

    `prompt_ids` has at least one token (BOS, or EOS as document separator, if the text is empty), so that the first
    completion token is always predicted from something. `truncated[i]` means that completion i lost its end (and so has no EOS).
    `masks` mark the trained tokens of completions that include other turns (SFT on several answers of a conversation).
    """

    row: int
    prompt_ids: np.ndarray  # (p,) int32
    completion_ids: tuple[np.ndarray, ...]  # k arrays (c_i,) int32
    truncated: tuple[bool, ...]
    source: str = ""
    labels: tuple[bool | None, ...] = ()  # k labels, or none at all
    scores: tuple[float | None, ...] = ()  # k scores, or none at all
    masks: tuple[np.ndarray, ...] = ()  # k arrays (c_i,) bool, or none at all: every token is trained
    origin: int = 0  # see `PromptTree`
    weight: float = 1.0  # likewise
    pictures: PicturedPrompt | None = None

    @property
    def trained(self) -> tuple[int, ...]:
        """Number of tokens in each completion that count in the loss and in log-probs."""
        return tuple(int(m.sum()) for m in self.masks) or tuple(map(len, self.completion_ids))

    @property
    def prompt_key(self) -> bytes:
        """A key that is equal for trees with the same prompt: its ids and its pictures."""
        pictures = () if self.pictures is None else self.pictures.images
        return self.prompt_ids.tobytes() + "".join(p.sha256 for p in pictures).encode()

    @property
    def shared_tokens(self) -> int:
        """Tokens computed when the prompt is shared: p + sum(c_i)."""
        return len(self.prompt_ids) + sum(len(c) for c in self.completion_ids)

    @property
    def separate_tokens(self) -> int:
        """Tokens computed when every completion repeats the prompt: sum(p + c_i)."""
        return sum(len(self.prompt_ids) + len(c) for c in self.completion_ids)


class Segment(NamedTuple):
    """Position of one tree in a packed row: `start`, then `prompt_len` tokens, then each completion's tokens in turn."""

    start: int
    prompt_len: int
    completion_lens: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_len + sum(self.completion_lens)


@dataclass(slots=True)
class PackedBatch:
    """One packed row of trees, without padding, and the index of every position that predicts a trained completion token.

    A completion attends to its own segment's prompt and to itself; its position ids restart at the prompt's end. In
    separate packing every completion is its own segment with the prompt repeated; completions keep the same order, so
    losses do not depend on the packing.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    segments: tuple[Segment, ...]
    predict_index: Tensor  # (R,) int64: position in the row whose hidden state predicts target_ids[r]
    target_ids: Tensor  # (R,) int64
    completion_of: Tensor  # (R,) int64 in [0, C): non-decreasing
    completion_tree: Tensor  # (C,) int64 in [0, number of trees)
    completion_slot: Tensor  # (C,) int64: 0 = first (chosen), 1 = second (rejected), ...
    lengths: Tensor  # (C,) int64: completion tokens that are trained
    rows: tuple[int, ...]  # dataset row of each tree
    labels: Tensor | None = None  # (C,) fp32, 1 or 0; None if a completion has none
    scores: Tensor | None = None  # (C,) fp32; None if a completion has none
    row_weights: Tensor | None = None  # (C,) fp32: weight of each completion's row; None: 1
    pairs: bool = False  # every tree has exactly two completions, so slots are 0, 1, 0, 1, ...
    most: int | None = None  # largest number of completions in a tree
    pictures: tuple[PicturedPrompt | None, ...] = ()  # of each segment, if any has pictures
    seed: int | None = None  # of dropout, in a training step
    strand: str = ""  # one of `Algorithm.strands`, for a pass of its own; empty: all
    idle: bool = False  # only there to match the passes of other processes; has no effect on sums
    columns: dict[str, Tensor] = field(default_factory=dict)  # precomputed inputs of `score` (`Algorithm.columns`)
    cache: dict[str, object] = field(default_factory=dict)  # layouts derived from `segments`, built once per batch

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def trees(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; layouts are rebuilt there."""
        return self if self.input_ids.device == device else self._with(lambda t: moved(t, device))

    def pinned(self) -> PackedBatch:
        """The batch in pinned memory, which a GPU can copy from while it computes."""
        return self._with(lambda t: t.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values: dict[str, Any] = {
            f.name: change(v) if hasattr(v := getattr(self, f.name), "to") else v
            for f in fields(self)
            if f.name not in ("cache", "columns")
        }
        return PackedBatch(**values, columns={name: change(v) for name, v in self.columns.items()})


# ---- losses ----


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Input of a pairwise loss: tensors of shape (batch,), float32 or float64; None if the loss does not need them.

    `*_logps` are summed over the completion, `*_shared_logps` over its first min(|chosen|, |rejected|) tokens (nats);
    `*_alignment` is the mean over tokens of ``log pi(y_t) - log sum_v pi(v)^2``.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    policy_chosen_shared_logps: Tensor | None = None
    policy_rejected_shared_logps: Tensor | None = None
    ref_chosen_shared_logps: Tensor | None = None
    ref_rejected_shared_logps: Tensor | None = None
    chosen_alignment: Tensor | None = None
    rejected_alignment: Tensor | None = None


@dataclass(frozen=True, slots=True)
class UnpairedLogps:
    """Input of an unpaired loss: tensors of shape (batch,), float32 or float64; None if the loss does not need them.

    `labels` are 1 (good) or 0 (bad); `divergence` is summed over the completion's tokens (nats), `weighted_logps` are
    ``sum_t sg[pi(y_t)] log pi(y_t)``. `z0` and `delta` hold for the whole optimizer step: KTO's reference point and BCO's
    running mean of rewards.
    """

    policy_logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None
    labels: Tensor | None = None
    divergence: Tensor | None = None
    z0: float | None = None
    delta: float | None = None
    weighted_logps: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ListLogps:
    """Input of a loss on lists: tensors of shape (lists, k), float32 or float64; shorter lists are padded (see `present`).

    Log-probs are summed over the completion (nats); a higher score is better. Padding is finite and has no effect.
    """

    policy_logps: Tensor
    present: Tensor  # bool, False for padding
    ref_logps: Tensor | None = None
    scores: Tensor | None = None
    lengths: Tensor | None = None


Divergence = Literal["kl", "js", "renyi"]  # over the whole vocabulary, at each completion token
Direction = Literal["ref_policy", "policy_ref"]  # KL(ref || policy), or KL(policy || ref)
Weighted = tuple["Tensor", "Tensor | None"]  # values and weights; None: every value counts 1


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Unreduced losses and detached metrics.

    The loop reduces ``losses.sum() / weights.sum()`` over all micro-batches and ranks; `weights` is None for a mean over
    examples, or the token counts for a mean over tokens. Each further term is reduced to its own mean and added; one whose
    weights are all zero is exactly zero. Every metric is (values, weights or None) and is reduced likewise.
    Weights depend only on lengths and labels, never on log-probs, so the loop knows them before the forward pass.
    """

    losses: Tensor  # (batch,)
    weights: Tensor | None = None
    metrics: Mapping[str, Weighted] = field(default_factory=dict)
    terms: Mapping[str, Weighted] = field(default_factory=dict)

    def summands(self) -> dict[str, Weighted]:
        """All terms of the loss by name; ``main`` is `losses`."""
        return {"main": (self.losses, self.weights), **self.terms}

    def weighted(self, *by: Tensor) -> LossOutput:
        """Weight the rows: every mean becomes what it would be if a row of weight 2 occurred twice.

        Args:
            by: weights of all completions, of all trees, and of other units; values get the weights of their own length.
        """
        by_length = {len(w): w for w in reversed(by)}

        def weigh(pair: Weighted) -> Weighted:
            values, weights = pair
            w = by_length.get(len(values)) if values.dim() else None
            return pair if w is None else (values * w, w if weights is None else weights * w)

        losses, weights = weigh((self.losses, self.weights))
        terms = {name: weigh(pair) for name, pair in self.terms.items()}
        return LossOutput(losses, weights, {name: weigh(pair) for name, pair in self.metrics.items()}, terms)


def check_output(out: Any) -> None:
    """Check the form of what a loss returns, of a user's own loss or algorithm.

    Raises:
        ValueError: it is no `LossOutput`, or its weights, terms or metrics are not as there.
    """
    if not isinstance(out, LossOutput):
        raise ValueError(f"returns {type(out).__name__}; return LossOutput(losses)")
    if out.weights is not None and not hasattr(out.weights, "shape"):
        raise ValueError(
            f"gives {type(out.weights).__name__} as weights of the losses; write LossOutput(losses, metrics=...)"
        )
    for name, pair in {**out.terms, **out.metrics}.items():
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ValueError(
                f"gives {name} as {type(pair).__name__}; write {name!r}: (values, None), a mean over the rows"
            )


@dataclass(frozen=True, slots=True)
class Scored:
    """Result of a forward pass over a batch: one number per completion, each of shape (C,); None if not needed.

    Losses get it as pairs or as single completions. Several can be concatenated, so that a loss over a whole optimizer
    step or held-out set gets the same numbers as from one big batch.
    """

    tree: Tensor  # int64, ascending: which tree a completion belongs to
    slot: Tensor  # int64: 0 = first (chosen), 1 = second (rejected), ...
    lengths: Tensor
    policy_logps: Tensor
    ref_logps: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    policy_shared_logps: Tensor | None = None
    ref_shared_logps: Tensor | None = None
    alignment: Tensor | None = None
    divergence: Tensor | None = None
    weighted_logps: Tensor | None = None
    row_weights: Tensor | None = None  # None: 1
    pairs: bool | None = None  # as in the batch; None: `is_pairs` checks the slots
    shape: tuple[int, int] | None = None  # trees, and most completions of one; None: `matrix` finds it

    @staticmethod
    def cat(parts: Sequence[Scored]) -> Scored:
        """Concatenate batches, with tree numbers that continue."""
        import torch

        columns: dict[str, Any] = {}
        for f in fields(Scored):
            values = [getattr(p, f.name) for p in parts]
            if f.name == "pairs":
                columns[f.name] = None if any(v is None for v in values) else all(values)
            elif f.name == "shape":
                shapes = [v for v in values if v is not None]
                complete = len(shapes) == len(values)
                columns[f.name] = (sum(n for n, _ in shapes), max(k for _, k in shapes)) if complete else None
            elif f.name == "row_weights" and any(v is not None for v in values):
                columns[f.name] = torch.cat([p.weight_of_rows for p in parts])
            else:
                columns[f.name] = None if any(v is None for v in values) else torch.cat(values)
        trees: list[Tensor] = []
        offset: Tensor | int = 0
        for p in parts:  # from the second part on, offset is a tensor, so as not to wait for the device
            trees.append(p.tree + offset)
            offset = trees[-1][-1:] + 1 if len(p.tree) else offset
        return Scored(**{**columns, "tree": torch.cat(trees)})

    @property
    def weight_of_rows(self) -> Tensor:
        """(C,) weight of each completion's row."""
        import torch

        return torch.ones_like(self.policy_logps) if self.row_weights is None else self.row_weights

    def of_trees(self, which: Sequence[int]) -> Scored:
        """The completions of some trees (ascending), which are renumbered."""
        import torch

        numbers = torch.full((int(self.tree.max()) + 1,), -1, dtype=self.tree.dtype, device=self.tree.device)
        numbers[torch.tensor(list(which), device=self.tree.device)] = torch.arange(
            len(which), dtype=self.tree.dtype, device=self.tree.device
        )
        mask = numbers[self.tree] >= 0
        values = {f.name: getattr(self, f.name) for f in fields(Scored)}
        selected = {n: v[mask] if hasattr(v, "to") else v for n, v in values.items()}
        return Scored(**{**selected, "tree": numbers[selected["tree"]], "shape": None})

    @property
    def is_pairs(self) -> bool:
        """Whether every tree has exactly two completions."""
        if self.pairs is not None:
            return self.pairs
        return len(self.slot) % 2 == 0 and bool((self.slot.view(-1, 2) == self.slot.new_tensor([0, 1])).all())

    def matrix(self, values: Tensor) -> Tensor:
        """Arrange values of completions (C,) as (trees, k), zero where a tree has fewer than k."""
        shape = self.shape or (int(self.tree[-1]) + 1, int(self.slot.max()) + 1)
        return values.new_zeros(shape).index_put((self.tree, self.slot), values)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values of completions (C,) into those of chosen (slot 0) and of rejected (slot 1) ones."""
        if self.is_pairs:  # no mask, which would wait for the device; copies, as with a mask
            return values[0::2].contiguous(), values[1::2].contiguous()
        return values[self.slot == 0], values[self.slot == 1]


class Algorithm(Protocol):
    """What the loop trains: computes losses of micro-batches, and each one's share of the global means.

    A step is `begin_step` with all of its rows, then `score` and `loss` for each micro-batch, then `end_step`.
    A subclass must define `weights`, `score` and `loss`; the other methods have defaults.
    """

    @property
    def coupled(self) -> bool:
        """Whether the loss of one example depends on the log-probs of the others, so that `loss` needs a whole step at once."""
        return False

    @property
    def side_by_side(self) -> bool:
        """Whether a CPU may run `score` and `loss` of several micro-batches in parallel threads."""
        return False

    @property
    def strands(self) -> tuple[str, ...]:
        """Values of `PackedBatch.strand` for independent passes over a batch that train no weights in common; parallel on a CPU."""
        return ("",)

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Prepare optimizer step `step` (0-based); return the trees to train on: `trees`, or completions sampled for them.

        `progress` goes from 0 at the first to 1 at the last step.
        """
        return trees

    def look_ahead(self, step: int, total: int, rows: Callable[[int], Sequence[TokenTree]]) -> None:
        """Called after `begin_step`; `rows` returns those of a later step (of `total`), for a method that starts on them early."""
        return None

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        """The batch's share of each term's denominator, known before its forward pass."""
        ...

    def columns(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Inputs of `score` from the CPU (stored log-probs, advantages), moved to the device with the batch as `batch.columns`."""
        return {}

    def score(self, batch: PackedBatch) -> Any:
        """The forward pass; returns the input of `loss` (a `Scored` for losses over completions)."""

    def loss(self, scored: Any) -> LossOutput:
        """Unreduced losses with gradient, and detached metrics."""
        ...

    def step_values(self) -> Mapping[str, float]:
        """Values for the step's log line, such as scheduled hyperparameters."""
        return {}

    def accepts(self, means: Mapping[str, float]) -> bool:
        """Whether to take the step, given the global means of its metrics; if not, the weights stay unchanged."""
        return True

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        """Called after optimizer step `step` (1-based) with the global means of its metrics; there are none if it had no rows."""
        return None

    def state_tensors(self) -> dict[str, Tensor]:
        """State that a resumed run needs besides model and optimizer."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_tensors` returned."""
        return None
