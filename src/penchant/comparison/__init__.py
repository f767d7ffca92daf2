"""Comparing trained models: what a pipeline does at its end and `penchant compare` does with any runs."""
