"""Tolerant access to values from untrusted files: values of the wrong type count as missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def number_of(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) is float:  # fast path: nearly all values
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def num(row: Any, key: str) -> float | None:
    """A finite number from a mapping, or None."""
    return number_of(row.get(key)) if isinstance(row, (dict, Mapping)) else None


FEW_ROWS = 10  # fewer rows, prompts or completions get no interval, because a percentile bootstrap is too narrow


def sample_size(row: Any, key: str) -> int | None:
    """Number of rows, prompts or completions behind a figure of a metrics line; None if the line does not say."""
    name = key.removeprefix("eval/")
    sampled = name.startswith(("kl/", "completions/", "reward", "win_rate")) and not name.startswith("rewards/")
    rows_key = f"eval/{name.partition('/')[0]}/rows"  # if there are several held-out sets
    keys = (f"{key}/n", rows_key, *(["eval/kl/completions"] if sampled else []), "eval/rows")
    size = next((n for k in keys if (n := num(row, k)) is not None), None)
    return None if size is None else int(size)


def ci_of(row: Any, key: str) -> tuple[float, float] | None:
    """The interval ``KEY/ci`` of a metrics line for display; None if it is missing, has no width, or is over fewer than `FEW_ROWS`."""
    interval = interval_of(row, key)
    too_few = (sample_size(row, key) or FEW_ROWS) < FEW_ROWS
    return None if interval is None or too_few or interval[0] == interval[1] else interval


def format_decimals(value: float, format_spec: str) -> str:
    """``0.583``; with an exponent if all its decimals would be 0 although the value is not: ``1.20e-05``."""
    text = f"{value:{format_spec}}"
    return f"{value:.2e}" if value and format_spec.endswith("f") and not text.strip("-0.") else text


def format_interval(interval: tuple[float, float] | None, format_spec: str) -> str:
    """``[low, high]``; empty if there is no interval or rounding leaves it without a width."""
    if interval is None:
        return ""
    low, high = (format_decimals(end, format_spec) for end in interval)
    return "" if low.lstrip("-") == high.lstrip("-") else f"[{low}, {high}]"


def format_p(p: float) -> str:
    """Format a p-value with its significant digits."""
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def interval_of(row: Any, key: str) -> tuple[float, float] | None:
    """The interval ``KEY/ci`` of a metrics line as recorded, or None."""
    value = row.get(f"{key}/ci") if isinstance(row, Mapping) else None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number_of(value[0]), number_of(value[1])
    return None if low is None or high is None or low > high else (low, high)


def count_unchanged(samples: Any) -> tuple[int, int]:
    """(unchanged, total) number of sampled answers, comparing those before and after training."""
    pairs = [(r["before"], r["after"]) for r in mappings(samples) if {"before", "after"} <= r.keys()]
    return sum(a == b for a, b in pairs), len(pairs)


def mapping(value: Any) -> dict[str, Any]:
    """The value as a mapping with text keys; empty if it is anything else."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def sequence(value: Any) -> list[Any]:
    """The value as a list; empty if it is anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list; other items are dropped."""
    return [mapping(v) for v in sequence(value) if isinstance(v, Mapping)]


def text(value: Any) -> str:
    """A value as text: strings unchanged, "" for None, JSON for mappings, lists and booleans, the shortest exact form for numbers."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (Mapping, list, tuple, bool)):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            return "?"
    return repr(value) if isinstance(value, float) else str(value)


def flatten(value: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """``{"a.b": leaf}`` of nested mappings."""
    if not isinstance(value, Mapping) or depth > 20:
        return {prefix: value} if prefix else {}
    if not value and prefix:
        return {prefix: {}}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    return leaves


def algorithm_of(config: Mapping[str, Any]) -> str:
    """The algorithm named in a run's config; empty for losses on given answers."""
    algorithm = config.get("algorithm")
    return text(algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm)


def is_online(config: Mapping[str, Any]) -> bool:
    """Whether a run with this config learns from its own completions."""
    return algorithm_of(config) not in ("", "reward_model")
