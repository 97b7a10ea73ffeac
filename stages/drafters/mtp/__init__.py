"""Native heads for multi-token prediction (MTP, NEXTN): the layer that many targets bring along, read as it serves."""
