"""The `draftsmith` command with the toy pipeline: `python -m tests.flows.toy_command refresh CONFIG`.

The environment variable TOY_FLOW names another flow of the pipeline.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from draftsmith.flows.cli.main import main
from tests.flows.toy import TOY

if __name__ == "__main__":
    sys.exit(main(pipeline=replace(TOY, flow=os.environ.get("TOY_FLOW", TOY.flow))))
