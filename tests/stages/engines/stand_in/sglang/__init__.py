"""Stands in the place of sglang in a server process of the tests."""
