"""Drafters: small models that propose blocks of tokens after an anchor. One folder per architecture, one interface."""
