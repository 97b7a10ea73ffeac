"""The store of artifacts: content-addressed folders, local or mirrored in a bucket."""
