"""One thread that the model belongs to: requests take turns token by token, so each gets exactly what it would get alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from penchant.talk.answer import Answers, Piece


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is read: its tokens."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """All answers are there: the tokens written."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Something went wrong in this request; others go on."""

    error: Exception


Event = Started | Piece | Ended | Failed


class Busy(Exception):
    """As many requests wait as may."""


class ShuttingDown(Exception):
    """The server ends."""


@dataclass(eq=False)
class Job:
    """One prompt.

    Args:
        start: reads the prompt, in the model's thread; tell: called there with every event. `cancel` ends it, without an event.
    """

    start: Callable[[], Answers]
    tell: Callable[[Event], None]
    answers: Answers | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def advance(self) -> bool:
        """One step; whether there are more."""
        if self.cancelled:
            return False
        try:
            if self.answers is None:
                self.answers = self.start()
                self.tell(Started(len(self.answers.prompt)))
            for piece in self.answers.step():
                self.tell(piece)
            if self.answers.done:
                self.tell(Ended(self.answers.tokens))
                return False
        except Exception as error:  # one request's failure must not end the thread
            self.tell(Failed(error))
            return False
        return True


class Scheduler:
    """The model's thread.

    Args:
        at_once: prompts that take turns; waiting: prompts that wait for a turn.
    """

    def __init__(self, at_once: int = 4, waiting: int = 64) -> None:
        self._at_once, self._most = at_once, waiting
        self._active: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all jobs of a request.

        Raises:
            Busy: too many wait. ShuttingDown: none is taken any more.
        """
        with self._changed:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            self._waiting = deque(j for j in self._waiting if not j.cancelled)
            free = self._at_once - len(self._active) + self._most - len(self._waiting)
            if len(jobs) > free:
                raise Busy("too many requests are waiting; try again in a moment")
            self._waiting.extend(jobs)
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """(prompts that are being answered, prompts that wait)."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def close(self, timeout: float = 30.0) -> None:
        """End every request, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._active or self._waiting):
                    self._changed.wait()
                if self._closing:
                    left = [*self._active, *self._waiting]
                    self._active, self._waiting = [], deque()
                    break
                while self._waiting and len(self._active) < self._at_once:
                    self._active.append(self._waiting.popleft())
                turn = list(self._active)
            going = [job for job in turn if job.advance()]
            with self._changed:
                self._active = going
        for job in left:
            with suppress(Exception):  # whoever listened may be gone
                job.tell(Failed(ShuttingDown("the server is shutting down")))
