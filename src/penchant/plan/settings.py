"""The source of each config value (a line of a file, the command line, or a default), and what each `auto` resolves to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from penchant.algorithms.method import SMALL_MODEL
from penchant.base.files import cache_folder
from penchant.base.machine import cores
from penchant.config import Places, RunConfig
from penchant.models.load import DTYPES, base_model_of
from penchant.models.options import outside_fast_path
from penchant.plan.outline import OutlinedRun, parameter_counts
from penchant.runs.parts import peak_lr, reference_kind, threads_for

Derived = tuple[Any, str]  # resolved value, and the reason


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the resolved config.

    Args:
        key: dotted; value: as the config has it; source: ``run.yaml:7``, ``command line``, ``default`` or ``default of dpo``.
        became, why: what an ``auto`` or other placeholder resolves to in this run, and the reason.
    """

    key: str
    value: Any
    source: str
    became: Any = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        entry = {"key": self.key, "value": self.value, "source": self.source}
        return entry | ({"became": self.became, "why": self.why} if self.why else {})


def settings_of(config: RunConfig, places: Places, derived: Mapping[str, Derived]) -> list[Setting]:
    """Every config key as a `Setting`, in the config's order."""
    settings = []
    for path, value in _leaves(config.model_dump(mode="json")):
        key = ".".join(path)
        became, why = derived.get(key, (None, ""))
        settings.append(Setting(key, value, _source(path, places, config), became, why))
    return settings


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for i, inner in enumerate(value):  # a null in an entry means the common value
            yield from _leaves({k: v for k, v in inner.items() if v is not None}, (*path, str(i)))
    else:
        yield path, value


def _source(path: tuple[str, ...], places: Places, config: RunConfig) -> str:
    if path in places:
        return places[path]
    if path[1:] == ("name",) and path[:1] in places:  # `loss: kto` gives only the name
        return places[path[:1]]
    if path == ("reference", "ema") and ("loss", "ref_ema") in places:
        return places["loss", "ref_ema"]
    if path[0] == "loss" and config.loss.components:
        return f"default of {'+'.join(c.spec.name for c in config.loss.components)}"
    if path[0] == "algorithm" and config.algorithm is not None:
        return f"default of {config.algorithm.name}"
    return "default"


def places_in(values: Mapping[str, Any], where: str) -> Places:
    """Places for a mapping that a Python caller gave: every key comes from `where`."""
    return {path[:n]: where for path, _ in _leaves(values) for n in range(1, len(path) + 1)}


# ---- What an `auto` resolves to ----


def derived_values(run: OutlinedRun) -> dict[str, Derived]:
    """``{key: (resolved value, reason)}`` for every key that is ``auto`` or another placeholder."""
    values = dict(_leaves(run.config.model_dump(mode="json")))
    derived = {}
    for key, (placeholder, derive) in DERIVED.items():
        path = tuple(key.split("."))
        if path in values and values[path] == placeholder:
            derived[key] = derive(run)
    for name, value in run.method.resolved.items():
        if values.get(("algorithm", name)) == "auto":
            derived[f"algorithm.{name}"] = (value, f"the default of {run.method.name}")
    encoder = run.rows.reward_parts
    if encoder is not None and encoder.max_length < run.config.data.max_length:
        derived["data.max_length"] = (encoder.max_length, "the encoder's limit")
    return derived


def _dtype(run: OutlinedRun) -> Derived:
    name = next(n for n, d in DTYPES.items() if d == run.dtype)
    native = run.dtype == torch.bfloat16
    where = "this GPU" if run.device.type == "cuda" else "this CPU"
    return name, f"bf16 matrix products are {'native' if native else 'not native'} on {where}"


def _device(run: OutlinedRun) -> Derived:
    return run.device.type, "a GPU is visible" if run.device.type == "cuda" else "no GPU is visible"


def _kernels(run: OutlinedRun) -> Derived:
    packing, fast, _ = run.layout
    name = type(base_model_of(run.model)).__name__
    if fast:
        return "fast path", f"{name} is recognized"
    if run.device.type != "cpu":
        return "transformers", "the fast path is for the CPU"
    if packing == "padded":
        return "transformers", "the fast path takes packed rows"
    return "transformers", outside_fast_path(run.config.lora) or f"{name} is not recognized"


def _threads(run: OutlinedRun) -> Derived:
    parameters = parameter_counts(run.model)[0]
    threads = threads_for(run.config, parameters)
    if parameters < SMALL_MODEL:
        return threads, f"{parameters:,} parameters: too small to gain from a second thread"
    return threads, f"{cores()} cores"


def _lr(run: OutlinedRun) -> Derived:
    lr = peak_lr(run.config, run.rows, parameter_counts(run.model)[0])
    return lr, f"{run.method.name}, {'an adapter' if run.config.lora else 'the whole model'}"


def _template(run: OutlinedRun) -> Derived:
    name = run.rows.tokenized[0].template
    reason = "the tokenizer has a chat template" if name == "chat" else "the tokenizer has none"
    return name, "plain documents" if run.rows.datasets[0].kind == "text" else reason


def _reference(run: OutlinedRun) -> Derived:
    if "reference" not in run.method.needs:
        return "none", f"{run.method.name} needs no reference"
    kind = reference_kind(run.config)
    reasons = {
        "cached": "computed once and kept on disk",
        "adapter": f"the model with its adapter {'off' if run.config.model.adapter is None else 'as it starts'}; no copy is held",
        "frozen": "it must run in each step",
    }
    return kind, reasons[kind]


DERIVED: dict[str, tuple[Any, Callable[[OutlinedRun], Derived]]] = {
    "model.dtype": ("auto", _dtype),
    "model.device": ("auto", _device),
    "model.kernels": ("auto", _kernels),
    "model.attention": ("auto", lambda run: run.attention),
    "model.tokenizer": (None, lambda run: (run.config.model.path, "the model's own")),
    "data.shape": ("auto", lambda run: (run.rows.loaded["train"].shape, "by its columns")),
    "data.template": ("auto", _template),
    "data.split_seed": (None, lambda run: (run.config.train.seed, "train.seed")),
    "reference.kind": ("auto", _reference),
    "reference.cache_dir": (None, lambda run: (str(cache_folder("reference")), "$PENCHANT_CACHE or ~/.cache/penchant")),
    "train.packing": ("auto", lambda run: (run.layout[0], run.layout[2])),
    "train.threads": ("auto", _threads),
    "train.lr": ("auto", _lr),
    "evaluation.tokens_per_step": (None, lambda run: (run.config.train.tokens_per_step, "train.tokens_per_step")),
}
