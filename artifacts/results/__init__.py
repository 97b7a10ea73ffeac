"""Pydantic models of the JSON that stages pass to each other, one module per phase so that code digests stay apart."""
