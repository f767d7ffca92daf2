"""The report: one self-contained HTML file for a run, a sweep, a pipeline or a comparison."""

from __future__ import annotations

from penchant.report.build import write_report
from penchant.report.live import LiveReport

__all__ = ["LiveReport", "write_report"]
