"""What went wrong with the model hub, in one line that says what to do."""

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

from looc_ldm.errors import ModelError

# Of httpx, or of the package that follows it in newer versions of huggingface_hub; its errors of connections too.
HTTPError = HfHubHTTPError.__mro__[1]

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Errors of the hub's client become a `ModelError`; all others pass."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the client wraps its own errors in several builtin ones
        message = explain(error, repo_id, revision)
        if message is None:
            raise
        _close_bars()
        raise ModelError(message) from error


def _close_bars() -> None:
    """The client leaves the bar of an upload that failed open: the error would stand behind it."""
    for bar in list(tqdm._instances):
        if isinstance(bar, tqdm):
            bar.close()


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """One line for an error of the hub's client, or for one that was raised because of it; None for any other."""
    causes = list(_causes(error))

    def first(*kinds: type[BaseException]):
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if invalid := first(HFValidationError):
        return f"{repo_id!r} is not a hub id (user/name): {' '.join(str(invalid).split())[:200]}"
    if first(GatedRepoError):
        return f"{repo_id}: access is by request; ask for it at {constants.ENDPOINT}/{repo_id}, then {LOGIN}."
    if first(RepositoryNotFoundError):
        return (
            f"no repository {repo_id!r} that you may see at {constants.ENDPOINT}: check the name; if it is private, "
            f"{LOGIN}."
        )
    if first(RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit that it has."
    if http := first(HfHubHTTPError):
        return _explain_status(http, repo_id)
    if first(OfflineModeIsEnabled):
        return f"{repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it once."
    if connection := first(HTTPError):
        reason = " ".join(str(connection).split()) or type(connection).__name__
        return (
            f"cannot reach the hub at {constants.ENDPOINT} for {repo_id} ({reason[:120]}): check the network and try "
            "again; what was transferred is kept."
        )
    if first(LocalEntryNotFoundError):
        return f"{repo_id} is not in the cache: download it once, with a network and without HF_HUB_OFFLINE."
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"{repo_id}: the hub does not accept the token (401): make one at {constants.ENDPOINT}/settings/tokens and "
            f"{LOGIN}."
        )
    if status == 403:
        return f"{repo_id}: the token does not allow this (403): take one that may write to it, or give --create-pr."
    reason = " ".join((error.server_message or str(error)).split())
    return f"{repo_id}: the hub answered {status}: {reason[:300]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
