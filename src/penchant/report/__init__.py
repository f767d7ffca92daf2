"""The report: one self-contained HTML file for a run."""

from __future__ import annotations

from penchant.report.build import write_report

__all__ = ["write_report"]
