"""Access the Hugging Face hub through its own client: list a data set's files, fetch them with checked hashes, and read parts of them.

Only that client reads the user's token (`hf auth login`, HF_TOKEN); this module never handles or prints it.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from penchant.base.files import file_sha256
from penchant.download.catalogue import HUB
from penchant.errors import DataError

T = TypeVar("T")
Advice = tuple[str, str]  # (what went wrong, what to do)
RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before each retry
TRANSIENT = {408, 429, 500, 502, 503, 504}
BLOCK = 1 << 18  # buffer size in bytes when a remote file is read sequentially
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
AGAIN = "run the same command again"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Args:
        path: in the repository; size: bytes; sha256: of its content, for files in large file storage;
            git_sha1: git object id, for other files.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A data set's repository at one commit. `configs` holds the subsets and splits that its card lists."""

    hub_id: str
    commit: str
    files: tuple[HubFile, ...]
    configs: tuple[dict[str, Any], ...] = ()


@dataclass(slots=True)
class Hub:
    """Client of the hub at HF_ENDPOINT, or huggingface.co.

    Args:
        say: called with progress lines.
    """

    say: Callable[[str], None]
    endpoint: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT") or None)
    cache: str | None = field(default_factory=lambda: os.environ.get("HF_HUB_CACHE") or None)

    def __post_init__(self) -> None:
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()  # its warnings show signed URLs
        if not sys.stderr.isatty():
            disable_progress_bars()

    def list_repository(self, hub_id: str, revision: str) -> Repository:
        """List a data set's files at the current commit of `revision`.

        Raises:
            DataError: no such data set or revision, no access, or no network.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        info = self._with_retries(hub_id, "its page", lambda: api.dataset_info(hub_id, revision=revision))
        commit = str(info.sha)

        entries = self._with_retries(
            hub_id,
            "its list of files",
            lambda: [*api.list_repo_tree(hub_id, repo_type="dataset", revision=commit, recursive=True)],
        )
        files = [
            HubFile(f.path, f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id)
            for f in entries
            if isinstance(f, RepoFile)
        ]
        card = getattr(info, "card_data", None)
        configs = (card.to_dict().get("configs") if card is not None else None) or []
        usable = tuple(c for c in configs if isinstance(c, dict)) if isinstance(configs, list) else ()
        return Repository(hub_id, commit, tuple(sorted(files, key=lambda f: f.path)), usable)

    def check_access(self, repository: Repository, file: HubFile) -> None:
        """Check that files may be fetched, before anything else is done.

        Raises:
            DataError: the terms were not accepted, no user is logged in, or no network.
        """
        from huggingface_hub import get_hf_file_metadata

        url = self._url(repository, file)
        self._with_retries(
            repository.hub_id, file.path, lambda: get_hf_file_metadata(url, token=None, endpoint=self.endpoint)
        )

    def fetch(self, repository: Repository, file: HubFile) -> Path:
        """Fetch a file into the hub's local cache and check its hash, with one more download if it is wrong.

        Raises:
            DataError: the file cannot be fetched, or its hash is wrong twice.
        """
        path = self._download(repository, file, force=False)
        if matches(path, file):
            return path
        self.say(f"{file.path}: its hash is not the published one; fetching it again")
        path = self._download(repository, file, force=True)
        if not matches(path, file):
            what = f"{file.path} has another hash than the published one, twice"
            how = f"something between here and the hub changes it; {AGAIN} later"
            raise DataError(HUB + repository.hub_id, what, how)
        return path

    def _download(self, repository: Repository, file: HubFile, force: bool) -> Path:
        from huggingface_hub import hf_hub_download

        def fetch() -> str:
            return hf_hub_download(
                repository.hub_id,
                file.path,
                repo_type="dataset",
                revision=repository.commit,
                endpoint=self.endpoint,
                cache_dir=self.cache,
                force_download=force,
            )

        return Path(self._with_retries(repository.hub_id, file.path, fetch))

    def fetch_range(self, repository: Repository, file: HubFile, start: int, end: int) -> bytes:
        """Fetch bytes `start` to `end` (exclusive) of a file."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def ask() -> bytes:
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            response = get_session().request(
                "GET", self._url(repository, file), headers=headers, follow_redirects=True, timeout=30
            )
            hf_raise_for_status(response)
            content = bytes(response.content)
            part = content if response.status_code == 206 else content[start:end]
            if len(part) != end - start:
                raise OSError("the connection broke")
            return part

        return self._with_retries(repository.hub_id, file.path, ask)

    def _url(self, repository: Repository, file: HubFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            repository.hub_id, file.path, repo_type="dataset", revision=repository.commit, endpoint=self.endpoint
        )

    def cached_bytes(self, repository: Repository, files: Sequence[HubFile]) -> int:
        """Bytes of these files that are already in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        location = (self.cache, repository.commit)
        cached_paths = [
            try_to_load_from_cache(repository.hub_id, f.path, *location, repo_type="dataset") for f in files
        ]
        return sum(f.size for f, path in zip(files, cached_paths, strict=True) if isinstance(path, str))

    def cache_folder(self) -> Path:
        """The folder of the hub's cache."""
        from huggingface_hub import constants

        return Path(self.cache or constants.HF_HUB_CACHE)

    def _with_retries(self, hub_id: str, what: str, call: Callable[[], T]) -> T:
        for wait in (*RETRY_DELAYS, None):
            try:
                return call()
            except _client_errors() as error:
                if wait is None or not is_transient(error):
                    raise explain_error(error, hub_id, what) from None  # the original message may contain a signed URL
                self.say(f"{what}: {_short_reason(error)}; trying again in {wait:g} s")
                time.sleep(wait)
        raise AssertionError("unreachable")


class RemoteFile(io.RawIOBase):
    """A file on the hub that is read over the network on demand. `fetched` counts the bytes received."""

    def __init__(self, hub: Hub, repository: Repository, file: HubFile) -> None:
        super().__init__()
        self._fetch_range = lambda start, end: hub.fetch_range(repository, file, start, end)
        self._size, self._position, self.fetched = file.size, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._fetch_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        self.fetched += len(data)
        return len(data)


def matches(path: Path, file: HubFile) -> bool:
    """Whether a file on disk equals the published one, by SHA-256, or by git object id if there is no SHA-256."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return file_sha256(path) == file.sha256
    if file.git_sha1 is None:
        return True
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.git_sha1


# ---- Errors ----


def logged_in() -> bool:
    """Whether the hub's client finds a token."""
    from huggingface_hub import get_token

    return get_token() is not None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help: the hub is busy, or the connection broke."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):  # the client has already retried
        return False
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in TRANSIENT
    return isinstance(error, HTTPError) or (
        isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)
    )


def _client_errors() -> tuple[type[Exception], ...]:
    """Exceptions that the hub's client raises. Anything else is a bug in this program."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError, KeyError


def _short_reason(error: BaseException) -> str:
    status = status_of(error)
    return f"the hub answers {status}" if status is not None else "the connection failed"


def explain_error(error: BaseException, hub_id: str, what: str) -> DataError:
    """Convert an error of the hub's client to a DataError that says what to do, without the original text."""
    from huggingface_hub import errors

    login_hint = "" if logged_in() else f"; if it is private, {LOGIN}"
    explanations: dict[type[Exception], Advice] = {  # the most specific first
        errors.OfflineModeIsEnabled: (
            "HF_HUB_OFFLINE is set, so nothing is fetched",
            "unset it, or give a copy on this machine with --from",
        ),
        errors.HFValidationError: (
            "is not a name that a data set can have",
            "write owner/name, as its page shows it",
        ),
        errors.GatedRepoError: _gated(),
        errors.DisabledRepoError: ("access to it was disabled", "its page says more"),
        errors.RepositoryNotFoundError: (
            "there is no such data set on the hub, or it is private",
            f"check the name: owner/name, as its page shows it{login_hint}",
        ),
        errors.RevisionNotFoundError: ("it has no such revision", "check --revision: a branch, a tag or a commit"),
        errors.LocalEntryNotFoundError: _unreachable(what, error),
        errors.EntryNotFoundError: (
            f"{what} is not there",
            "its files may have been renamed; name another --revision",
        ),
        errors.HfHubHTTPError: _refusal(what, status_of(error)),
    }
    matching = (advice for kind, advice in explanations.items() if isinstance(error, kind))
    return DataError(HUB + hub_id, *next(matching, _unreachable(what, error)))


def _gated() -> Advice:
    if not logged_in():
        how = f"accept its terms on that page with your Hugging Face account, then {LOGIN}, and {AGAIN}"
        return "this data set is gated, and nobody is logged in here", how
    how = (
        "accept them on that page (some are granted by hand, which takes a while) with the account that the token is of; a "
        f"fine-grained token also needs the right to read public gated repositories; then {AGAIN}, or {LOGIN} anew"
    )
    return "this data set is gated, and the account that is logged in has not accepted its terms", how


def _refusal(what: str, status: int | None) -> Advice:
    if status == 401:
        return "the hub does not accept the token that it was given (401)", f"{LOGIN} anew, and {AGAIN}"
    if status in TRANSIENT:
        how = f"wait, and {AGAIN}; it continues where it stopped"
        return f"the hub answers {status} for {what}, several times", how
    return f"the hub answers {status} for {what}", f"see its page; if you may read it, {LOGIN}, and {AGAIN}"


def _unreachable(what: str, error: BaseException) -> Advice:
    cause = error.__cause__ if status_of(error) is None else None
    if cause is not None and status_of(cause) is not None:
        return _refusal(what, status_of(cause))
    if isinstance(error, (ValueError, KeyError)) and cause is None:
        how = f"something in between, a proxy or a login page, may have given it; check the network, and {AGAIN}"
        return "the hub's answer cannot be understood", how
    if isinstance(error, OSError) and getattr(error, "strerror", None) and error.errno is not None:
        return f"{what} cannot be kept on this machine ({error.strerror})", "fix that, or set HF_HOME to another place"
    how = f"check the network, and {AGAIN}; it continues where it stopped; or give a copy on this machine with --from"
    return "the hub cannot be reached", how
