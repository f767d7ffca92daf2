"""Read files that describe several runs: a sweep's runs, a pipeline's stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError

from penchant.base.text import did_you_mean, short
from penchant.config import (
    Places,
    RunConfig,
    build,
    check_values,
    explain_all,
    place_of,
    plain_values,
    read_mapping,
    with_absolute_paths,
)
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError, PenchantError, RewardError
from penchant.runfolder import check_not_taken, check_run_folder

S = TypeVar("S", bound=BaseModel)


def read_values(config_or_path: Mapping[str, Any] | str | Path, kind: str) -> tuple[dict[str, Any], Places, str]:
    """(values, their places, source) of a file of several runs, or of a mapping; `kind` as for `read_mapping`."""
    values, places = (
        ({**config_or_path}, {}) if isinstance(config_or_path, Mapping) else read_mapping(config_or_path, kind)
    )
    source = kind if isinstance(config_or_path, Mapping) else str(config_or_path)
    values = plain_values(values)
    check_values(values, places, source)
    return values, places, source


def read_output(
    values: Mapping[str, Any], keys: Sequence[str], places: Places, source: str, what: str, part: str
) -> Path:
    """Check the top-level keys of a file of several runs and return its output folder.

    Args:
        keys: allowed at the top; what: sweep or pipeline, for messages; part: the path of the section that takes a run's keys.

    Raises:
        ConfigError: a key is unknown, or output is missing.
    """
    for key in values:
        if key not in keys:
            advice = f"it goes into {part}.{key}" if key in RunConfig.model_fields else did_you_mean(key, keys)
            raise ConfigError(place_of((key,), places, source), f'unknown key "{key}" at the top level', advice)
    output = values.get("output")
    if not isinstance(output, str) or not output:
        raise ConfigError(place_of(("output",), places, source), "output is missing", f"add it: the {what}'s folder")
    return Path(output).expanduser().resolve()


SECTION = "it is a section: indent its keys below it"


def read_section(
    kind: type[S], name: str, values: Mapping[str, Any], places: Places, source: str, how: str = SECTION
) -> S:
    """Validate a section of such a file; `how` is the advice if it is not a mapping.

    Raises:
        ConfigError: with the file's line.
    """
    section = values[name]
    if not isinstance(section, dict):
        place = place_of((name,), places, source)
        raise ConfigError(place, f"{name} is {short(repr(section))}", how)
    try:
        return kind.model_validate(section)
    except ValidationError as error:
        hint = lambda word: did_you_mean(word, kind.model_fields)  # noqa: E731
        raise explain_all(error, (name,), places, source, hint) from error


@dataclass(frozen=True)
class Member:
    """A run of a sweep or a stage of a pipeline, as the file describes it.

    Args:
        values: of its config, without output; places: ``{key path: "file:line"}``; place: of keys that have none; folder: the run's.
    """

    name: str
    values: dict[str, Any]
    places: Places
    place: str
    folder: Path

    title: ClassVar[str] = "run {}"

    def build_config(self, values: Mapping[str, Any]) -> RunConfig:
        """Build the config of `values` with this run's folder as output.

        Raises:
            ConfigError: with the file's line and the run's name.
        """
        with self.naming():
            return with_absolute_paths(build({**values, "output": str(self.folder)}, self.places, self.place))

    def named(self, error: PenchantError) -> PenchantError:
        """The error with the run's name and, if it is about a setting, the file's line."""
        title = self.title.format(self.name)
        if isinstance(error, ConfigError):
            # a place has a line or is the command line; anything else is a key of the config
            is_place = error.where in {*self.places.values(), self.place}
            where = error.where if is_place else place_of(tuple(error.where.split(".")), self.places, self.place)
            what = error.what if is_place else f"{error.where} {error.what}"
            return ConfigError(where, f"{title}: {what}", error.how)
        if isinstance(error, (DataError, ModelError, RewardError)):
            return type(error)(error.where, f"{title}: {error.what}", error.how)
        return error

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Add the run's name to errors raised inside the context."""
        try:
            yield
        except PenchantError as error:
            raise self.named(error) from error

    def refusal(self, reason: str, how: str) -> CheckpointError:
        """The error for a run that exists with other inputs, so that it can be neither skipped nor overwritten."""
        what = f"{self.title.format(self.name)} was already run, fully or in part, with other inputs: {reason}"
        return CheckpointError(self.place, what, how)


def check_folders(output: Path, members: Iterable[Member]) -> None:
    """Refuse a sweep or pipeline whose folder, or that of one of its runs, cannot be used; see `check_run_folder`.

    The runs are in its folder, and a finished one may be read-only.
    """
    check_run_folder(output)
    for member in members:
        check_not_taken(member.folder)
