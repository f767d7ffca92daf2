"""Tree attention (a token attends causally to its own prompt and its own completion only), and its installation in models.

``groups``: trees are short and a packed row is long, so attention runs tree by tree: trees are gathered into groups of equal (rounded)
length, with one batched attention per group, and scattered back. Each tree's length is rounded by itself, so a tree's numbers do not
depend on the other trees in the row. ``varlen`` and ``flex``, which need no mask in memory, are in `tree_kernels`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penchant.base.machine import kind_of
from penchant.distributed.context import SPLIT, my_heads, part_of_heads, part_of_tokens
from penchant.models.tree_kernels import (
    FLASH_MAX_HEAD,
    HALF,
    flex_plan,
    flex_tree_attention,
    longest_path,
    moved_together,
    varlen_attention,
    varlen_plan,
)
from penchant.types import PackedBatch, Segment

IMPLEMENTATION = "penchant_tree"
_OWN = "_penchant_own_attention"  # attribute of a model: its configs, each with its original attention
_EAGER_MAX_LENGTH = 768  # above this, a full score matrix costs more than SDPA's tiles


@dataclass(frozen=True, slots=True)
class Group:
    """Trees of one rounded length: `index` (B, L) positions in the row, `mask` (B, 1, L, L) bool.

    Padding cycles through its own tree's tokens: if it all pointed at one token, a GPU would add up that token's gradients serially.
    """

    index: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """The groups of a packed row, and `inverse` (T,), which puts the groups' outputs back in row order."""

    groups: tuple[Group, ...]
    inverse: Tensor


def rounded_length(n: int) -> int:
    """The padded length of a tree of n tokens: the next multiple of 16 (32 above 256), to get few distinct lengths."""
    step = 16 if n <= 256 else 32
    return -(-n // step) * step


def tree_mask(segment: Segment, length: int, sliding_window: int | None) -> np.ndarray:
    """The attention mask of one tree: (length, length) bool, True = may attend.

    Token i attends to j when j <= i, j is in the prompt or in i's own completion, and, under a sliding window w,
    ``position(i) - position(j) < w`` (positions, not packed indices: each completion restarts at the prompt's end).
    Padding attends to itself, so that no row is empty (a softmax over nothing is NaN).
    """
    index = np.arange(length)
    branch, position = np.zeros(length, dtype=np.int64), index.copy()
    start = segment.prompt_len
    for k, n in enumerate(segment.completion_lens):
        branch[start : start + n] = k + 1
        position[start : start + n] = np.arange(segment.prompt_len, segment.prompt_len + n)
        start += n
    branch[start:] = -1
    allowed: np.ndarray = (index[:, None] >= index) & ((branch == 0) | (branch[:, None] == branch))
    if sliding_window is not None:
        allowed &= position[:, None] - position < sliding_window
    allowed[start:] = False
    allowed[index, index] = True
    return allowed


def tree_layout(batch: PackedBatch, sliding_window: int | None = None) -> TreeLayout:
    """The layout of a batch, built once per batch and window."""
    key = f"layout/{sliding_window}"
    if key not in batch.cache:
        batch.cache[key] = _build_layout(batch.segments, sliding_window, batch.input_ids.device)
    layout = batch.cache[key]
    assert isinstance(layout, TreeLayout)
    return layout


def _build_layout(segments: tuple[Segment, ...], sliding_window: int | None, device: torch.device) -> TreeLayout:
    """Build the layout on the CPU, without kernel launches, and move it in two copies: all indices, and all masks."""
    by_length: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_length[rounded_length(segment.length)].append(segment)
    shapes = [(len(members), length) for length, members in sorted(by_length.items())]
    indices = [np.zeros(shape, dtype=np.int64) for shape in shapes]
    masks = [np.empty((trees, length, length), dtype=np.bool_) for trees, length in shapes]
    inverse = np.empty(sum(s.length for s in segments), dtype=np.int64)
    offset = 0
    for (_, length), index, mask in zip(shapes, indices, masks, strict=True):
        for b, segment in enumerate(by_length[length]):
            n = segment.length
            index[b] = segment.start + np.arange(length) % n
            inverse[segment.start : segment.start + n] = np.arange(offset, offset + n)
            mask[b] = tree_mask(segment, length, sliding_window)
            offset += length
    *moved_indices, moved_inverse = moved_together([*indices, inverse], device)
    groups = [Group(i, m[:, None]) for i, m in zip(moved_indices, moved_together(masks, device), strict=True)]
    return TreeLayout(tuple(groups), moved_inverse)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each tree of a packed row.

    Args:
        query: (T, H, d); key, value: (T, H_kv, d), H a multiple of H_kv.
        layout: the row's `TreeLayout`.
        scaling: factor of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: (H,) an extra score per head in the softmax's sum, without a value (gpt-oss).

    Returns:
        (T, H, d_v).
    """
    heads = query.shape[1]
    repeat = heads // key.shape[1]
    outputs = []
    for group in layout.groups:
        q, k, v = (x[group.index].transpose(1, 2) for x in (query, key, value))  # (B, heads, L, d)
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        on_cpu = kind_of(query.device) == "cpu"
        if softcap is not None or sinks is not None or (on_cpu and q.shape[2] <= _EAGER_MAX_LENGTH):
            scores = torch.matmul(q, k.transpose(-1, -2)) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.masked_fill(~group.mask, float("-inf"))
            out = torch.matmul(_weights(scores, sinks).to(v.dtype), v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B * L, H, d)
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, layout.inverse)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores (B, H, L, L'), with each head's sink in the sum if there are sinks (H,)."""
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights if sinks is None else weights[..., :-1]


# ---- Which attention a model can use, from the arguments its layers pass ----

CALLS = "attention calls"  # key in a batch's cache: a set that collects the calls of the attention


class Call(NamedTuple):
    """The properties of a layer's attention: dtype, head dimension, whether scores are capped, sliding window, heads."""

    dtype: torch.dtype
    head_dim: int
    capped: bool
    window: int | None
    heads: int = 1
    kv_heads: int = 1


def select_attention(requested: str, calls: Collection[Call], device: str, triton: bool) -> tuple[list[str], str]:
    """The kinds of attention to try on a model, best first, and why.

    ``varlen+flex`` uses FlexAttention for the layers and batches that varlen kernels do not support: capped scores, and trees longer
    than a layer's sliding window. ``varlen`` alone uses ``groups`` for those.

    Args:
        requested: ``auto``, ``varlen``, ``flex`` or ``groups``; calls: of the model's layers; device: its type; triton: whether torch can
            compile for it.

    Returns:
        The kinds, and a reason for the log; if the requested kind is impossible, no kinds and what is missing.
    """
    if requested == "groups":
        return ["groups"], "as asked"
    varlen = [_no_varlen(c, device) for c in calls]
    flex = next((reason for c in calls if (reason := _no_flex(c, device, triton))), "")
    if requested == "flex":
        return ([], flex) if flex else (["flex"], "as asked")
    obstacle = next(filter(None, varlen), "")
    if requested == "varlen" and obstacle:
        return [], obstacle
    if requested == "auto" and (device != "cuda" or any(c.dtype not in HALF for c in calls)):
        return ["groups"], ""
    windows = sorted({c.window for c in calls if c.window is not None})
    fallback = "groups" if flex else "flex"
    reason = f"{fallback} for trees longer than {windows[0]} tokens, the model's sliding window" if windows else ""
    if not obstacle:
        mixed = ["varlen+flex"] if windows and not flex else []
        return [*mixed, "varlen", *(["groups"] if requested == "auto" else [])], reason
    if flex:
        return (["groups"] if all(varlen) else ["varlen", "groups"]), f"{obstacle}; {flex}"
    return (["flex"] if all(varlen) else ["varlen+flex", "varlen"]) + ["groups"], obstacle


def _no_varlen(call: Call, device: str) -> str:
    """Why varlen kernels do not support a call, or ""; on a CPU they are plain products, which take any dtype."""
    if call.capped:
        return "its attention caps the scores"
    if call.head_dim > FLASH_MAX_HEAD:
        return f"its heads have {call.head_dim} numbers, and flash kernels take {FLASH_MAX_HEAD}"
    if device not in ("cpu", "cuda"):
        return f"torch has no flash kernels for {device}"
    if device == "cuda" and call.dtype not in HALF:
        return f"flash kernels take bf16 and fp16, not {str(call.dtype).removeprefix('torch.')}"
    return ""


def _no_flex(call: Call, device: str, triton: bool) -> str:
    if device not in ("cuda", "xpu"):
        return f"FlexAttention has no gradient on {device}"
    if not triton:
        return "FlexAttention needs Triton and a C compiler, which are not here"
    if call.dtype == torch.float64 or call.head_dim < 16:
        return "FlexAttention takes heads of 16 numbers or more, in fp32 or less"
    return ""


# arguments that models pass to their attention: computed here, or without effect on it
_COMPUTED = {"penchant_attention", "penchant_batch", "scaling", "sliding_window", "softcap", "s_aux"}
_WITHOUT_MEANING = {
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments that the attention does not compute: ignoring them would silently give wrong results."""
    unknown = sorted(
        name
        for name, value in arguments.items()
        if name not in _COMPUTED and name not in _WITHOUT_MEANING and value is not None and value is not False
        if not (name == "dropout" and value == 0.0)
    )
    if unknown:
        raise NotImplementedError(
            f"the model's attention takes {', '.join(unknown)}, which the tree attention does not"
        )
    if arguments.get("is_causal") is False:
        raise NotImplementedError("the model's attention is not causal")


def _attention_interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: tree attention if a packed batch is passed along, otherwise SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _check_arguments(kwargs)
    batch: PackedBatch | None = kwargs.pop("penchant_batch", None)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scaling = kwargs.get("scaling")
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else float(scaling)
    if batch is None:
        if softcap is not None or sinks is not None:  # SDPA supports neither
            return _eager_attention(query, key, value, attention_mask, scaling, softcap, sinks), None
        if attention_mask is None:  # some decoders' own attention relies on the mask alone
            kwargs["is_causal"] = True
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel() != 1:
        raise NotImplementedError("the model adds to its attention's mask")
    window, kind = kwargs.get("sliding_window"), kwargs.get("penchant_attention", "groups")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (1, H, T, d) -> (T, H, d)
    if isinstance(calls := batch.cache.get(CALLS), set):
        calls.add(_call(q, k, v, softcap, window))
    if batch.cache.get(SPLIT):
        q, k, v = (part_of_heads(x, batch.tokens) for x in (q, k, v))
        out = packed_attention(kind, batch, q, k, v, scaling, softcap, my_heads(sinks), window)
        return part_of_tokens(out)[None], None
    return packed_attention(kind, batch, q, k, v, scaling, softcap, sinks, window)[None], None


def packed_attention(
    kind: str,
    batch: PackedBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention within the trees of a packed row, by a kind from `select_attention`; arguments and result as in `tree_attention`."""
    if "varlen" in kind and _by_varlen(_call(query, key, value, softcap, window), batch):
        return varlen_attention(query, key, value, varlen_plan(batch), scaling, sinks)
    if "flex" in kind:
        return flex_tree_attention(query, key, value, flex_plan(batch, window), scaling, softcap, sinks)
    return tree_attention(query, key, value, tree_layout(batch, window), scaling, softcap, sinks)


def _call(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, window: int | None) -> Call:
    width = max(query.shape[-1], value.shape[-1])
    return Call(query.dtype, width, softcap is not None, window, query.shape[1], key.shape[1])


def _by_varlen(call: Call, batch: PackedBatch) -> bool:
    """Whether two varlen passes can compute this: a window must hide nothing, as the second pass does not know positions."""
    if call.capped or call.head_dim > FLASH_MAX_HEAD:
        return False
    return call.window is None or call.window >= longest_path(batch.segments)


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with capped scores or sinks for unpacked rows: (B, H, L, d) -> (B, L, H, d)."""
    repeat = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    if softcap is None:
        scores = torch.matmul(query, k.transpose(-1, -2)) * scaling
    else:
        scores = torch.tanh(torch.matmul(query, k.transpose(-1, -2)) * (scaling / softcap)) * softcap
    if mask is None and query.shape[2] > 1:  # transformers omits a plain causal mask
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # finite: a padding row under a window may have no visible key
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(_weights(scores, sinks).to(v.dtype), v).transpose(1, 2)


def install_tree_attention(model: nn.Module) -> None:
    """Switch a transformers model to the tree attention (plain SDPA if no packed batch is passed).

    Raises:
        NotImplementedError: the model's attention cannot be switched.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_interface)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if not model._can_set_attn_implementation():  # type: ignore[operator]
        raise NotImplementedError(f"the attention of {type(model).__name__} cannot be replaced")
    if not hasattr(model, _OWN):
        setattr(model, _OWN, [(c, c._attn_implementation) for c in _configs(model)])
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]


def uncompiled_attention() -> None:
    """Exclude the tree attention from `torch.compile`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(_attention_interface))


def restore_attention(model: nn.Module) -> None:
    """Switch a model back to its original attention."""
    for config, implementation in getattr(model, _OWN, ()):
        config._attn_implementation_internal = implementation


def own_attention(model: Any) -> str:
    """The name of a model's original attention, even if the tree attention is installed."""
    originals = getattr(model, _OWN, None)
    return str(originals[0][1] if originals else model.config._attn_implementation)


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of its submodels, the model's own first."""
    module_configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = [c for c in module_configs if hasattr(c, "_attn_implementation")]
    configs += [getattr(c, name) for c in configs for name in c.sub_configs if getattr(c, name, None) is not None]
    return list({id(c): c for c in configs}.values())
