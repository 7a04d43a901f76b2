"""Mixing along depth."""
