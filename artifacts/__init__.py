"""What passes between stages: schemas, manifests, the content-addressed store and MLflow tracking."""
