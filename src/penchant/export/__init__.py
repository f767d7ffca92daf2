"""Exports a run's model to the formats that other tools load; each is read back and compared before it gets its name."""

from __future__ import annotations

from penchant.export.export import ExportResult, export_run
from penchant.requests import ExportRequest

__all__ = ["ExportRequest", "ExportResult", "export_run"]
