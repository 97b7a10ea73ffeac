"""Selects prompts with token ids, in splits (train, validation, held-out)."""
