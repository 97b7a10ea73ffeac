"""Text made by rules, and small targets trained on it: what stands in for a large model on a CPU."""
