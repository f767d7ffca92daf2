"""The `penchant` command. Each command does its heavy imports itself, so that `--help` answers at once."""

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
from penchant.base.signals import interrupted_by
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

# Read at process start, hence the re-execution:
# - glibc would return freed activations to the kernel and fault them in again each step, which costs a third of the time; with one heap
#   per thread, passes that run side by side would each keep freed memory of their own
# - passive waiting keeps a shared machine usable, and a short spin before it avoids waking a thread for every small operation (15% of a
#   training step, a third of decoding)
# - oneDNN caches 1,024 primitives by default, but micro-batches rarely have the same size twice: 128 are enough for the layers of a pass
#   and take some hundred MB less (benchmarks/product_cache.py)
CPU_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}

# for several processes that shard a model's weights: gathered weights are large blocks of many sizes that come and go and would
# fragment a heap, so they are returned to the kernel, and huge pages keep page faults few
SHARDED_CPU_ENV = CPU_ENV | {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# for a GPU: a host that never returns memory would hold the loaded weights to the end; expandable segments keep micro-batches of many
# sizes from fragmenting GPU memory; cuBLAS is deterministic only with a fixed workspace; a failed collective ends its process
CUDA_ENV = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}

# compute on the CPU what these devices have no kernel for
FALLBACK_ENV = {"mps": {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}, "xpu": {"PYTORCH_ENABLE_XPU_FALLBACK": "1"}}


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Subcommands whose own help starts with their line in the list of commands."""

    def add_parser(self, name: str, **given: Any) -> Any:
        help_text = given.get("help", "")
        return super().add_parser(name, **{"description": f"{help_text[:1].upper()}{help_text[1:]}.", **given})


class _Parser(argparse.ArgumentParser):
    """argparse with suggestions for mistyped commands."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.register("action", "parsers", _Commands)

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '(.*?)'", message)
        if match and self._subparsers:
            (commands,) = self._subparsers._group_actions
            message = f"{match[1]!r} is not a command; {did_you_mean(match[1], list(commands.choices or ()))}"
        self.exit(2, f"penchant: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
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
    """Run a command and return its exit code. A user's mistake prints one paragraph on stderr, never a traceback."""
    # a process of several leaves SIGTERM to torch: it may be waiting for another one, and would not hear it before that one answers
    signals = () if "TORCHELASTIC_ERROR_FILE" in os.environ else ("SIGTERM",)
    with _printable_output():
        try:
            with interrupted_by(*signals):
                return _run(argv)
        except KeyboardInterrupt:
            print("penchant: interrupted", file=sys.stderr)
            return 130


@contextmanager
def _printable_output() -> Iterator[None]:
    """Make everything printed within the block printable and free of secrets."""
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream = unescaped(getattr(sys, name))
            if stream is not None:
                stack.enter_context(redirect(Shown(stream)))  # type: ignore[type-var]
        try:
            yield
        except Exception:
            if "pytest" not in sys.modules:  # the interpreter's own traceback is neither escaped nor redacted
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
    from penchant.cli.arguments import apply_bounds, options_in_errors

    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse does not accept overrides after an option
        if not hasattr(args, "overrides") or any(r.startswith("-") or "=" not in r for r in unknown):
            command = " ".join(filter(None, ("penchant", args.command, getattr(args, "verb", None))))
            parser.error(f"unrecognized arguments: {' '.join(unknown)}; {_suggest_setting(args, unknown, command)}")
        args.overrides += unknown
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
            _reexecute(_device_of(args, config), _is_distributed(args, config))
            # a command that only prints may end when its reader does, but work must continue: ``penchant train run.yaml | head``
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, Shown):
                    stream.leaves = not stream.isatty()
        with no_exit(), apply_bounds(args), options_in_errors(getattr(args, "parser", None)):
            return int(args.handler(args) or 0)
    except BrokenPipeError:  # from a command that only prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        print(f"penchant: your code called exit({stop.code}), so the command did not finish", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) and stop.code > 0 else 2
    except Exception as error:
        user_error = mistake(error)
        if user_error is None:
            raise
        print(f"penchant: {user_error}", file=sys.stderr)
        return user_error.exit_code


def _suggest_setting(args: argparse.Namespace, unknown: Sequence[str], command: str) -> str:
    """Suggest what to write in place of unknown options: ``--lr 1e-4`` is the setting train.lr=1e-4."""
    from penchant.config.explain import full_key

    first, *others = unknown
    name, _, value = first.lstrip("-").partition("=")
    key = name if "." in name else full_key(name.replace("-", "_"), {}).partition(" ")[0]
    if not key or not hasattr(args, "overrides"):
        return f"`{command} --help` lists what there is"
    value = value or next((w for w in others if not w.startswith("--")), "VALUE")
    return f"settings are written key.path=value, without dashes: {key}={value}"


def _check_config(args: argparse.Namespace) -> Any:
    """Check the config, and that the files it names exist, before torch is imported, so that mistakes are reported at once.

    Returns:
        The config of a single run, if one was read.

    Raises:
        PenchantError: as the command itself would.
    """
    config_kind = getattr(args, "reads", None)
    if config_kind is None or os.environ.get("PENCHANT_REEXECUTED"):
        return None
    if config_kind == "pipeline":
        from penchant.pipeline import load_pipeline

        load_pipeline(args.config, args.overrides)
        return None
    if config_kind == "sweep":
        from penchant.sweep import load_sweep

        load_sweep(args.config, args.overrides)
        return None
    if Path(args.config).suffix not in (".yaml", ".yml"):
        return None  # `penchant eval` also accepts the folder of a run or a model
    from penchant.config import load_config
    from penchant.data.read import named_files
    from penchant.models.options import check_model_path, check_weights
    from penchant.rewards.functions import check_reward_name
    from penchant.rollout.environment import check_environment_name
    from penchant.runfolder import check_run_folder, leads_to_model

    launch_overrides = import_module("penchant.cli.train").launch_settings(args) if args.command == "train" else []
    config = load_config(args.config, [*args.overrides, *launch_overrides])
    if args.command == "eval":
        return config  # a finished run does not need its base model nor, with --data, its own rows
    check_run_folder(Path(config.output).expanduser())
    if not leads_to_model(Path(config.model.path).expanduser()):
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


def _reexecute(device: str, is_distributed: bool) -> None:
    """Re-execute this process once, with the environment for the device it will use."""
    for name, value in FALLBACK_ENV.get(device, {}).items():  # works without re-execution: no torch yet
        os.environ.setdefault(name, value)
    if sys.platform != "linux" or os.environ.get("PENCHANT_REEXECUTED") or "pytest" in sys.modules:
        return
    os.execve(sys.executable, [sys.executable, "-m", "penchant", *sys.argv[1:]], environment_of(device, is_distributed))


def environment_of(device: str, several: bool = False) -> dict[str, str]:
    """Return the environment of a process that computes on a device, as in `model.device`; variables set by the user take precedence.

    Args:
        several: the process is one of several that train together, or starts them.
    """
    on_gpu = device == "cuda" or (device == "auto" and gpu_visible())
    variables = CUDA_ENV if on_gpu else FALLBACK_ENV.get(device, SHARDED_CPU_ENV if several else CPU_ENV)
    return {**variables, **os.environ, "PENCHANT_REEXECUTED": "1"}


def _is_distributed(args: argparse.Namespace, config: Any) -> bool:
    """Return True if a command trains with several processes, whether torchrun started them or the command will."""
    from penchant.distributed.world import started_by_torchrun

    processes = getattr(args, "processes", None) or (config.launch.processes if config is not None else "auto")
    return started_by_torchrun() or processes not in ("auto", 1)


def _device_of(args: argparse.Namespace, config: Any) -> str:
    """Return the device a command will use; without a config, ``auto``, which depends on whether there is a GPU."""
    return getattr(args, "device", None) or (config.model.device if config is not None else "auto")


if __name__ == "__main__":
    sys.exit(main())
