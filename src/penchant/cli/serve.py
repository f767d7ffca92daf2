"""`penchant chat`, `penchant serve`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.base.text import unescaped
from penchant.cli.arguments import add_arguments
from penchant.requests import ChatRequest, ServeRequest

if TYPE_CHECKING:
    from penchant.serve.chat import Terminal


def add(commands: Any) -> None:
    _add_chat(commands)
    _add_serve(commands)


# ---- `penchant chat` ----


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to a model in the terminal, or to two side by side")
    add_arguments(parser, ChatRequest)
    parser.set_defaults(handler=_chat, allocator=True)


def _chat(args: argparse.Namespace) -> int:
    from penchant.errors import ConfigError
    from penchant.serve.chat import Chat, ChatOptions, safe
    from penchant.serve.model import load_chat_model
    from penchant.serve.stream import Sampling

    for argument, name in (
        (args.prefer, "--prefer"),
        (args.blind, "--blind"),
        (args.against_step != "last", "--against-step"),
    ):
        if argument and args.against is None:
            raise ConfigError(name, "is given without a second model", "name it with --against")
    if args.prefer and not args.prefer.endswith(".jsonl"):
        how = "give it that ending"
        raise ConfigError("--prefer", f"{args.prefer} does not end in .jsonl", how)
    if args.prefer and not Path(args.prefer).expanduser().parent.is_dir():
        what = f"{Path(args.prefer).parent}: no such folder"
        raise ConfigError("--prefer", what, "make it first, or give another file")
    terminal = _terminal()
    sources = [(args.model, args.step, args.base)]
    sources += [] if args.against is None else [(args.against, args.against_step, None)]
    models = []
    for argument, step, base in sources:
        terminal.note(f"loading {safe(argument)} ...")
        models.append(
            load_chat_model(
                argument, step=step, base=base, template=args.template, dtype=args.dtype, device=args.device
            )
        )
    if args.model == args.against:  # one run at two steps
        for chat_model, (argument, step, _) in zip(models, sources, strict=True):
            chat_model.name = f"{argument} (step {step})"
    if len({v.style.keeps_history for v in models}) == 2:
        what = "one model has a chat template and the other has none"
        raise ConfigError("--against", what, "give --template transcript or plain")
    if args.system and not models[0].style.keeps_history:
        raise ConfigError("--system", "plain text has no system prompt", "leave it out, or give --template transcript")
    tools = _tools(args.tools) if args.tools else ()
    sampling = Sampling(args.max_new_tokens, 1, args.temperature, args.top_p, args.top_k, args.seed)
    for style in {v.style.name: v.style for v in models}.values():
        terminal.note(style.note)
    terminal.note("/help lists the commands")
    return Chat(models, ChatOptions(sampling, args.system, args.prefer, args.blind, tools), terminal).run()


def _tools(path: str) -> tuple[Any, ...]:
    from pathlib import Path

    from penchant.data.layouts.fields import RowError, tools
    from penchant.errors import ConfigError

    try:
        tools_json = tools({"tools": Path(path).read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError, RowError) as error:
        what = f"{path} cannot be used ({error})"
        raise ConfigError("--tools", what, "give a file with a JSON list of tools, as the column of a row") from error
    return tuple(json.loads(tools_json or "[]"))


def _terminal() -> Terminal:
    from penchant.serve.chat import Terminal

    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        with suppress(ImportError):  # line editing and history, if Python has readline
            import readline  # noqa: F401
        return Terminal(lambda: input("> "), unescaped(sys.stdout), sys.stdout, True)
    return Terminal(_read_line, sys.stdout, sys.stderr, False)


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


# ---- `penchant serve` ----


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model on 127.0.0.1 with an OpenAI-compatible API")
    add_arguments(parser, ServeRequest)
    parser.set_defaults(handler=_serve, allocator=True)


def _serve(args: argparse.Namespace) -> int:
    from penchant.judges.endpoint import key_from_environment
    from penchant.serve.server import (
        KEY_ENV,
        Server,
        check_host,
        listen,
        require_server,
        served_name,
        server_url,
        set_up_logging,
    )

    key = key_from_environment(KEY_ENV)
    local = check_host(args.host, key)
    sock = listen(args.host, args.port)  # before the model is loaded, so that a port in use is reported at once
    try:
        require_server()
        from penchant.serve.chat import safe
        from penchant.serve.model import load_chat_model
        from penchant.serve.routes import App, Limits, Scheduler

        print(f"loading {safe(args.model)} ...", file=sys.stderr, flush=True)
        chat_model = load_chat_model(
            args.model,
            step=args.step,
            base=args.base,
            template=args.template,
            fallback_style="transcript",
            dtype=args.dtype,
            device=args.device,
        )
        name = served_name(args.model, args.name)
        limits = Limits(max_tokens=args.max_tokens, body=args.max_body, seconds=args.timeout)
        server = Server(App(chat_model, name, Scheduler(args.at_once, args.waiting), key, local, limits), sock)
    except BaseException:
        sock.close()
        raise
    set_up_logging(args.quiet)
    print(f"messages: {chat_model.style.note}", file=sys.stderr)
    print(f"serving {safe(name)} at {server_url(sock)} ({'with' if key else 'without'} a key); Ctrl-C ends", flush=True)
    server.run_until_signal()
    return 0
