"""Passes over captured graphs: each a pure function from a graph to a new graph and a report."""
