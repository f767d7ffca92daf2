"""Rungs of a sweep with successive halving: how settings stand at them, as the runs' records say, and who is stopped there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.sweep import SweepRun
from penchant.sweep_halving import Halving, Standing, standings

Records = Mapping[str, dict[str, Any]]


def at_rung(record: Mapping[str, Any], rung: int) -> Mapping[str, Any] | None:
    """The held-out figures of a run at a rung; None where it has not come so far."""
    found = record.get("rungs", {}).get(str(rung))
    return None if found is None else found["metrics"]


def standings_at(runs: Sequence[SweepRun], records: Records, halving: Halving, rung: int) -> list[Standing]:
    """How the settings that entered a rung stand there, best first: a function of the records alone, so it comes out the same again."""
    entered = list(dict.fromkeys(r.setting for r in runs))
    found: list[Standing] = []
    for k in range(1, rung + 1):
        values = {s: [_value(records, r, halving, k) for r in runs if r.setting == s] for s in entered}
        found = standings(values, halving)
        entered = [s.setting for s in found if s.kept]
    return found


def stop_the_rest(
    runs: Sequence[SweepRun], records: Records, halving: Halving, rung: int, found: Sequence[Standing]
) -> None:
    """Mark the runs of every setting that does not go on; those that stopped themselves stay what they are."""
    for standing in found:
        for run in runs:
            record = records.get(run.name, {})
            if not standing.kept and run.setting == standing.setting and record.get("state") == "paused":
                cut = {
                    **{"rung": rung, "of": halving.rungs, "rank": standing.rank, "among": len(found)},
                    **{"metric": halving.metric, "mean": standing.mean},
                }
                record |= {"state": "cut", "cut": cut, "why": why_cut(cut)}


def why_cut(cut: Mapping[str, Any]) -> str:
    """``stopped at rung 1 of 3: rank 5 of 9``."""
    stood = f"rank {cut['rank']} of {cut['among']}" if cut["mean"] is not None else "another seed of it stopped itself"
    return f"stopped at rung {cut['rung']} of {cut['of']}: {stood}"


def _value(records: Records, run: SweepRun, halving: Halving, rung: int) -> float | None:
    metrics = at_rung(records.get(run.name, {}), rung)
    found = None if metrics is None else metrics.get(halving.metric)
    return None if found is None else float(found)
