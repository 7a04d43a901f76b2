"""Attention on grids of tokens, such as those of an image: neighbourhoods, windows, regions, channels."""
