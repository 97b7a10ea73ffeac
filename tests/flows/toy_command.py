"""The `draftsmith` command with the toy pipeline: `python -m tests.flows.toy_command run CONFIG`.

The environment variable TOY_FLOW names another flow of the pipeline.
"""

from __future__ import annotations

import os
import sys

from draftsmith.flows.cli.main import main
from tests.flows.toy import TOY, ToyPipeline

if __name__ == "__main__":
    sys.exit(main(pipeline=ToyPipeline(os.environ.get("TOY_FLOW", TOY.flow))))
