"""Run an experiment: `python -m tests.lab.run FILE`, with the options of `draftsmith run` behind it.

The same command goes on with a run that was interrupted; what has not changed is reused.
"""

from __future__ import annotations

import sys

from draftsmith.flows.cli.main import main
from tests.lab.experiment import LAB

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], LAB))
