"""Which errors are the disk's, which only passed by one, and what is said of them."""

from __future__ import annotations

import errno
import shutil

import pytest
from safetensors import SafetensorError

from draftsmith.artifacts.errors import disk_error_of

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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_refusal_of_the_disk_is_known_by_itself(number: int) -> None:
    error = OSError(number, "refused")
    assert disk_error_of(error) is error


def test_a_full_disk_is_known_behind_another_error() -> None:
    assert disk_error_of(behind(FULL, RuntimeError("unexpected pos 704 vs 598"))) is FULL
    found = disk_error_of(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert found is not None and found.errno == errno.ENOSPC
    found = disk_error_of(shutil.Error([("from", "to", str(FULL))]))  # of `copytree`
    assert found is not None and found.errno == errno.ENOSPC


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
    assert disk_error_of(error) is None
