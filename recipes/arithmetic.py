"""Arithmetic with a checked answer: exact match before and after GRPO, GSPO, DAPO and RLOO, three seeds each. One command:

    python recipes/arithmetic.py runs/arithmetic

A Llama of 110,000 parameters with one token a character learns the form of sums (`7+15=` -> `22`) by SFT on a part of the training
rows; then each method trains it on all of them with the column `answer`, rewarding nothing but the right one. Held-out rows are
looked at for the table's columns only once, at the end. Minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from penchant import api
from penchant.metrics.stats import share_ci
from penchant.rollout.generate import greedy

MOST, TEST, SHOWN = 24, 150, 220  # numbers below MOST; held-out rows; rows that SFT sees
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "gspo": {"name": "gspo"},
    "dapo": {"name": "dapo"},
    "rloo": {"name": "rloo"},
}
REWARD = (
    "def right(completions, answer, **_):\n    return [float(c.strip() == a) for c, a in zip(completions, answer)]\n"
)


def model_folder(folder: Path) -> str:
    """A small random Llama and its tokenizer."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {t: i for i, t in enumerate(["<s>", "</s>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=160,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def right(folder: str, rows: list[dict[str, str]]) -> np.ndarray:
    """(rows,) whether the greedy answer is the right one."""
    import torch

    from penchant.models.load import load_causal_model, load_tokenizer
    from penchant.models.options import ModelConfig

    tokenizer = load_tokenizer(folder)
    model = load_causal_model(ModelConfig(path=folder), torch.device("cpu"))
    prompts = [[tokenizer.bos_token_id, *tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]] for r in rows]
    said = greedy(model, tokenizer, prompts, max_new_tokens=4)
    return np.array([float(s.strip() == r["answer"]) for s, r in zip(said, rows, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sft-epochs", type=float, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(MOST) for b in range(MOST)]
    random.Random(0).shuffle(rows)
    test, train = rows[:TEST], rows[TEST:]
    prompts = write(args.output / "prompts.jsonl", train)
    shown = write(
        args.output / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["answer"]} for r in train[:SHOWN]]
    )
    (args.output / "checked.py").write_text(REWARD)
    common = {
        "evaluation": {"samples": 0, "kl_prompts": 0, "at_start": False, "every": None},
        "checkpoint": {"keep_last": 1},
    }
    start = model_folder(args.output / "model")
    sft = api.train(
        {
            **common,
            "model": {"path": start, "dtype": "fp32"},
            "data": {"path": shown, "max_length": 32},
            "loss": "sft",
            "train": {"epochs": args.sft_epochs, "batch_size": 44, "lr": 3e-3, "tokens_per_step": 2048},
            "output": str(args.output / "sft"),
        },
        quiet=True,
    )
    made: dict[tuple[str, int], str] = {}
    for name in args.methods.split(","):
        for seed in range(args.seeds):
            result = api.train(
                {
                    **common,
                    "model": {"path": str(sft.model), "dtype": "fp32"},
                    "data": {"path": prompts, "max_length": 16},
                    "algorithm": {**METHODS[name], "samples": 8, "max_new_tokens": 4},
                    "reward": f"{args.output / 'checked.py'}:right",
                    "train": {
                        "epochs": 1000,
                        "max_steps": args.steps,
                        "batch_size": 32,
                        "lr": 1e-3,
                        "tokens_per_step": 8192,
                        "seed": seed,
                    },
                    "output": str(args.output / f"{name}-{seed}"),
                },
                quiet=True,
            )
            made[name, seed] = str(result.model)
    # the held-out rows are read here, and nowhere else
    before = right(str(sft.model), test)
    print(
        f"{len(train)} training prompts, {SHOWN} of them with answers for SFT; {TEST} held-out sums; {args.steps} steps of 32 prompts x 8\n"
    )
    print("| method | seed | exact match before | after | change |\n|---|---|---|---|---|")
    for (name, seed), folder in made.items():
        after = right(folder, test)
        b, a = share_ci(before, draws=2000), share_ci(after, draws=2000)
        gain = after - before
        half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
        print(
            f"| {name} | {seed} | {b.estimate:.3f} [{b.low:.3f}, {b.high:.3f}] | {a.estimate:.3f} [{a.low:.3f}, {a.high:.3f}] "
            f"| {gain.mean():+.3f} [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}] |"
        )


if __name__ == "__main__":
    main()
