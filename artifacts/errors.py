"""Errors for the person who must act: what was wrong, where (file, field, row), what to do."""

from __future__ import annotations

import errno
import os
import re

from draftsmith.artifacts.redaction import redacted

EXIT_USER_ERROR = 2  # bad config, data, checkpoint or disk: a retry cannot help
EXIT_RETRYABLE = 75  # EX_TEMPFAIL: something outside went away (an engine, a queue)
EXIT_INTERRUPTED = 130


class DraftsmithError(Exception):
    """Bad input or environment. The message is one line, names the file, field or row, and says what to do.

    Secrets in it are masked, and so are ends of lines, which names from a file may hold: it is logged, kept and shown
    in many places.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: object = "") -> None:
        super().__init__(re.sub(r"\s*[\r\n]+\s*", " ", redacted(str(message)).strip()))


class RetryableError(DraftsmithError):
    """Something outside this process was lost; the same stage may succeed when run again."""

    exit_code = EXIT_RETRYABLE


class RefusedError(DraftsmithError):
    """Everything ran, and what it made was found not good enough."""

    exit_code = 3


class StageInterrupted(DraftsmithError):
    """The stage was asked to stop and has saved what it had; running it again continues there."""

    exit_code = EXIT_INTERRUPTED


def one_line(error: BaseException, most: int | None = None) -> str:
    """What it says, without ends of lines; its kind where it says nothing. most: characters, cut between words."""
    said = " ".join(str(error).split()) or type(error).__name__
    if most is None or len(said) <= most:
        return said
    return f"{said[:most].rpartition(' ')[0] or said[:most]} …"


def find_disk_error(error: BaseException) -> OSError | None:
    """The disk's refusal that an error is; for a full disk also that it comes from.

    torch, safetensors and shutil raise classes of their own where a disk is full. Other refusals behind an error may
    have been dealt with before it, such as a cache that could not be written.
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
    """Or a quota that is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: mount it writable or point DRAFTSMITH_HOME elsewhere",
    errno.EACCES: "permission denied: make it writable or point DRAFTSMITH_HOME elsewhere",
}


def from_os_error(error: OSError, doing: str) -> DraftsmithError:
    """One clear error for a failed disk operation; `doing` is a short phrase such as 'writing trajectories'."""
    where = f" {error.filename}" if error.filename else ""
    advice = _DISK_ADVICE.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return DraftsmithError(f"{doing}{where}: {advice}; then run the same command again, finished work is kept")


class TimeLimitError(DraftsmithError):
    """The stage ran past its time limit. It goes on from what it saved."""
