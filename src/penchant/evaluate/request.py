"""What is asked of a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from penchant.config import parse_yaml
from penchant.errors import ConfigError

Reward = str | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Request:
    """Options of `penchant eval`, apart from the model itself.

    Args:
        data: a file of rows, None: the run's own held-out rows; text: a file of plain text.
        reference: a model as MODEL is given, ``none``, or None: what the model started from; base: of an adapter.
        generate: prompts to write completions of, None: none; samples: of each; temperature: 0 is greedy; max_new_tokens, seed: of them.
        reward: as `load_reward` takes it; also: other rewards.
        exact_kl: None: wherever there is a reference; overlap: BLEU and ROUGE against the data's answers.
        beta: of the implicit reward, None: the run's, else 1; stemmer: of ROUGE.
        output: a JSON file of all figures; samples_output: a JSONL file of the completions.
    """

    data: str | None = None
    text: str | None = None
    reference: str | None = None
    base: str | None = None
    generate: int | None = None
    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    reward: Reward | None = None
    also: tuple[str, ...] = ()
    exact_kl: bool | None = None
    overlap: bool = True
    beta: float | None = None
    stemmer: bool = False
    output: str | None = None
    samples_output: str | None = None

    @property
    def bare(self) -> bool:
        """Whether nothing is asked beyond a run's own held-out metrics."""
        asked = (self.data, self.text, self.reference, self.base, self.generate, self.exact_kl, self.beta)
        return all(value is None for value in asked)

    @property
    def text_alone(self) -> bool:
        """Whether a text is all that is to be read: no answers are then."""
        others = (self.data, self.generate, self.exact_kl, self.beta)
        return self.text is not None and all(value is None for value in others)

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: it names the option.
        """
        for option, value, least in (
            ("--generate", self.generate, 1),
            ("--samples", self.samples, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(option, f"is {value}", f"give at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("--temperature", f"is {self.temperature:g}", "give 0 (the likeliest token) or more")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ConfigError("--beta", f"is {self.beta:g}", "give a positive number")
        needs = {
            "--reward": self.reward,
            "--also": self.also,
            "--samples-output": self.samples_output,
        }
        idle = next((option for option, value in needs.items() if value), None)
        if self.generate is None and idle is not None:
            raise ConfigError(idle, "is about what the model writes, and it writes nothing", "add --generate 100")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                "--samples", "greedy completions of one prompt are all alike", "give --temperature 1, or one sample"
            )
        for option, path in (("--output", self.output), ("--samples-output", self.samples_output)):
            if path is not None:
                _check_file(option, Path(path).expanduser())

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, apart from model and rows, for the log."""
        found: dict[str, Any] = {}
        if self.generate is not None:
            names = ("generate", "samples", "temperature", "max_new_tokens", "seed")
            found |= {name: getattr(self, name) for name in names}
            found["reward"] = dict(self.reward) if isinstance(self.reward, Mapping) else self.reward
            found |= {"also": list(self.also)} if self.also else {}
        return found


def request_of(asked: Mapping[str, Any]) -> Request:
    """A request from keywords.

    Raises:
        ConfigError: a keyword that is none of `Request`.
    """
    names = [f.name for f in fields(Request)]
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            how = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(names)}"
            raise ConfigError("evaluate", f"unknown option {name!r}", how)
    values = dict(asked)
    for name in ("data", "text", "reference", "base", "output", "samples_output"):
        if isinstance(values.get(name), Path):
            values[name] = str(values[name])
    reward = values.get("reward")
    if isinstance(reward, str) and reward.lstrip().startswith("{"):
        values["reward"], _ = parse_yaml(reward, "--reward")
    if isinstance(values.get("also"), str):
        values["also"] = (values["also"],)
    return Request(**values | {"also": tuple(values.get("also") or ())})


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(option, f"{path} is a folder", "give a file")
    if not path.parent.is_dir():
        raise ConfigError(option, f"{path.parent}: no such folder", "make it first, or give another file")
