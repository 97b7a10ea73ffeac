"""Turns logged answers of a service into training data."""
