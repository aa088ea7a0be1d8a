"""State-space sequence mixers: Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024)."""
