"""Errors for the person who must act: the cause, where it is (file, field or row) and the remedy; and exit codes."""

from __future__ import annotations

import errno
import os
import re

from draftsmith.artifacts.redaction import shown

EXIT_USER_ERROR = 2  # bad config, data, checkpoint or disk: a retry does not help
EXIT_RETRYABLE = 75  # EX_TEMPFAIL: something outside this process went away (an engine, a server)
EXIT_INTERRUPTED = 130


class DraftsmithError(Exception):
    """Bad input or environment. The message is one line that names the file, field or row and says what to do.

    The message is logged, stored and shown in many places, and may quote text from a file or a server, so it is `shown`
    and its line breaks are replaced.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(filter(None, map(str.strip, shown(str(message)).split("\n")))))


class RetryableError(DraftsmithError):
    """Something outside this process was lost; the same stage may succeed when it is run again."""

    exit_code = EXIT_RETRYABLE


class RefusedError(DraftsmithError):
    """Everything ran, but the result was rejected."""

    exit_code = 3


class StageInterrupted(DraftsmithError):
    """The stage was asked to stop and saved its state; the next run continues from there."""

    exit_code = EXIT_INTERRUPTED


def one_line(error: BaseException, max_chars: int | None = None) -> str:
    """Return the error's message (if empty, its class name) `shown` on one line, cut between words to `max_chars`."""
    message = " ".join(shown(str(error)).split()) or type(error).__name__
    if max_chars is None or len(message) <= max_chars:
        return message
    return f"{message[:max_chars].rpartition(' ')[0] or message[:max_chars]} …"


def find_disk_error(error: BaseException) -> OSError | None:
    """Return `error` if it is a disk error, or the full-disk error that caused it; else None.

    torch, safetensors and shutil raise other classes when the disk is full, so the chain of causes is searched for a
    full disk. It is not searched for other disk errors: they may have been handled, as of a cache that is not writable.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ADVICE:
        return error
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if is_full_disk(link):
            assert isinstance(link, OSError)
            return link
        if re.search(r"os error 28\b|\[Errno 28\]", str(link)):  # safetensors, which is written in Rust; shutil
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def is_full_disk(error: BaseException) -> bool:
    """Return whether the disk is full or its quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space",
    errno.EDQUOT: "the disk quota is used up. Free some space",
    errno.EROFS: "the file system is read-only. Mount it writable or set DRAFTSMITH_HOME to another folder",
    errno.EACCES: "permission denied. Make it writable or set DRAFTSMITH_HOME to another folder",
}


def from_os_error(error: OSError, doing: str) -> DraftsmithError:
    """Return one clear error for a failed disk operation.

    doing: a short phrase such as "writing trajectories".
    """
    where = f" {error.filename}" if error.filename else ""
    cause = os.strerror(error.errno) if error.errno else str(error)
    advice = _DISK_ADVICE.get(error.errno or 0, f"{cause}. Check the disk")
    return DraftsmithError(f"{doing}{where}: {advice}, then run the same command again. Finished work is kept.")


class TimeLimitError(DraftsmithError):
    """The stage exceeded its time limit; the next attempt continues from what it saved."""
