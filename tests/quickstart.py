"""The demo that `make quickstart` runs: a whole refresh, which succeeds whatever the gate decides about the drafter.

A drafter that is refused, or whose speed is inconclusive, is a result. But if outputs in float32 differ from those
without a drafter, the demo fails like `draftsmith run`.
"""

from __future__ import annotations

import sys

from draftsmith.artifacts.errors import RefusedError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.cli.main import main as draftsmith

CONFIG = "configs/quickstart.yaml"


def lossless(store: Store) -> bool:
    """Return whether outputs with and without a drafter are equal in float32, by the last gate."""
    last = [manifest for manifest in store.list() if manifest.stage == "gate"][-1]
    decision = GateDecision.read(store.path(last.stage, last.key))
    return all(rule.passed for rule in decision.rules if rule.name == "lossless")


def main() -> int:
    """Run the demo and return its exit code."""
    code = draftsmith(["run", CONFIG])
    if code == RefusedError.exit_code and lossless(Store(home() / "store")):
        print("The pipeline works. A drafter that is not promoted is a result, too.")
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
