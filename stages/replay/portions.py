"""How much of a replay is in memory at once. The estimates read it, which load no torch."""

TREE_TOKENS = 512  # rejected proposals that the target scores in one forward, a trajectory
POSITIONS_PER_CHUNK = 1024  # whose logits are held at once
