"""Mirrors of a run's metrics in W&B, TensorBoard, MLflow and Trackio; `metrics.jsonl` stays the truth."""

from __future__ import annotations

from penchant.tracking.mirror import Mirrors, check_installed, run_info
from penchant.tracking.protocol import Line, RunInfo, Started, Tracker
from penchant.tracking.registry import TRACKERS, TrackerSpec

__all__ = ["TRACKERS", "Line", "Mirrors", "RunInfo", "Started", "Tracker", "TrackerSpec", "check_installed", "run_info"]
