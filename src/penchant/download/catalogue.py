"""The data sets that have a name: where each is published, in which files, and in which layout. docs/data_get.md names the sources."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penchant.errors import ConfigError

HUB = "https://huggingface.co/datasets/"
PARQUET = "refs/convert/parquet"  # where the hub keeps its own Parquet copy of a data set that is published as a script


@dataclass(frozen=True, slots=True)
class Files:
    """A subset's files.

    Args:
        splits: published split (train, validation or test) to a pattern of paths, as `fnmatch` has them.
        layout: of these rows, where it is not the data set's; options: of that layout, unless a person says otherwise.
        prompts_only: these rows are for prompts alone (`--as prompts`).
    """

    splits: Mapping[str, str]
    layout: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts_only: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """A data set of the catalogue.

    Args:
        name: what a person types; aliases: other names for it; hub: its id there; revision: a branch other than main.
        subsets: name to files; default: the subsets that are read where nobody chooses.
        layout: of its rows (`penchant data formats`); gated: whether its terms must be accepted first.
        terms: licence, in a few words; summary: one line; filters: which of language, redacted and moderation apply.
    """

    name: str
    hub: str
    subsets: Mapping[str, Files]
    default: tuple[str, ...]
    layout: str
    terms: str
    summary: str
    aliases: tuple[str, ...] = ()
    revision: str = "main"
    gated: bool = False
    filters: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """Its page, where its terms are."""
        return HUB + self.hub


def _one(splits: Mapping[str, str], name: str = "default", **more: Any) -> dict[str, Files]:
    return {name: Files(splits, **more)}


def _train(pattern: str) -> dict[str, Files]:
    return _one({"train": pattern})


_HH = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
_ULTRA = ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat")
_SHP_DOMAINS = (
    *("askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs", "askengineers"),
    *("askhistorians", "askhr", "askphilosophy", "askphysics", "askscience", "asksciencefiction", "asksocialscience"),
    *("askvet", "changemyview", "explainlikeimfive", "legaladvice"),
)
_PKU = ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")

SPECS = (
    Spec(
        "lmsys-chat-1m",
        "lmsys/lmsys-chat-1m",
        _train("data/train-*.parquet"),
        ("default",),
        "lmsys",
        "LMSYS-Chat-1M licence agreement",
        "one million conversations with 25 models, without preferences",
        aliases=("lmsys", "lmsys_chat_1m"),
        gated=True,
        filters=("language", "redacted", "moderation"),
    ),
    Spec(
        "hh-rlhf",
        "Anthropic/hh-rlhf",
        {
            **{s: Files({"train": f"{s}/train.jsonl*", "test": f"{s}/test.jsonl*"}) for s in _HH},
            "red-team-attempts": Files(
                {"train": "red-team-attempts/red_team_attempts.jsonl*"}, layout="prompts", prompts_only=True
            ),
        },
        _HH,
        "hh",
        "MIT",
        "helpful and harmless pairs of whole transcripts; red-team-attempts for its prompts",
        aliases=("hh", "hh_rlhf"),
    ),
    Spec(
        "ultrafeedback",
        "openbmb/UltraFeedback",
        {s: Files({"train": f"{s}.jsonl"}) for s in _ULTRA},
        _ULTRA,
        "ultrafeedback",
        "MIT",
        "64k prompts with four answers each, scored by GPT-4",
    ),
    Spec(
        "ultrafeedback-binarized",
        "HuggingFaceH4/ultrafeedback_binarized",
        {
            "prefs": Files({"train": "data/train_prefs-*.parquet", "test": "data/test_prefs-*.parquet"}),
            "sft": Files({"train": "data/train_sft-*.parquet", "test": "data/test_sft-*.parquet"}, layout="messages"),
            "gen": Files({"train": "data/train_gen-*.parquet", "test": "data/test_gen-*.parquet"}, layout="prompts"),
        },
        ("prefs",),
        "ultrafeedback_binarized",
        "MIT",
        "UltraFeedback as pairs: the best answer against one of the others",
        aliases=("ultrafeedback_binarized", "ultrafeedback-binarised", "ultrafeedback_binarised"),
    ),
    Spec(
        "shp",
        "stanfordnlp/SHP",
        {d: Files({s: f"{d}/{s}.json*" for s in ("train", "validation", "test")}) for d in _SHP_DOMAINS},
        _SHP_DOMAINS,
        "shp",
        "Reddit's API terms; see its page",
        "385k pairs of Reddit comments in 18 domains",
    ),
    Spec(
        "pku-saferlhf",
        "PKU-Alignment/PKU-SafeRLHF",
        {s: Files({"train": f"data/{s}/train.jsonl", "test": f"data/{s}/test.jsonl"}) for s in _PKU},
        _PKU,
        "pku_saferlhf",
        "CC BY-NC 4.0",
        "pairs with a vote for the better and one for the safer answer",
        aliases=("pku_saferlhf", "pku-safe-rlhf", "saferlhf"),
    ),
    Spec(
        "helpsteer",
        "nvidia/HelpSteer",
        _one({"train": "train.jsonl*", "validation": "validation.jsonl*"}),
        ("default",),
        "helpsteer",
        "CC BY 4.0",
        "37k answers with five scores each",
    ),
    Spec(
        "helpsteer2",
        "nvidia/HelpSteer2",
        {
            "default": Files({"train": "train.jsonl*", "validation": "validation.jsonl*"}),
            "preference": Files({"train": "preference/preference.jsonl*"}, layout="helpsteer2_pairs"),
        },
        ("default",),
        "helpsteer",
        "CC BY 4.0",
        "21k answers with five scores each; subset preference: votes between two answers",
    ),
    Spec(
        "oasst1",
        "OpenAssistant/oasst1",
        {
            "default": Files({"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"}),
            "ready-trees": Files({"train": "*_oasst_ready.trees.jsonl*"}, layout="oasst"),
        },
        ("default",),
        "oasst_flat",
        "Apache 2.0",
        "trees of messages by volunteers in many languages, with ranks",
        aliases=("oasst",),
        filters=("language",),
    ),
    Spec(
        "oasst2",
        "OpenAssistant/oasst2",
        {
            "default": Files({"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"}),
            "ready-trees": Files({"train": "*_oasst2_ready.trees.jsonl*"}, layout="oasst"),
        },
        ("default",),
        "oasst_flat",
        "Apache 2.0",
        "the second release of oasst1",
        filters=("language",),
    ),
    Spec(
        "tldr",
        "openai/summarize_from_feedback",
        _one({s: f"comparisons/{s}/*.parquet" for s in ("train", "validation")}),
        ("default",),
        "tldr_comparisons",
        "see its page",
        "comparisons of two summaries of a Reddit post",
        aliases=("tldr-comparisons", "tldr_comparisons", "summarize_from_feedback"),
        revision=PARQUET,
    ),
    Spec(
        "chatbot-arena",
        "lmsys/chatbot_arena_conversations",
        _train("data/train-*.parquet"),
        ("default",),
        "arena",
        "Creative Commons; see its page",
        "33k votes between two models' conversations",
        aliases=("arena", "chatbot_arena_conversations", "arena-33k"),
        gated=True,
        filters=("language", "moderation"),
    ),
    Spec(
        "arena-55k",
        "lmarena-ai/arena-human-preference-55k",
        _train("train.csv"),
        ("default",),
        "arena_55k",
        "Apache 2.0",
        "55k votes of the Chatbot Arena",
        aliases=("lmsys-arena-human-preference-55k", "arena-human-preference-55k"),
    ),
    Spec(
        "arena-100k",
        "lmarena-ai/arena-human-preference-100k",
        _train("default/train/*.parquet"),
        ("default",),
        "arena",
        "see its page",
        "100k votes of the Chatbot Arena",
        aliases=("arena-human-preference-100k",),
        revision=PARQUET,
        filters=("language",),
    ),
)
CATALOGUE: dict[str, Spec] = {spec.name: spec for spec in SPECS}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


_NAMES: dict[str, Spec] = {
    _plain(n): spec for spec in SPECS for n in (spec.name, *spec.aliases, spec.hub, spec.hub.partition("/")[2])
}


def find(name: str) -> Spec | None:
    """The data set that a name, an alias or a hub id stands for; None where the catalogue has none."""
    return _NAMES.get(_plain(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def unknown(name: str) -> ConfigError:
    """What to say of a name that is neither in the catalogue nor a hub id."""
    near = difflib.get_close_matches(_plain(name), _NAMES, 1)
    guess = f"did you mean {_NAMES[near[0]].name}? " if near else ""
    return ConfigError(
        name, "is no data set of the catalogue", f"{guess}there are {', '.join(CATALOGUE)}, or any owner/name"
    )


def chosen_subsets(spec: Spec, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The subsets to read, in the catalogue's order.

    Raises:
        ConfigError: one of them is not there.
    """
    wanted = spec.subsets if asked == ("all",) else asked or spec.default
    for name in wanted:
        if name not in spec.subsets:
            near = difflib.get_close_matches(name, spec.subsets, 1)
            how = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                "--subset", f"{spec.name} has no subset {name!r}", f"{how}it has {', '.join(spec.subsets)}"
            )
    return tuple(s for s in spec.subsets if s in wanted)


def table() -> str:
    """The catalogue as text, a line a data set."""
    wide = max(len(s.name) for s in SPECS)
    return "\n".join(f"{s.name:<{wide}}  {'gated  ' if s.gated else '       '}{s.summary} ({s.terms})" for s in SPECS)


def markdown() -> str:
    """The catalogue as the table of docs/data_get.md."""
    lines = [
        "| name | published as | subsets (read by default in bold) | splits | layout | terms |",
        "|---|---|---|---|---|---|",
    ]
    for s in SPECS:
        names = list(s.subsets)
        subsets = (
            ", ".join(f"**{n}**" if n in s.default else n for n in names)
            if len(names) <= 8
            else f"**{len(names)} domains**"
        )
        splits = ", ".join(dict.fromkeys(x for n in s.default for x in s.subsets[n].splits))
        gated = ", gated" if s.gated else ""
        lines.append(
            f"| {s.name} | [{s.hub}]({s.page}) | {'' if names == ['default'] else subsets} | {splits} | {s.layout} | {s.terms}{gated} |"
        )
    return "\n".join(lines) + "\n"
