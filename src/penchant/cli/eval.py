"""`penchant eval`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import add_config


def add(commands: Any) -> None:
    """The command's arguments."""
    evaluate = commands.add_parser(
        "eval", help="figures of a run, a checkpoint, an adapter or any model: docs/eval.md defines each"
    )
    add_config(evaluate, "RUN, CONFIG.yaml, a checkpoint's, an adapter's or a model's folder, or a hub id", "MODEL")
    evaluate.add_argument(
        "--step", default="last", help="of a run: last, best, 0 (the start) or a number (default: last)"
    )
    evaluate.add_argument("--data", metavar="FILE", help="rows to evaluate on (default: those that the run holds out)")
    evaluate.add_argument("--text", metavar="FILE", help="plain text: perplexity and bits per byte")
    evaluate.add_argument("--reference", metavar="MODEL", help="default: what it started from, where known; or none")
    evaluate.add_argument("--base", metavar="MODEL", help="of an adapter (default: what the adapter names)")
    evaluate.add_argument("--beta", type=float, help="of implicit rewards (default: the run's loss.beta, else 1)")
    evaluate.add_argument(
        "--exact-kl", action=_either(), default=None, help="over the whole vocabulary (default: with a reference)"
    )
    write = evaluate.add_argument_group("what the model writes")
    write.add_argument("--generate", type=int, metavar="N", help="write to so many prompts")
    write.add_argument("--samples", type=int, default=1, help="completions of each prompt (default: 1)")
    write.add_argument("--max-new-tokens", type=int, default=64, help="tokens of a completion (default: 64)")
    write.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (default: 1)")
    write.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    write.add_argument("--reward", help="any reward: sentiment, path.py:function, a reward model's run")
    write.add_argument(
        "--also", action="append", default=[], metavar="REWARD", help="another reward (may be given again)"
    )
    write.add_argument("--overlap", action=_either(), default=True, help="BLEU and ROUGE against the data's answers")
    write.add_argument("--rouge-stemmer", action="store_true", help="Porter's stemmer for ROUGE")
    write.add_argument("--samples-output", metavar="FILE.jsonl", help="write the completions there")
    evaluate.add_argument("--output", metavar="FILE.json", help="write all figures there")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--explain", action="store_true", help="say what each figure is")
    evaluate.set_defaults(handler=_evaluate, allocator=True, reads="run")


def _evaluate(args: argparse.Namespace) -> int:
    from penchant import api

    metrics = api.evaluate(
        args.config,
        *args.overrides,
        quiet=args.json,
        step=args.step,
        data=args.data,
        text=args.text,
        reference=args.reference,
        base=args.base,
        generate=args.generate,
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        reward=args.reward,
        also=args.also,
        exact_kl=args.exact_kl,
        overlap=args.overlap,
        beta=args.beta,
        stemmer=args.rouge_stemmer,
        output=args.output,
        samples_output=args.samples_output,
    )
    if args.json:
        import json

        from penchant.runfolder import finite

        print(json.dumps(finite(metrics), indent=1))
        return 0
    from penchant.base.text import printable
    from penchant.evaluate.output import explained, table

    parts = [table(metrics), "\n".join(map(printable, metrics.get("notes", [])))]
    if "tables" in metrics:
        from penchant.metrics.heldout import as_text

        parts.append(as_text(metrics["tables"]))
    if args.explain:
        parts.append(explained(metrics))
    print("\n\n".join(p for p in parts if p))
    return 0


def _either() -> type[argparse.Action]:
    return argparse.BooleanOptionalAction
