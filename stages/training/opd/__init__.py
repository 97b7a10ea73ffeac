"""Trains a drafter on what verification says of its own proposals."""
