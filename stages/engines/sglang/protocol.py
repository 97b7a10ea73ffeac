"""The protocol between Draftsmith and its plug-in in SGLang's servers. Standard library only: both sides import it."""

from __future__ import annotations

from typing import Any, TypeAlias

NATIVE = {"EAGLE": "NEXTN"}  # `speculative_algorithm` in /server_info -> the option that becomes it
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
