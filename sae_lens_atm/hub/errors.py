"""What went wrong between us and the Hugging Face Hub, in one line."""

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

from sae_lens_atm.errors import HubError, SettingsError


@contextmanager
def clear_hub_errors(what: str) -> Generator[None]:
    """Say in one line what went wrong with `what`, such as `repo you/saes`.

    Raises:
        SettingsError: there is no such thing on the Hub.
        HubError: anything else between here and there.
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
    """An error whose message says it, or None for one that has nothing to do with the Hub."""
    chain = list(_causes(error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return HubError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked")
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause, what)
        if isinstance(cause, HTTPError):
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            return HubError(
                f"{what}: no connection to {constants.ENDPOINT}, or it broke ({reason})"
            )
    if isinstance(error, OSError):
        return HubError(f"{what}: {' '.join(str(error).split())}")
    return None


def _answered(error: HfHubHTTPError, what: str) -> Exception:
    status, said = error.response.status_code, error.server_message
    if status == 401:
        return HubError(
            f"{what}: the Hub knows no such repo, or wants a valid token (401): `hf auth login`, "
            "or HF_TOKEN"
        )
    if status == 403:
        return HubError(f"{what}: the token does not allow it (403{f', {said}' if said else ''})")
    if isinstance(error, RevisionNotFoundError):
        return SettingsError(f"{what}: no such branch or revision")
    if isinstance(error, RepositoryNotFoundError):
        return SettingsError(f"{what}: no such repo on the Hub, or none that the token may see")
    if isinstance(error, EntryNotFoundError):
        return SettingsError(f"{what}: not in that repo")
    if status == 412:
        return HubError(f"{what}: somebody else has changed it in the meantime: push again")
    reason = " ".join((said or error.response.reason_phrase).split())
    return HubError(f"{what}: the Hub answers {status} ({reason})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from: the client wraps some in errors of its own."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
