"""`penchant compare`."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """The command's arguments."""
    compare = commands.add_parser(
        "compare", help="compare runs with their start and with each other: figures, paired tests, a verdict in words"
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in train.seed alone are one setting"
    )
    compare.add_argument(
        "--reward", help="any reward: sentiment, path.py:function, a reward model's run (default: none)"
    )
    compare.add_argument(
        "--also", action="append", default=[], metavar="NAME", help="another reward beside it; may be given again"
    )
    compare.add_argument(
        "--judge", metavar="JUDGE", help="who decides between two answers: path.py:function, or http://HOST:PORT/v1"
    )
    compare.add_argument("--judge-model", metavar="NAME", help="the endpoint's model")
    compare.add_argument(
        "--judge-key-env", metavar="NAME", help="variable that holds its key (default: OPENAI_API_KEY)"
    )
    compare.add_argument("--judge-instruction", metavar="FILE", help="a template in place of the built-in one")
    compare.add_argument("--judge-parameters", metavar="JSON", help="of its sampling, in place of the built-in ones")
    compare.add_argument("--judge-concurrency", metavar="N", type=int, help="questions at a time (default: 4)")
    compare.add_argument("--against", metavar="RUN", help="what all are compared with (default: their common start)")
    compare.add_argument("--prompts", type=int, default=200, help="held-out prompts (default: 200)")
    compare.add_argument("--samples", type=int, default=1, help="completions of each prompt (default: 1)")
    compare.add_argument("--max-new-tokens", type=int, default=64, help="tokens of a completion (default: 64)")
    compare.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    compare.add_argument("--step", help="best, last or a step's number (default: best where one is tracked, else last)")
    compare.add_argument("--data", metavar="FILE", help="test rows; each reading is written down beside the file")
    compare.add_argument("--output", metavar="FOLDER", help="where both files go (default: beside the first run)")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--quiet", action="store_true", help="no progress")
    compare.set_defaults(handler=_compare, allocator=True)


def _compare(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.errors import ConfigError
    from penchant.judges import OF_ENDPOINTS, JudgeOptions

    of_judge = {name: getattr(args, f"judge_{name}") for name in OF_ENDPOINTS}
    given = [OF_ENDPOINTS[name] for name, value in of_judge.items() if value is not None]
    if args.judge is None and given:
        raise ConfigError(given[0], "is given without --judge", "name the judge")
    result = api.compare(
        *args.runs,
        reward=args.reward,
        also=args.also,
        judge=None if args.judge is None else JudgeOptions(args.judge, **of_judge),
        against=args.against,
        prompts=args.prompts,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        step=args.step,
        data=args.data,
        output=args.output,
        quiet=args.quiet or args.json,
    )
    if args.json:
        import json

        print(json.dumps(result.figures, indent=1, ensure_ascii=False))
        return 0
    if not args.quiet:
        print(f"penchant: written to {result.folder}", file=sys.stderr)
    print(result.to_text())
    print(f"report: {api.report(result.folder)}", file=sys.stderr)
    return 0
