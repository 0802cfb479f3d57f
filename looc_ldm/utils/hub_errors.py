"""Errors of the model hub in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from looc_ldm.utils.errors import ModelError

# Of httpx, or of the package that follows it in newer versions of huggingface_hub; its errors of connections too.
HTTPError = HfHubHTTPError.__mro__[1]

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the hub's client into a `ModelError`; all others pass."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the client wraps its own errors in several builtin ones
        message = explain(error, repo_id, revision)
        if message is None:
            raise
        for bar in list(tqdm._instances):
            if isinstance(bar, tqdm):
                bar.close()  # the client does not close it after an error, which would be printed behind it
        raise ModelError(message) from error


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """Return one line for an error of the hub's client, or for one raised because of it; None for any other."""
    hub = constants.ENDPOINT
    reason = " ".join(str(error).split())
    match error:
        case HFValidationError():
            return f"{repo_id!r} is not a hub id (user/name): {reason[:200]}"
        case GatedRepoError():
            return f"{repo_id}: access is by request; ask for it at {hub}/{repo_id}, then {LOGIN}."
        case RepositoryNotFoundError():
            return f"no repository {repo_id!r} that you may see at {hub}: check the name; if it is private, {LOGIN}."
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit that it has."
        case HfHubHTTPError():
            return _explain_status(error, repo_id)
        case OfflineModeIsEnabled():
            return f"{repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it once."
        case HTTPError():
            return (
                f"cannot reach the hub at {hub} for {repo_id} ({reason[:120] or type(error).__name__}): check the "
                "network and try again; what was transferred is kept."
            )
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    message = None if cause is None else explain(cause, repo_id, revision)
    if message is None and isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id} is not in the cache: download it once, with a network and without HF_HUB_OFFLINE."
    return message


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        new = f"{constants.ENDPOINT}/settings/tokens"
        return f"{repo_id}: the hub does not accept the token (401): make one at {new} and {LOGIN}."
    if status == 403:
        return f"{repo_id}: the token does not allow this (403): take one that may write to it, or give --create-pr."
    reason = " ".join((error.server_message or str(error)).split())
    return f"{repo_id}: the hub answered {status}: {reason[:300]}"
