"""Claims of masks."""
