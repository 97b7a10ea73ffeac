"""Speed, measured: `python -m tests.benchmarks.NAME`, for machine, decode, sft_step and replay. Not run by pytest."""
