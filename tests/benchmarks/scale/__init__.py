"""Peak memory and time of every stage's tables by the number of answers: `python -m tests.benchmarks.scale`."""
