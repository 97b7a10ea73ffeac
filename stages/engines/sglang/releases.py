"""The supported releases of SGLang. Standard library only: its servers import this module too."""

from __future__ import annotations

import re

FIRST, END = (0, 5, 20), (0, 5, 24)
SUPPORTED = ">=0.5.20,<0.5.24"  # FIRST and END as a requirement


def supported(version: str) -> bool:
    """Return whether a release is in SUPPORTED; its pre- and post-releases count as the release."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= tuple(int(n) for n in numbers.groups()) < END
