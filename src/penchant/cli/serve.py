"""`penchant chat`, `penchant serve`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from penchant.cli.arguments import add_model, whole, within

if TYPE_CHECKING:
    from penchant.serve.chat import Terminal


def add(commands: Any) -> None:
    """Both commands' arguments."""
    add_chat(commands)
    add_serve(commands)


# ---- `penchant chat` ----


def add_chat(commands: Any) -> None:
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
    parser.set_defaults(handler=run_chat, allocator=True)


def run_chat(args: argparse.Namespace) -> int:
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


# ---- `penchant serve` ----


def add_serve(commands: Any) -> None:
    """Put `serve` on the command line."""
    parser = commands.add_parser("serve", help="an OpenAI-compatible endpoint of a model on 127.0.0.1")
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1; any other needs PENCHANT_API_KEY in the environment"
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0: one that is free (default: 8000)")
    parser.add_argument("--name", help="of the model, as clients call it (default: the folder's, or the hub id)")
    parser.add_argument("--at-once", type=whole(1, 64), default=4, help="prompts that take turns (default: 4)")
    parser.add_argument("--waiting", type=whole(0), default=64, help="prompts that may wait for a turn (default: 64)")
    parser.add_argument("--max-tokens", type=whole(1), default=4096, help="of one answer at most (default: 4096)")
    parser.add_argument(
        "--max-body", type=whole(1), default=4 << 20, metavar="BYTES", help="of a request (default: 4 MiB)"
    )
    parser.add_argument(
        "--timeout", type=within(0, open_low=True), default=600.0, metavar="SECONDS", help="of a request (default: 600)"
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each request")
    parser.set_defaults(handler=run_serve, allocator=True)


def run_serve(args: argparse.Namespace) -> int:
    """Bind, load and serve until a signal."""
    import sys

    from penchant.serve.server import (
        Server,
        address_of,
        check_host,
        key_from_environment,
        listen,
        log_to,
        require_server,
        served_name,
    )

    key = key_from_environment()
    local = check_host(args.host, key)
    sock = listen(args.host, args.port)  # before the model is loaded: a port that is taken is told at once
    try:
        require_server()
        from penchant.serve.app import App, Limits, Scheduler
        from penchant.serve.chat import safe
        from penchant.serve.model import load_chat_model

        print(f"loading {safe(args.model)} ...", file=sys.stderr, flush=True)
        chat_model = load_chat_model(
            args.model,
            step=args.step,
            base=args.base,
            template=args.template,
            otherwise="transcript",
            dtype=args.dtype,
            device=args.device,
        )
        name = served_name(args.model, args.name)
        limits = Limits(max_tokens=args.max_tokens, body=args.max_body, seconds=args.timeout)
        server = Server(App(chat_model, name, Scheduler(args.at_once, args.waiting), key, local, limits), sock)
    except BaseException:
        sock.close()
        raise
    log_to(args.quiet)
    print(f"messages: {chat_model.style.note}", file=sys.stderr)
    print(f"serving {safe(name)} at {address_of(sock)} ({'with' if key else 'without'} a key); Ctrl-C ends", flush=True)
    server.run_until_signal()
    return 0
