"""Whether the hub has what a name means, asked once and briefly: libraries try each file for a minute where there is no network."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from penchant.errors import DataError, ModelError, PenchantError

SECONDS = 10.0  # for one answer
AGAIN = 60.0  # seconds after which a hub that could not be reached is asked again
_gone_since: list[float] = []  # when it could not be reached, by the monotonic clock


def ask_again() -> None:
    """Let libraries ask the hub again, where it could not be reached a while ago; HF_HUB_OFFLINE of the environment holds."""
    from huggingface_hub import constants

    if _gone_since:
        _gone_since.clear()
        constants.HF_HUB_OFFLINE = False


class NotReached(ModelError):
    """A hub id that is not in the local cache, and no hub to ask."""


@cache
def check_hub(name: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Refuse a hub id that the hub does not have; where it cannot be reached, what is in the local cache is taken without asking again.

    Raises:
        ModelError, DataError: there is no such model or data set, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    failed: type[PenchantError] = ModelError if kind == "model" else DataError
    cached = kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str)
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    why = "HF_HUB_OFFLINE is set" if asked else "the hub cannot be reached"
    if _gone_since and time.monotonic() - _gone_since[0] > AGAIN:
        ask_again()
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
            return
        except RepositoryNotFoundError as error:
            how = "check the name; for a private one set HF_TOKEN"
            raise failed(name, f"is not here, and the hub has no such {kind}", how) from error
        except HFValidationError as error:
            raise failed(name, "is not here, and not a hub id either", "a hub id is written owner/name") from error
        except HfHubHTTPError:
            return  # access or the hub's own trouble: the library that reads it says which
        except Exception:  # of whatever HTTP library it has; the next one need not wait
            why = "the hub cannot be reached"
            constants.HF_HUB_OFFLINE = True
            _gone_since[:] = [time.monotonic()]
    if not cached and kind == "model":
        raise NotReached(
            name, f"is neither a folder here nor in the hub's cache, and {why}", "check the name, or give a folder"
        )
    if kind == "dataset" and not asked:  # what is cached of a data set, its library knows
        raise DataError(name, f"is not a file here, and {why}", "check the name, or give a file")


def snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The folder of the local cache with a model's files of these patterns, fetched where they are not there yet; None where they cannot be."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns], ignore_patterns=["*/*"]))
    except Exception:  # of whatever HTTP library it has: what loads the model says what is wrong
        return None
