"""Claims of mechanisms."""
