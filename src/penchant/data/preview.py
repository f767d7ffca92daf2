"""The first rows of a file as examples: what `penchant data show` prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.catalogue import rows_text, tree_json, tree_lines
from penchant.data.converters import Detection
from penchant.data.converting import Converted, convert_rows, layout_named
from penchant.data.formats import BadRow, Row, read_rows
from penchant.data.load import FIRST_ROWS, detected
from penchant.printable import printable

MOST_ROWS = 2000  # read for a layout whose rows make groups


@dataclass(frozen=True, slots=True)
class Preview:
    """A file's layout and its first rows as examples.

    Args:
        name: of the file; layout: its name; detection: None where a person named the layout; shown: rows, or groups of rows.
    """

    name: str
    layout: str
    detection: Detection | None
    shown: tuple[Converted, ...]

    @property
    def headline(self) -> str:
        """The layout, why, and how to choose another."""
        if self.detection is None:
            return f"{self.name}: layout {self.layout}, as --shape says"
        return self.detection.sentence(self.name, "--shape NAME, or data.shape=NAME in a config")

    def to_text(self) -> str:
        """For a terminal."""
        blocks = [(t.source, tree_lines(t)) for made in self.shown for t in made.trees]
        aside = [
            (q.where, ["  " + printable(f"{'left out' if made.left_out else 'kept aside'}: {q.what}; {q.how}")])
            for made in self.shown
            for q in made.aside[:1]
        ]
        return "\n\n".join(filter(None, (printable(self.headline), rows_text(blocks), rows_text(aside))))

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        found = self.detection
        return {
            "file": self.name,
            "layout": self.layout,
            "why": None if found is None else found.why,
            "others": [] if found is None else list(found.others),
            "examples": [{"where": t.source, **tree_json(t)} for made in self.shown for t in made.trees],
            "aside": [
                {"where": q.where, "what": q.what, "how": q.how, "left_out": made.left_out}
                for made in self.shown
                for q in made.aside
            ],
        }


def preview(
    path: str,
    rows: int = 3,
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    layout_options: Mapping[str, Any] | None = None,
) -> Preview:
    """The layout of a file or hub id and its first `rows` rows (or groups of rows) as examples.

    Raises:
        DataError: it cannot be read, or is of no known layout. ConfigError: an unknown layout or option.
    """
    stream: Iterator[Row | BadRow] = itertools.islice(read_rows(path), MOST_ROWS)
    detection = None
    if shape == "auto":
        first = list(itertools.islice(stream, FIRST_ROWS))
        shape, detection = detected(first, path, columns or {})
        stream = itertools.chain(first, stream)
    layout = layout_named(shape)
    options = layout.settings(layout_options or {})
    shown = tuple(itertools.islice(convert_rows(stream, layout, options, columns), rows))
    return Preview(Path(path).name if Path(path).exists() else path, shape, detection, shown)
