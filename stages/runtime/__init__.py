"""What every stage runs in: its process, ranks, memory and checkpoints."""
