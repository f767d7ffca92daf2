"""Chooses the packing, attention and kernels for a model and checks that they reproduce its own `forward`."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from penchant.data.packing import pack
from penchant.distributed.shard import layers_of
from penchant.errors import ConfigError, ModelError
from penchant.logprobs import Packing, Scorer
from penchant.models.folder import first_line
from penchant.models.load import backbone_of, base_model_of, carries_state, quiet, widened, without_cache
from penchant.models.tree_attention import CALLS, Call, packed_attention, restore_attention, select_attention
from penchant.models.tree_kernels import HALF
from penchant.types import TokenTree

# ---- Choose a packing and check it on the model: anything the engine does not replicate would be a silent error ----

WINDOW = 6  # tokens of sliding windows during the check, shorter than its row
NOISE = 20.0  # times the difference in the model's own logits between computing a prefix alone and as part of its row
LEAST, MOST = 1e-5, 1e-3  # bounds of the tolerance, relative to 1 + |log-prob|, whatever the noise


RunsAs = tuple[torch.device, torch.dtype]


def choose_packing(
    model: Any, requested: str, kernels: str, attention: str = "auto", runs_as: RunsAs | None = None
) -> tuple[Scorer, str]:
    """Return a scorer with the best packing that reproduces the model's own `forward`, row by row in fp32.

    Args:
        requested: ``auto``, ``shared``, ``separate`` or ``padded``; raises if an explicit choice fails the check.
        attention: ``auto``, ``varlen``, ``flex`` or ``groups``, likewise.
        runs_as: the device and dtype that the model will run in, if it is not there yet.

    Returns:
        The scorer and a sentence for the log.

    Raises:
        ConfigError: shared or separate packing was requested and differs from the model's own `forward`, or the requested
            attention, compilation or 16-bit dtype does not work.
        ModelError: no packing that may be used reproduces the model's own `forward`.
    """
    kind, attention_reason = choose_attention(model, attention, runs_as)
    config_packing, reason = packing_by_config(model)
    candidates: list[Packing] = ["shared", "separate", "padded"]
    if requested != "auto":
        candidates = [requested]  # type: ignore[list-item]
    elif config_packing == "padded":
        candidates = ["padded"]
    attentions = [kind] if attention != "auto" or kind == "groups" else [kind, "groups"]
    way, failure = _first_right(model, candidates, "off" if kernels == "compile" else kernels, attentions)
    if way is None and requested in ("shared", "separate"):
        what = f"{requested} packing gives wrong log-probs on this model ({failure})"
        raise ConfigError("train.packing", what, "set train.packing=auto or padded")
    if way is None:
        raise ModelError(
            str(base_model_of(model).config._name_or_path or type(base_model_of(model)).__name__),
            f"its log-probs cannot be computed as its own forward does: {failure}",
            "train a model of another architecture (docs/models.md)",
        )
    if attention in ("varlen", "flex") and way.packing == "padded":
        what = f"{attention} needs packed rows, but this model uses padded rows ({failure or reason})"
        raise ConfigError("model.attention", what, "set model.attention=auto")
    scorer = _compiled(model, way) if kernels == "compile" else Scorer(model, kernels=kernels, **way._asdict())
    if scorer.fast and not _fast_is_right(scorer):
        scorer = replace(scorer, kernels="off", _fast=None)
    if not scorer.fast:
        check_precision(model)
    if way.packing == "shared":
        reason = "each prompt is computed once for all its completions"
    elif config_packing != "padded":
        reason = "the model's attention does not take the tree mask" if requested == "auto" else "as asked"
    notes = "; fast kernels for this model" if scorer.fast else "; compiled layers" if scorer.compiled else ""
    notes += "; with the model's own head" if scorer.own_head else ""
    attention_note = f"; attention: {scorer.attention}" + (f" ({attention_reason})" if attention_reason else "")
    return scorer, f"packing: {scorer.packing} ({reason}{notes})" + (
        attention_note if attention_reason or scorer.attention != "groups" else ""
    )


def _compiled(model: Any, way: _Way) -> Scorer:
    """Return a scorer with compiled layers, after checking their log-probs and gradients. Raises ConfigError if they differ."""
    if way.packing == "padded":
        what, how = "needs packed rows, but this model uses padded rows", "set model.kernels=auto"
        raise ConfigError("model.kernels", f"compile {what}", how)
    expected = _probe_outputs(Scorer(model, **way._asdict()))
    try:
        scorer = Scorer(model, kernels="compile", **way._asdict())
        compiled = _probe_outputs(scorer)
    except Exception as error:  # the compiler is missing or failed in any way
        what = f"compile does not run here ({first_line(getattr(error, 'inner_exception', error))})"
        raise ConfigError("model.kernels", what, "set model.kernels=auto") from error
    allowed = 5e-2 if any(p.dtype in HALF for p in model.parameters()) else MOST
    for name, value in expected.items():
        difference = _away(compiled[name], value)
        if not difference <= allowed:
            what = f"compile changes this model's {name} by {difference:.2g}"
            raise ConfigError("model.kernels", what, "set model.kernels=auto")
    return scorer


def _probe_outputs(scorer: Scorer) -> dict[str, torch.Tensor]:
    """Log-probs of the probe tree, and the gradients of the lowest trained layer, if any."""
    model, tree = scorer.model, _probe_tree(scorer.model)
    headless = base_model_of(model).get_output_embeddings() is None
    with quiet(model):
        outputs = {"log-probs": _probe(scorer, tree, headless)}
    layer_parameters = ([p for p in layer.parameters() if p.requires_grad] for layer in layers_of(backbone_of(model)))
    trained = next(filter(None, layer_parameters), [])
    # compiled dropout draws other numbers
    has_dropout = any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    if trained:
        with quiet(model, training=not has_dropout), torch.enable_grad():
            total = _probe(scorer, tree, headless).sum()
            grads = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
        outputs["gradients"] = torch.cat([g.flatten() for g in grads])[None].double()
    return outputs


def choose_pictured(model: Any, processor: Any) -> tuple[Scorer, str]:
    """`choose_packing` for a vision-language model: padded rows with the model's own attention and positions.

    Raises:
        ModelError: even for text alone, the log-probs differ from the model's own `forward`.
    """
    from penchant.logprobs.pictures import PicturedScorer

    tree, difference = _probe_tree(model), 0.0
    with widened(model), quiet(model):
        expected, allowed = _own(model, tree, False)
        for own_head in (False, True):
            scorer = PicturedScorer(model, "padded", own_attention=True, own_head=own_head, processor=processor)
            difference = _away(_probe(scorer, tree, False), expected)
            if difference <= allowed:
                return scorer, "packing: padded (pictures: each answer is a row of its own behind its prompt)"
    name = str(base_model_of(model).config._name_or_path or type(base_model_of(model)).__name__)
    what = f"its log-probs cannot be computed as its own forward does: they differ by {difference:.2g} (allowed: {allowed:.2g})"
    raise ModelError(name, what, "train a model of another architecture (docs/vision.md)")


class _Way(NamedTuple):
    """One way to run a model, see `Scorer`."""

    packing: Packing
    attention: str
    own_attention: bool
    own_head: bool


def _first_right(
    model: Any, candidates: Sequence[Packing], kernels: str, attentions: Sequence[str]
) -> tuple[_Way | None, str]:
    """Return the first way that reproduces the model's own outputs, or None, and how the last failed way differs."""
    base, tree = base_model_of(model), _probe_tree(model)
    headless = base.get_output_embeddings() is None
    failure = ""
    with widened(model), _short_windows(model), quiet(model):
        restore_attention(base)
        expected, allowed = _own(model, tree, headless)
        for way in _ways(candidates, attentions, headless):
            try:
                difference = _away(_probe(Scorer(model, kernels=kernels, **way._asdict()), tree, headless), expected)
            except Exception as error:  # an unknown model may raise anything when run in a new way
                failure = first_line(error)
                continue
            if difference <= allowed:
                return way, failure
            failure = f"{way.packing} rows differ by {difference:.2g} (allowed: {allowed:.2g})"
        restore_attention(base)
    return None, failure


def _ways(candidates: Sequence[Packing], attentions: Sequence[str], headless: bool) -> Iterator[_Way]:
    """Every way to run a model, best first."""
    for packing in candidates:
        padded = packing == "padded"
        for attention, own_attention in itertools.product(
            ("groups",) if padded else attentions, (False, True) if padded else (False,)
        ):
            for own_head in (False,) if headless else (False, True):
                yield _Way(packing, attention, own_attention, own_head)


def _own(model: Any, tree: TokenTree, headless: bool) -> tuple[torch.Tensor, float]:
    """Outputs of the model's own `forward`, row by row, and the allowed difference for other ways to compute them."""
    device = next(model.parameters()).device
    rows, noise = [], 0.0
    for completion in tree.completion_ids:
        ids = torch.tensor([*tree.prompt_ids.tolist(), *completion.tolist()], device=device)
        values = own_outputs(model, ids, headless)
        prefix = own_outputs(model, ids[: len(tree.prompt_ids)], headless)
        noise = max(noise, _away(prefix, values[: len(prefix)]))
        predicting = values[len(tree.prompt_ids) - 1 : -1]
        if not headless:
            predicting = torch.log_softmax(predicting, -1).gather(1, ids[len(tree.prompt_ids) :, None]).squeeze(1)
        rows.append(predicting)
    return torch.cat(rows), min(max(LEAST, NOISE * noise), MOST)


def own_outputs(model: Any, ids: torch.Tensor, headless: bool = False) -> torch.Tensor:
    """Logits (n, V) of one row (n,) from the model's own `forward`, or hidden states (n, d) if `headless`."""
    part = backbone_of(model) if headless else base_model_of(model)
    out = part(input_ids=ids[None], **without_cache(part))
    values: torch.Tensor = (out.last_hidden_state if headless else out.logits)[0]
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _probe(scorer: Scorer, tree: TokenTree, headless: bool) -> torch.Tensor:
    """The scorer's log-probs (R,) of the completion tokens, or hidden states (R, d) if `headless`."""
    batch = pack([tree], shared=scorer.shared).to(next(scorer.model.parameters()).device)
    return scorer.predicting(batch) if headless else scorer.logps(batch).tokens


def _probe_tree(model: Any) -> TokenTree:
    """A small random tree for the checks: a prompt and three completions."""
    rng, vocabulary = np.random.default_rng(0), base_model_of(model).config.get_text_config().vocab_size
    prompt, *completions = (rng.integers(0, vocabulary, size=n).astype(np.int32) for n in (13, 9, 6, 2))
    return TokenTree(0, prompt, tuple(completions), (False,) * len(completions))


def _away(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference: of numbers relative to 1 + their absolute value, of vectors relative to their norm."""
    if expected.ndim == 1:
        return float(((actual - expected).abs() / (1 + expected.abs())).max())
    return float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).max())


def _fast_is_right(scorer: Scorer) -> bool:
    """Whether the fast path agrees with the slow one in the model's own precision."""
    model, tree = scorer.model, _probe_tree(scorer.model)
    headless = base_model_of(model).get_output_embeddings() is None
    with quiet(model):
        slow, fast = (_probe(s, tree, headless) for s in (replace(scorer, kernels="off", _fast=None), scorer))
    return _away(fast, slow) <= (5e-2 if next(model.parameters()).dtype == torch.bfloat16 else MOST)


def check_precision(model: Any) -> None:
    """Check that the model's own `forward` runs in the precision of its weights.

    Raises:
        ConfigError: it does not run in 16 bits.
    """
    if all(p.dtype not in HALF for p in model.parameters()):
        return
    base, ids = base_model_of(model), torch.from_numpy(_probe_tree(model).prompt_ids)
    try:
        with quiet(model):
            own_outputs(model, ids.to(next(model.parameters()).device), base.get_output_embeddings() is None)
    except RuntimeError as error:
        if not re.search("dtype|scalar type", str(error)):
            raise
        what = f"{base.config.model_type} does not run in 16 bits here ({first_line(error)})"
        raise ConfigError("model.dtype", what, "set model.dtype=fp32 (chat and serve: --dtype fp32)") from error


# ---- Choose an attention by the model's calls, then compare its kernels with ``groups`` in the model's own precision ----


def choose_attention(model: Any, requested: str, runs_as: RunsAs | None = None) -> tuple[str, str]:
    """Return (kind, reason for the log) of attention within packed rows, see `select_attention`.

    Args:
        runs_as: as for `choose_packing`. If the device differs, only the layers' attention shapes are checked there.

    Raises:
        ConfigError: the requested attention is impossible on this model and device, or its results differ.
    """
    current_device = next(model.parameters()).device
    device, dtype = (current_device, None) if runs_as is None else runs_as
    if requested == "groups" or (requested == "auto" and device.type != "cuda"):
        return "groups", ""
    calls = attention_calls(model)
    if dtype is not None:
        calls = {call._replace(dtype=dtype) for call in calls}
    kinds, reason = select_attention(requested, calls, device.type, _triton())
    half = any(p.dtype in HALF for p in model.parameters()) if dtype is None else dtype in HALF
    allowed = 5e-2 if half else MOST
    failure = ""
    for kind in kinds:
        if kind == "groups":
            return kind, failure or reason
        try:
            differences = {"log-probs": _away_from_groups(model, kind)} if device == current_device else {}
            if any(p.requires_grad for p in model.parameters()) or not differences:
                differences["gradients"] = max((_gradients_away(model, kind, c, device) for c in calls), default=0.0)
        except Exception as error:  # a kernel that this GPU or installation lacks
            failure = f"{kind}: {first_line(error)}"
            continue
        too_large = [
            f"its {name} differ by {difference:.2g}"
            for name, difference in differences.items()
            if not difference <= allowed
        ]
        if not too_large:
            return kind, failure or reason
        failure = f"{kind}: {too_large[0]}"
    raise ConfigError(
        "model.attention", f"{requested} cannot run here ({failure or reason})", "set model.attention=auto"
    )


def attention_calls(model: Any) -> set[Call]:
    """The distinct attention calls of a model's layers; empty if its attention cannot be replaced."""
    calls: set[Call] = set()
    batch = pack([_probe_tree(model)]).to(next(model.parameters()).device)
    batch.cache[CALLS] = calls
    with quiet(model):
        try:
            Scorer(model, "shared").hidden(batch)
        except Exception:  # packed rows fail too, which `choose_packing` reports
            calls.clear()
    return calls


def _away_from_groups(model: Any, kind: str) -> float:
    tree, headless = _probe_tree(model), base_model_of(model).get_output_embeddings() is None
    with quiet(model):
        values, expected = (_probe(Scorer(model, "shared", attention=a), tree, headless) for a in (kind, "groups"))
    return _away(values, expected)


def _gradients_away(model: Any, kind: str, call: Call, device: torch.device) -> float:
    """Relative difference of one layer's attention gradients, for random inputs, from those of ``groups`` in fp32 or better."""
    batch = pack([_probe_tree(model)]).to(device)
    generator, wide = torch.Generator().manual_seed(0), torch.promote_types(call.dtype, torch.float32)
    heads = (call.heads, call.kv_heads, call.kv_heads, call.heads)
    shapes = [(batch.tokens, h, call.head_dim) for h in heads]
    *inputs, upstream = (torch.randn(s, generator=generator).to(batch.input_ids.device, call.dtype) for s in shapes)
    gradients = []
    for way, dtype in ((kind, call.dtype), ("groups", wide)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        cap = 30.0 if call.capped else None
        with torch.enable_grad():
            out = packed_attention(way, batch, q, k, v, call.head_dim**-0.5, cap, window=call.window)
        grads = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
        gradients.append(torch.cat([g.flatten().to(wide) for g in grads]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def _triton() -> bool:
    """Whether torch can compile GPU kernels here: Triton and a C compiler are present."""
    from torch.utils._triton import has_triton

    return bool(has_triton()) and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Shorten sliding windows below the probe row's length in the block, so that a mask that ignores them fails the check."""
    base = base_model_of(model)
    holders = {id(x): x for x in (base.config, base.config.get_text_config(), *base.modules())}.values()
    originals = [(x, w) for x in holders if type(w := getattr(x, "sliding_window", None)) is int and w > WINDOW]
    for holder, _ in originals:
        holder.sliding_window = WINDOW
    try:
        yield
    finally:
        for holder, window in originals:
            holder.sliding_window = window


# ---- The packing a model should support by its config; the checks above confirm it ----


def packing_by_config(model: Any) -> tuple[str, str]:
    """(packing, reason) by the model's config: padded if layers carry state along a row, else shared."""
    reason = carries_state(base_model_of(model).config.get_text_config())
    return ("padded", reason) if reason else ("shared", "attention layers only, so prompts can be shared")
