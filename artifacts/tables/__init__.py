"""Parquet tables: schemas, writing, reading in parts."""
