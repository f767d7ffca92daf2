"""A process of its own that starts at once: forked from this one, which has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess


def forked(call: Callable[[], object], streams: Sequence[int] = ()) -> BaseProcess:
    """Start `call`; a number that it returns is the exit code.

    Args:
        streams: descriptors that become its input, output and errors.
    """

    def child() -> None:
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        if streams:
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, 1) for n, mode in enumerate("rww"))
        # a suite that runs in the background ignores Ctrl-C, and its children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
        result = call()
        sys.exit(result if isinstance(result, int) else 0)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process
