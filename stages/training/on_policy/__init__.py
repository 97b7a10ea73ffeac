"""On-policy distillation: where it trains, what it knows of verification there, and its loss."""
