"""A process of its own that starts at once: forked from this one, which has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any


class ForkedPython:
    """`subprocess.Popen([python, "-m", MODULE, ...], text=True)` with pipes for input and output, as a fork of this process."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        _, minus_m, module, *arguments = command
        assert minus_m == "-m"
        (its_input, to_it), (from_it, its_output) = os.pipe(), os.pipe()

        def child() -> None:
            for descriptor in (to_it, from_it):
                os.close(descriptor)  # else its input would never end
            os.setsid()
            os.environ.update(env)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)

        self.process = forked(child, [its_input, its_output, 2])
        for descriptor in (its_input, its_output):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(to_it, "w"), os.fdopen(from_it)

    def wait(self) -> int | None:
        self.process.join()
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


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
        if "torch" in sys.modules:  # OpenMP's other threads are not in a fork: it would wait for them for ever
            sys.modules["torch"].set_num_threads(1)
        result = call()
        sys.exit(result if isinstance(result, int) else 0)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process
