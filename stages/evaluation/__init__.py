"""Measures drafters: acceptance, speed, drift, and the gate that decides on a promotion."""
