"""`python -m draftsmith.flows` is the `draftsmith` command."""

import sys

from draftsmith.flows.cli.main import main

sys.exit(main())
