"""Proxies that the environment names (`http_proxy`): servers on this machine are reached without them."""

from __future__ import annotations

import os

_OURSELVES = ("127.0.0.1", "localhost")


def reach_ourselves_directly() -> None:
    """For this process and those that it starts: a proxy knows nothing of a server of Prefect, MLflow or SGLang here.

    What the user has excluded stays.
    """
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in known.split(",")]
    if known.strip() != "*":  # libraries read one of the two names, or the first that is set
        exclusions = ",".join(filter(None, [known, *(each for each in _OURSELVES if each not in hosts)]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = exclusions
