"""`penchant train`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from penchant.base.machine import cores
from penchant.cli.arguments import add_config
from penchant.distributed.world import join, started_by_torchrun

PER_CORE = 8  # maximum processes per core, so that a typo in their number cannot bring the machine down


def add(commands: Any) -> None:
    train = commands.add_parser("train", help="train from a config; run it again to resume after an interruption")
    add_config(train, "CONFIG.yaml")
    train.add_argument("--quiet", action="store_true", help="do not show progress")
    group = train.add_mutually_exclusive_group()
    group.add_argument("--processes", type=int, metavar="N", help="train with N processes (launch.processes=N)")
    group.add_argument("--gpus", type=int, metavar="N", help="train with N GPUs of this machine, one process each")
    train.set_defaults(handler=_train, allocator=True, reads="run")


def _train(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.runfolder.read import read_folder
    from penchant.runfolder.values import count_unchanged
    from penchant.training.checkpoint import latest_checkpoint
    from penchant.training.loop import Interrupted

    config = api.as_config(args.config, [*args.overrides, *launch_settings(args)])
    if started_by_torchrun():
        from penchant.distributed.launch import leave, watched

        if config.train.deterministic:
            # NVLink switches add in no fixed order; torch disables them only if its deterministic mode is on before process groups exist
            os.environ.setdefault("NCCL_ALGO", "^NVLS")
        limit = config.launch.timeout
        with join(limit, config.launch.context) as world, watched(world, limit):
            restarts, max_restarts = (
                os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS")
            )
            if world.leads and restarts != "0":
                print(
                    f"penchant: a process crashed; all are started again ({restarts} of {max_restarts})",
                    file=sys.stderr,
                )
            try:
                result = api.train(config, quiet=args.quiet)
                world.agree(patient=True)  # rank 0 still writes the report and waits for trackers
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                leave(error, world, limit)
            if not world.leads:
                return 0
    elif config.launch.processes not in ("auto", 1):
        return _launch(args, config)
    else:
        try:
            result = api.train(config, quiet=args.quiet)
        except KeyboardInterrupt:
            if (path := latest_checkpoint(Path(config.output))[0]) is None:
                raise
            what = f"interrupted; a checkpoint of {path.name.replace('-', ' ')} was written"
            raise Interrupted(config.output, what, "run the same command to continue") from None
    for name, metrics in (("before", result.before), ("after", result.after)):
        if metrics:
            print(f"{name:>6}: {_held_out_summary(metrics)}")
    print(f" model: {result.model}")
    if (report := result.folder / "report.html").is_file():
        print(f"report: {report}")
    if result.flags:
        from penchant.flags import summary

        print(f"{summary(result.flags)}\nevidence and advice: penchant flags {result.folder}")
    from penchant.report import headline

    print(f"result: {headline(result.folder)}")
    unchanged, total = count_unchanged(read_folder(result.folder).samples)
    if unchanged:
        print(f"        {unchanged} of {total} sampled answers are unchanged by training")
    return 0


def launch_settings(args: argparse.Namespace) -> list[str]:
    """Return --processes and --gpus as settings."""
    if args.gpus is not None:
        return [f"launch.processes={args.gpus}", "model.device=cuda"]
    return [] if args.processes is None else [f"launch.processes={args.processes}"]


def _launch(args: argparse.Namespace, config: Any) -> int:
    """Start the training processes and wait for them."""
    import torch

    from penchant.base.text import counted
    from penchant.config.launching import check_launch
    from penchant.distributed.launch import launch
    from penchant.errors import ConfigError

    processes, gpus = int(config.launch.processes), torch.cuda.device_count()
    check_launch(config, processes)
    if config.model.device == "cuda" and gpus < processes:
        available = counted(gpus, "GPU") if gpus else "no GPU that torch can use"
        how = f"give at most {gpus}" if gpus else "give --processes N in place of --gpus to train on the CPU"
        raise ConfigError("launch.processes", f"is {processes}, and this machine has {available}", how)
    if processes > (limit := PER_CORE * cores()):
        available = counted(cores(), "core")
        raise ConfigError(
            "launch.processes", f"is {processes}, and this machine has {available}", f"give at most {limit}"
        )
    quiet = ["--quiet"] if args.quiet else []
    command = ["train", args.config, *args.overrides, *launch_settings(args), *quiet]
    return launch(command, processes, config.launch.restarts, max(30.0, config.launch.timeout))


def _held_out_summary(metrics: Any) -> str:
    from penchant.base.text import counted
    from penchant.metrics.names import format_figure

    parts = []
    for name, label in (
        ("eval/rewards/accuracies", "preference accuracy"),
        ("eval/rewards/margins", "margin"),
        ("eval/reward", "reward"),
        ("eval/win_rate", "win rate"),
        ("eval/loss", "loss"),
        ("eval/kl/k3", "KL"),
        ("eval/perplexity", "perplexity"),
    ):
        if name in metrics and not (name == "eval/loss" and "eval/reward" in metrics):
            parts.append(f"{label} {format_figure(metrics, name)}")
    return ", ".join(parts) + f" ({counted(metrics['eval/rows'], 'held-out row')})"
