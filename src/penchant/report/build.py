"""Write a report: one HTML file that can be read offline, with nothing in it that could call home."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from penchant.errors import CheckpointError
from penchant.report.data import ReportData, read_report
from penchant.report.page import render

MARK = '<meta name="generator" content="penchant">'
NAME = "report.html"


def write_report(
    paths: Path | str | Sequence[Path | str], output: Path | str | None = None, *, strict: bool = False
) -> Path:
    """Write the report of a run, of several, of a sweep, a pipeline or a comparison; what a folder lacks is said, not guessed.

    Args:
        paths: one folder or more. output: the file; default: ``report.html`` in the folder, or, of several folders, in the current one.
        strict: whether a part that cannot be made raises, rather than saying so on the page.

    Raises:
        CheckpointError: a path does not exist or holds nothing of Penchant's, or the file cannot be written.
    """
    folders = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    data = read_report(folders, time.time())
    target = _target(data, output)
    text = render(data, strict=strict)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(aside, target)  # a page that loads itself anew never sees half of one
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(
            str(target), f"cannot be written ({error.strerror})", "choose another --output"
        ) from error
    return target


def _target(data: ReportData, output: Path | str | None) -> Path:
    if output is not None:
        target = Path(output).expanduser()
        return target / NAME if target.is_dir() else target
    if len(data.paths) == 1:
        return data.paths[0] / NAME
    target = Path.cwd() / NAME
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise CheckpointError(str(target), "is there already, and is no report of Penchant's", "give --output")
    return target
