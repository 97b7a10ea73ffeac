"""Makes one node: its process, devices, shards, log and MLflow run."""
