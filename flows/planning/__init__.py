"""Plans a run: its graph of nodes, their cache keys, and what the store already has."""
