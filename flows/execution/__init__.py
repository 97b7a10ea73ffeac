"""Makes one node: its process, devices, log, and MLflow run."""
