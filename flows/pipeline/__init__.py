"""A run as a graph of stages: config file, plan, tasks, processes, display. Knows no drafter and names no stage."""
