"""State-space sequence mixers: Mamba (Gu and Dao 2023), Mamba-2 (Dao and Gu 2024), Mamba-3 (Lahoti et al. 2026)."""
