"""The refresh of a drafter: its config, graph, flow and what is printed at the end."""
