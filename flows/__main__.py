"""`python -m draftsmith.flows` is the `draftsmith` command."""

from draftsmith.flows.cli.main import main

raise SystemExit(main())
