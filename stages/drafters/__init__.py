"""Drafters: small models that propose blocks of tokens behind an anchor. One folder an architecture, one interface."""
