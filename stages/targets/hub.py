"""What went wrong with the hub, and whether it is worth another try."""

from __future__ import annotations


def hub_answered(error: Exception) -> bool:
    """Whether the hub said no (or the id was wrong); else it could not be asked, and may be later."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not isinstance(error, HfHubHTTPError) or isinstance(error, LocalEntryNotFoundError):
        return isinstance(error, HFValidationError)
    status = getattr(error.response, "status_code", None)
    return status is None or (status < 500 and status != 429)  # else it is busy or ill


def hub_reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the hub and what to do, to follow the name of the field. revision: that was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too: must come first
        return "access is restricted: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here and no such model on the hub: check the name, or set HF_TOKEN if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision}: correct it"
    if isinstance(error, HFValidationError):
        return "neither an existing folder nor a hub id: check the name"
    if not hub_answered(error):
        return (
            f"not a folder here, not in the hub's cache, and no network to the hub ({one_line(error)[:99]}): connect, "
            "or give a local folder"
        )
    return f"the hub answered: {one_line(error)}: try again, or give a local folder"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
