"""The `data` section of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from penchant.base.functions import is_own
from penchant.base.section import Section
from penchant.data.layouts import LAYOUTS, no_layout


class DataConfig(Section):
    """Where the data is, how it is read, and what happens to rows that do not fit."""

    path: str | list[str] = Field(description="file, files or hub id (owner/name)")
    eval_path: str | list[str] | None = Field(None, description="held-out data of its own")
    validation_rows: int | None = Field(None, ge=1, description="rows to hold out, by prompt")
    validation_fraction: float | None = Field(None, gt=0, lt=1, description="share of rows to hold out, by prompt")
    split_seed: int | None = Field(None, ge=0, lt=2**31, description="of what is held out; default: train.seed")
    shape: str = Field(
        "auto", description="layout of a row: auto, one that `penchant data formats` lists, or your own: path.py:Name"
    )
    layout_options: dict[str, Any] = Field(
        default_factory=dict, description="what can be chosen about the layout: `penchant data formats NAME`"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our field: your column")
    template: Literal["auto", "chat", "plain"] = Field("auto", description="how a prompt becomes text")
    max_length: int = Field(1024, ge=8, description="tokens of prompt + longest completion")
    add_eos: bool = Field(True, description="false: completions are open-ended, the model is not taught to stop there")
    truncation: Literal["prompt_then_completion", "bad_row"] = Field(
        "prompt_then_completion", description="what happens to longer rows"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="stop at a bad row, or keep it aside and count it"
    )
    identical: Literal["bad_row", "keep"] = Field("bad_row", description="what a pair with chosen == rejected is")
    score_threshold: float | None = Field(
        None, description="scored rows for a loss on labels: a score at or above it is good, below it is bad"
    )
    pairs_from_scores: Literal["off", "best_worst"] = Field(
        "off", description="scored rows for a loss on pairs: the best against the worst answer of each prompt"
    )
    limit: int | None = Field(None, ge=1, description="read the first n rows only")
    cache: Literal["auto", "off"] = Field(
        "auto", description="keep rows, tokens and audit of files of 4 MB and more on disk, by content; off: never"
    )

    @field_validator("shape")
    @classmethod
    def _known_layout(cls, name: str) -> str:
        if name == "auto" or name in LAYOUTS or is_own(name):  # a file is read when the rows are
            return name
        raise ValueError(f"{name!r} is not a layout; {no_layout(name)}")

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataConfig:
        given = [n for n in ("eval_path", "validation_rows", "validation_fraction") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; keep one")
        return self
