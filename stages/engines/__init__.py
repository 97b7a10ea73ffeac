"""Who generates: engines behind one interface."""
