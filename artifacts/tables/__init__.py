"""Parquet tables: schemas, writing, and reading by row group, by key and in shards."""
