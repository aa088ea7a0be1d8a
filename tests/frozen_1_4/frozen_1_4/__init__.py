"""A plugin written for contract 1.4."""
