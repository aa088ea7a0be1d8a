"""Linear-recurrent sequence mixers: a matrix-valued state, written by keys and values, read by queries."""
