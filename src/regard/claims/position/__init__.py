"""Claims of positions."""
