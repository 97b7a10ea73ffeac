"""The words that Draftsmith and its plug-in in SGLang's servers exchange. Standard library only: both sides read it."""

from __future__ import annotations

import re

KEY = "draftsmith_trace"  # of a request's custom parameters, and of the answer's meta_info
PROTOCOL = "1"  # of the records; written as "v" into each
ENVIRONMENT = "DRAFTSMITH_TRACE"  # a server's variable: 1 asks for every request
FIRST, END = (0, 5, 20), (0, 5, 24)
SUPPORTED = ">=0.5.20,<0.5.24"  # FIRST and END, in words


def supported(version: str) -> bool:
    """Whether a release lies in SUPPORTED; its pre- and post-releases count as the release."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= tuple(int(n) for n in numbers.groups()) < END
