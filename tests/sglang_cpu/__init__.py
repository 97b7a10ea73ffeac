"""A real SGLang server on a CPU, for tests: its environment, its options, fixtures. See README.md."""
