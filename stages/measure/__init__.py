"""Measuring a drafter: acceptance on fixed trajectories, and real decoding speed."""
