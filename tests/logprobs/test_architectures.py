"""Log-probs equal the model's own `forward`, or the model is refused, for every architecture of transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load_tool

from penchant.errors import ConfigError, ModelError
from penchant.logprobs import packing
from penchant.logprobs.packing import choose_packing
from penchant.models import tree_attention
from penchant.models.load import cast_parameters, load_causal_model
from penchant.models.merge import _probe
from penchant.models.options import ModelConfig
from penchant.rollout.generate import sample

tool = load_tool()
CPU = torch.device("cpu")
SOME = {
    "llama": "shared",
    "gemma2": "shared",  # caps on scores and logits, a window
    "gemma3_text": "shared",
    "gpt_oss": "shared",  # attention sinks
    "opt": "shared",  # functional dropout
    "granite": "shared",  # divides its logits
    "falcon_h1": "padded",  # a state, and a logit scale that only its own head applies
    "bloom": "padded",  # ALiBi
    "mamba": "padded",
    "bigbird_pegasus": "padded",  # its layers claim not to be causal, and rely on a mask
    "llama4_text": "padded",
    "bert": "refused",  # an encoder that `AutoModelForCausalLM` loads
}


@pytest.mark.parametrize("kind", SOME)
def test_the_engine_says_what_the_model_says(kind: str) -> None:
    with tool.silent():
        verdict = tool.judge(kind)
    assert verdict.way == SOME[kind], verdict.note
    if kind == "bert":
        assert "later tokens" in verdict.note


@pytest.mark.slow
def test_every_architecture_is_right_or_refused() -> None:
    verdicts = []
    for kind in tool.causal_types():
        with tool.silent():
            verdicts.append(tool.judge(kind))
        print(f"{kind:28} {verdicts[-1].way:8} {verdicts[-1].note}")
    assert [v for v in verdicts if v.way == "wrong"] == []
    assert {v.kind: v.note for v in verdicts if v.way == "unbuilt" and v.kind not in tool.NOT_BUILT} == {}
    ways = Counter(v.way for v in verdicts)
    assert ways["shared"] > 80 and ways["shared"] + ways["padded"] > 0.6 * len(verdicts), ways


def _saved(kind: str, folder: Path) -> ModelConfig:
    with tool.silent():
        tool.tiny_model(kind).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_sinks_that_are_left_out_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If our attention leaves out the sinks, the model's own is used on padded rows."""
    model = load_causal_model(_saved("gpt_oss", tmp_path), CPU)
    weights = tree_attention._weights
    monkeypatch.setattr(tree_attention, "_weights", lambda scores, sinks: weights(scores, None))
    scorer, _ = choose_packing(model, "auto", "off")
    assert scorer.packing == "padded" and scorer.own_attention
    with pytest.raises(ConfigError, match="shared packing gives wrong log-probs"):
        choose_packing(model, "shared", "off")


def test_an_argument_that_our_attention_does_not_know_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_model(_saved("gpt_oss", tmp_path), CPU)
    monkeypatch.setattr(tree_attention, "_COMPUTED", tree_attention._COMPUTED - {"s_aux"})
    scorer, _ = choose_packing(model, "auto", "off")
    assert scorer.packing == "padded" and scorer.own_attention


def test_a_head_that_does_more_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit scale that the engine does not know by name. Its gradient is the model's own too."""
    model = load_causal_model(_saved("granite", tmp_path), CPU)
    monkeypatch.setattr("penchant.logprobs.head_scaling", lambda config: (1.0, None))
    scorer, note = choose_packing(model, "auto", "off")
    assert scorer.packing == "shared" and scorer.own_head and "own head" in note
    batch = packing.pack([packing._probe_tree(model)])
    scorer.logps(batch).sums.sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    tree = packing._probe_tree(model)
    torch.stack([tool._own_logp(model, tree.prompt_ids, c) for c in tree.completion_ids]).sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, ours[name], rtol=1e-3, atol=1e-5), name


def test_where_nothing_agrees_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_model(_saved("llama", tmp_path), CPU)
    forward = type(model).forward

    def other(self: Any, *args: Any, **more: Any) -> Any:
        out = forward(self, *args, **more)
        if more["input_ids"].shape[1] > 1 and "attention_mask" not in more:  # a path that our code never uses
            out.logits = out.logits.cumsum(1)
        return out

    monkeypatch.setattr(type(model), "forward", other)
    monkeypatch.setattr("penchant.logprobs.OwnHead.__call__", lambda self, hidden: self.model.lm_head(hidden))
    with pytest.raises(ModelError, match="cannot be computed as its own forward does"):
        choose_packing(model, "auto", "off")


def test_a_window_beyond_the_check_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a window of thousands of tokens, the check temporarily shortens it."""
    config = tool.tiny_config("mistral")
    config.sliding_window = 4096
    monkeypatch.setattr(tool, "tiny_config", lambda kind: config)
    model = load_causal_model(_saved("mistral", tmp_path), CPU)
    layout = tree_attention.tree_layout
    monkeypatch.setattr(tree_attention, "tree_layout", lambda batch, window: layout(batch, None))
    scorer, _ = choose_packing(model, "auto", "off")
    assert scorer.packing == "padded" and model.config.sliding_window == 4096


def test_a_backbone_that_adds_up_in_fp32_runs_in_bf16(tmp_path: Path) -> None:
    """Mamba's hidden states are in fp32 for any weight dtype."""
    model = load_causal_model(_saved("mamba", tmp_path), CPU)
    cast_parameters(model, torch.bfloat16)
    scorer, _ = choose_packing(model, "auto", "auto")
    tree = packing._probe_tree(model)
    found = scorer.logps(packing.pack([tree], shared=scorer.shared)).sums
    own = torch.stack([tool._own_logp(model, tree.prompt_ids, c) for c in tree.completion_ids])
    assert torch.allclose(found, own, rtol=2e-2)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_that_does_not_run_in_16_bits_is_a_sentence(tmp_path: Path) -> None:
    """XGLM adds positions in fp32, which its bf16 norms do not accept."""
    model = load_causal_model(_saved("xglm", tmp_path), CPU)
    choose_packing(model, "auto", "auto")
    cast_parameters(model, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"does not run in 16 bits here .* set model\.dtype=fp32"):
        choose_packing(model, "auto", "auto")


def test_nor_is_one_that_is_held_in_16_bits_under_an_adapter(tmp_path: Path) -> None:
    model = load_causal_model(_saved("xlstm", tmp_path), CPU, within=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"does not run in 16 bits here .* set model\.dtype=fp32"):
        choose_packing(model, "auto", "auto")


def test_an_encoder_in_16_bits_is_refused_too(tmp_path: Path) -> None:
    """A later token's effect on an earlier one is hidden by rounding in 16 bits, but visible in fp32."""
    with tool.silent():
        model = tool.tiny_model("bert")
        for p in model.parameters():
            p.data /= 3 if p.ndim > 1 else 1
        model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match="depend on later tokens"):
            load_causal_model(ModelConfig(path=str(tmp_path)), CPU, within=dtype)


def test_a_probe_of_a_merged_model_asks_for_no_cache(tmp_path: Path) -> None:
    """Bamba creates a cache that its tiny layers cannot fill. Training never uses one."""
    model = load_causal_model(_saved("bamba", tmp_path), CPU)
    assert bool(_probe(model).isfinite().all())


@pytest.mark.parametrize("kind", ["mamba", "bloom", "gpt_oss", "recurrent_gemma", "opt"])
def test_sampling_follows_the_models_own_forward(kind: str, tmp_path: Path) -> None:
    """Greedy completions of prompts of two lengths, with a cache or, if it is unusable, without."""
    model = load_causal_model(_saved(kind, tmp_path), CPU)
    choose_packing(model, "auto", "auto")
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]
    with tool.silent():
        found = sample(model, prompts, n=2, max_new_tokens=6, temperature=0)
    own = load_causal_model(ModelConfig(path=str(tmp_path)), CPU).eval()
    for prompt, rows in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(own(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert [r.ids for r in rows] == [ids[len(prompt) :]] * 2
