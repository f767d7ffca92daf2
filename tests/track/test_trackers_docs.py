"""docs/trackers.md agrees with the registry and the table of metrics."""

from __future__ import annotations

from pathlib import Path

from refresh import trackers_page

from penchant.track import TRACKERS
from penchant.training.options import LoggingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text()


def test_the_page_has_every_metric_every_tracker_and_every_key() -> None:
    assert trackers_page() in PAGE
    for name, spec in TRACKERS.items():
        assert f"| `{name}` |" in PAGE and spec.extra == name
    for key in LoggingConfig.model_fields.keys() - {"every"}:
        assert f"| `logging.{key}` |" in PAGE
