"""What a run will do: its graph of nodes, their cache keys, and the part that is asked for."""
