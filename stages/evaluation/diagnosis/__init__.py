"""Compares an engine's verify steps with replay, and names the difference."""
