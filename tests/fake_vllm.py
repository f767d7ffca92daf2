"""A fake vLLM server around a tiny model, with vLLM's routes for completions and weights and configurable faults.

Routes and fields are those of vLLM 0.32, which `penchant.rollout.engines` was tested against by hand.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from penchant.metrics.completions import EVALUATION_ITERATION
from penchant.rollout.engines import request_seed
from penchant.rollout.generate import sample

Answer = tuple[int, Any]


@dataclass
class FakeVLLM:
    """The server's model, its weights' version, and the requests it received.

    Args:
        start: folder of its initial weights; name: of its model; raw: whether log-probs are before the temperature.
        keeps: names of weights that an update by file does not change; lose: how often it restarts after a batch.
        spoil: maps (path, request, answer) to the answer that is sent.
    """

    start: str
    name: str = "served"
    longest: int = 256
    raw: bool = False
    keeps: Callable[[str], bool] = lambda _: False
    lose: int = 0
    spoil: Callable[[str, dict[str, Any], Answer], Answer] = lambda _, __, answer: answer
    versions: bool = True
    url: str = ""
    model: Any = None
    version: str | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    batch: set[int] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def restart(self) -> None:
        """Reset the weights and the version."""
        with self.lock:  # requests of a killed run may still arrive
            self.model = AutoModelForCausalLM.from_pretrained(self.start, dtype=torch.float32).eval()
            self.version = None

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        with self.lock:
            torch.set_num_threads(1)  # per thread; results depend on it in the last bits
            self.asked.append((path, body))
            return self.spoil(path, body, self._right(path, body))

    def _right(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.longest}]}
        if path == "/v1/completions":
            if body["model"] != self.name:
                return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
            if len(body["prompt"]) + body["max_tokens"] > self.longest:
                return 400, {"error": {"message": f"This model's maximum context length is {self.longest} tokens."}}
            return 200, {"choices": self._scored(body) if "prompt_logprobs" in body else self._written(body)}
        if path in ("/update_weight_version", "/weight_info") and not self.versions:
            return 404, {"detail": "Not Found"}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/weight_info":
            if self.lose:
                self.lose -= 1
                self.restart()
            return 200, {"weight_version": self.version}
        elif path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            new = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            own = self.model.state_dict()
            with torch.no_grad():
                for name, value in new.items():
                    if not self.keeps(name):
                        own[name].copy_(value)
            return 200, {"results": [None]}
        elif path not in ("/pause?mode=wait", "/resume"):
            return 404, {"detail": "Not Found"}
        return 200, {}

    def _scored(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        row = body["prompt"]
        with torch.inference_mode():
            logps = self.model(torch.tensor([row])).logits[0].log_softmax(-1)
        of = [None, *({str(t): {"logprob": float(logps[i, t])}} for i, t in enumerate(row[1:]))]
        return [{"index": 0, "token_ids": [0], "prompt_logprobs": of, "finish_reason": "length"}]

    def _written(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        seed, row = self.drawn[body["seed"]]
        rows = sample(
            self.model,
            [body["prompt"]],
            n=body["n"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            min_p=body["min_p"],
            repetition_penalty=body["repetition_penalty"],
            seed=seed,
            prompt_seeds=[row],
            eos_token_id=body["stop_token_ids"],
        )[0]
        if self.raw:
            for s in rows:
                with torch.inference_mode():
                    ids = torch.tensor([body["prompt"] + s.ids])
                    logps = self.model(ids).logits[0, len(body["prompt"]) - 1 : -1].log_softmax(-1)
                s.logps = logps.gather(1, torch.tensor(s.ids)[:, None]).squeeze(1).tolist()
        return [
            {
                "index": i,
                "text": "",
                "token_ids": s.ids,
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": s.logps, "tokens": [""] * len(s.ids)},
                "finish_reason": "stop" if s.finished else "length",
            }
            for i, s in enumerate(rows)
        ]

    # what request seeds are derived from: run seed 0, a few iterations, rows, and turns of conversations
    @property
    def drawn(self) -> dict[int, tuple[int, int]]:
        if not _DRAWN:
            for iteration in (*range(12), EVALUATION_ITERATION):
                seed = iteration % 2**63
                turns = [(((row << 16) | at) << 8) + t for row in range(8) for at in range(3) for t in range(3)]
                _DRAWN.update({request_seed(seed, row): (seed, row) for row in (*range(40), *turns)})
        return _DRAWN

    def of(self, path: str) -> list[dict[str, Any]]:
        """Requests to one route."""
        return [body for p, body in self.asked if p == path]


_DRAWN: dict[int, tuple[int, int]] = {}


@contextmanager
def served(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    """Serve the fake at a local address."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a busy machine accepts late, and a full queue delays a client by a second

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._say(*fake.answer(self.path, {}))

        def do_POST(self) -> None:
            self._say(*fake.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _say(self, status: int, said: Any) -> None:
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            with suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Log nothing."""

    fake.restart()
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
