"""DSpark (arXiv 2607.05147): DFlash's block, with a bias from the token before each offset."""
