"""State-space sequence mixers: Mamba (Gu and Dao 2023)."""
