"""The stages of a refresh: each knows its config, its input artifacts and its output, no Prefect and no MLflow."""
