"""Prompts and logged answers: where they come from, and how they become token ids."""
