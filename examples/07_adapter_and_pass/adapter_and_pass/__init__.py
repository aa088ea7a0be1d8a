"""Two hooks of the compiler: an adapter for somebody's attention class, and a pass over the graphs of mixers."""
