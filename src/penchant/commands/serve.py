"""`penchant serve`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.commands.model_arguments import add_model, whole, within


def add(commands: Any) -> None:
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
    parser.set_defaults(handler=run, allocator=True)


def run(args: argparse.Namespace) -> int:
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
