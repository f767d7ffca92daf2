"""Signals that end the program as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupted_by(*names: str) -> Iterator[None]:
    """Raise KeyboardInterrupt at these signals (``SIGTERM``), where the system has them, so that the program ends in order."""

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signal handlers can only be set there
        numbers = [getattr(signal, n) for n in names if hasattr(signal, n)]
        previous = {n: signal.signal(n, interrupt) for n in numbers}
    try:
        yield
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
