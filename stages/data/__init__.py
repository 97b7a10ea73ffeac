"""Prompts and answers: files, chat templates, splits, and stored trajectories."""
