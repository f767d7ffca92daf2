"""Check once, with a short timeout, that the hub has a name; without network, libraries would retry each file for a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from penchant.errors import DataError, ModelError, PenchantError

SECONDS = 10.0  # timeout of a request
AGAIN = 60.0  # seconds after which an unreachable hub is tried again
_gone_since: list[float] = []  # when the hub could not be reached, on the monotonic clock


def reset_hub_state() -> None:
    """Let libraries use the hub again after it was unreachable; HF_HUB_OFFLINE in the environment still applies."""
    from huggingface_hub import constants

    if _gone_since:
        _gone_since.clear()
        constants.HF_HUB_OFFLINE = False


class HubUnreachable(ModelError):
    """A hub id that is not in the local cache while the hub is unreachable."""


@cache
def check_hub(name: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Refuse a hub id that does not exist; if the hub is unreachable, use the local cache without asking again.

    Raises:
        ModelError, DataError: there is no such model or dataset, or it is not cached and the hub is unreachable.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    error_class: type[PenchantError] = ModelError if kind == "model" else DataError
    cached = kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str)
    offline_requested = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    reason = "HF_HUB_OFFLINE is set" if offline_requested else "the hub cannot be reached"
    if _gone_since and time.monotonic() - _gone_since[0] > AGAIN:
        reset_hub_state()
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
            return
        except RepositoryNotFoundError as error:
            how = "check the name; for a private one set HF_TOKEN"
            raise error_class(name, f"is not here, and the hub has no such {kind}", how) from error
        except HFValidationError as error:
            raise error_class(name, "is not here, and not a hub id either", "a hub id is written owner/name") from error
        except HfHubHTTPError:
            return  # no access, or an error of the hub: loading it will report which
        except Exception:  # from any HTTP library; the next check need not wait
            reason = "the hub cannot be reached"
            constants.HF_HUB_OFFLINE = True
            _gone_since[:] = [time.monotonic()]
    if not cached and kind == "model":
        raise HubUnreachable(
            name, f"is neither a folder here nor in the hub's cache, and {reason}", "check the name, or give a folder"
        )
    if kind == "dataset" and not offline_requested:  # only the datasets library knows what it has cached
        raise DataError(name, f"is not a file here, and {reason}", "check the name, or give a file")


def snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The cached folder with a model's files of these patterns, downloaded if missing; None if that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns], ignore_patterns=["*/*"]))
    except Exception:  # from any HTTP library; loading the model will report what is wrong
        return None
