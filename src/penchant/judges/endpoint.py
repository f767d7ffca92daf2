"""A model behind an OpenAI-compatible endpoint as a pairwise judge: its cached verdicts, and patience with an endpoint that fails."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from penchant.base.files import cache_folder
from penchant.base.text import shown
from penchant.errors import CheckpointError, ConfigError, RewardError
from penchant.judges.instruction import filled, verdict_of
from penchant.judges.judge import Answers, Progress, Question
from penchant.runfolder.read import read_lines
from penchant.runfolder.values import num

# ---- verdicts on disk ----

VERSION = 1  # part of every key: raise it when the same question is put otherwise


def key_of(model: str, instruction: str, parameters: Mapping[str, Any], question: Question) -> str:
    """SHA-256 over all that a reply depends on: the model, the instruction, the parameters, the prompt, and both answers in their order."""
    parts = [VERSION, model, instruction, parameters, question.prompt, question.first, question.second]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Replies:
    """Verdicts by key, in one file a judge; each new one is a line that is appended whole.

    Args:
        path: a JSONL file of ``{"key", "verdict", "reply"}``; a damaged line is one that was never written.
    """

    path: Path
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, model: str, instruction: str, parameters: Mapping[str, Any]) -> Replies:
        """The replies of a judge so far; the file can be written.

        Raises:
            CheckpointError: it cannot.
        """
        made = json.dumps([VERSION, model, instruction, parameters], sort_keys=True)
        path = folder / f"{hashlib.sha256(made.encode()).hexdigest()[:16]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as out:
                torn = out.tell() > 0 and path.read_bytes()[-1:] != b"\n"
                out.write(b"\n" if torn else b"")
        except OSError as error:
            what = f"a judge's replies cannot be kept ({error.strerror})"
            raise CheckpointError(str(path), what, "set PENCHANT_CACHE to another folder") from error
        rows = ((row.get("key"), num(row, "verdict")) for row in read_lines(path)[0])
        return cls(path, {str(key): v for key, v in rows if key is not None and v is not None and 0.0 <= v <= 1.0})

    def keep(self, key: str, verdict: float, reply: str) -> None:
        """Write a reply down."""
        self.known[key] = verdict
        line = json.dumps({"key": key, "verdict": verdict, "reply": reply}) + "\n"
        with self.path.open("ab") as out:
            out.write(line.encode())


# ---- HTTP ----

LARGEST = 4 << 20  # bytes of a reply
LONGEST = 60.0  # seconds between two attempts
RETRIED = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 403, 404, 405)  # the same for every question
DEFAULT_KEY = "OPENAI_API_KEY"


class NoReply(Exception):
    """A question that got no reply.

    Args:
        final: no other one would get one either; silent: nobody was there, or was willing for now.
    """

    def __init__(self, what: str, *, final: bool = False, silent: bool = False) -> None:
        super().__init__(what)
        self.final, self.silent = final, silent


@dataclass(frozen=True)
class Connection:
    """An endpoint.

    Args:
        url: ``http(s)://HOST/v1``; key: sent as a bearer token, never shown; timeout: seconds without a byte.
        attempts: of one question; pause: seconds before the second attempt, twice as many before each further one.
        largest: bytes of a reply that are read.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    pause: float = 1.0
    largest: int = LARGEST

    def post(self, path: str, body: Mapping[str, Any] | None, stop: threading.Event) -> Any:
        """The JSON that the endpoint answers; None where it answers something else.

        Args:
            body: None: GET; stop: set when nobody waits any more.

        Raises:
            NoReply: none after all attempts, or refused.
        """
        data = None if body is None else json.dumps(body).encode()
        if stop.is_set():
            raise NoReply("was not asked: an earlier question was refused")
        for attempt in range(1, self.attempts + 1):
            failure, wait = self._once(path, data)
            if not isinstance(failure, str):
                return failure[0]
            # drawn, so that many waiting questions do not come back together
            pause = self.pause * 2.0 ** (attempt - 1) * random.uniform(0.75, 1.25)
            if attempt == self.attempts or stop.wait(min(LONGEST, max(wait, pause))):
                raise NoReply(f"{failure} ({attempt} attempts)" if attempt > 1 else failure, silent=True)
        raise AssertionError("at least one attempt")

    @cached_property
    def _client(self) -> Any:
        import httpx

        return httpx.Client(
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,  # a redirect would carry the key to another host
            trust_env=not is_local(self.url),  # no proxy on the way to this machine
        )

    def close(self) -> None:
        """Let its sockets go; the next question opens new ones."""
        client = self.__dict__.pop("_client", None)
        if client is not None:
            client.close()

    def _once(self, path: str, data: bytes | None) -> tuple[tuple[Any] | str, float]:
        """One attempt: the reply in a tuple, or what went wrong and the seconds that the endpoint wants to be left alone."""
        import httpx

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            with self._client.stream(
                "GET" if data is None else "POST", self.url + path, content=data, headers=headers
            ) as reply:
                received = bytearray()
                for chunk in reply.iter_bytes():
                    received += chunk
                    if len(received) > self.largest:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return f"cannot be reached ({shown(self.without_key(str(error)) or type(error).__name__)})", 0.0
        if reply.is_success:
            return (_json(received, self.largest),), 0.0
        what = f"answered {reply.status_code} {shown(reply.reason_phrase)}".rstrip()
        said = refusal(received)
        what += f": {shown(self.without_key(said)[:300])}" if said else ""
        if reply.status_code in RETRIED or reply.status_code >= 500:
            return what, _seconds(reply.headers.get("Retry-After"))
        raise NoReply(what, final=reply.status_code in HOPELESS or reply.status_code < 400)

    def without_key(self, text: str) -> str:
        """A text of the endpoint's that may repeat the key that it was sent."""
        return text.replace(self.key, "[key]") if self.key else text


def connect(url: str, key_env: str | None, where: str = "--judge", where_key: str = "--judge-key-env") -> Connection:
    """An endpoint from its address, with the key of an environment variable.

    Args:
        key_env: the variable, which must be set; None: `OPENAI_API_KEY` where it is set, and where it goes over https or stays on this machine.

        where, where_key: what sets both, in errors.

    Raises:
        ConfigError: no such address, or no key.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(where, "is not an address", "write http://HOST:PORT/v1") from error
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(where, f"{shown(url)} is not an address", "write http://HOST:PORT/v1")
    if parts.username is not None or parts.query or parts.fragment:
        how = f"leave user, password and query out; a key comes by {where_key}"
        raise ConfigError(where, "holds more than an address", how)
    address = url.rstrip("/").removesuffix("/chat/completions")
    readable = parts.scheme == "http" and not is_local(url)  # on the way: only a key that was named goes there
    key = None if key_env is None and readable else key_from_environment(key_env or DEFAULT_KEY)
    if key_env is not None and key is None:
        raise ConfigError(where_key, f"{key_env} is not set", "set that environment variable to the key")
    return Connection(address, key)


def key_from_environment(name: str) -> str | None:
    """The key in an environment variable; None where there is none.

    Raises:
        ConfigError: it holds characters that no header carries.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(name, "holds characters that no key has", "set it to the key alone")
    return key or None


def is_local(url: str) -> bool:
    """Whether the address is this machine's own."""
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(data: bytes | bytearray, largest: int = LARGEST) -> Any:
    if len(data) > largest:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def refusal(data: bytes | bytearray) -> str:
    """What a refusal says: the message in its JSON, or its text."""
    found = _json(data)
    error = found.get("error", found) if isinstance(found, dict) else found
    said = error.get("message") if isinstance(error, dict) else error
    return said if isinstance(said, str) else data[:600].decode("utf-8", "replace")


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        return 0.0


# ---- the judge ----

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
        read: what a reply says, in [0, 1], None where it cannot be read.
    """

    connection: Connection
    model: str
    instruction: str
    parameters: Mapping[str, Any]
    concurrency: int
    read: Callable[[str], float | None] = verdict_of

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
        replies = Replies.open(cache_folder("judge"), self.model, self.instruction, self.parameters)
        keys = [key_of(self.model, self.instruction, self.parameters, q) for q in questions]
        values = np.array([replies.known.get(k, np.nan) for k in keys], dtype=np.float64)
        todo = np.flatnonzero(np.isnan(values)).tolist()
        unread: list[str] = []
        silent = 0  # questions in a row to which nobody answered
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        futures = {pool.submit(self._verdict, questions[i], stop): i for i in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                i = futures[future]
                try:
                    verdict, reply = future.result()
                    silent = 0
                except NoReply as error:
                    silent = silent + 1 if error.silent else 0
                    if error.final or silent >= give_up or give_up == 1:
                        how = "fix that and run again; every verdict so far is kept and is not asked for again"
                        raise RewardError(f"judge {self.connection.url}", str(error), how) from error
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
            self.connection.close()
        return Answers(values, np.zeros(len(values), dtype=bool), len(questions), len(questions) - len(todo), unread)

    def _verdict(self, question: Question, stop: threading.Event) -> tuple[float | None, str]:
        messages = [{"role": "user", "content": filled(self.instruction, question)}]
        body = {**self.parameters, "model": self.model, "messages": messages}
        reply = ""
        for _ in range(READS):
            try:
                reply = text_of(self.connection.post("/chat/completions", body, stop))
            except NoReply as error:
                if error.final:  # before another question is put
                    stop.set()
                raise
            verdict = self.read(reply)
            if verdict is not None:
                return verdict, reply
        return None, reply


def text_of(reply: Any) -> str:
    """The text in a chat completion; empty where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
