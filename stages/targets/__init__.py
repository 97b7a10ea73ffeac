"""The frozen target: resolved from a source, loaded, and asked for hidden states, features and verification."""
