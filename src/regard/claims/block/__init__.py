"""Claims of blocks."""
