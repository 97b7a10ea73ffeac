"""The protocol between Draftsmith and its plug-in in SGLang's servers. Standard library only: both sides import it."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]  # an object of SGLang's HTTP API
KEY = "draftsmith_trace"  # in a request's custom parameters, and in the answer's meta_info
PROTOCOL = "1"  # version of the records: "v" in each
ENVIRONMENT = "DRAFTSMITH_TRACE"  # environment variable of a server: 1 traces every request, a smaller number a share
SWAP_ACTION = "draftsmith:"  # start of the action of /weights_checker that writes another drafter; JSON follows
# In each of /server_info's internal states: the fields of `servers.state.SwapReport`
SWAP_STATE = "draftsmith"
# In the same place, if a share of the requests is traced, the last ended ones:
# {digest of the drafter: [[seconds since 1970, {depth: [committed tokens, verify steps]}], …]}
REQUESTS_STATE = "draftsmith_requests"
FIRST, END = (0, 5, 20), (0, 5, 24)
SUPPORTED = ">=0.5.20,<0.5.24"  # FIRST and END as a requirement


def supported(version: str) -> bool:
    """Return whether a release is in SUPPORTED; its pre- and post-releases count as the release."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= tuple(int(n) for n in numbers.groups()) < END
