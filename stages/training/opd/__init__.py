"""Trains a drafter on the target's feedback to its own proposals."""
