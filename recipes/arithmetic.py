"""Arithmetic with verifiable answers: exact match before and after GRPO, GSPO, DAPO and RLOO, three seeds each.

    python recipes/arithmetic.py runs/arithmetic

A Llama of 100,000 parameters with one token per character learns sums (`17+25=` -> `42`) by SFT, stopped while it solves less than
a third of the held-out sums. Each method then trains it on SFT's prompts with a reward of 1 if the completion equals the column
`answer` and 0 otherwise. For comparison, SFT continues for the same number of steps with the same number of prompts. The held-out
sums are evaluated once, at the end. It takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from penchant import api
from penchant.metrics.stats import share_ci
from penchant.rollout.generate import greedy

MOST, TEST = 50, 600  # summands are below MOST; TEST sums are held out
METHODS = ("grpo", "gspo", "dapo", "rloo", "sft")  # sft continues on the answers, for comparison
REWARD = "def right(completions, answer, **_):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"


def model_folder(folder: Path) -> str:
    """Save a small random Llama and its tokenizer to `folder`."""
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
    """Whether the greedy completion of each row is correct, (rows,) of 0 or 1."""
    import torch

    from penchant.models.load import load_causal_model, load_tokenizer
    from penchant.models.options import ModelConfig

    tokenizer = load_tokenizer(folder)
    model = load_causal_model(ModelConfig(path=folder), torch.device("cpu"))
    prompts = [[tokenizer.bos_token_id, *tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]] for r in rows]
    completions = greedy(model, tokenizer, prompts, max_new_tokens=4)
    return np.array([float(s == r["answer"]) for s, r in zip(completions, rows, strict=True)])


def rewards_of(folder: Path, steps: int) -> str:
    """Mean reward of sampled completions in the first and the last `steps` steps, as text; "" for SFT."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [x["reward"] for x in lines if "reward" in x]
    return f"{np.mean(rewards[:steps]):.3f}, {np.mean(rewards[-steps:]):.3f}" if rewards else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(MOST) for b in range(MOST)]
    random.Random(1).shuffle(rows)
    test, train = rows[:TEST], rows[TEST:]
    prompts = write(args.output / "prompts.jsonl", train)
    answered = write(args.output / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["answer"]} for r in train])
    (args.output / "checked.py").write_text(REWARD)
    common = {
        "data": {"path": prompts, "max_length": 16},
        "evaluation": {"samples": 0, "kl_prompts": 0, "at_start": False, "every": None},
        "checkpoint": {"keep_last": 1},
    }
    training = {"epochs": 1000, "tokens_per_step": 8192}
    sft = api.train(
        {
            **common,
            "model": {"path": model_folder(args.output / "model"), "dtype": "fp32"},
            "data": {"path": answered, "max_length": 16},
            "loss": "sft",
            "train": training | {"max_steps": args.sft_steps, "batch_size": 64, "lr": 3e-3, "schedule": "constant"},
            "output": str(args.output / "sft"),
        },
        quiet=True,
    )
    checked = {"reward": f"{args.output / 'checked.py'}:right"}
    sft_settings = {"loss": "sft", "data": {"path": answered, "max_length": 16}}
    results: dict[tuple[str, int], api.TrainResult] = {}
    for name in args.methods.split(","):
        for seed in range(args.seeds):
            result = api.train(
                {
                    **common,
                    "model": {"path": str(sft.model), "dtype": "fp32"},
                    **(
                        sft_settings
                        if name == "sft"
                        else checked | {"algorithm": {"name": name, "samples": 8, "max_new_tokens": 4}}
                    ),
                    "train": training | {"max_steps": args.steps, "batch_size": 32, "lr": args.lr, "seed": seed},
                    "output": str(args.output / f"{name}-{seed}"),
                },
                quiet=True,
            )
            results[name, seed] = result
    # the held-out sums are used only from here on
    before = right(str(sft.model), test)
    start = share_ci(before, draws=2000)
    print(
        f"{len(train)} training prompts, {TEST} held-out sums; {args.sft_steps} steps of SFT, then {args.steps} steps of 32 prompts x 8 completions\n"
        f"held-out accuracy after SFT: {start.estimate:.3f} [{start.low:.3f}, {start.high:.3f}]\n"
    )
    print(
        "| method | seed | held-out accuracy | change | training reward, first and last 20 steps |\n|---|---|---|---|---|"
    )
    for (name, seed), result in results.items():
        after = right(str(result.model), test)
        accuracy, change = share_ci(after, draws=2000), after - before
        half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
        print(
            f"| {name} | {seed} | {accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] "
            f"| {change.mean():+.3f} [{change.mean() - half:+.3f}, {change.mean() + half:+.3f}] | {rewards_of(result.folder, 20)} |"
        )


if __name__ == "__main__":
    main()
