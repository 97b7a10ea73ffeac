"""Run an experiment: `python -m tests.lab.run FILE`, followed by options of `draftsmith run`.

The same command continues an interrupted run; unchanged artifacts are reused.
"""

from __future__ import annotations

import sys

from draftsmith.flows.cli.main import main
from tests.lab.experiment import LAB

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], LAB))
