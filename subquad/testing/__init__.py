"""Suites for plugin authors: subclass one in a test module, name your mixer or kernel, and run pytest."""
