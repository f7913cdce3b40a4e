"""Turn errors of the Hugging Face Hub into messages of one line."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] # of httpx or httpx2, as it is built on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_lens_atm.errors import HubError, SettingsError, one_line, with_type


@contextmanager
def clear_hub_errors(what: str) -> Generator[None]:
    """Turn errors of the Hub's client into our own.

    Args:
        what: the subject of the message, such as `repo you/saes`.

    Raises:
        SettingsError: it does not exist on the Hub.
        HubError: another error of the Hub or of the connection.
    """
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        clear = explained(error, what)
        if clear is None:
            raise
        raise clear from error


def explained(error: Exception, what: str) -> Exception | None:
    """Return an error of ours, or None if the error does not come from the Hub."""
    chain = list(_causes(error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return HubError(f"{what}: HF_HUB_OFFLINE is set: unset it to use the Hub")
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause, what)
        if isinstance(cause, HTTPError):
            reason = with_type(cause)
            return HubError(
                f"{what}: no connection to {constants.ENDPOINT}, or it was lost ({reason})"
            )
    if isinstance(error, OSError):
        return HubError(f"{what}: {one_line(error)}")
    return None


def _answered(error: HfHubHTTPError, what: str) -> Exception:
    status, message = error.response.status_code, error.server_message
    if status == 401:
        return HubError(
            f"{what}: there is no such repo, or it needs a valid token (401): run `hf auth login`, "
            "or set HF_TOKEN"
        )
    if status == 403:
        return HubError(
            f"{what}: the token has no permission (403{f', {message}' if message else ''})"
        )
    if isinstance(error, RevisionNotFoundError):
        return SettingsError(f"{what}: no such branch or revision")
    if isinstance(error, RepositoryNotFoundError):
        return SettingsError(f"{what}: no such repo on the Hub, or the token has no access to it")
    if isinstance(error, EntryNotFoundError):
        return SettingsError(f"{what}: the repo has no such file")
    if status == 412:
        return HubError(f"{what}: it was changed meanwhile: push again")
    reason = " ".join((message or error.response.reason_phrase).split())
    return HubError(f"{what}: the Hub answered {status} ({reason})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: the client wraps errors in others."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
