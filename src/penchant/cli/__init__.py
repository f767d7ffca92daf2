"""The `penchant` command. Heavy imports happen inside the command that needs them: `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from penchant import __version__
from penchant.base.machine import gpu_visible
from penchant.base.text import Shown, did_you_mean, unescaped
from penchant.requests import HUMANS

# modules of this package, in the order of `penchant --help`
COMMANDS = [
    "demo",
    "init",
    "plan",
    "train",
    "sweep",
    "eval",
    "compare",
    "data",
    "report",
    "export",
    "track",
    "serve",
    "studio",
    "losses",
    "config",
    "importing",
]

EXIT_CODES = """exit codes:
  0  done                        3  the run stopped itself (NaN/Inf, failed step-0 check)
  1  a bug in penchant           4  interrupted; a checkpoint was written, run the command again to resume
  2  something you can fix       5  a disk that is full, fails or cannot be written; once fixed, run the command again
                               130  interrupted before there was anything to save"""

# glibc gives freed activations back to the kernel and faults them in again each step, which costs a third of the time; a heap for each
# thread would hold what passes side by side free twice;
# passive waiting keeps a shared machine usable, and a short spin before it saves waking a thread for every small operation (15% of a
# training step, a third of decoding); oneDNN keeps 1,024 prepared products, and a run's micro-batches rarely have one size twice: 128
# are enough for the layers of a pass and hold some hundred MB less (benchmarks/product_cache.py). All are read at process start, hence
# the re-execution.
CPU_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}

# where several processes share a model's weights, gathered ones come and go in large pieces of many sizes, which fragment a heap: they
# are given back, and huge pages keep the faults few
SHARDED_CPU_ENV = CPU_ENV | {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# where a GPU computes, a host that never gives memory back would hold the loaded weights to the end; segments that grow keep
# micro-batches of many sizes from cutting the GPU's memory into pieces; cuBLAS repeats its bits only with a workspace of its own; a
# collective that fails ends its process
CUDA_ENV = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}

# what these devices have no kernel for is computed on the CPU
FALLBACK_ENV = {"mps": {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}, "xpu": {"PYTORCH_ENABLE_XPU_FALLBACK": "1"}}


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Commands whose own help begins with what the list of commands says of them."""

    def add_parser(self, name: str, **given: Any) -> Any:
        about = given.get("help", "")
        return super().add_parser(name, **{"description": f"{about[:1].upper()}{about[1:]}.", **given})


class _Parser(argparse.ArgumentParser):
    """argparse with suggestions for mistyped commands."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.register("action", "parsers", _Commands)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)'", message)
        if wrong and self._subparsers:
            (commands,) = self._subparsers._group_actions
            message = f"{wrong[1]!r} is not a command; {did_you_mean(wrong[1], list(commands.choices or ()))}"
        self.exit(2, f"penchant: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="penchant",
        description="Preference data in, an aligned language model and the evidence for it out.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penchant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    for name in COMMANDS:
        import_module(f"penchant.cli.{name}").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. A person's mistake is one paragraph on stderr, never a traceback."""
    with _for_people():
        return _run(argv)


@contextmanager
def _for_people() -> Iterator[None]:
    """Whatever is printed in here is made printable and without secrets, once, on its way out."""
    with ExitStack() as replaced:
        for name, replacing in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream = unescaped(getattr(sys, name))
            if stream is not None:
                replaced.enter_context(replacing(Shown(stream)))  # type: ignore[type-var]
        try:
            yield
        except Exception:
            if "pytest" not in sys.modules:  # the interpreter's own way to print it escapes and hides nothing
                traceback.print_exc()
                sys.excepthook = lambda *_: None
            raise
        finally:
            if getattr(sys.stdout, "leaves", False):
                sys.stdout.flush()


def _run(argv: Sequence[str] | None) -> int:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from penchant.distributed.world import ended_on_purpose

        if (code := ended_on_purpose()) is not None:
            return code
    from penchant.base.functions import no_exit
    from penchant.base.mistakes import mistake
    from penchant.cli.arguments import bounded

    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no overrides behind an option
        if not hasattr(args, "overrides") or any(r.startswith("-") or "=" not in r for r in rest):
            command = " ".join(filter(None, ("penchant", args.command, getattr(args, "verb", None))))
            parser.error(f"unrecognized arguments: {' '.join(rest)}; {_as_settings(args, rest, command)}")
        args.overrides += rest
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if getattr(args, "allocator", False) and not str(getattr(args, "judge", "")).startswith(HUMANS):
            # the command needs tensors
            config = _check_config(args)
            quiet = getattr(args, "quiet", False)
            if sys.stderr.isatty() and not quiet and not os.environ.get("PENCHANT_REEXECUTED"):
                print(f"penchant {args.command}: loading torch", file=sys.stderr)
            _with_allocator(_device_of(args, config), _is_one_of_several(args, config))
            # what only prints may end with its reader; work goes on to its end: ``penchant train run.yaml | head``
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, Shown):
                    stream.leaves = not stream.isatty()
        with no_exit(), bounded(args):
            return int(args.handler(args) or 0)
    except KeyboardInterrupt:
        print("penchant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of a command that only prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        print(f"penchant: something that was run called exit({stop.code}), so this is not finished", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) and stop.code > 0 else 2
    except Exception as error:
        told = mistake(error)
        if told is None:
            raise
        print(f"penchant: {told}", file=sys.stderr)
        return told.exit_code


def _as_settings(args: argparse.Namespace, rest: Sequence[str], command: str) -> str:
    """What to write in place of options that there are none of: ``--lr 1e-4`` is the setting train.lr=1e-4."""
    from penchant.config.explain import setting_of

    first, *others = rest
    name, _, value = first.lstrip("-").partition("=")
    key = name if "." in name else setting_of(name.replace("-", "_"), {}).partition(" ")[0]
    if not key or not hasattr(args, "overrides"):
        return f"`{command} --help` lists what there is"
    value = value or next((w for w in others if not w.startswith("--")), "VALUE")
    return f"settings are written key.path=value, without dashes: {key}={value}"


def _check_config(args: argparse.Namespace) -> Any:
    """Check the config, and that the files it names are there, before torch is imported: a mistake is answered at once.

    Returns:
        A single run's config, where one was read.

    Raises:
        PenchantError: as the command itself would.
    """
    reads = getattr(args, "reads", None)
    if reads is None or os.environ.get("PENCHANT_REEXECUTED"):
        return None
    if reads == "pipeline":
        from penchant.pipeline import load_pipeline

        load_pipeline(args.config, args.overrides)
        return None
    if reads == "sweep":
        from penchant.sweep import load_sweep

        load_sweep(args.config, args.overrides)
        return None
    if Path(args.config).suffix not in (".yaml", ".yml"):
        return None  # `penchant eval` also takes the folder of a run or a model
    from penchant.config import load_config
    from penchant.data.read import named_files
    from penchant.models.options import check_model_path, check_weights
    from penchant.rewards.functions import check_reward_name
    from penchant.rollout.environment import check_environment_name
    from penchant.runfolder import check_run_folder, stands_for_model

    more = import_module("penchant.cli.train").launched(args) if args.command == "train" else []
    config = load_config(args.config, [*args.overrides, *more])
    if args.command == "eval":
        return config  # a finished run needs neither the model that it started from nor, with --data, its own rows
    check_run_folder(Path(config.output).expanduser())
    if not stands_for_model(Path(config.model.path).expanduser()):
        check_model_path(config.model.path)
        if args.command == "train":  # a plan needs shapes alone
            check_weights(config.model)
    for reward in filter(None, (config.reward, config.evaluation.reward)):
        for name in reward.terms:
            check_reward_name(name)
    if config.rollout.environment is not None:
        check_environment_name(config.rollout.environment)
    for path in (config.data.path, *config.data.held_out_files.values()):
        named_files(path)
    return config


def _with_allocator(device: str, several: bool) -> None:
    """Start this process anew with the settings of where it computes, once."""
    for name, value in FALLBACK_ENV.get(device, {}).items():  # where no process is started anew: torch is not there yet
        os.environ.setdefault(name, value)
    if sys.platform != "linux" or os.environ.get("PENCHANT_REEXECUTED") or "pytest" in sys.modules:
        return
    os.execve(sys.executable, [sys.executable, "-m", "penchant", *sys.argv[1:]], environment_of(device, several))


def environment_of(device: str, several: bool = False) -> dict[str, str]:
    """The environment of a process that computes on a device, as in `model.device`; what a person has set wins.

    Args:
        several: it is one of several that train together, or starts them.
    """
    on_gpu = device == "cuda" or (device == "auto" and gpu_visible())
    ours = CUDA_ENV if on_gpu else FALLBACK_ENV.get(device, SHARDED_CPU_ENV if several else CPU_ENV)
    return {**ours, **os.environ, "PENCHANT_REEXECUTED": "1"}


def _is_one_of_several(args: argparse.Namespace, config: Any) -> bool:
    """Whether a command trains with other processes: those that torchrun started, or that it starts."""
    from penchant.distributed.world import started_by_torchrun

    asked = getattr(args, "processes", None) or (config.launch.processes if config is not None else "auto")
    return started_by_torchrun() or asked not in ("auto", 1)


def _device_of(args: argparse.Namespace, config: Any) -> str:
    """Where a command will compute; what has no config that was read goes by whether there is a GPU."""
    return getattr(args, "device", None) or (config.model.device if config is not None else "auto")


if __name__ == "__main__":
    sys.exit(main())
