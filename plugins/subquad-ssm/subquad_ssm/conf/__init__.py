"""Recipes of this plugin: YAML only."""
