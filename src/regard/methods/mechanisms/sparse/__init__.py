"""Sparse attention: a few keys of many."""
