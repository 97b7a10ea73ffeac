"""The checks before a run: `draftsmith check` prints all findings, and a run raises the first error."""
