"""`penchant watch`: runs in a terminal as they go on. It reads their files and nothing else, and loads neither torch nor a model."""

from __future__ import annotations

from penchant.watch.app import watch

__all__ = ["watch"]
