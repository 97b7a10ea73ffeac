"""DFlash2: DFlash with convolutions over the block, and a selector that walks through candidates of every offset."""
