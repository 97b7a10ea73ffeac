"""A small trained target made here, for tests and benchmarks where a real model is not the point."""
