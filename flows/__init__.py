"""Prefect flows, the plan of a refresh and the `draftsmith` command."""
