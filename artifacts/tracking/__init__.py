"""MLflow: runs, the model registry, data sets and models."""
