"""A full file system (a small tmpfs in its own mount namespace) gives an error message, and the same command resumes.

Run as a script inside such a namespace, this file tries each command with different amounts of free space.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 24 << 20
ROOM = (0, 3000, 20_000, 120_000, 400_000, 900_000)  # free bytes
UNSHARE = ["unshare", "--mount", "--map-root-user"]


def _may_mount(folder: Path) -> bool:
    try:
        tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "compare", "eval", "export", "fix"])
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(what: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _may_mount(disk):
        pytest.skip("no file system can be mounted here (unshare --mount): a really full disk is not tried")
    mount = f'mount -t tmpfs -o size={SIZE} none "{disk}" && exec "{sys.executable}" "{__file__}" {what} "{tmp_path}"'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    tried = json.loads(done.stdout.splitlines()[-1])
    assert len(tried) == len(ROOM) and 5 in tried, tried


# ---- in the namespace -------------------------------------------------------------------------------------------------


def _leave(disk: Path, room: int) -> Path:
    """Fill the disk except for `room` bytes."""
    filler, free = disk / "filler", os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
    return filler


def _ran(*command: str) -> tuple[int, str]:
    from penchant.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([*command])
    return code, said.getvalue()


def _tried(what: str, folder: Path) -> list[int]:
    """Exit codes of the command for each amount of free space. It must resume whenever there is more."""
    from tiny import polite_rows, tiny_model_folder, write_jsonl

    disk, codes = folder / "disk", []
    os.environ["PENCHANT_CACHE"] = str(folder / "cache")
    config = folder / "run.yaml"
    config.write_text(
        f"model: {{path: {tiny_model_folder(folder / 'model')}, dtype: fp32}}\n"
        f"data: {{path: {write_jsonl(folder / 'rows.jsonl', polite_rows(40))}, validation_rows: 8, max_length: 96}}\n"
        "train: {max_steps: 3, batch_size: 4, lr: 1e-3, tokens_per_step: 600}\nreference: {kind: cached}\n"
        "checkpoint: {every: 1, keep_last: 2}\nevaluation: {samples: 1, sample_tokens: 3, kl_prompts: 2, every: 1}\n"
    )
    whole, rows = folder / "whole", str(folder / "rows.jsonl")
    code, said = _ran("train", str(config), f"output={whole}", "--quiet")
    assert code == 0, said
    if what == "compare":
        code, said = _ran("train", str(config), f"output={folder / 'other'}", "train.lr=1e-4", "--quiet")
        assert code == 0, said
    for room in ROOM:
        at = disk / f"{what}-{room}"
        at.mkdir()
        command = {
            "train": ("train", str(config), f"output={at / 'run'}", "--quiet"),
            "compare": f"compare {whole} {folder}/other --max-new-tokens 3 --prompts 4 --output {at}/compared --quiet".split(),
            "eval": ("eval", str(whole), "--data", rows, "--output", str(at / "eval.json")),
            "export": ("export", str(whole), "--to", "safetensors", "--output", str(at / "exported")),
            "fix": ("data", "fix", rows, str(at / "fixed.jsonl")),
        }[what]
        filler = _leave(disk, room)
        code, said = _ran(*command)
        assert code in (0, 5), (room, code, said)
        assert "Traceback" not in said and (code == 0 or said.count("penchant: ") == 1), said
        codes.append(code)
        filler.unlink()
        code, said = _ran(*command) if codes[-1] else (0, "")
        assert code == 0, (room, code, said)
        if what == "train":
            weights = Path("checkpoints", "step-3", "model", "model.safetensors")
            assert (at / "run" / weights).read_bytes() == (whole / weights).read_bytes(), room
        left = [p for p in at.rglob("*") if p.suffix in (".tmp", ".part") or ".tmp-" in p.name]
        assert left == [], left
    return codes


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    print(json.dumps(_tried(sys.argv[1], Path(sys.argv[2]))))
