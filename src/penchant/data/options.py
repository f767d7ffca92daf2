"""The `data` section of a config."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from penchant.base.functions import is_own
from penchant.base.section import Section
from penchant.data.layouts import LAYOUTS, unknown_layout_advice
from penchant.data.layouts.fields import NOT_OPTIONS
from penchant.data.read import Bounds

Paths = str | list[str]


class SourceConfig(Section):
    """One of several sources of training rows; settings left out are those of the `data` section."""

    path: Paths = Field(description="as data.path")
    weight: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="share of the rows of an epoch, against the other weights; all sources have one, or none",
    )
    repeat: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="how often an epoch goes through its rows (default 1); 0.5: through half of them, the next epoch through the rest",
    )
    limit: int | None = Field(None, ge=1, le=10**9, description="read only the first n rows")
    columns: dict[str, str] | None = Field(None, description="as data.columns")
    shape: str | None = Field(None, description="as data.shape")
    layout_options: dict[str, Any] | None = Field(None, description="as data.layout_options")

    def reading(self) -> dict[str, Any]:
        """Its settings for reading rows."""
        return self.model_dump(include={"limit", "columns", "shape", "layout_options"}, exclude_none=True)

    @property
    def files(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class DataConfig(Section):
    """Where the data is, how it is read, and what happens to rows that do not fit."""

    path: Paths = Field(
        description="file, folder or pattern of files (shards/*.parquet), several of these, or hub id (owner/name)"
    )
    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="in place of path: several sources, [{path, weight, repeat, limit, columns, shape, layout_options}, ...], mixed by weight",
    )
    eval_path: Paths | dict[str, Paths] | None = Field(
        None,
        description="held-out rows from files of their own; {name: path} of several sets, which have figures of their own",
    )
    validation_rows: int | None = Field(
        None, ge=1, le=10**9, description="how many rows to hold out; equal prompts stay together"
    )
    validation_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of rows to hold out; equal prompts stay together"
    )
    split_seed: int | None = Field(None, ge=0, lt=2**31, description="seed of the split; default: train.seed")
    shape: str = Field(
        "auto", description="layout of a row: auto, one that `penchant data formats` lists, or your own: path.py:Name"
    )
    layout_options: dict[str, Any] = Field(
        default_factory=dict, description="options of the layout, as `penchant data formats NAME` lists them"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="which of your columns holds each field, as field: column"
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="how a prompt becomes text: with the chat template, or as plain text"
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, e.g. {enable_thinking: false}; strftime_now: the date that it uses as today",
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=2**24,
        description="limit on the tokens of the prompt plus the longest completion; the default, or auto, is the model's context where that is less",
    )
    add_eos: bool = Field(
        True,
        description="end completions with EOS; false: they are open-ended, and the model does not learn to stop there",
    )
    truncation: Literal["prompt_then_completion", "bad_row"] = Field(
        "prompt_then_completion",
        description="what to do with longer rows: cut the prompt and then the completion, or treat them as bad rows",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or set it aside and count it")
    identical: Literal["bad_row", "keep"] = Field("bad_row", description="how to treat a pair of equal answers")
    score_threshold: float | None = Field(
        None, description="for scored rows and a loss on labels: scores at or above this are good, lower ones are bad"
    )
    pairs_from_scores: Literal["off", "best_worst"] = Field(
        "off", description="for scored rows and a loss on pairs: pair the best answer of each prompt with the worst"
    )
    weight: str | None = Field(
        None,
        min_length=1,
        description="column with each row's weight in the loss and in held-out figures: 2 counts as two rows, 0 not at all",
    )
    image_dir: str | None = Field(
        None,
        description="the folder that holds the rows' pictures, and that relative paths start from; default: that of the data file",
    )
    limit: int | None = Field(
        None, ge=1, le=10**9, description="read only the first n rows of path, and of eval_path if there is one"
    )
    bounds: Bounds = Field(Bounds(), description="how large one row may be, so that no file fills the memory")
    workers: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="processes that read, split, tokenize and audit cached rows, with the same results as one; default: one per core for 128 MB or 200,000 rows and more",
    )
    cache: Literal["auto", "off"] = Field(
        "auto",
        description="auto: cache the rows, tokens and audit of files of 4 MB and more on disk, by content; off: never",
    )

    def reading(self, *, pictures: bool) -> dict[str, Any]:
        """How rows are read, as keywords of `load_preferences`; `pictures`: whether the model reads those of the prompts."""
        kept = {"shape", "columns", "on_bad_row", "identical", "limit", "layout_options"}
        keywords = self.model_dump(include=kept) | self.model_dump(include={"bounds"}, exclude_defaults=True)
        return keywords | ({"image_dir": self.image_dir or ""} if pictures else {})

    @model_validator(mode="before")
    @classmethod
    def _fill_path(cls, values: Any) -> Any:
        """Set `path` to the files of all sources, for code that needs the list of files."""
        sources = values.get("sources") if isinstance(values, dict) else None
        if not sources or not isinstance(sources, list):
            return values
        entries = [{"path": s} if isinstance(s, str) else s for s in sources]
        paths = [s.get("path") if isinstance(s, dict) else None for s in entries]
        files = [f for p in paths for f in (p if isinstance(p, list) else [p])]
        if values.get("path", files) != files:
            raise ValueError("path and sources are both set; keep one")
        return {**values, "sources": entries, "path": files if all(isinstance(f, str) for f in files) else ""}

    @model_validator(mode="after")
    def _check_mix(self) -> DataConfig:
        weights = [s.weight is not None for s in self.sources]
        if any(weights) and not all(weights):
            raise ValueError(
                f"sources.{weights.index(False)} has no weight and others have one; give all of them one, or none"
            )
        clash = next((i for i, s in enumerate(self.sources) if s.weight is not None and s.repeat is not None), None)
        if clash is not None:
            raise ValueError(
                f"sources.{clash} has a weight and a repeat, which both say how many of its rows an epoch has; keep one"
            )
        return self

    @property
    def held_out_files(self) -> dict[str, Paths]:
        """The files of held-out rows by the name of their set; the name of a single set is empty."""
        if self.eval_path is None:
            return {}
        return self.eval_path if isinstance(self.eval_path, dict) else {"": self.eval_path}

    @model_validator(mode="before")
    @classmethod
    def _drop_auto(cls, values: Any) -> Any:
        is_auto = isinstance(values, dict) and values.get("max_length") == "auto"
        return {k: v for k, v in values.items() if k != "max_length"} if is_auto else values

    @field_validator("path", "eval_path", mode="before")
    @classmethod
    def _check_files(cls, files: Any) -> Any:
        if isinstance(files, (list, dict)) and not files:
            raise ValueError("is empty; give at least one file, or one row")
        return files

    @field_validator("template_options")
    @classmethod
    def _check_date(cls, options: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(options.keys() & NOT_OPTIONS):
            raise ValueError(f"{reserved[0]} is not a variable of a chat template; take it out")
        try:
            datetime.fromisoformat(options.get("strftime_now", "2026-01-01"))
        except (TypeError, ValueError) as error:
            raise ValueError("strftime_now is the day that the template takes for today, as 2026-12-31") from error
        return options

    @field_validator("shape")
    @classmethod
    def _check_layout(cls, name: str) -> str:
        if name == "auto" or name in LAYOUTS or is_own(name):  # the user's file is read along with the rows
            return name
        raise ValueError(f"{name!r} is not a layout; {unknown_layout_advice(name)}")

    @model_validator(mode="after")
    def _check_hold_out(self) -> DataConfig:
        keys = [n for n in ("eval_path", "validation_rows", "validation_fraction") if getattr(self, n) is not None]
        if len(keys) > 1:
            raise ValueError(f"{' and '.join(keys)} are {'both ' if len(keys) == 2 else ''}set; keep one")
        return self
