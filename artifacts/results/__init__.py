"""What stages hand each other as JSON, as pydantic models: a module for each phase, so that digests stay apart."""
