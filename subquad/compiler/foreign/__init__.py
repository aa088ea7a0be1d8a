"""Models that we did not write: found in a captured graph, rewritten at the modules that own the attention."""
