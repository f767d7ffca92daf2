"""Answers generated while a person waits, by runs of the folder or by any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.base.files import cache_folder, write_atomically
from penchant.base.text import one_line
from penchant.errors import DataError
from penchant.judges.endpoint import connect, error_message, is_local
from penchant.judges.humans import turns_of
from penchant.runfolder.values import mapping

if TYPE_CHECKING:
    from penchant.studio.app import Studio

MAX_TOKENS = 512
SECONDS = 600.0  # per answer
KEYS = "keys.json"  # the approved endpoints, each with the environment variable of its key
LONGEST = 200_000  # characters per answer
TEMPERATURE = 0.7


class Writers:
    """Generates answers. Local models are loaded once and take turns token by token in one thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._models: dict[Path, Any] = {}

    async def write(
        self, studio: Studio, writers: Sequence[Mapping[str, str]], prompt: Any
    ) -> AsyncIterator[tuple[int, str]]:
        """Yield (index of the writer, piece of its answer) as the pieces arrive.

        Raises:
            DataError: a writer cannot be used.
        """
        queue: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

        async def forward_pieces(index: int, writer: Mapping[str, str]) -> None:
            try:
                pieces = (
                    self._stream_from_endpoint(writer, prompt)
                    if "url" in writer
                    else self._stream_from_run(studio, writer, prompt)
                )
                length = 0
                async with asyncio.timeout(SECONDS):
                    async for piece in pieces:
                        length += len(piece)
                        if length > LONGEST:
                            break
                        queue.put_nowait((index, piece))
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(forward_pieces(i, w)) for i, w in enumerate(writers)]
        try:
            remaining = len(tasks)
            while remaining and not studio.closing:
                try:
                    index, piece = await asyncio.wait_for(queue.get(), 0.5)
                except TimeoutError:
                    continue
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    remaining -= 1
                else:
                    yield index, piece
        finally:
            for task in tasks:
                task.cancel()
        if studio.closing:
            raise DataError("studio", "is shutting down", "start it again")

    # ---- runs of the folder ----

    async def _stream_from_run(self, studio: Studio, writer: Mapping[str, str], prompt: Any) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        folder = studio.resolve(writer.get("run", ""))
        completions = await loop.run_in_executor(self._thread, self._start_completions, folder, prompt)
        while not completions.done:
            for piece in await loop.run_in_executor(self._thread, completions.step):
                if piece.text:
                    yield piece.text

    def _start_completions(self, folder: Path, prompt: Any) -> Any:
        from penchant.serve.model import load_chat_model
        from penchant.serve.routes import token_ids
        from penchant.serve.stream import Completions, Sampling
        from penchant.types import Message

        if folder not in self._models:
            self._models[folder] = load_chat_model(str(folder), fallback_style="transcript")
        model = self._models[folder]
        messages = prompt if isinstance(prompt, str) else tuple(Message(r, t) for r, t in turns_of(prompt))
        if isinstance(messages, str) and model.style.keeps_history and model.style.name == "chat":
            messages = (Message("user", messages),)
        ids, continued = token_ids(model, messages, {})
        room = model.context - len(ids)
        if room < 1:
            raise DataError(folder.name, f"the prompt has {len(ids)} tokens, and its context is {model.context}")
        sampling = Sampling(min(room, MAX_TOKENS), 1, TEMPERATURE)
        return Completions(model, ids, sampling, () if continued else model.style.stops, continued=continued)

    # ---- endpoints ----

    async def _stream_from_endpoint(self, writer: Mapping[str, str], prompt: Any) -> AsyncIterator[str]:
        import httpx

        key, name = writer.get("key_env", ""), f"writer {writer.get('model')}"
        endpoint = connect(writer["url"], key or None, name, name)
        if (key or not is_local(endpoint.url)) and [writer["url"], key] not in _approved_endpoints():
            raise DataError(
                name,
                f"this arena would send {f'the key in ${key}' if key else 'prompts'} to {writer['url']}, and it was not made in your studio",
                "make a new arena with this endpoint if you trust it",
            )
        headers = {"accept": "text/event-stream"}
        if key:  # `connect` may find a default key, but only a key the user named is sent
            headers["authorization"] = f"Bearer {endpoint.key}"
        body = {
            "model": writer.get("model", ""),
            "messages": [{"role": role, "content": text} for role, text in turns_of(prompt)],
            "stream": True,
            "max_tokens": MAX_TOKENS,
            "temperature": TEMPERATURE,
        }
        where = f"{writer.get('model')} at {endpoint.url}"
        try:
            async with (
                httpx.AsyncClient(**endpoint.client_options) as client,
                client.stream("POST", f"{endpoint.url}/chat/completions", json=body, headers=headers) as reply,
            ):
                if reply.status_code != 200:
                    message = endpoint.without_key(one_line(error_message(await reply.aread()))[:300])
                    raise DataError(where, f"answered {reply.status_code}: {message}", "check its address and model")
                async for line in reply.aiter_lines():
                    chunk = _event_json(line)
                    if chunk.get("error"):
                        message = endpoint.without_key(one_line(error_message(json.dumps(chunk).encode()))[:300])
                        raise DataError(where, f"broke off: {message}", "load the page to try again")
                    if piece := _delta_text(chunk):
                        yield piece
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DataError(where, f"cannot be asked ({type(error).__name__})", "check that it is running") from error

    def close(self) -> None:
        """Stop generating and drop the loaded models."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._models.clear()


def approve_endpoint(url: str, key_env: str) -> None:
    """Record that this user approved an endpoint and the key to send it, since an arena's folder may come from someone else."""
    approved = _approved_endpoints()
    if [url, key_env] not in approved:
        path = cache_folder("studio") / KEYS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [*approved, [url, key_env]])


def _approved_endpoints() -> list[Any]:
    try:
        approved = json.loads((cache_folder("studio") / KEYS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return approved if isinstance(approved, list) else []


def _event_json(line: str) -> dict[str, Any]:
    """Return the JSON of one line of the event stream, or {} if there is none."""
    kind, _, data = line.partition(":")
    try:
        return mapping(json.loads(data)) if kind == "data" else {}
    except ValueError:  # such as [DONE]
        return {}


def _delta_text(chunk: Mapping[str, Any]) -> str:
    """Return the text in one chunk of an answer."""
    try:
        text = chunk["choices"][0]["delta"].get("content")
    except (LookupError, TypeError, AttributeError):
        return ""
    return text if isinstance(text, str) else ""
