"""Training a drafter: losses, objectives, batches of trajectories, the optimiser loop."""
