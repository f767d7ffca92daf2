"""The `penchant` command. Heavy imports happen inside the command that needs them: `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from penchant import __version__
from penchant.cli import config, export, importing, track
from penchant.cli.data import add_audit, add_fix, add_formats, add_get, add_show
from penchant.cli.serve import add_chat, add_serve

EXIT_CODES = """exit codes:
  0  done                        3  the run stopped itself (NaN/Inf, failed step-0 check)
  1  a bug in penchant           4  interrupted; a checkpoint was written, the same command continues
  2  something you can fix    130  interrupted before there was anything to save"""

# glibc gives freed activations back to the kernel and faults them in again each step, which costs a third of the time;
# passive waiting keeps a shared machine usable, and a short spin before it saves waking a thread for every small operation (15% of a
# training step, a third of decoding); oneDNN keeps 1,024 prepared products, and a run's micro-batches rarely have one size twice: 128
# are enough for the layers of a pass and hold some hundred MB less (benchmarks/product_cache.py). All are read at process start, hence
# the re-execution.
ALLOCATOR_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}


class _Parser(argparse.ArgumentParser):
    """argparse with suggestions for mistyped commands."""

    def error(self, message: str) -> NoReturn:
        for action in self._subparsers._group_actions if self._subparsers else []:
            names = list(action.choices or ())
            given = [a for a in sys.argv[1:] if not a.startswith("-")]
            if "invalid choice" in message and given:
                near = difflib.get_close_matches(given[0], names, 1) or difflib.get_close_matches(given[-1], names, 1)
                message = f"{given[0]!r} is not a command" + (
                    f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(names)}"
                )
        self.exit(2, f"penchant: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="penchant",
        description="Preference data in, an aligned language model and the evidence for it out.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penchant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser("demo", help="see it work: align the bundled small model, offline, in about two minutes")
    demo.add_argument("--output", default="runs/demo", help="run folder (default: runs/demo)")
    demo.add_argument("--reviews", help="film reviews (JSONL with a text field) for a second held-out perplexity")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(handler=_demo, allocator=True)

    from penchant.cli import init, plan

    init.add(commands)
    plan.add(commands)

    train = commands.add_parser("train", help="train as a config says; run it again to continue after an interruption")
    _config_arguments(train, "CONFIG.yaml")
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.set_defaults(handler=_train, allocator=True, reads="run")

    pipeline = commands.add_parser(
        "pipeline", help="train several stages from one file and compare them; run it again to continue"
    )
    _config_arguments(pipeline, "PIPELINE.yaml")
    pipeline.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    pipeline.add_argument("--only", metavar="STAGE", help="one stage, whose inputs must be done")
    pipeline.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        default=[],
        help="train it anew, and every stage that uses it; their folders are moved aside (may be given again)",
    )
    pipeline.add_argument("--quiet", action="store_true", help="no progress")
    pipeline.set_defaults(handler=_pipeline, allocator=True, reads="pipeline")

    sweep = commands.add_parser(
        "sweep", help="train one config with many settings and compare them; run it again to continue"
    )
    sweep.add_argument("config", metavar="CONFIG", help="SWEEP.yaml, or a run's CONFIG.yaml")
    sweep.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="settings of every run; key.path=a,b,c makes the key vary",
    )
    sweep.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, each with its share of the cores"
    )
    sweep.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    sweep.add_argument("--quiet", action="store_true", help="no progress")
    sweep.set_defaults(handler=_sweep, allocator=True, reads="sweep")

    evaluate = commands.add_parser(
        "eval", help="figures of a run, a checkpoint, an adapter or any model: docs/eval.md defines each"
    )
    _eval_arguments(evaluate)
    evaluate.set_defaults(handler=_evaluate, allocator=True, reads="run")

    compare = commands.add_parser(
        "compare", help="compare runs with their start and with each other: figures, paired tests, a verdict in words"
    )
    _compare_arguments(compare)
    compare.set_defaults(handler=_compare, allocator=True)

    data = commands.add_parser("data", help="get data, and look at it before training on it")
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    add_get(verbs)
    add_formats(verbs)
    add_show(verbs)
    add_audit(verbs)
    add_fix(verbs)

    report = commands.add_parser(
        "report", help="write the report of runs, a sweep, a pipeline or a comparison: one HTML file"
    )
    report.add_argument("paths", nargs="+", metavar="PATH", help="folder of a run, a sweep, a pipeline or a comparison")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it (default: report.html in PATH; of several, in the current folder)",
    )
    report.set_defaults(handler=_report)

    flags = commands.add_parser("flags", help="what to know before trusting a run or a comparison, with the evidence")
    flags.add_argument(
        "path", metavar="RUN or COMPARISON", nargs="?", help="a run's folder, or one with a comparison.json"
    )
    flags.add_argument("--json", action="store_true", help="print JSON")
    flags.add_argument(
        "--rules", action="store_true", help="list the rules and their thresholds instead, as in docs/trust.md"
    )
    flags.set_defaults(handler=_flags)

    watch = commands.add_parser("watch", help="follow runs in the terminal: progress, curves, figures, last answers")
    watch.add_argument(
        "paths", nargs="+", metavar="RUN", help="folder of a run, a sweep or a pipeline; or several runs"
    )
    watch.add_argument("--once", action="store_true", help="print one frame and end")
    watch.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two frames (default: 2)")
    watch.set_defaults(handler=_watch)

    export.add(commands)
    track.add(commands)
    add_chat(commands)
    add_serve(commands)

    losses = commands.add_parser("losses", help="list the losses with their formulas and hyperparameters")
    losses.add_argument("name", nargs="?", help="one loss, with its whole description")
    losses.add_argument("--markdown", action="store_true", help="the page docs/losses.md")
    losses.set_defaults(handler=_losses)

    config.add(commands)
    importing.add(commands)
    return parser


def _config_arguments(parser: argparse.ArgumentParser, what: str, metavar: str = "CONFIG") -> None:
    parser.add_argument("config", metavar=metavar, help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one, argparse calls them required
        metavar="key.path=value",
        help="settings that override the config's",
    )


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(
        parser, "RUN, CONFIG.yaml, a checkpoint's, an adapter's or a model's folder, or a hub id", "MODEL"
    )
    parser.add_argument(
        "--step", default="last", help="of a run: last, best, 0 (the start) or a number (default: last)"
    )
    parser.add_argument("--data", metavar="FILE", help="rows to evaluate on (default: those that the run holds out)")
    parser.add_argument("--text", metavar="FILE", help="plain text: perplexity and bits per byte")
    parser.add_argument("--reference", metavar="MODEL", help="default: what it started from, where known; or none")
    parser.add_argument("--base", metavar="MODEL", help="of an adapter (default: what the adapter names)")
    parser.add_argument("--beta", type=float, help="of implicit rewards (default: the run's loss.beta, else 1)")
    parser.add_argument(
        "--exact-kl", action=_either(), default=None, help="over the whole vocabulary (default: with a reference)"
    )
    write = parser.add_argument_group("what the model writes")
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
    parser.add_argument("--output", metavar="FILE.json", help="write all figures there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--explain", action="store_true", help="say what each figure is")


def _either() -> type[argparse.Action]:
    return argparse.BooleanOptionalAction


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in train.seed alone are one setting"
    )
    parser.add_argument(
        "--reward", help="any reward: sentiment, path.py:function, a reward model's run (default: none)"
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME", help="another reward beside it; may be given again"
    )
    parser.add_argument(
        "--judge", metavar="JUDGE", help="who decides between two answers: path.py:function, or http://HOST:PORT/v1"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the endpoint's model")
    parser.add_argument("--judge-key-env", metavar="NAME", help="variable that holds its key (default: OPENAI_API_KEY)")
    parser.add_argument("--judge-instruction", metavar="FILE", help="a template in place of the built-in one")
    parser.add_argument("--judge-parameters", metavar="JSON", help="of its sampling, in place of the built-in ones")
    parser.add_argument("--judge-concurrency", metavar="N", type=int, help="questions at a time (default: 4)")
    parser.add_argument("--against", metavar="RUN", help="what all are compared with (default: their common start)")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts (default: 200)")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of a completion (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--step", help="best, last or a step's number (default: best where one is tracked, else last)")
    parser.add_argument("--data", metavar="FILE", help="test rows; each reading is written down beside the file")
    parser.add_argument("--output", metavar="FOLDER", help="where both files go (default: beside the first run)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. A person's mistake is one paragraph on stderr, never a traceback."""
    from penchant.errors import PenchantError

    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no overrides behind an option
        if not hasattr(args, "overrides") or any(r.startswith("-") or "=" not in r for r in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if getattr(args, "allocator", False):  # the command needs tensors
            _check_config(args)
            if sys.stderr.isatty() and not os.environ.get("PENCHANT_REEXECUTED"):
                print(f"penchant {args.command}: loading torch", file=sys.stderr)
            _with_allocator()
        return int(args.handler(args) or 0)
    except PenchantError as error:
        print(f"penchant: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("penchant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _check_config(args: argparse.Namespace) -> None:
    """Check the config, and that the files it names are there, before torch is imported: a mistake is answered at once.

    Raises:
        PenchantError: as the command itself would.
    """
    reads = getattr(args, "reads", None)
    if reads is None or os.environ.get("PENCHANT_REEXECUTED"):
        return
    if reads == "pipeline":
        from penchant.pipeline import load_pipeline

        load_pipeline(args.config, args.overrides)
        return
    if reads == "sweep":
        from penchant.sweep import load_sweep

        load_sweep(args.config, args.overrides)
        return
    if Path(args.config).suffix not in (".yaml", ".yml"):
        return  # `penchant eval` also takes the folder of a run or a model
    from penchant.config import load_config
    from penchant.data.read import find_file
    from penchant.models.options import check_model_path

    config = load_config(args.config, args.overrides)
    check_model_path(config.model.path)
    if args.command == "eval":
        return  # of other data, perhaps
    for path in (config.data.path, config.data.eval_path):
        for name in path if isinstance(path, (list, tuple)) else [path]:
            if name is not None:
                find_file(str(name))


def _with_allocator() -> None:
    """Start this process anew with the allocator's settings, once."""
    if sys.platform != "linux" or os.environ.get("PENCHANT_REEXECUTED") or "pytest" in sys.modules:
        return
    environment = {**ALLOCATOR_ENV, **os.environ, "PENCHANT_REEXECUTED": "1"}  # what a person has set wins
    os.execve(sys.executable, [sys.executable, "-m", "penchant", *sys.argv[1:]], environment)


def _demo(args: argparse.Namespace) -> int:
    from penchant.demo import run_demo

    return run_demo(args.output, reviews=args.reviews, seed=args.seed)


def _train(args: argparse.Namespace) -> int:
    from penchant import api

    result = api.train(args.config, *args.overrides, quiet=args.quiet)
    for name, metrics in (("before", result.before), ("after", result.after)):
        if metrics:
            print(f"{name:>6}: {_held_out_line(metrics)}")
    print(f" model: {result.model}")
    print(f"report: {result.folder / 'report.html'}")
    if result.flags:
        from penchant.metrics.flags import summary

        print(f"{summary(result.flags)}\nevidence and advice: penchant flags {result.folder}")
    return 0


def _pipeline(args: argparse.Namespace) -> int:
    from penchant import api

    if args.plan:
        print(api.pipeline_plan(args.config, *args.overrides, redo=args.redo))
        return 0
    result = api.pipeline(args.config, *args.overrides, only=args.only, redo=args.redo, quiet=args.quiet)
    print(result.to_text())
    print(f"report: {api.report(result.folder)}", file=sys.stderr)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from penchant import api

    if args.plan:
        print(api.sweep_plan(args.config, *args.overrides))
        return 0
    result = api.sweep(args.config, *args.overrides, jobs=args.jobs, quiet=args.quiet)
    print(result.to_text())
    print(f"report: {result.folder / 'report.html'}", file=sys.stderr)
    return 0


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


def _held_out_line(metrics: Any) -> str:
    parts = []
    for name, label in (
        ("eval/rewards/accuracies", "preference accuracy"),
        ("eval/rewards/margins", "margin"),
        ("eval/reward", "reward"),
        ("eval/loss", "loss"),
        ("eval/kl/policy_ref", "KL"),
        ("eval/perplexity", "perplexity"),
    ):
        if name in metrics and not (name == "eval/loss" and "eval/reward" in metrics):
            interval = metrics.get(f"{name}/ci")
            parts.append(
                f"{label} {metrics[name]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
            )
    return ", ".join(parts) + f" ({metrics['eval/rows']} held-out rows)"


def _report(args: argparse.Namespace) -> int:
    from penchant import api

    print(api.report(*args.paths, output=args.output))
    return 0


def _flags(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.errors import ConfigError
    from penchant.metrics.flags import as_text, markdown

    if args.rules:
        print(markdown(), end="")
        return 0
    if args.path is None:
        raise ConfigError("flags", "no folder is given", "give a run's folder, one with a comparison.json, or --rules")
    found = api.flags(args.path)
    if args.json:
        import json

        print(json.dumps([f.to_json() for f in found], indent=1))
    else:
        print(as_text(found))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from penchant.watch import watch

    return watch(args.paths, once=args.once, interval=args.interval)


def _losses(args: argparse.Namespace) -> int:
    from penchant.losses import page

    if args.markdown:
        print(page.markdown(), end="")
    else:
        print(page.text() if args.name is None else page.describe(args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
