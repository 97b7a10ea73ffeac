"""EAGLE-3 (arXiv 2503.01840): one decoder layer drafts token by token from the target's features and its own."""
