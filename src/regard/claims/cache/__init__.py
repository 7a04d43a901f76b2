"""Claims of caches."""
