"""What `penchant data get` prints when it is done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from penchant.retrieve.job import GetResult


def summary(result: GetResult) -> str:
    """What was read, what became of it, and what to do next."""
    data, counts = result.data, result.counts
    left = "; ".join(f"{n:,} {reason}" for reason, n in counts.filtered.most_common())
    filtered = f"{sum(counts.filtered.values()):,} filtered" + (f" ({left})" if left else "")
    lines = [
        f"{data['name']}: {counts.rows:,} rows = {counts.accepted:,} accepted + {filtered} + {counts.quarantined:,} quarantined",
        "  " + ", ".join(_split_line(s, held) for s, held in data["splits"].items()) + f" ({data['kind']})",
        f"  {data['prompt_groups']['prompts']:,} prompts in {data['prompt_groups']['groups']:,} groups: "
        + (
            "published splits are kept as they are"
            if data["request"]["published_splits"]
            else "nearly equal ones stay on one side"
        ),
    ]
    if counts.unlabelled:
        lines.append(f"  {counts.unlabelled:,} answers were given no label and are left out")
    if data["straddling"]["groups"]:
        held = data["straddling"]
        lines.append(
            f"  {held['groups']:,} groups of prompts ({held['rows']:,} rows) stand in several published splits"
        )
    published = {s["split"] for s in data["sources"]}
    if len(published) > 1 and not data["request"]["published_splits"]:
        lines.append(
            f"  the published splits ({', '.join(sorted(published))}) were put together; --published-splits keeps them"
        )
    if counts.quarantined:
        lines.append(f"  rows kept aside, with reasons: {result.folder / 'quarantine.jsonl'}")
    return "\n".join([*lines, *_next(result)])


def _split_line(name: str, held: Mapping[str, int]) -> str:
    more = f" ({held['examples']:,} examples)" if held["examples"] != held["rows"] else ""
    return f"{name} {held['rows']:,}{more}"


def _next(result: GetResult) -> list[str]:
    train = result.folder / "train.jsonl"
    held_out = result.folder / "validation.jsonl"
    more = f" --eval-data {shlex.quote(str(held_out))}" if result.data["splits"]["validation"]["rows"] else ""
    data = shlex.quote(str(train))
    return [
        "next:",
        f"  penchant data audit {data}",
        f"  penchant init --data {data}{more}  # asks for model and goal, writes run.yaml",
    ]
