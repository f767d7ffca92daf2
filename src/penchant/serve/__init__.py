"""Talking to a model: one engine under `penchant chat` and `penchant serve`."""
