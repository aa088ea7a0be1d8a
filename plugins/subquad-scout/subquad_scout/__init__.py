"""SCOUT (Jafari et al. 2025): attention over segment summaries."""
