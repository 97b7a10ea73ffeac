"""Tests: mirror the tree; the test bed (a tiny trained target) is in tests/testbed."""

import gc

# Nearly all of what is imported from here on stays: Python would look through it over and over for garbage.
gc.set_threshold(50_000, 20, 20)
