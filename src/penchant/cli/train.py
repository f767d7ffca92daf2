"""`penchant train`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import add_config


def add(commands: Any) -> None:
    """The command's arguments."""
    train = commands.add_parser("train", help="train from a config; run it again to resume after an interruption")
    add_config(train, "CONFIG.yaml")
    train.add_argument("--quiet", action="store_true", help="do not show progress")
    train.set_defaults(handler=_train, allocator=True, reads="run")


def _train(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.runfolder.read import read
    from penchant.runfolder.values import unchanged

    result = api.train(args.config, *args.overrides, quiet=args.quiet)
    for name, metrics in (("before", result.before), ("after", result.after)):
        if metrics:
            print(f"{name:>6}: {_held_out_line(metrics)}")
    print(f" model: {result.model}")
    print(f"report: {result.folder / 'report.html'}")
    if result.flags:
        from penchant.metrics.flags import summary

        print(f"{summary(result.flags)}\nevidence and advice: penchant flags {result.folder}")
    from penchant.report import headline

    print(f"result: {headline(result.folder)}")
    same, of = unchanged(read(result.folder).samples)
    if same:
        print(f"        {same} of {of} sampled answers are unchanged by training")
    return 0


def _held_out_line(metrics: Any) -> str:
    from penchant.base.text import counted
    from penchant.metrics.names import figure_text

    parts = []
    for name, label in (
        ("eval/rewards/accuracies", "preference accuracy"),
        ("eval/rewards/margins", "margin"),
        ("eval/reward", "reward"),
        ("eval/win_rate", "win rate"),
        ("eval/loss", "loss"),
        ("eval/kl/k3", "KL"),
        ("eval/perplexity", "perplexity"),
    ):
        if name in metrics and not (name == "eval/loss" and "eval/reward" in metrics):
            parts.append(f"{label} {figure_text(metrics, name)}")
    return ", ".join(parts) + f" ({counted(metrics['eval/rows'], 'held-out row')})"
