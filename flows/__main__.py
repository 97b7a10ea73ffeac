"""`python -m flows` is the `draftsmith` command."""

import sys

from flows.cli import main

sys.exit(main())
