"""Training a drafter: losses, streams of positions, anchors, batches of trajectories, the optimiser loop."""
