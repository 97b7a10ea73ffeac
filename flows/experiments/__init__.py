"""Comparisons of ways to train and of architectures: their configs, graphs, flows and results."""
