"""Which errors are the disk's, which only passed by one, and what is said of them."""

from __future__ import annotations

import errno

import pytest

from draftsmith.artifacts.errors import find_disk_error

FULL, REFUSED = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")


def behind(first: Exception, second: Exception, *, suppress: bool = False) -> Exception:
    """`second`, raised while `first` was handled."""
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
        behind(REFUSED, KeyError("fallback")),  # a cache that could not be written, and a defect behind it
        behind(FULL, ValueError("unrelated"), suppress=True),
    ],
)
def test_any_other_error_is_not_the_disks(error: Exception) -> None:
    assert find_disk_error(error) is None
