"""Read a training command in a shell script (`swift rlhf --beta 0.1 ...`) as a mapping, like a config file."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from penchant.base.files import yaml_value
from penchant.config import read_mapping
from penchant.errors import ConfigError

ENDINGS = (".sh", ".bash")
MAX_BYTES = 256 << 10
# command: (tool, {training subcommand: its method, or "" if an argument gives it})
COMMANDS: dict[str, tuple[str, Mapping[str, str]]] = {
    "swift": ("ms-swift", {"sft": "sft", "pt": "pt", "rlhf": ""}),
    "trl": ("trl", {m: m for m in ("sft", "dpo", "kto", "reward", "grpo", "rloo")}),
    "llamafactory-cli": ("llama-factory", {"train": ""}),
}


@dataclass(frozen=True, slots=True)
class Command:
    """A training command: its arguments, the tool, the method if the subcommand gives it (else ""), and the number of GPUs."""

    values: dict[str, Any]
    tool: str
    method: str
    devices: int


def read_command(path: str | Path) -> Command:
    """Find the single training command in a script.

    Raises:
        ConfigError: the script cannot be read, has no such command or several, or a value needs a variable that it does not set.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(where, f"cannot be read ({error})", "give a UTF-8 shell script") from error
    if len(text) > MAX_BYTES:
        raise ConfigError(where, f"has more than {MAX_BYTES >> 10} kB", "leave the command in it alone")
    variables: dict[str, str] = {}
    commands: list[Command] = []
    uncommented = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\[ \t]*\n", " ", uncommented).splitlines():
        if not re.match(r"\s*(export\s+)?\w+=", line) and not any(name in line for name in COMMANDS):
            continue
        try:
            words = [_expand_variables(w, variables) for w in _split_words(_evaluate_arithmetic(line, variables))]
        except ValueError as error:
            raise ConfigError(where, f"a line cannot be understood ({error}): {line[:60]}", "fix its quotes") from error
        words = words[: next((i for i, w in enumerate(words) if w.startswith("#")), len(words))]
        while words and (words[0] == "export" or re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.S)):
            name, equals, value = words.pop(0).partition("=")
            variables |= {name: value} if equals else {}
        position = next(
            (i for i, w in enumerate(words[:-1]) if _tool_name(w) and words[i + 1] in COMMANDS[_tool_name(w)][1]), None
        )
        if position is not None:
            tool, methods = COMMANDS[_tool_name(words[position])]
            values = _parse_arguments(words[position + 2 :], where)
            if methods[words[position + 1]] == "" and tool == "ms-swift":
                values.setdefault("rlhf_type", "dpo")
            process_counts = re.findall(
                r"--(?:num_processes|nproc[-_]per[-_]node)[= ](\S+)", " ".join(words[:position])
            )
            devices = _device_count({**variables, **({"NPROC_PER_NODE": process_counts[-1]} if process_counts else {})})
            commands.append(Command(values, tool, methods[words[position + 1]], devices))
    if len(commands) != 1:
        what = f"{len(commands)} commands that train" if commands else "no command that trains"
        how = f"leave one in the script: {', '.join(f'{c} {s}' for c, (_, m) in COMMANDS.items() for s in m)}"
        raise ConfigError(where, f"has {what}", how)
    return commands[0]


def _split_words(line: str) -> list[str]:
    """Split a line into words. Command separators are words of their own, even without spaces around them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer)


def _tool_name(word: str) -> str:
    name = word.rpartition("/")[2]
    return name if name in COMMANDS else ""


def _expand_variables(word: str, variables: Mapping[str, str]) -> str:
    names = re.compile(r"\$\{(\w+)\}|\$(\w+)")
    if sum(len(variables.get(m[1] or m[2], "")) for m in names.finditer(word)) > MAX_BYTES:
        raise ValueError("its variables hold too much text")
    return names.sub(lambda m: variables.get(m[1] or m[2], m[0]), word)


def _evaluate_arithmetic(line: str, variables: Mapping[str, str]) -> str:
    """Evaluate `$(expr 16 / $n)` and `$((16 / n))` like the shell. Other expressions are kept, and rejected later."""

    def evaluate(match: re.Match[str]) -> str:
        left, operator, right = (g for g in match.groups() if g is not None)
        a, b = (variables.get(w.strip("${}"), w) for w in (left, right))
        if not all(re.fullmatch("[0-9]{1,9}", n) for n in (a, b)) or (operator == "/" and int(b) == 0):
            return match[0]
        return str(
            {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[operator](int(a), int(b))
        )

    word = r"(\$?\w+|\$\{\w+\})"
    return re.sub(
        rf"\$\(expr\s+{word}\s+\\?([*/+-])\s+{word}\s*\)|\$\(\(\s*{word}\s*([*/+-])\s*{word}\s*\)\)", evaluate, line
    )


def _device_count(variables: Mapping[str, str]) -> int:
    counts = [variables.get(n, "1") for n in ("NPROC_PER_NODE", "NNODES")]
    return max(1, int(counts[0])) * max(1, int(counts[1])) if all(re.fullmatch(r"[0-9]{1,6}", c) for c in counts) else 1


def _parse_arguments(words: list[str], where: str) -> dict[str, Any]:
    """Parse ``--key value`` and ``--key=value``. No value means true, several make a list. Arguments override a `--config` file."""
    values: dict[str, Any] = {}
    key = ""
    for word in words:
        if re.match(r"[;|&]+$|\d?>", word):
            break
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [_parse_value(value)] if equals else []
        elif key:
            values[key].append(_parse_value(word))
        else:
            raise ConfigError(where, f"gives {word} without a name", "import that file itself, or write --name value")
    for name, arguments in values.items():
        if (
            unknown := next((v for v in arguments if isinstance(v, str) and re.search(r"\$[\w{(@*#?]|`", v)), None)
        ) is not None:
            what = f"--{name} is {unknown[:60]}, which needs a variable that it does not set, or a shell"
            raise ConfigError(where, what, "write the value in its place")
    parsed = {k: True if not v else v[0] if len(v) == 1 else v for k, v in values.items()}
    if "config" not in parsed:
        return parsed
    config_path = Path(str(parsed.pop("config")))
    config_path = config_path if os.path.exists(config_path) else Path(where).parent / config_path
    return {**read_mapping(config_path, "foreign")[0], **parsed}


def _parse_value(word: str) -> Any:
    try:
        value = yaml_value(word)
    except (yaml.YAMLError, ValueError, ConfigError):
        return word
    return value if isinstance(value, (bool, int, float, dict, list)) else word
