"""Reads configs: files, fields of a run, and errors that name the field."""
