"""Penchant: preference data in, an aligned language model and the evidence for it out."""

from __future__ import annotations

__version__ = "0.1.0"
