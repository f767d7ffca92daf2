"""`penchant init`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import add_columns, column_pairs


def add(commands: Any) -> None:
    init = commands.add_parser(
        "init", help="write a first config from three answers (data, model, goal) or from options"
    )
    init.add_argument("--data", metavar="FILE", help="preference data: a file or a hub id")
    init.add_argument(
        "--eval-data",
        metavar="FILE",
        help="file with held-out rows (default: validation.jsonl beside a train.jsonl of `data get`, "
        "else a part of the data; none: always a part of the data)",
    )
    add_columns(init)
    init.add_argument("--model", metavar="PATH", help="a model's folder or hub id")
    init.add_argument("--goal", metavar="GOAL", help="dpo, simpo, orpo, reward, kto, pmpo, sft, ppo, rloo or grpo")
    init.add_argument(
        "--reward",
        metavar="NAME",
        help="for ppo, rloo and grpo: sentiment, words, path.py:function, a run (default: accuracy for rows with an answer, else sentiment)",
    )
    init.add_argument(
        "--lora", action="store_true", help="train an adapter (the default for a model that is large for this machine)"
    )
    init.add_argument("--run-folder", metavar="FOLDER", help="where the run will write (default: runs/GOAL)")
    init.add_argument("--output", metavar="FILE", default="run.yaml", help="the config to write (default: run.yaml)")
    init.set_defaults(handler=run, parser=init)


def run(args: argparse.Namespace) -> int:
    """Ask for what is not given, write the config, and print the next steps."""
    from pathlib import Path

    from penchant.errors import ConfigError
    from penchant.init import propose, write_config
    from penchant.init.ask import collect_answers, terminal_asker
    from penchant.rewards.functions import check_reward

    if Path(args.output).exists():  # before any question is asked
        raise ConfigError(args.output, "already exists", "give another --output; init never overwrites")
    if args.reward is not None:  # before any question is asked
        check_reward(args.reward)
    columns = column_pairs(args.columns)
    answers = collect_answers(
        terminal_asker(), args.data, args.model, args.goal, eval_data=args.eval_data, columns=columns
    )
    start = propose(
        answers.data,
        answers.model,
        answers.goal,
        reward=args.reward,
        output=args.run_folder,
        held_out=answers.held_out,
        lora=args.lora,
    )
    path = write_config(start, args.output)
    if start.remark:
        print(f"note:    {start.remark}")
    print(
        f"written: {path}\nnext:    penchant data audit {path}\n         penchant plan {path}\n         penchant train {path}"
    )
    return 0
