"""A pairwise judge behind an OpenAI-compatible endpoint, with cached verdicts and retries."""

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
from penchant.judges.instruction import fill_instruction, parse_verdict
from penchant.judges.judge import Answers, Progress, Question
from penchant.runfolder.read import read_lines
from penchant.runfolder.values import num

# ---- verdicts on disk ----

VERSION = 1  # part of every key: increase it if the way of asking changes


def cache_key(model: str, instruction: str, parameters: Mapping[str, Any], question: Question) -> str:
    """SHA-256 of everything a reply depends on: model, instruction, parameters, prompt, and both answers in order."""
    parts = [VERSION, model, instruction, parameters, question.prompt, question.first, question.second]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class VerdictCache:
    """A cache of verdicts by key, with one append-only file per judge.

    Args:
        path: a JSONL file of ``{"key", "verdict", "reply"}``; damaged lines are ignored.
    """

    path: Path
    verdicts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, model: str, instruction: str, parameters: Mapping[str, Any]) -> VerdictCache:
        """Open a judge's cache and make sure that it can be written.

        Raises:
            CheckpointError: the file cannot be written.
        """
        settings = json.dumps([VERSION, model, instruction, parameters], sort_keys=True)
        path = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.jsonl"
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

    def add(self, key: str, verdict: float, reply: str) -> None:
        """Add a verdict to the cache."""
        self.verdicts[key] = verdict
        line = json.dumps({"key": key, "verdict": verdict, "reply": reply}) + "\n"
        with self.path.open("ab") as out:
            out.write(line.encode())


# ---- HTTP ----

MAX_REPLY_BYTES = 4 << 20  # maximum bytes of a reply
MAX_WAIT = 60.0  # maximum seconds between two attempts
RETRY_STATUSES = (408, 409, 425, 429)  # status codes that are retried, as is every 5xx
FATAL_STATUSES = (401, 403, 404, 405)  # status codes that every other question would get too
DEFAULT_KEY = "OPENAI_API_KEY"


class NoReplyError(Exception):
    """A question got no reply.

    Args:
        final: other questions would not get one either; silent: the endpoint could not be reached or was temporarily unavailable.
    """

    def __init__(self, what: str, *, final: bool = False, silent: bool = False) -> None:
        super().__init__(what)
        self.final, self.silent = final, silent


@dataclass(frozen=True)
class Connection:
    """An HTTP connection to an endpoint, with retries.

    Args:
        url: ``http(s)://HOST/v1``; key: sent as a bearer token, never shown; timeout: seconds without receiving a byte.
        attempts: maximum per question; pause: seconds before the second attempt, doubled for each further one.
        largest: maximum bytes of a reply.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    pause: float = 1.0
    largest: int = MAX_REPLY_BYTES

    def post(self, path: str, body: Mapping[str, Any] | None, stop: threading.Event) -> Any:
        """Send a request and return the JSON of the reply; None if the reply is not JSON or too large.

        Args:
            body: JSON body to POST, or None for GET; stop: set to cancel waiting requests.

        Raises:
            NoReplyError: no reply after all attempts, or the request was refused or canceled.
        """
        data = None if body is None else json.dumps(body).encode()
        if stop.is_set():
            raise NoReplyError("was not asked: an earlier question was refused")
        for attempt in range(1, self.attempts + 1):
            failure, wait = self._attempt(path, data)
            if not isinstance(failure, str):
                return failure[0]
            # with jitter, so that waiting questions do not all retry at once
            pause = self.pause * 2.0 ** (attempt - 1) * random.uniform(0.75, 1.25)
            if attempt == self.attempts or stop.wait(min(MAX_WAIT, max(wait, pause))):
                raise NoReplyError(f"{failure} ({attempt} attempts)" if attempt > 1 else failure, silent=True)
        raise AssertionError("at least one attempt")

    @property
    def client_options(self) -> dict[str, Any]:
        """How an httpx client connects: no redirects, which would carry the key to another host; no proxy for local addresses."""
        local = is_local(self.url)
        # reading the machine's certificates takes 20 ms, and a local address without https needs none
        verify = not local or urlsplit(self.url).scheme == "https"
        return {"timeout": self.timeout, "follow_redirects": False, "trust_env": not local, "verify": verify}

    @cached_property
    def _client(self) -> Any:
        import httpx

        return httpx.Client(limits=httpx.Limits(max_connections=None), **self.client_options)

    def close(self) -> None:
        """Close the sockets; the next question opens new ones."""
        client = self.__dict__.pop("_client", None)
        if client is not None:
            client.close()

    def _attempt(self, path: str, data: bytes | None) -> tuple[tuple[Any] | str, float]:
        """Make one attempt; return the reply in a 1-tuple or an error text, and the seconds to wait before retrying."""
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
            return (_parse_json(received, self.largest),), 0.0
        what = f"answered {reply.status_code} {shown(reply.reason_phrase)}".rstrip()
        message = error_message(received)
        what += f": {shown(self.without_key(message)[:300])}" if message else ""
        if reply.status_code in RETRY_STATUSES or reply.status_code >= 500:
            return what, _retry_after(reply.headers.get("Retry-After"))
        raise NoReplyError(what, final=reply.status_code in FATAL_STATUSES or reply.status_code < 400)

    def without_key(self, text: str) -> str:
        """Remove the API key from a text of the endpoint, which may echo it."""
        return text.replace(self.key, "[key]") if self.key else text


def connect(url: str, key_env: str | None, where: str = "--judge", where_key: str = "--judge-key-env") -> Connection:
    """Make a connection from an endpoint's address, with the API key from an environment variable.

    Args:
        key_env: the variable, which must be set; None: `OPENAI_API_KEY` if it is set and the address uses https or is local.
        where, where_key: names of the options for address and key in errors.

    Raises:
        ConfigError: not an address, or no key.
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
    unencrypted = parts.scheme == "http" and not is_local(url)  # in transit: only send a key that was named explicitly
    key = None if key_env is None and unencrypted else key_from_environment(key_env or DEFAULT_KEY)
    if key_env is not None and key is None:
        raise ConfigError(where_key, f"{key_env} is not set", "set that environment variable to the key")
    return Connection(address, key)


def key_from_environment(name: str) -> str | None:
    """Read an API key from an environment variable; None if unset or empty.

    Raises:
        ConfigError: it contains characters that are not allowed in a header.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(name, "holds characters that no key has", "set it to the key alone")
    return key or None


def is_local(url: str) -> bool:
    """Whether an address points to this machine."""
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a host is localhost or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_json(data: bytes | bytearray, max_bytes: int = MAX_REPLY_BYTES) -> Any:
    if len(data) > max_bytes:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def error_message(data: bytes | bytearray) -> str:
    """The error message of a refusal: from its JSON, or its text."""
    reply = _parse_json(data)
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else data[:600].decode("utf-8", "replace")


def _retry_after(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        return 0.0


# ---- the judge ----

PARAMETERS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 512}
READ_ATTEMPTS = 2  # how often a question is asked while its reply cannot be read
MAX_SILENT = 8  # consecutive questions without any reply before giving up
MAX_UNREAD = 3  # maximum unreadable replies to show
PROBE = Question("Say hello.", "Hello! How can I help you?", "No.")


@dataclass(frozen=True)
class EndpointJudge:
    """A judge model behind an HTTP endpoint.

    Args:
        model: the endpoint's name for it; parameters: of sampling, sent unchanged; concurrency: parallel requests.
        read: parses a reply to a preference in [0, 1], or None if it cannot be read.
    """

    connection: Connection
    model: str
    instruction: str
    parameters: Mapping[str, Any]
    concurrency: int
    read: Callable[[str], float | None] = parse_verdict

    @property
    def name(self) -> str:
        return shown(self.model)

    def describe(self) -> dict[str, Any]:
        """The endpoint's address, model, parameters and the SHA-256 of the instruction."""
        return {
            "kind": "endpoint",
            "endpoint": self.connection.url,
            "model": self.model,
            "parameters": dict(self.parameters),
            "instruction_sha256": hashlib.sha256(self.instruction.encode()).hexdigest(),
        }

    def check(self) -> str | None:
        """Ask one small question unless its reply is cached; return a note if the reply cannot be read.

        Raises:
            RewardError: the endpoint cannot be reached or refuses. CheckpointError: the cache cannot be written.
        """
        probe_judge = replace(self, connection=replace(self.connection, attempts=min(2, self.connection.attempts)))
        unread = probe_judge._ask([PROBE], None, give_up=1).unread
        return f"The judge's reply to a trial question cannot be read: '{unread[0]}'." if unread else None

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """Return the model's verdict on each question; those of earlier comparisons come from the cache.

        If a reply cannot be read, the question is asked once more and then left without a verdict.

        Raises:
            RewardError: the endpoint refuses, or gives no reply to several questions in a row. Verdicts received so far stay cached.
        """
        return self._ask(questions, progress, give_up=MAX_SILENT)

    # ---- concurrency ----------------------------------------------------------------------------------------------

    def _ask(self, questions: Sequence[Question], progress: Progress | None, *, give_up: int) -> Answers:
        replies = VerdictCache.open(cache_folder("judge"), self.model, self.instruction, self.parameters)
        keys = [cache_key(self.model, self.instruction, self.parameters, q) for q in questions]
        values = np.array([replies.verdicts.get(k, np.nan) for k in keys], dtype=np.float64)
        todo = np.flatnonzero(np.isnan(values)).tolist()
        unread: list[str] = []
        silent = 0  # consecutive questions without an answer
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        futures = {pool.submit(self._ask_one, questions[i], stop): i for i in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                i = futures[future]
                try:
                    verdict, reply = future.result()
                    silent = 0
                except NoReplyError as error:
                    silent = silent + 1 if error.silent else 0
                    if error.final or silent >= give_up or give_up == 1:
                        how = "fix that and run again; every verdict so far is kept and is not asked for again"
                        raise RewardError(f"judge {self.connection.url}", str(error), how) from error
                    verdict, reply = None, str(error)
                if verdict is None:
                    unread += [shown(reply[:80])] if len(unread) < MAX_UNREAD else []
                else:
                    values[i] = verdict
                    replies.add(keys[i], verdict, reply)
                if progress is not None:
                    progress(done, len(todo))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self.connection.close()
        return Answers(values, np.zeros(len(values), dtype=bool), len(questions), len(questions) - len(todo), unread)

    def _ask_one(self, question: Question, stop: threading.Event) -> tuple[float | None, str]:
        messages = [{"role": "user", "content": fill_instruction(self.instruction, question)}]
        body = {**self.parameters, "model": self.model, "messages": messages}
        reply = ""
        for _ in range(READ_ATTEMPTS):
            try:
                reply = completion_text(self.connection.post("/chat/completions", body, stop))
            except NoReplyError as error:
                if error.final:  # before another question is asked
                    stop.set()
                raise
            verdict = self.read(reply)
            if verdict is not None:
                return verdict, reply
        return None, reply


def completion_text(reply: Any) -> str:
    """The text of a chat completion; empty if there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
