"""A small trained target, drafters and servers for tests and benchmarks that need no real model."""
