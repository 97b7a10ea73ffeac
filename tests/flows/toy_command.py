"""The `draftsmith` command with the toy pipeline: `python -m tests.flows.toy_command refresh CONFIG`."""

from __future__ import annotations

import sys

from flows.cli import main
from tests.flows.toy import TOY

if __name__ == "__main__":
    sys.exit(main(pipeline=TOY))
