"""Child processes that start fast, as forks of this process, which has already imported torch."""

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
    """Like `subprocess.Popen([python, "-m", MODULE, ...], text=True)` with pipes for input and output, but as a fork."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        _, minus_m, module, *arguments = command
        assert minus_m == "-m"
        (its_input, to_it), (from_it, its_output) = os.pipe(), os.pipe()

        def child() -> None:
            for descriptor in (to_it, from_it):
                os.close(descriptor)  # otherwise its input would never end
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
    """Run `call` in a fork. An int that it returns is the exit code.

    Args:
        streams: descriptors that become its stdin, stdout and stderr.
    """

    def child() -> None:
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        if streams:
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, 1) for n, mode in enumerate("rww"))
        # a suite in the background ignores SIGINT, and its children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "torch" in sys.modules:  # a fork lacks OpenMP's other threads, and would wait for them forever
            sys.modules["torch"].set_num_threads(1)
        result = call()
        sys.exit(result if isinstance(result, int) else 0)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process
