"""DFlash2: DFlash with convolutions over the block, and a selector among the candidates of every offset."""
