"""Check whether the number of processes can train a config, before anything is loaded."""

from __future__ import annotations

from penchant.config.schema import RunConfig
from penchant.errors import ConfigError


def check_launch(config: RunConfig, processes: int) -> None:
    """Reject settings that do not fit the number of processes or that only one process can train so far.

    Raises:
        ConfigError: with what to do instead.
    """
    launch = config.launch
    if processes == 1:
        if launch.processes not in ("auto", 1):
            what = f"is {launch.processes}, and this is one process: only the command penchant train starts others"
            how = "leave it out of sweeps, pipelines and Python calls, or use penchant train or torchrun"
            raise ConfigError("launch.processes", what, how)
        if launch.context > 1:
            what = f"is {launch.context}, and this is one process"
            raise ConfigError("launch.context", what, "give --processes, or leave it out")
        if launch.offload:
            raise ConfigError("launch.offload", "moves shards, and this is one process", "leave it out, or give --gpus")
        return
    if launch.processes not in ("auto", processes):
        what = f"is {launch.processes}, but {processes} processes were started"
        raise ConfigError("launch.processes", what, "leave it out under torchrun")
    if processes % launch.replicas:
        what = f"{processes} processes are not {launch.replicas} equal groups"
        raise ConfigError("launch.replicas", what, "give a divisor of them")
    if processes % launch.context:
        what = f"{processes} processes are not equal groups of {launch.context}"
        raise ConfigError("launch.context", what, "give a divisor of them")
    if launch.context > 1:
        reason = None
        if config.algorithm is not None:
            reason = f"{config.method.name} samples completions, which is untested with it"
        elif config.model.router_aux_loss is not None:
            reason = "a router's balance loss has not been tried with it"
        elif config.train.packing == "padded":
            reason = "padded rows have no part of it"
        if reason is not None:
            raise ConfigError("launch.context", f"is {launch.context}, and {reason}", "set it to 1")
    single_process_advice = "train it in one process (without torchrun, --processes and --gpus)"
    if config.model.sees:
        raise ConfigError("model.vision", "pictures are read by one process", single_process_advice)
    if config.method.name == "gkd":
        raise ConfigError("algorithm.name", "gkd has not been tried with a sharded teacher yet", single_process_advice)
    if (kind := config.train.optimizer) not in ("adamw", "muon", "sgd"):
        reason = "adds up columns in place, which torch cannot do over shards"
        if kind != "adafactor":
            reason = "keeps its moments in blocks that go over the borders of shards"
        raise ConfigError("train.optimizer", f"{kind} {reason}", f"set adamw, muon or sgd, or {single_process_advice}")
    if config.model.quantize != "none":
        raise ConfigError(
            "model.quantize", "quantized weights cannot be sharded yet", f"leave it out, or {single_process_advice}"
        )
    if isinstance(config.train.gradient_checkpointing, str):
        what = f"{config.train.gradient_checkpointing} is for one process so far"
        raise ConfigError("train.gradient_checkpointing", what, f"set layers or off, or {single_process_advice}")
