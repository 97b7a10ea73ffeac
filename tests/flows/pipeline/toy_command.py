"""The `draftsmith` command with the toy pipeline: `python -m tests.flows.pipeline.toy_command refresh CONFIG`."""

from __future__ import annotations

import sys

from draftsmith.flows.cli import main
from tests.flows.pipeline.toy import TOY

if __name__ == "__main__":
    sys.exit(main(pipeline=TOY))
