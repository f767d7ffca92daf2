"""Import flat files with common key names (model_path, dataset_path, lora_r, max_seq_length, ...) that belong to no known tool."""

from __future__ import annotations

from collections.abc import Iterator

from penchant.importers.hf import report_to
from penchant.importers.rules import Line, ToolConfig, integer, source, table

TABLE = table("flat")


def method_of(config: ToolConfig) -> Iterator[Line]:
    """The loss, from loss_type, method or algorithm."""
    for key in (k for k in TABLE["derived"]["method_of"] if config.sets(k)):
        ours = TABLE["losses"].get(str(config[key]).lower().replace("-", "_"))
        if ours:
            yield config.line([key], "translated", {"loss.name": ours})
        else:
            how = "set loss.name (`penchant losses` lists them) or algorithm.name"
            yield config.line([key], "unsupported", note=how)


def batches(config: ToolConfig) -> Iterator[Line]:
    """The batch size: per device or plain, times gradient accumulation and devices."""
    size_key = "per_device_train_batch_size" if config.sets("per_device_train_batch_size") else "batch_size"
    accumulation_key = "gradient_accumulation_steps" if config.sets("gradient_accumulation_steps") else "grad_accum"
    if config.sets(size_key, accumulation_key):
        rows = integer(config[size_key] or 1) * integer(config[accumulation_key] or 1) * config.devices
        note = f"rows of one optimizer step, on {config.devices} device(s)"
        yield config.line(
            [k for k in (size_key, accumulation_key) if config.sets(k)], "translated", {"train.batch_size": rows}, note
        )


def columns(config: ToolConfig) -> Iterator[Line]:
    """prompt_column, chosen_column and similar keys."""
    keys = {key.partition("_")[0]: key for key in TABLE["derived"]["columns"] if config.sets(key)}
    if keys:
        mapping = {field: str(config[key]) for field, key in keys.items()}
        yield config.line(list(keys.values()), "translated", {"data.columns": mapping})


SOURCE = source("flat", (batches, method_of, columns, report_to), lambda values, name: "flat")
