"""The report of a refresh: one HTML page."""
