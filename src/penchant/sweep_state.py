"""What a sweep has done: `sweep.json`, and what follows from it for the next call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penchant.errors import CheckpointError
from penchant.pipeline_state import Inputs, changes, write_atomically
from penchant.sweep import SweepRun
from penchant.sweep_halving import Halving
from penchant.sweep_search import SearchConfig
from penchant.training.checkpoint import latest_checkpoint
from penchant.training.runfolder import differences

Action = Literal["done", "run", "resume", "changed"]
STATE, LINES = "sweep.json", "sweep.jsonl"
ENDED = ("finished", "stopped")  # a run that stopped itself is a result, one that was interrupted is not


@dataclass(slots=True)
class State:
    """`sweep.json`: a record of each run, the search that drew them, the table, and what the last call was about.

    A record holds the run's state (``running``, ``interrupted``, ``finished``, ``stopped``; with halving ``paused`` at a rung and ``cut``),
    what it varied, the inputs that it was started with, seconds, and its steps and held-out metrics or why it stopped itself. With
    halving, its metrics at the end stand apart from those at its rungs. `about` holds the metric, its direction, every run's name, and
    halving with how settings stood at its rungs.
    """

    path: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    table: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state of the sweep in `folder`; an empty one where there is none.

        Raises:
            CheckpointError: the file was damaged, or the folder holds something else.
        """
        path = folder / STATE
        if not path.exists():
            for other, what in (("identity.json", "one run"), ("pipeline.json", "a pipeline")):
                if (folder / other).exists():
                    raise CheckpointError(str(folder), f"is the folder of {what}", "choose another output")
            return cls(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(values["runs"]), values["search"], values["table"], dict(values.get("sweep", {})))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                str(path), f"cannot be read ({error})", "restore it, or choose another output"
            ) from error

    def save(self) -> None:
        """Write the file so that a reader, or a crash, sees the old or the new one."""
        write_atomically(
            self.path, {"sweep": self.about, "table": self.table, "search": self.search, "runs": self.runs}
        )

    def write_lines(self, runs: Sequence[SweepRun]) -> None:
        """`sweep.jsonl`: one line a run that came to an end, in the sweep's order."""
        lines = []
        for run in runs:
            record = self.runs.get(run.name)
            if record is not None and record["state"] in (*ENDED, "cut"):
                known = {k: v for k, v in record.items() if k != "inputs"}
                lines.append({"run": run.name, "setting": run.setting, "seed": run.seed, **known})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.path.with_name(LINES).write_text(text, encoding="utf-8")

    def same_search(self, search: SearchConfig, where: str) -> None:
        """Remember what draws the trials, or refuse where it is not what drew those that are there.

        Raises:
            CheckpointError: with what changed.
        """
        now = json.loads(search.model_dump_json(by_alias=True, exclude={"trials"}))
        trials = [name for name in self.runs if name.startswith("trial-")]
        found = differences(self.search, now) if trials and self.search is not None else []
        if found:
            raise CheckpointError(
                where,
                f"search has changed since {len(trials)} of its trials were drawn: {'; '.join(found)}",
                "undo the change, or choose another output",
            )
        self.search = now

    def same_halving(self, halving: Halving | None, runs: Sequence[str], where: str) -> None:
        """Remember how settings are halved, or refuse where runs have begun that were not judged so; leaving it out is no matter.

        Raises:
            CheckpointError: with what changed.
        """
        old, begun = self.about.get("halving"), [name for name in runs if name in self.runs]
        if halving is None or not begun:
            self.about["halving"] = None if halving is None else {**halving.to_json(), "runs": list(runs), "judged": []}
            return
        now = {**halving.to_json(), "runs": list(runs), "judged": (old or {}).get("judged", [])}
        changed = "it was not there" if old is None else ""
        if old is not None:
            before = {k: v for k, v in old.items() if k not in ("runs", "judged")}
            changed = "; ".join(differences(before, halving.to_json()))
            if not changed and old["judged"] and set(old["runs"]) != set(runs):
                changed = "runs were added or left out after a rung was judged"
        if changed:
            raise CheckpointError(
                where,
                f"halving has changed since {len(begun)} of the runs were begun: {changed}",
                "undo the change, choose another output, or leave halving out to have every run trained to its end",
            )
        self.about["halving"] = now


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done with a run, and why."""

    name: str
    action: Action
    why: str


def judge(run: SweepRun, record: Mapping[str, Any] | None, inputs: Inputs, halved: bool = False) -> Planned:
    """What is to be done with a run.

    Args:
        record: what `sweep.json` says of it, None where it says nothing; inputs: as they are now; halved: whether what was cut stays so.
    """
    last, _ = latest_checkpoint(run.folder)
    if record is None:
        if last is not None or (run.folder / "identity.json").exists():
            return Planned(run.name, "changed", "its folder holds a run that this sweep did not make")
        return Planned(run.name, "run", "not started")
    state = record["state"]
    if state == "cut" and halved and not changes(record["inputs"], inputs):
        return Planned(run.name, "done", record["why"])  # whether its folder is still there or not
    if not run.folder.exists() or (state == "finished" and last is None):
        return Planned(run.name, "run", "its checkpoints are gone")
    if last is None and state not in ENDED:
        return Planned(run.name, "run", "started, no checkpoint yet")
    found = changes(record["inputs"], inputs)
    if found:
        return Planned(run.name, "changed", "; ".join(found))
    if state == "stopped":
        return Planned(run.name, "done", f"stopped itself: {record['why']}")
    if state == "finished":
        return Planned(run.name, "done", f"{record['steps']} steps")
    assert last is not None
    if state in ("paused", "cut"):
        return Planned(run.name, "resume", f"at a rung, {last.name.replace('-', ' ')}")
    return Planned(run.name, "resume", f"interrupted at {last.name.replace('-', ' ')}")


def refusal(planned: Planned, folder: Path, source: str) -> CheckpointError:
    """Why a changed run is neither skipped nor overwritten, and how to go on."""
    return CheckpointError(
        source,
        f"run {planned.name} is done or half done with other inputs: {planned.why}",
        f"undo the change, choose another output, or move {folder / planned.name} away to have it trained anew",
    )
