"""Text made by rules, and small targets trained on it: what experiments on a CPU use in place of a large model."""
