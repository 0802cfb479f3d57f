"""Turn errors of the model hub into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import tqdm

from looc_ldm.utils.errors import ModelError, UserError, one_line

# The base of every HTTP error, connections included: from httpx, or from its successor in newer huggingface_hub.
HTTPError = HfHubHTTPError.__mro__[1]


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the hub's client into a `ModelError` with the client's message; all others pass."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        for bar in list(tqdm._instances):
            if isinstance(bar, tqdm):
                bar.close()  # the client does not close it after an error, which would be printed behind it
        message = one_line(error)
        if error.__cause__ is not None and one_line(error.__cause__) not in message:
            message += f" ({one_line(error.__cause__)})"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            message += " Log in with `hf auth login`, or set HF_TOKEN."
        raise ModelError(f"{repo_id} at {constants.ENDPOINT}: {message}") from error
