"""A model behind an OpenAI-compatible endpoint as a pairwise judge: many questions at a time, patient with an endpoint that is not."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.errors import RewardError
from penchant.judges.http import Connection, NoReply
from penchant.judges.instruction import INSTRUCTION, filled, verdict_of
from penchant.judges.protocol import Answers, Progress, Question
from penchant.judges.replies import Replies, default_folder, key_of
from penchant.judges.text import shown

PARAMETERS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 512}
READS = 2  # times that a question is put whose reply cannot be read
GIVE_UP = 8  # questions in a row without any reply
UNREAD = 3  # replies that are shown
PROBE = Question("Say hello.", "Hello! How can I help you?", "No.")


@dataclass(frozen=True)
class EndpointJudge:
    """A model that is asked over HTTP.

    Args:
        model: as the endpoint calls it; parameters: of sampling, sent as they are; concurrency: questions at a time.
        cache: folder of replies, None: the default one.
    """

    connection: Connection
    model: str
    instruction: str = INSTRUCTION
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMETERS))
    concurrency: int = 4
    cache: Path | None = None

    @property
    def name(self) -> str:
        return shown(self.model)

    def describe(self) -> dict[str, Any]:
        """Its address, model, parameters and the SHA-256 of the instruction."""
        return {
            "kind": "endpoint",
            "endpoint": self.connection.url,
            "model": self.model,
            "parameters": dict(self.parameters),
            "instruction_sha256": hashlib.sha256(self.instruction.encode()).hexdigest(),
        }

    def check(self) -> str | None:
        """Put one small question, unless it was put before; a sentence where the reply cannot be read.

        Raises:
            RewardError: the endpoint cannot be reached or refuses. CheckpointError: replies cannot be kept.
        """
        impatient = replace(self, connection=replace(self.connection, attempts=min(2, self.connection.attempts)))
        said = impatient._ask([PROBE], None, give_up=1).unread
        return f"The judge's reply to a trial question cannot be read: '{said[0]}'." if said else None

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """The model's verdict of each question; those of earlier comparisons are read from disk.

        A reply that cannot be read is asked for once more and then counts as none.

        Raises:
            RewardError: the endpoint refuses, or gives no reply to several questions in a row; what it has said so far is kept.
        """
        return self._ask(questions, progress, give_up=GIVE_UP)

    # ---- many at a time -------------------------------------------------------------------------------------------

    def _ask(self, questions: Sequence[Question], progress: Progress | None, *, give_up: int) -> Answers:
        replies = Replies.open(self.cache or default_folder(), self.model, self.instruction, self.parameters)
        keys = [key_of(self.model, self.instruction, self.parameters, q) for q in questions]
        values = np.array([replies.known.get(k, np.nan) for k in keys], dtype=np.float64)
        todo = np.flatnonzero(np.isnan(values)).tolist()
        unread: list[str] = []
        silent = 0  # questions in a row to which nobody answered
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        futures: dict[Future[tuple[float | None, str]], int] = {
            pool.submit(self._verdict, questions[i], stop): i for i in todo
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                i = futures[future]
                try:
                    verdict, reply = future.result()
                    silent = 0
                except NoReply as error:
                    silent = silent + 1 if error.silent else 0
                    if error.final or silent >= give_up or give_up == 1:
                        raise self._refused(error) from error
                    verdict, reply = None, str(error)
                if verdict is None:
                    unread += [shown(reply[:80])] if len(unread) < UNREAD else []
                else:
                    values[i] = verdict
                    replies.keep(keys[i], verdict, reply)
                if progress is not None:
                    progress(done, len(todo))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return Answers(values, np.zeros(len(values), dtype=bool), len(questions), len(questions) - len(todo), unread)

    def _verdict(self, question: Question, stop: threading.Event) -> tuple[float | None, str]:
        body = {
            **self.parameters,
            "model": self.model,
            "messages": [{"role": "user", "content": filled(self.instruction, question)}],
        }
        reply = ""
        for _ in range(READS):
            try:
                reply = text_of(self.connection.post("/chat/completions", body, stop))
            except NoReply as error:
                if error.final:  # before another question is put
                    stop.set()
                raise
            verdict = verdict_of(reply)
            if verdict is not None:
                return verdict, reply
        return None, reply

    def _refused(self, error: NoReply) -> RewardError:
        return RewardError(
            f"judge {self.connection.url}",
            str(error),
            "mend that and run again; every verdict so far is kept and is not asked for again",
        )


def text_of(reply: Any) -> str:
    """The text in a chat completion; empty where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
