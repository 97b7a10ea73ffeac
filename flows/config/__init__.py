"""Loads configs: files, options of a run, and errors that name the field."""
