"""The `rollout` section of a config: the engine that samples an online method's completions, and its off-policy corrections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from penchant.base.section import Section, refuse_idle

PLACES = ("url", "model", "key_env", "timeout", "attempts", "update", "folder")  # these do not affect what is computed


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["own", "vllm"] = Field(
        "own", description="own: Penchant's sampler; vllm: a vLLM server at `url`, or vLLM in this process without one"
    )
    environment: str | None = Field(
        None, description="what the policy converses with in its completions: calculator (a toy), or path.py:Class"
    )
    turns: int = Field(
        4, ge=1, le=256, description="with an environment: the most turns that the policy has in a completion"
    )
    environment_timeout: float | None = Field(
        600.0, gt=0, le=86_400, description="seconds for each call of the environment's code; null: no limit"
    )
    url: str | None = Field(None, description="address of a vLLM server, without /v1: http://127.0.0.1:8000")
    model: str | None = Field(None, description="the model's name at the server; null: the one that it serves")
    key_env: str | None = Field(None, description="environment variable with the server's key; null: no key")
    timeout: float = Field(600.0, gt=0, le=86_400, description="seconds without a byte from the server")
    attempts: int = Field(8, ge=1, le=100, description="how many times a request, or a batch, is tried")
    update: Literal["auto", "nccl", "file"] = Field(
        "auto",
        description="how weights reach the engine; auto: nccl from a GPU where vllm is installed here too, else by file",
    )
    folder: str | None = Field(
        None,
        description="file: where weights are written, a path that the server can read too; null: in the run's folder",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="vLLM in this process: further arguments of vllm.LLM"
    )
    tolerance: float | Literal["auto"] = Field(
        "auto",
        description="largest mean difference between the engine's log-probs and the policy's, nats per token; auto: 1e-3 in fp32, otherwise 0.05",
    )
    correction: Literal["none", "tis", "mis"] = Field(
        "none",
        description="weights of tokens that another engine or older weights wrote: truncated (tis) or masked (mis) importance sampling",
    )
    correction_level: Literal["token", "sequence"] = Field(
        "token", description="ratios of single tokens, or of whole completions"
    )
    correction_high: float = Field(2.0, gt=0, description="tis: largest weight; mis: beyond it a weight is 0")
    correction_low: float = Field(0.0, ge=0, description="mis: below it a weight is 0")
    lag: Literal[0, 1] = Field(
        0, description="1: the next batch is written while this one trains, by the weights from before its updates"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> RolloutConfig:
        if self.engine == "own":
            misplaced = [n for n in (*PLACES, "options") if n in self.model_fields_set and getattr(self, n)]
            misplaced = [n for n in misplaced if getattr(self, n) != type(self).model_fields[n].get_default()]
            if misplaced:
                raise ValueError(f"{misplaced[0]} is for engines other than own; set engine: vllm, or leave it out")
        if self.url is not None and self.options:
            raise ValueError("options are for vLLM in this process; a server has its own, so leave out url or options")
        if self.url is None and self.update == "nccl":
            raise ValueError("update is nccl, which is for a server; vLLM in this process reads a file")
        if self.correction == "mis" and self.correction_low >= self.correction_high:
            raise ValueError("correction_low must be below correction_high")
        refuse_idle(self, self._idle())
        return self

    def _idle(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.environment is None:
            reason = "without environment; set environment, or leave {} out"
            idle |= dict.fromkeys(("turns", "environment_timeout"), reason)
        if self.engine == "own":
            idle["tolerance"] = "on the own engine; set engine: vllm, or leave it out"
        elif self.url is None:
            idle |= dict.fromkeys(("model", "key_env", "timeout"), "without a server; set url, or leave it out")
        if self.update == "nccl":
            idle["folder"] = "where update is nccl; set update: file, or leave {} out"
        if self.correction != "mis":
            idle["correction_low"] = "without correction: mis; set that, or leave {} out"
        if self.correction == "none":
            reason = "without correction; set correction, or leave {} out"
            idle |= dict.fromkeys(("correction_level", "correction_high"), reason)
        return idle

    @property
    def elsewhere(self) -> bool:
        """Whether completions come from an engine other than the training policy."""
        return self.engine != "own"

    @property
    def measured(self) -> bool:
        """Whether the policy's log-probs are computed before its first update, besides those at sampling time."""
        return self.elsewhere or self.correction != "none" or bool(self.lag)
