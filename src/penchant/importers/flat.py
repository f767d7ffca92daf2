"""Import flat files with common key names (model_path, dataset_path, lora_r, max_seq_length, ...) that belong to no known tool."""

from __future__ import annotations

from collections.abc import Iterator

from penchant.importers.hf import report_to
from penchant.importers.rules import Given, Line, source, table, whole

TABLE = table("flat")


def method_of(given: Given) -> Iterator[Line]:
    """The loss, from loss_type, method or algorithm."""
    for key in (k for k in TABLE["derived"]["method_of"] if given.says(k)):
        ours = TABLE["losses"].get(str(given[key]).lower().replace("-", "_"))
        if ours:
            yield given.line([key], "translated", {"loss.name": ours})
        else:
            how = "set loss.name (`penchant losses` lists them) or algorithm.name"
            yield given.line([key], "unsupported", note=how)


def batches(given: Given) -> Iterator[Line]:
    """The batch size: per device or plain, times gradient accumulation and devices."""
    one = "per_device_train_batch_size" if given.says("per_device_train_batch_size") else "batch_size"
    more = "gradient_accumulation_steps" if given.says("gradient_accumulation_steps") else "grad_accum"
    if given.says(one, more):
        rows = whole(given[one] or 1) * whole(given[more] or 1) * given.devices
        note = f"rows of one optimizer step, on {given.devices} device(s)"
        yield given.line([k for k in (one, more) if given.says(k)], "translated", {"train.batch_size": rows}, note)


def columns(given: Given) -> Iterator[Line]:
    """prompt_column, chosen_column and similar keys."""
    named = {key.partition("_")[0]: key for key in TABLE["derived"]["columns"] if given.says(key)}
    if named:
        found = {field: str(given[key]) for field, key in named.items()}
        yield given.line(list(named.values()), "translated", {"data.columns": found})


SOURCE = source("flat", (batches, method_of, columns, report_to), lambda values, name: "flat")
