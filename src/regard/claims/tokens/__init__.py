"""Claims of papers on fewer visual tokens."""
