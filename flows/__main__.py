"""`python -m draftsmith.flows` is the `draftsmith` command."""

import sys

from draftsmith.flows.cli import main

sys.exit(main())
