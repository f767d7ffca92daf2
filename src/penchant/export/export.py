"""`penchant export`: write to a temporary folder, read back, compare, rename, push."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from penchant.base.files import EXPORT, sweep, temp_path, writing
from penchant.base.hub import reset_hub_state
from penchant.base.text import told
from penchant.errors import CheckpointError, ConfigError, ModelError
from penchant.export.card import CARD, file_hashes, model_card
from penchant.export.formats import FORMATS, Check, Format, compare_outputs, dtype_of
from penchant.export.subject import DTYPE_NAMES, Subject, find_subject, outputs
from penchant.models.options import looks_like_folder
from penchant.requests import ExportRequest
from penchant.runfolder import MANIFEST, damaged_files
from penchant.runfolder.read import json_object
from penchant.runfolder.values import mapping

# ---- An existing export: if it is what was requested, and unchanged, it can be pushed as it is ----

RECORD = EXPORT


def check_finished(folder: Path, expected_record: Mapping[str, Any]) -> tuple[Check, tuple[str, ...]]:
    """Return the comparison and the notes of a finished export.

    Args:
        folder: the existing folder; expected_record: the values its record must have (run, step, format, dtype, checkpoint).

    Raises:
        CheckpointError: it is not an export, is an export of something else, or its files have changed. Only the card may have changed,
            since a license is added to it before publication.
    """
    try:
        record = {} if folder.is_symlink() else json_object((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if not record:
        raise exists_error(folder, "it is not a finished export")
    for name, value in expected_record.items():
        if record.get(name) != value:
            difference = f"is of another {name} ({record.get(name)!r}, not {value!r})"
            raise exists_error(folder, f"it {difference if name in record else f'does not say which {name}'}")
    current, recorded = file_hashes(folder), mapping(record.get("sha256"))
    for name in sorted({*current, *recorded, CARD}):
        if name not in current:
            raise exists_error(folder, f"its file {name!r} is missing")
        if name not in (RECORD, CARD) and current[name] != recorded.get(name):
            raise exists_error(folder, f"{name!r} is not as the export wrote it")
    check, notes = _parse_check(record.get("check")), record.get("notes")
    valid_notes = isinstance(notes, list) and all(isinstance(note, str) and note.isprintable() for note in notes)
    if check is None or not check.good or not valid_notes:
        raise exists_error(folder, f"its {RECORD} records no comparison that was passed")
    return check, tuple(record["notes"])


def exists_error(folder: Path, why: str | None = None) -> CheckpointError:
    """Return the error for a folder that exists and is not overwritten; `why`: the reason it cannot be pushed as it is."""
    reason = "nothing is overwritten" if why is None else f"{why}, and nothing is overwritten"
    return CheckpointError(str(folder), f"already exists, and {reason}", "give another --output")


def _parse_check(record: Any) -> Check | None:
    values: dict[str, Any] = {f.name: mapping(record).get(f.name) for f in fields(Check)}
    numbers = [v for name, v in values.items() if not (name == "greedy" and v is None)]
    return Check(**values) if all(isinstance(v, (int, float)) for v in numbers) else None


# ---- Pushing to the hub. The token comes from the environment or the login and is never shown ----


def check_push(repo: str, base: str | None = None) -> None:
    """Check everything that would stop a push, before anything is written.

    Args:
        base: base model of an adapter, which other users need too.

    Raises:
        ConfigError: the name is invalid, there is no token, or an adapter's base is only on this machine.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError("--push", f"{repo!r} is not the name of a repository", "give owner/name")
    if get_token() is None:
        raise ConfigError("--push", "there is no token of the hub", "set HF_TOKEN, or log in with `hf auth login`")
    if base is not None and looks_like_folder(base):
        raise ConfigError("--push", "the adapter's base is a folder on this machine", "push --to merged instead")


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Create the repository if needed and upload the folder in one commit; return its URL.

    Raises:
        ModelError: the hub refused or cannot be reached; the exported folder stays.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    reset_hub_state()
    api = HfApi(library_name="penchant")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        how = f"{folder} is written and whole; try again later"
        raise ModelError("--push", f"the hub rejected it ({told(error)})", how) from None


# ---- One export: write to a temporary folder, read back, compare, describe, rename; optionally push ----

SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB|KiB|MiB|GiB|TiB)")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export.

    Args:
        folder: its folder; format, dtype, step: what was exported; check: the comparison; url: on the hub, if it was pushed.
        notes: remarks for the user.
    """

    folder: Path
    format: str
    dtype: str
    step: int
    check: Check
    notes: tuple[str, ...] = ()
    url: str | None = None


def export_run(request: ExportRequest, say: Callable[[str], None] = lambda _: None) -> ExportResult:
    """Write a run's model in the requested format. The folder gets its name only after it has been read back and compared.

    With a push, a finished and unchanged export of the same model is not made again but pushed as it is.

    Raises:
        ConfigError: no such format, dtype or name; no token for a push. CheckpointError: no run or step, or the folder already exists.
        ModelError: the format cannot hold this model, or what was read back differs (it is kept as ``NAME.failed``).
    """
    form, subject, dtype = _validate_request(request)
    default_name = f"step-{subject.step}-{form.name}" + ("" if request.dtype == "auto" else f"-{dtype}")
    folder = Path(request.output).expanduser() if request.output else subject.run / "export" / default_name
    if request.push is not None:
        check_push(request.push, subject.base.path if form.name == "adapter" else None)
    if folder.exists() or folder.is_symlink():
        if request.push is None:
            raise exists_error(folder)
        check, notes = check_finished(folder, _identity(subject, form, dtype))
        notes = (*notes, "it was exported and compared before, and is pushed as it is")
    else:
        check, notes = _export_to(subject, form, request, dtype, folder)
    for note in notes:
        say(note)
    url = None
    if request.push is not None:
        message = f"{subject.run.name}, step {subject.step}: {form.what}"
        url = push(folder, request.push, private=request.private, message=message)
    return ExportResult(folder, form.name, dtype, subject.step, check, notes, url)


def _export_to(
    subject: Subject, form: Format, request: ExportRequest, dtype: str, folder: Path
) -> tuple[Check, tuple[str, ...]]:
    """Write to a temporary folder, and rename it if the comparison passes."""
    form.check(subject)
    temp = temp_path(folder)
    shutil.rmtree(temp, ignore_errors=True)
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent, f"{folder.name}-*")
            temp.mkdir()
            check, notes = _write(subject, form, request, dtype, temp)
            if not check.good:  # a failed export is kept for inspection under a name that says so
                names = (folder.with_name(f"{folder.name}.failed{i or ''}") for i in range(10_000))
                failed = next(n for n in names if not n.exists())
                os.rename(temp, failed)
                what = f"what was written is not the run's model: {check.to_text()}"
                raise ModelError(str(folder), what, f"see {failed}")
            if folder.exists():
                raise exists_error(folder)
            os.rename(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return check, notes


def _validate_request(request: ExportRequest) -> tuple[Format, Subject, str]:
    if request.to not in FORMATS:
        raise ConfigError("--to", f"{request.to} is not an export format", f"there are {', '.join(FORMATS)}")
    if not SHARD_SIZE.fullmatch(request.max_shard_size):
        what = f"{request.max_shard_size!r} is not a size"
        raise ConfigError("--max-shard-size", what, "give a number of GB or MB: 5GB")
    form = FORMATS[request.to]
    subject = find_subject(request.run, request.step)
    return form, subject, dtype_of(form, subject, request.dtype)


def _identity(subject: Subject, form: Format, dtype: str) -> dict[str, Any]:
    """Return what identifies an export, including a hash of the checkpoint's manifest, since a run may be trained again under its name."""
    digest = hashlib.sha256((subject.checkpoint / MANIFEST).read_bytes()).hexdigest()
    identity = {"run": subject.run.name, "step": subject.step, "format": form.name, "dtype": dtype}
    return {**identity, "checkpoint": digest}  # last, so that a difference in a familiar name is reported first


def _write(
    subject: Subject, form: Format, request: ExportRequest, dtype: str, folder: Path
) -> tuple[Check, tuple[str, ...]]:
    """Write the files, compare what is read back, and describe them."""
    rows = subject.rows()
    own_outputs = outputs(subject.load_own(), rows)
    model, notes = form.write(subject, request, dtype, folder)
    notes = (*notes, *(f"the run's {name} was changed after it was written" for name in damaged_files(subject.run)))
    expected = outputs(model, rows)
    del model
    merged = subject.adapter is not None and form.name != "adapter" and not subject.reward
    check = compare_outputs(
        own_outputs,
        expected,
        outputs(form.read(subject, folder), rows),
        equal=form.equal,
        dtype=dtype,
        exact=DTYPE_NAMES[subject.dtype()] == dtype and not merged and not (subject.reward and form.name == "adapter"),
        tokens=sum(map(len, rows)),
    )
    files = file_hashes(folder)
    results = {"check": check.to_json(), "notes": list(notes), "sha256": files}
    record = {**_identity(subject, form, dtype), **results}
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / CARD).write_text(model_card(subject, form, dtype, check, files, notes), encoding="utf-8")
    return check, notes
