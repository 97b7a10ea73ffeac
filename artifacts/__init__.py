"""What passes between stages: schemas, manifests, the content-addressed store, tracking and the report."""
