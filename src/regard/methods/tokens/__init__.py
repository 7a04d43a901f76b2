"""Fewer visual tokens."""
