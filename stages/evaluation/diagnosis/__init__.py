"""Compares an engine's verify steps with replay, and names what differs."""
