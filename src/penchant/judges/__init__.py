"""Pairwise judges, which decide which of two answers to a prompt is better: a user's function or a model behind an endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.judges.endpoint import PARAMETERS, EndpointJudge, connect
from penchant.judges.instruction import INSTRUCTION, read_instruction
from penchant.judges.judge import Answers, BothOrders, PairJudge, Question, ask_both_orders, load_function_judge
from penchant.requests import check_type

__all__ = ["Answers", "BothOrders", "JudgeOptions", "PairJudge", "Question", "ask_both_orders", "load_judge"]

ENDPOINT_FLAGS = {
    "model": "--judge-model",
    "key_env": "--judge-key-env",
    "instruction": "--judge-instruction",
    "parameters": "--judge-parameters",
    "concurrency": "--judge-concurrency",
}


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Options of a pairwise judge.

    Args:
        spec: ``path.py:function`` or the address of an endpoint. The other options are for endpoints; None: the default.
        model: the endpoint's name for it; key_env: environment variable with the API key; instruction: file with a template.
        parameters: sampling parameters that replace the defaults, a mapping or JSON; concurrency: parallel requests.
    """

    spec: str
    model: str | None = None
    key_env: str | None = None
    instruction: str | Path | None = None
    parameters: Mapping[str, Any] | str | None = None
    concurrency: int | None = None


def load_judge(options: JudgeOptions) -> PairJudge:
    """Create the judge, without contacting an endpoint yet.

    Raises:
        ConfigError: no such judge, something other than a judge, or options that do not apply to it.
    """
    check_type("judge", options, "str | JudgeOptions")
    check_type("judge", options.spec, "str")
    if not options.spec.startswith(("http://", "https://")):
        flags = [flag for name, flag in ENDPOINT_FLAGS.items() if getattr(options, name) is not None]
        if flags:
            raise ConfigError(flags[0], f"is for endpoints, and {options.spec} is not one", "leave it out")
        return load_function_judge(options.spec)
    if not options.model:
        raise ConfigError("--judge-model", "is missing", "name the model as the endpoint calls it")
    concurrency = 4 if options.concurrency is None else options.concurrency
    if concurrency < 1:
        raise ConfigError("--judge-concurrency", "is below 1", "give 1 or more")
    return EndpointJudge(
        connect(options.spec, options.key_env),
        options.model,
        INSTRUCTION if options.instruction is None else read_instruction(options.instruction),
        _parse_parameters(options.parameters),
        concurrency,
    )


def _parse_parameters(raw: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if raw is None:
        return dict(PARAMETERS)
    try:
        parameters = json.loads(raw) if isinstance(raw, str) else json.loads(json.dumps(dict(raw)))
    except (ValueError, TypeError) as error:
        raise ConfigError("--judge-parameters", f"is not JSON ({error})", """write '{"temperature": 0}'""") from error
    if not isinstance(parameters, dict):
        raise ConfigError("--judge-parameters", "is not a mapping", """write '{"temperature": 0}'""")
    reserved = sorted({"model", "messages", "stream", "n"} & set(parameters))
    if reserved:
        raise ConfigError("--judge-parameters", f"sets {reserved[0]}, which cannot be set", "leave it out")
    return parameters
