"""Sampling engines: Penchant's own sampler, a vLLM server, or vLLM in this process.

Prompts and completions are token ids, and a completion ends at the ids of `penchant.data.templates.end_ids`. An engine with its own
weights is sent the policy's before it samples, and each update is verified by comparing its log-probs of a few fixed tokens with
the policy's.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from penchant.base.machine import place_of
from penchant.base.text import shown
from penchant.errors import ConfigError, PenchantError, RolloutError
from penchant.judges.endpoint import Connection, NoReplyError, connect
from penchant.models.load import base_model_of, effective_weights, plain_name, without_cache
from penchant.rollout.generate import Sample, Settings, sample
from penchant.rollout.options import RolloutConfig

PROBE_ROWS, PROBE_TOKENS = 2, 32  # fixed tokens to compare engine and policy on, at most
CONCURRENT = 64  # concurrent requests to a server
LARGEST = 1 << 28  # limit on the bytes of a reply for one prompt
NOISE = 1e-5  # nats per token: smaller differences between two engines are ignored


class Engine(Protocol):
    """The interface of sampling engines."""

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seed: int, prompt_seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """Sample `settings.n` completions of each prompt with the weights sent last.

        Args:
            seed: of the run and the batch; prompt_seeds: one per prompt. With a completion's index they determine its draws.

        Raises:
            WeightsLost: the engine no longer has those weights. RolloutError: no reply, or a wrong one.
        """

    def update(self, version: int) -> None:
        """Load the policy's current weights, which are those of `version` (optimizer steps).

        Raises:
            RolloutError: the update fails, or the engine's log-probs do not match the policy's afterwards.
        """

    def close(self) -> None:
        """Release all resources."""


class WeightsLost(Exception):
    """An engine lost the weights that it was sent: it was restarted, or someone else has sent others."""


@dataclass(slots=True)
class OwnSampler:
    """Samples from the policy itself, in this process."""

    model: Any

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seed: int, prompt_seeds: Sequence[int]
    ) -> list[list[Sample]]:
        s = settings
        return sample(
            self.model,
            prompts,
            n=s.n,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=seed,
            prompt_seeds=prompt_seeds,
            eos_token_id=s.ends,
            rooms=s.rooms,
        )

    def update(self, version: int) -> None:
        """Nothing to do: it samples from the policy."""

    def close(self) -> None:
        """Nothing to release."""


def request_seed(seed: int, prompt_seed: int) -> int:
    """The seed of one prompt's request, below 2^62, as vLLM adds the completion's index to it."""
    return int(np.random.SeedSequence([seed, prompt_seed]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def settings_of_prompt(settings: Settings, i: int) -> Settings:
    """The settings of prompt `i` in a batch."""
    return replace(settings, max_new_tokens=settings.rooms[i], rooms=()) if settings.rooms else settings


# ---- the policy's weights, for another engine ---------------------------------------------------------------------------


def whole_weights_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under the base model's names, with adapters merged in, each in its own dtype."""
    base = base_model_of(model)
    merged = effective_weights(model, {}) if base is not model else {}
    seen: set[int] = set()
    for name, p in base.named_parameters():
        if "lora_" in name or id(p) in seen:
            continue
        seen.add(id(p))
        plain = plain_name(name)
        yield plain, merged[plain].to(p.dtype) if plain in merged else p.detach()


def write_weights(model: Any, folder: Path) -> None:
    """Write the policy's whole weights as a model folder, replacing an existing one."""
    from safetensors.torch import save_file

    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    base = base_model_of(model)
    base.config.save_pretrained(aside)
    weights = {n: w.contiguous().cpu() for n, w in whole_weights_of(model)}
    save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


@dataclass(slots=True)
class Probe:
    """Fixed tokens with the log-probs of policy and engine, to detect a failed weight update.

    Args:
        model: the policy; tolerance: mean difference in nats per token; longest: least context of the engine, in tokens.
    """

    model: Any
    tolerance: float
    longest: int
    rows: list[list[int]] = field(init=False)
    policy: np.ndarray | None = field(default=None, init=False)
    engine: np.ndarray | None = field(default=None, init=False)
    noise: float = field(default=NOISE, init=False)

    def __post_init__(self) -> None:
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        tokens = max(2, min(PROBE_TOKENS, self.longest - 1))  # an engine is asked for one more
        self.rows = np.random.default_rng(0).integers(0, vocab_size, (PROBE_ROWS, tokens)).tolist()

    def of_policy(self) -> np.ndarray:
        """The policy's log-probs of all tokens except each row's first, at temperature 1."""
        training = self.model.training
        self.model.eval()
        device = place_of(self.model)
        row_logps = []
        with torch.inference_mode():
            for row in self.rows:
                ids = torch.tensor([row], device=device)
                logps = self.model(input_ids=ids, **without_cache(self.model)).logits[0, :-1].float().log_softmax(-1)
                row_logps.append(logps.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy())
        self.model.train(training)
        return np.concatenate(row_logps).astype(np.float64)

    def wrong(self, policy: np.ndarray, engine: np.ndarray) -> str:
        """What is wrong with an engine after an update; "" if nothing is."""
        difference = float(np.abs(engine - policy).mean())
        change = 0.0 if self.policy is None else float(np.abs(policy - self.policy).mean())
        message = f"its log-probs of fixed tokens are {difference:.2g} nats a token from the policy's"
        if not difference <= self.tolerance:  # NaN too
            return f"{message} (rollout.tolerance: {self.tolerance:g})"
        # detect a failed update even if it is smaller than the tolerance
        if difference > 4 * self.noise and difference > 0.25 * change and change > 0:
            return f"{message}, and the update moved the policy's by {change:.2g}"
        return ""

    def keep(self, policy: np.ndarray, engine: np.ndarray) -> None:
        """Remember both log-probs after a successful update."""
        if self.policy is None:
            self.noise = max(NOISE, float(np.abs(engine - policy).mean()))
        self.policy, self.engine = policy, engine


@dataclass(slots=True)
class Remote:
    """Base class of engines with their own weights: sends and verifies updates.

    Args:
        model: the policy; config: the `rollout` section; folder: where weights are written for the engine.
        longest: tokens of the longest prompt and its completion together.
        whole: context manager in which the policy's parameters are not sharded.
    """

    model: Any
    config: RolloutConfig
    folder: Path
    tolerance: float
    longest: int
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    probe: Probe = field(init=False)
    version: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.probe = Probe(self.model, self.tolerance, self.longest)

    @property
    def where(self) -> str:
        return "rollout"

    def _send_weights(self, version: int) -> None:
        raise NotImplementedError

    def _scores(self) -> np.ndarray:
        """The engine's log-probs of the probe's tokens."""
        raise NotImplementedError

    def update(self, version: int) -> None:
        if version == self.version:
            return
        self.version = None
        for attempt in range(1, self.config.attempts + 1):
            with self.whole():
                self._send_weights(version)
                policy = self.probe.of_policy()
            engine = self._scores()
            problem = self.probe.wrong(policy, engine)
            if not problem:
                break
            if attempt == min(2, self.config.attempts):  # a third update would not help
                raise RolloutError(
                    self.where,
                    f"after its weights were updated, {problem}: it has other or only some of the new weights, or is another model",
                    "start it with the run's model, dtype and --enforce-eager; by file, vLLM may keep the old head of a model with "
                    "tied embeddings: use rollout.update=nccl, or the own engine; where it computes in bf16, raise rollout.tolerance",
                )
        self.probe.keep(policy, engine)
        self.version = version


# ---- a vLLM server ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class VLLMServer(Remote):
    """A vLLM server: ``/v1/completions`` with token ids, and its development routes for weights (``VLLM_SERVER_DEV_MODE=1``)."""

    connection: Connection = field(kw_only=True)
    name: str = field(default="", init=False)
    tag: str = field(default="", init=False)  # the version last sent to the server
    versions: bool = field(default=True, init=False)  # whether the server stores it
    trainer: Any = field(default=None, init=False)  # vLLM's weight sender

    @property
    def where(self) -> str:
        return f"vLLM server {self.connection.url}"

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return self.connection.post(path, body, threading.Event())
        except NoReplyError as error:
            how = "look at the server's own log, start it again and run the same command: the run goes on from its last checkpoint"
            if error.final and not path.startswith("/v1/"):
                how = "start it with VLLM_SERVER_DEV_MODE=1 (vLLM 0.29 or later), which opens the routes for weights"
            raise RolloutError(self.where, f"{path} {error}", how) from error

    def check(self, longest: int) -> None:
        """Find the model's name, and refuse a server whose context is too short for prompt and completion.

        Raises:
            ConfigError, RolloutError.
        """
        reply = self._ask("/v1/models")
        try:
            models = {m["id"]: m.get("max_model_len") for m in reply["data"]}
        except (LookupError, TypeError, AttributeError) as error:
            raise RolloutError(self.where, "does not say what it serves", "is it a vLLM server?") from error
        self.name = self.config.model or next(iter(models), "")
        if self.name not in models:
            served = ", ".join(map(shown, models)) or "nothing"
            what = f"{self.where} serves {served}, not {shown(self.name)}"
            raise ConfigError("rollout.model", what, "name one of them")
        limit = models[self.name]
        if isinstance(limit, int) and limit < longest:
            what = f"the longest prompt and its completion make {longest} tokens, and {self.where} holds {limit}"
            how = "start it with a larger --max-model-len, or lower algorithm.max_new_tokens"
            raise ConfigError("algorithm.max_new_tokens", what, how)

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seed: int, prompt_seeds: Sequence[int]
    ) -> list[list[Sample]]:
        def sample_prompt(i: int) -> list[Sample]:
            return self._request(list(prompts[i]), settings_of_prompt(settings, i), request_seed(seed, prompt_seeds[i]))

        with ThreadPoolExecutor(min(CONCURRENT, max(1, len(prompts))), thread_name_prefix="rollout") as pool:
            samples = list(pool.map(sample_prompt, range(len(prompts))))
        self._check_version()
        return samples

    def _request(self, prompt: list[int], settings: Settings, seed: int) -> list[Sample]:
        s = settings
        body = {
            "model": self.name,
            "prompt": prompt,
            "n": s.n,
            "max_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # only our own end ids stop a completion
            "stop_token_ids": sorted(s.ends),
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        problem = ""
        for _ in range(self.config.attempts):
            try:
                return parse_samples(self._ask("/v1/completions", body), prompt, settings, self._vocabulary_size())
            except InvalidReply as error:
                problem = str(error)
        raise RolloutError(
            self.where,
            f"{problem} ({self.config.attempts} attempts)",
            "start it with --logprobs-mode processed_logprobs and without plugins; the run goes on from its last checkpoint",
        )

    def _vocabulary_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _scores(self) -> np.ndarray:
        logps: list[float] = []
        for row in self.probe.rows:
            body = {
                "model": self.name,
                "prompt": row,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
                "return_token_ids": True,
                "add_special_tokens": False,
            }
            answer = self._ask("/v1/completions", body)
            try:
                per_token = answer["choices"][0]["prompt_logprobs"][1:]
                logps += [float(p[str(token)]["logprob"]) for p, token in zip(per_token, row[1:], strict=True)]
            except (LookupError, TypeError, ValueError) as error:
                how = "is it a vLLM server of this run's model?"
                raise RolloutError(self.where, "gives no log-probs of a prompt's tokens", how) from error
        return np.array(logps)

    def _check_version(self) -> None:
        """Refuse a batch that was sampled with weights other than those sent.

        Raises:
            WeightsLost.
        """
        if self.versions:
            reply = self._ask("/weight_info")
            same = (reply.get("weight_version") if isinstance(reply, dict) else None) == self.tag
        else:
            same = bool(np.abs(self._scores() - self.probe.engine).mean() <= max(NOISE, 4 * self.probe.noise))
        if not same:
            self.version = None
            raise WeightsLost

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _send_weights(self, version: int) -> None:
        tag = f"penchant-{version}-{uuid4().hex[:12]}"
        if not (nccl := self._by_nccl()):
            write_weights(self.model, self.folder)
        self._ask("/pause?mode=wait", {})  # waits for running requests and clears the prefix cache
        try:
            if nccl:
                self._send_by_nccl()
            else:
                kwargs = {"weights_path": str(self.folder.resolve())}
                self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        except PenchantError:
            with suppress(NoReplyError):  # the server may be gone
                replace(self.connection, attempts=1).post("/resume", {}, threading.Event())
            raise
        try:
            self.connection.post("/update_weight_version", {"new_version": tag}, threading.Event())
        except NoReplyError as error:  # an older vLLM stores no version; its log-probs are compared instead
            if not error.final:
                what = f"/update_weight_version {error}"
                raise RolloutError(self.where, what, "look at the server's own log") from error
            self.versions = False
        self.tag = tag
        self._ask("/resume", {})

    def _by_nccl(self) -> bool:
        on_gpu = place_of(self.model).type == "cuda"
        if self.config.update == "auto":
            return on_gpu and _has_vllm()
        if self.config.update == "nccl" and not (on_gpu and _has_vllm()):
            reason = "vllm is not installed here" if on_gpu else "the policy is on no GPU"
            raise ConfigError("rollout.update", f"is nccl, and {reason}", "set it to file")
        return self.config.update == "nccl"

    def _send_by_nccl(self) -> None:
        """Send weights with vLLM's own sender (0.29 and later). Written against its API, but never run."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        policy = self.model

        class Source(WeightSource):  # type: ignore[misc]
            def metadata(self) -> list[Any]:
                return [ParamMeta(n, w.dtype, tuple(w.shape)) for n, w in whole_weights_of(policy)]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return whole_weights_of(policy)

        try:
            if self.trainer is None:
                ranks = int(self._ask("/get_world_size")["world_size"])
                self.trainer = WeightTransferTrainerFactory.trainer_init(
                    NCCLTrainerInitInfo(
                        master_address=get_ip(), master_port=get_open_port(), world_size=ranks + 1, rank=0
                    ),
                    client=HTTPVLLMWeightSyncClient(self.connection.url, timeout=self.config.timeout),
                    source=Source(),
                )
            self.trainer.send_weights()
        except PenchantError:
            raise
        except Exception as error:
            self.trainer = None
            raise RolloutError(
                self.where,
                f"the weights could not be sent by NCCL ({shown(str(error)[:300])})",
                'start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\', or set rollout.update=file',
            ) from error

    def close(self) -> None:
        self.connection.close()


class InvalidReply(Exception):
    """A reply that cannot be a valid result of the request."""


def parse_samples(answer: Any, prompt: list[int], settings: Settings, vocabulary_size: int) -> list[Sample]:
    """Check and convert a server's reply to one prompt.

    Raises:
        InvalidReply: too few completions, impossible lengths, ids or log-probs, or a completion that was broken off.
    """
    s = settings
    try:
        choices = {c["index"]: c for c in answer["choices"]}
        if sorted(choices) != list(range(s.n)) or len(answer["choices"]) != s.n:
            raise InvalidReply(f"{len(answer['choices'])} completions came back for {s.n}")
        samples = []
        for i in range(s.n):
            c = choices[i]
            ids, logps, finish_reason = c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]
            if (echo := c.get("prompt_token_ids")) is not None and echo != prompt:
                raise InvalidReply("a completion is of another prompt")
            samples.append(_sample(ids, logps, finish_reason, s, vocabulary_size))
        return samples
    except (LookupError, TypeError, AttributeError) as error:
        raise InvalidReply("an answer is not a completion with token ids and log-probs") from error


def _sample(ids: list[int], logps: list[float], why: Any, settings: Settings, vocabulary_size: int) -> Sample:
    if not 1 <= len(ids) <= settings.max_new_tokens:
        raise InvalidReply(f"a completion has {len(ids)} tokens, and 1 to {settings.max_new_tokens} were asked for")
    if len(logps) != len(ids):
        raise InvalidReply(f"{len(logps)} log-probs came back for {len(ids)} tokens")
    if not all(isinstance(t, int) and 0 <= t < vocabulary_size for t in ids):
        raise InvalidReply(f"a completion holds ids that are none of the model's {vocabulary_size} tokens")
    if not all(isinstance(p, (int, float)) and math.isfinite(p) and -9000 < p < 1e-3 for p in logps):
        raise InvalidReply("a completion has invalid log-probs: NaN, above 0, or of tokens that cannot be drawn")
    finished = ids[-1] in settings.ends
    if any(t in settings.ends for t in ids[:-1]):
        raise InvalidReply("a completion continues after its end token")
    if not finished and (len(ids) < settings.max_new_tokens or why not in ("length", "stop")):
        raise InvalidReply(f"a completion was broken off ({shown(str(why))})")
    return Sample(list(ids), [min(0.0, float(p)) for p in logps], finished)


def _has_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


# ---- vLLM in this process -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class VLLMInProcess(Remote):
    """vLLM in this process, on the training device. Written against vLLM 0.32's API; docs/rollouts.md says whether it ever ran."""

    llm: Any = field(default=None, init=False)

    @property
    def where(self) -> str:
        return "vLLM in this process"

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seed: int, prompt_seeds: Sequence[int]
    ) -> list[list[Sample]]:
        from vllm import SamplingParams

        s = settings
        params = [
            SamplingParams(
                n=s.n,
                max_tokens=settings_of_prompt(s, i).max_new_tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                min_p=s.min_p,
                repetition_penalty=s.repetition_penalty,
                seed=request_seed(seed, row),
                logprobs=0,
                ignore_eos=True,
                stop_token_ids=sorted(s.ends),
                detokenize=False,
            )
            for i, row in enumerate(prompt_seeds)
        ]
        requests = [{"prompt_token_ids": list(p)} for p in prompts]
        vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        samples = []
        for i, out in enumerate(self.llm.generate(requests, params, use_tqdm=False)):
            row = []
            for c in sorted(out.outputs, key=lambda c: c.index):
                ids = list(c.token_ids)
                logps = [float(p[t].logprob) for p, t in zip(c.logprobs, ids, strict=True)]
                try:
                    row.append(_sample(ids, logps, c.finish_reason, settings_of_prompt(s, i), vocab_size))
                except InvalidReply as error:
                    raise RolloutError(self.where, str(error), "look at vLLM's own log") from error
            samples.append(row)
        return samples

    def _send_weights(self, version: int) -> None:
        write_weights(self.model, self.folder)
        if self.llm is None:
            self._start()
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder.resolve())})
        self.llm.reset_prefix_cache()

    def _start(self) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            what = "is vllm without a url, and vllm is not installed here"
            raise ConfigError("rollout.engine", what, "install it, or give rollout.url") from error
        options = {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "max_model_len": self.longest,
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": 0.3,
            **self.config.options,
        }
        self.llm = LLM(model=str(self.folder.resolve()), **options)

    def _scores(self) -> np.ndarray:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        logps = []
        for row, out in zip(
            self.probe.rows,
            self.llm.generate([{"prompt_token_ids": r} for r in self.probe.rows], params, use_tqdm=False),
            strict=True,
        ):
            logps += [float(p[t].logprob) for p, t in zip(out.prompt_logprobs[1:], row[1:], strict=True)]
        return np.array(logps)

    def close(self) -> None:
        self.llm = None


def make_engine(
    config: RolloutConfig,
    model: Any,
    folder: Path,
    longest: int,
    whole: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Engine:
    """Create the engine of a `rollout` section.

    Args:
        model: the policy; folder: the run folder; longest: tokens of the longest prompt plus completion.

    Raises:
        ConfigError, RolloutError: the server cannot be reached, or serves something else.
    """
    if config.engine == "own":
        return OwnSampler(model)
    dtype = next(model.parameters()).dtype
    exact = dtype in (torch.float32, torch.float64)
    tolerance = (1e-3 if exact else 0.05) if config.tolerance == "auto" else config.tolerance
    weights_folder = Path(config.folder).expanduser() if config.folder else folder / "rollout-weights"
    if config.url is None:
        return VLLMInProcess(model, config, weights_folder, tolerance, longest, whole)
    server = connect(config.url.rstrip("/").removesuffix("/v1"), config.key_env, "rollout.url", "rollout.key_env")
    key = server.key if config.key_env else None
    connection = replace(server, key=key, timeout=config.timeout, attempts=config.attempts, largest=LARGEST)
    engine = VLLMServer(model, config, weights_folder, tolerance, longest, whole, connection=connection)
    engine.check(longest)
    return engine
