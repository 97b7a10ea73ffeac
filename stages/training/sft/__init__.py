"""Trains a drafter on the target's answers."""
