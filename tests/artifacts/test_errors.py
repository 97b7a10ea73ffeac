"""Disk errors are recognized, and errors that merely follow one are not taken for them."""

from __future__ import annotations

import errno

import pytest

from draftsmith.artifacts.errors import find_disk_error

FULL, REFUSED = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")


def raised_after(first: Exception, second: Exception, *, suppress: bool = False) -> Exception:
    """Return `second`, raised while `first` was handled."""
    try:
        try:
            raise first
        except Exception:
            if suppress:
                raise second from None
            raise second  # noqa: B904
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the matrix is singular"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        raised_after(REFUSED, KeyError("fallback")),  # a cache that is not writable, then another error
        raised_after(FULL, ValueError("unrelated"), suppress=True),
    ],
)
def test_other_errors_are_no_disk_errors(error: Exception) -> None:
    assert find_disk_error(error) is None
