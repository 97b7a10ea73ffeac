"""Faults injected into real refreshes: what must hold afterwards, and a table of what did."""
