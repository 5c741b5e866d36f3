"""Low-rank adapters: their names and scales in every format, their arithmetic, and how they reach a network."""
