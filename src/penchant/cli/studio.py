"""`penchant studio`."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

from penchant.base.text import for_terminal, unescaped
from penchant.cli.arguments import add_arguments
from penchant.requests import StudioRequest


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "studio", help="compare answers, follow runs and look through data in the browser, on this machine"
    )
    add_arguments(parser, StudioRequest)
    parser.set_defaults(handler=_studio)


def _studio(args: argparse.Namespace) -> int:
    from penchant.errors import ConfigError
    from penchant.judges.endpoint import key_from_environment
    from penchant.serve.server import KEY_ENV, Server, check_host, listen, require_server, server_url, set_up_logging

    require_server("studio")
    key = key_from_environment(KEY_ENV)
    local = check_host(args.host, key)
    folder = Path(args.folder).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(args.folder, "is not a folder", "give the folder that holds your runs and data")
    sock = listen(args.host, args.port)
    try:
        from penchant.studio.app import Studio

        studio = Studio(folder, local=local) if key is None else Studio(folder, token=key, local=local)
        server = Server(studio, sock)
    except BaseException:
        sock.close()
        raise
    set_up_logging(not args.log)
    address = server_url(sock, "/")
    if key is None:
        message = f"{for_terminal(f'studio of {folder}: open {address}')}?token={studio.token}"
        # bypasses the wrapper that hides secrets: the token is for the user who started the studio
        print(message, file=unescaped(sys.stdout), flush=True)
    else:
        print(f"studio of {folder}: open {address} and give the key in {KEY_ENV}", flush=True)
    print("Ctrl-C ends it", file=sys.stderr, flush=True)
    for area in studio.areas:
        threading.Thread(target=area.preload, daemon=True).start()
    server.run_until_signal()
    return 0
