"""What a person asks of `penchant data get`, checked."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError

SPLITS = ("train", "validation", "test")
AS = ("sft", "prompts", "unpaired")
REDACTED = ("keep", "only", "drop")


@dataclass(frozen=True, slots=True)
class GetRequest:
    """The options of `penchant data get`; docs/data_get.md explains each.

    Args:
        name: of the catalogue, or a hub id; source: a local file or folder in its place; output: the folder to write.
        first: read so many rows only; split: shares of train, validation and test; threshold: of the reward, or of moderation scores.
    """

    name: str
    output: str
    source: str | None = None
    subsets: tuple[str, ...] = ()
    revision: str | None = None
    first: int | None = None
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    seed: int = 0
    published_splits: bool = False
    language: tuple[str, ...] = ()
    redacted: str = "keep"
    moderation: str | float = "keep"
    as_: str | None = None
    reward: str | None = None
    threshold: float | None = None
    label_with: str | None = None
    layout: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for check in (_check_split, _check_choices, _check_labels):
            check(self)

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON holds it: everything but where it is written."""
        held = json.loads(json.dumps(asdict(self)))
        held.pop("output")
        held["source"] = None if self.source is None else str(Path(self.source).expanduser().resolve())
        return dict(held)

    @property
    def labels(self) -> bool:
        """Whether a reward or a function says which answers are good."""
        return self.reward is not None or self.label_with is not None


def request_of(name: str, output: str, asked: Mapping[str, Any]) -> GetRequest:
    """A request from keyword arguments; sequences may be lists.

    Raises:
        ConfigError: an argument that there is not, or that cannot be.
    """
    known = {f.name for f in fields(GetRequest)}
    for key in asked:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                key, "is no option", f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            )
    held: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in asked.items()}
    return GetRequest(name=name, output=output, **held)


def _check_split(asked: GetRequest) -> None:
    shares = asked.split
    if len(shares) != 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            "--split",
            f"{','.join(f'{s:g}' for s in shares)} are not the shares of train, validation and test",
            "give three numbers from 0 to 1 that add up to 1, such as 0.9,0.05,0.05",
        )
    if shares[0] == 0:
        raise ConfigError("--split", "train has no share", "give it one above 0")


def _check_choices(asked: GetRequest) -> None:
    if asked.first is not None and asked.first < 1:
        raise ConfigError("--first", f"is {asked.first}", "give a number of rows, 1 or more")
    if asked.as_ is not None and asked.as_ not in AS:
        raise ConfigError("--as", f"is {asked.as_!r}", f"choose one of {', '.join(AS)}")
    if asked.redacted not in REDACTED:
        raise ConfigError("--redacted", f"is {asked.redacted!r}", f"choose one of {', '.join(REDACTED)}")
    moderation = asked.moderation
    if not (moderation in ("keep", "drop-flagged") or (isinstance(moderation, float) and 0 <= moderation <= 1)):
        raise ConfigError("--moderation", f"is {moderation!r}", "give keep, drop-flagged or a score from 0 to 1")


def _check_labels(asked: GetRequest) -> None:
    if asked.reward is not None and asked.label_with is not None:
        raise ConfigError(
            "--reward", "is given together with --label-with", "keep one: both say which answers are good"
        )
    if asked.labels and asked.as_ != "unpaired":
        given = "--reward" if asked.reward is not None else "--label-with"
        raise ConfigError(given, "labels answers, which only unpaired data have", "add --as unpaired")
    if (asked.reward is None) != (asked.threshold is None):
        how = (
            "a reward at or above it makes an answer good; give both"
            if asked.threshold is None
            else "give --reward too"
        )
        raise ConfigError("--threshold", "is missing" if asked.threshold is None else "is given without --reward", how)
    if asked.threshold is not None and not math.isfinite(asked.threshold):
        raise ConfigError("--threshold", f"is {asked.threshold}", "give a finite number")
