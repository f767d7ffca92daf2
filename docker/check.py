"""Run a Dockerfile's RUN steps, and finally its ENTRYPOINT, without a container engine.

    python docker/check.py docker/cpu.Dockerfile [--list] [--arg NAME=VALUE]

It needs root on Linux and runs the steps in a chroot on an overlay of this machine's root. Paths, users and permissions are real, writes
go to a temporary folder, and this machine's Python stands in for the base image's. It cannot check that the base image has what a step
needs, layer caching, or the image's size. Elsewhere the steps are only parsed and printed, with exit code 3 (with --list: 0).
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

KNOWN = {"FROM", "ENV", "ARG", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "ENTRYPOINT", "CMD", "LABEL"}
SYSTEM = {  # entries of / in a base image
    *("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "media", "mnt", "opt", "proc"),
    *("root", "run", "sbin", "srv", "sys", "tmp", "usr", "var"),
}


@dataclass(frozen=True)
class Step:
    """One instruction and the state it runs in: environment, working folder, user."""

    line: int
    name: str
    text: str
    env: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0"


def instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, NAME, rest) of each instruction, with continuations joined and comments removed.

    Raises:
        ValueError: an instruction is not in `KNOWN`.
    """
    joined, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if joined else number
        joined += line.rstrip("\\").strip() + " "
        if line.endswith("\\"):
            continue
        name, _, rest = joined.strip().partition(" ")
        if name.upper() not in KNOWN:
            raise ValueError(f"line {start}: {name} is not supported by this script")
        yield start, name.upper(), rest.strip()
        joined = ""


def expand(text: str, env: dict[str, str]) -> str:
    """Expand ``$NAME`` and ``${NAME}`` as in a Dockerfile."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: env.get(m[1] or m[2], ""), text)


def steps(text: str, arguments: dict[str, str], base_path: str) -> list[Step]:
    """Parse every instruction, with the state it runs in."""
    state = Step(0, "", "", {"PATH": base_path})
    parsed = []
    for line, name, rest in instructions(text):
        if name == "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            state = replace(state, env=state.env | {k: expand(v, state.env) for k, v in pairs.items()})
        elif name == "ARG":
            key, _, default = rest.partition("=")
            state = replace(state, env=state.env | {key: arguments.get(key, default)})
        elif name == "WORKDIR":
            state = replace(state, folder=rest)
        elif name == "USER":
            state = replace(state, user=rest)
        parsed.append(replace(state, line=line, name=name, text=rest))
    return parsed


def command(step: Step) -> str:
    """The shell command of a RUN step, without its --mount options, which only concern caching."""
    return re.sub(r"^(--\w+=\S+\s+)+", "", step.text)


class Root:
    """A copy-on-write root in a separate mount namespace."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.root = scratch / "root"
        for name in ("upper", "work", "root"):
            (scratch / name).mkdir()
        for entry in Path(
            "/"
        ).iterdir():  # hide entries that a base image lacks (this machine's own data) by an overlay whiteout
            if entry.name not in SYSTEM:
                os.mknod(scratch / "upper" / entry.name, stat.S_IFCHR, os.makedev(0, 0))

    def mount(self) -> None:
        """Mount the overlay, /proc and /dev. The mount namespace ends with this process."""
        layers = f"lowerdir=/,upperdir={self.scratch}/upper,workdir={self.scratch}/work"
        for words in (
            ["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)],
            ["mount", "-t", "proc", "proc", f"{self.root}/proc"],
            ["mount", "--rbind", "/dev", f"{self.root}/dev"],
        ):
            subprocess.run(words, check=True)
        for folder in (
            Path(sys.executable).resolve().parents[:-1]
        ):  # the Python used in place of the image's may be in root's home
            inside = self.root / folder.relative_to("/")
            inside.chmod(inside.stat().st_mode | 0o055)
        for name in ("passwd", "group", "shadow", "gshadow"):  # a base image has no login users
            self._forget_people(self.root / "etc" / name)

    def _forget_people(self, file: Path) -> None:
        people = {p.pw_name for p in pwd.getpwall() if 1000 <= p.pw_uid < 60000}
        if file.exists():
            lines = file.read_text().splitlines()
            file.write_text("".join(f"{line}\n" for line in lines if line.split(":")[0] not in people))

    def run(self, step: Step, shell: str) -> int:
        """Run a command in the root with the step's environment, folder and user, plus this machine's PIP_*, SSL_* and REQUESTS_*."""
        pip = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        home = "/root" if step.user == "0" else "/home/penchant"
        env = [f"{k}={v}" for k, v in {**pip, "HOME": home, **step.env}.items()]
        user, _, group = step.user.partition(":")
        who = [] if user == "0" else ["setpriv", f"--reuid={user}", f"--regid={group or user}", "--clear-groups"]
        inside = (
            f"mkdir -p {step.folder} && cd {step.folder} && {shell}" if user == "0" else f"cd {step.folder} && {shell}"
        )
        words = ["chroot", str(self.root), "env", "-i", *env, *who, "/bin/sh", "-c", inside]
        return subprocess.run(words, check=False).returncode

    def copy(self, step: Step, context: Path) -> None:
        """Perform COPY of files into a folder, or of a folder's contents."""
        *sources, target = step.text.split()
        to = self.root / (Path(step.folder) / target).relative_to("/")
        for source in (context / s for s in sources):
            if source.is_dir():
                shutil.copytree(source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, to)


def check(parsed: list[Step], context: Path, root: Root) -> int:
    """Run the steps, the entry point and a write check. Returns the exit code of the first failure, otherwise 0."""
    for step in parsed:
        began = time.monotonic()
        code = 0
        if step.name == "COPY":
            root.copy(step, context)
        elif step.name == "WORKDIR" and step.user == "0":
            (root.root / step.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.name == "RUN":
            code = root.run(step, command(step))
        print(f"[{code}] {step.line}: {step.name} {step.text[:100]}  ({time.monotonic() - began:.1f}s)", flush=True)
        if code:
            return code
    last = parsed[-1]
    words = [w for s in parsed if s.name in ("ENTRYPOINT", "CMD") for w in json.loads(s.text)]
    for shell in (shlex.join(words), "id -u && touch /workspace/written && ! touch /opt/penchant/written 2>/dev/null"):
        code = root.run(last, shell)
        print(f"[{code}] as user {last.user}: {shell}", flush=True)
        if code:
            return code
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="a build argument (may be repeated)"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    base_path = f"/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:{Path(sys.executable).resolve().parent}"
    parsed = steps(args.dockerfile.read_text(), dict(a.split("=", 1) for a in args.arg), base_path)
    if args.list or sys.platform != "linux" or os.geteuid() != 0:
        for step in parsed:
            print(f"{step.line}: {step.name} {command(step) if step.name == 'RUN' else step.text}")
        if not args.list:
            print(
                "nothing was run: running the steps needs root on Linux (for a chroot on an overlay)", file=sys.stderr
            )
        return 0 if args.list else 3
    if not args.inside:  # use a mount namespace that ends with the process
        words = [sys.executable, __file__, *(argv or sys.argv[1:]), "--inside"]
        return subprocess.run(["unshare", "--mount", *words], check=False).returncode
    context = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="penchant-docker-", ignore_cleanup_errors=True) as scratch:
        root = Root(Path(scratch))
        root.mount()
        try:
            return check(parsed, context, root)
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", str(root.root)], check=False)


if __name__ == "__main__":
    sys.exit(main())
