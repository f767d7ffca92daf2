"""An exported folder to the hub. The token comes from the environment or the login, and is never shown."""

from __future__ import annotations

from pathlib import Path

from penchant.errors import ConfigError, ModelError
from penchant.models.load import looks_like_folder
from penchant.redact import told


def check_push(repo: str, base: str | None = None) -> None:
    """Meet what would stop a push before anything is written.

    Args:
        base: of an adapter, which others need too.

    Raises:
        ConfigError: no such name, no token, or an adapter of a base that is on this machine only.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        named = repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise ConfigError("--push", f"{repo!r} is no name of a repository", "give owner/name")
    if get_token() is None:
        raise ConfigError("--push", "there is no token of the hub", "set HF_TOKEN, or log in with `hf auth login`")
    if base is not None and looks_like_folder(base):
        raise ConfigError("--push", "the adapter's base is a folder of this machine", "push --to merged instead")


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Make the repository if it is not there, and upload the folder in one commit; returns its address.

    Raises:
        ModelError: the hub refused or cannot be reached; the exported folder stays.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(library_name="penchant")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise ModelError(
            "--push", f"the hub did not take it ({told(error)})", f"{folder} is written and whole; try again later"
        ) from None
