"""Tests: mirror the tree; the test bed (a tiny trained target) is in tests/testbed."""
