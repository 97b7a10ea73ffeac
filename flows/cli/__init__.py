"""The command `draftsmith`."""
