"""`penchant chat`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from penchant.commands.model_arguments import add_model, whole, within

if TYPE_CHECKING:
    from penchant.serve.chat import Terminal


def add(commands: Any) -> None:
    """Put `chat` on the command line."""
    parser = commands.add_parser("chat", help="talk to a model in the terminal, or to two side by side")
    add_model(parser)
    parser.add_argument("--against", metavar="RUN", help="a second model that answers the same")
    parser.add_argument("--against-step", default="last", metavar="STEP", help="its step, where it is a run")
    parser.add_argument("--prefer", metavar="FILE.jsonl", help="where /left and /right go (default: preferences.jsonl)")
    parser.add_argument("--blind", action="store_true", help="do not show which answer is whose")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--temperature", type=within(0), default=0.7, help="0: the likeliest token (default: 0.7)")
    parser.add_argument("--top-p", type=within(0, 1, open_low=True), default=1.0, help="default: 1")
    parser.add_argument("--top-k", type=whole(0), default=0, help="default: 0, all tokens")
    parser.add_argument("--max-new-tokens", type=whole(1), default=256, help="tokens of an answer (default: 256)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the draws (default: 0)")
    parser.set_defaults(handler=run, allocator=True)


def run(args: argparse.Namespace) -> int:
    """Load and talk."""
    from penchant.errors import ConfigError
    from penchant.serve.chat import Chat, ChatOptions, safe
    from penchant.serve.model import load_chat_model
    from penchant.serve.stream import Sampling

    for given, name in (
        (args.prefer, "--prefer"),
        (args.blind, "--blind"),
        (args.against_step != "last", "--against-step"),
    ):
        if given and args.against is None:
            raise ConfigError(name, "is given without a second model", "name it with --against")
    if args.prefer and not args.prefer.endswith(".jsonl"):
        raise ConfigError(
            "--prefer", f"{args.prefer} does not end in .jsonl", "penchant tells a file's kind by its ending"
        )
    terminal = _terminal()
    which = [(args.model, args.step, args.base)]
    which += [] if args.against is None else [(args.against, args.against_step, None)]
    models = []
    for given, step, base in which:
        terminal.note(f"loading {safe(given)} ...")
        models.append(
            load_chat_model(given, step=step, base=base, template=args.template, dtype=args.dtype, device=args.device)
        )
    if len(models) == 2 and step_matters(which):
        for chat_model, (given, step, _) in zip(models, which, strict=True):
            chat_model.name = f"{given} (step {step})"
    if len({v.style.remembers for v in models}) == 2:
        raise ConfigError(
            "--against", "one model has a chat template and the other has none", "give --template transcript or plain"
        )
    if args.system and not models[0].style.remembers:
        raise ConfigError("--system", "plain text has no system prompt", "leave it out, or give --template transcript")
    sampling = Sampling(args.max_new_tokens, 1, args.temperature, args.top_p, args.top_k, args.seed)
    for style in {v.style.name: v.style for v in models}.values():
        terminal.note(style.note)
    terminal.note("/help lists the commands")
    return Chat(models, ChatOptions(sampling, args.system, args.prefer, args.blind), terminal).run()


def step_matters(which: list[tuple[str, str, str | None]]) -> bool:
    """Whether two models are one run at two steps."""
    return which[0][0] == which[1][0]


def _terminal() -> Terminal:
    from penchant.serve.chat import Terminal, use_history

    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        use_history()
        return Terminal(lambda: input("> "), sys.stdout, sys.stdout, True)
    return Terminal(_next_line, sys.stdout, sys.stderr, False)


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
